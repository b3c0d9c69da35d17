# SPDX-License-Identifier: ZPL-2.1
"""A process that serves a ØMQ socket beside the application."""

import asyncio
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any

import zmq
from zope.interface import implementer

from pyams_zmq.auth import Users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.handler.plain import make_handler
from pyams_zmq.handler.statistics import CallStatistics
from pyams_zmq.interfaces import IZMQProcess, ZMQProcessStartedEvent, ZMQProcessStoppedEvent
from pyams_zmq.process.attendant import Attendant
from pyams_zmq.process.base import ReadyProcess
from pyams_zmq.process.inspection import ProcessInspection, check_stats_users
from pyams_zmq.process.reply_stream import ReplyStream
from pyams_zmq.process.server_socket import SIZE_SLACK, closed_on_error
from pyams_zmq.process.service import TERM_GRACE, ServiceProcess
from pyams_zmq.process.stream import ZMQStream
from pyams_zmq.wire.endpoint import Endpoint, port_of
from pyams_zmq.wire.message import check_integer
from pyams_zmq.wire.names import needs_ipv6

__all__ = ['ReadyProcess', 'ZMQProcess', 'process_exit_func']

LOGGER = logging.getLogger('PyAMS (zmq)')

# Seconds after which a method that computes releases the interpreter to the loop, to other methods,
# and to the attendant; the default of Python is 0.005, and a reply needs three switches.
SWITCH_INTERVAL = 0.001

# A stopping process refuses messages until none arrives within a turn of 0.02 seconds. What is on
# its way when the sockets close is lost: with 10 turns, hundreds of messages of busy clients were.
REFUSAL_TURNS = 100
REFUSAL_TURN = 0.02


@implementer(IZMQProcess)
class ZMQProcess(ServiceProcess):
    """Process that serves a ØMQ socket.

    It always uses fork, also in a program with another start method, because registries and
    schedulers cannot be pickled; its child does so for the same reason. It is not daemonic, so that
    its handlers can start child processes. It ends with its owner, the process that started it.

    :param bind_addr: address to bind, see :class:`pyams_zmq.endpoint.Endpoint`
    :param handler: class with the methods, an instance of one, or a subclass of
        :class:`~pyams_zmq.handler.ZMQMessageHandler`
    :param auth: `'user:password'` that a client must present (RFC 24/PLAIN), or several, see
        :func:`pyams_zmq.auth.parse_users`
    :param clients: IP addresses that may connect, see :func:`pyams_zmq.auth.parse_clients`
    :param registry: registry of the application, by default the current one
    :param curve: keys of the server and its clients (RFC 26/CURVEZMQ), by default those of the
        class attribute
    :raises ValueError: for an address, credentials or clients that cannot be parsed, and for *auth*
        together with *curve*
    :raises TypeError: for a *curve* of another class
    """

    socket_type: int = zmq.REP  #: Type of the socket that `init_stream` binds
    concurrency: int = 1  #: Messages handled at a time; plain methods run in threads above 1

    statistics: CallStatistics | None = None
    _inspection: ProcessInspection | None = None  # from `setup` on
    _rep_stream: Any = None
    _is_bound = False  # `bind_addr`
    _has_streams = False  # `init_stream` has returned

    def __init__(
        self,
        bind_addr: Any,
        handler: Any,
        auth: Users = None,
        clients: str | Iterable[str] | None = None,
        registry: Any = None,
        *,
        curve: CurveServer | None = None,
    ):
        super().__init__(registry)
        Endpoint.parse(bind_addr, bind=True)
        self.set_access(auth, clients, curve)
        self.bind_addr = bind_addr
        self.handler = handler
        self.owed_replies: set[asyncio.Future[Any]] = set()

    def start(self) -> None:
        """Fork the child and return at once.

        :raises ValueError: if `concurrency` is not a number above 0, or above 1 for a socket that
            is not a REP
        :raises TypeError: for `stats_users` that are a string
        :raises ZMQStartError: in a program that cannot fork
        """
        check_integer('concurrency', self.concurrency, 1)
        check_stats_users(self.stats_users)
        if self.concurrency > 1 and self.socket_type != zmq.REP:
            raise ValueError(
                f'A concurrency of {self.concurrency} is for the socket type REP: only there each '
                'reply is routed to its peer'
            )
        super().start()

    # In the child

    def setup(self) -> None:
        """Create context, loop, authenticator and streams."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        self.statistics = CallStatistics()
        self._inspection = ProcessInspection(self)
        super().setup()
        self._has_streams = True

    @property
    def rep_stream(self) -> Any:
        """Stream that receives the messages; None in the parent, and if there is none.

        It is bound when it is first read, unless one was assigned, or `init_stream` has returned
        and has bound `bind_addr` for another stream.
        """
        is_missing = self._rep_stream is None and self._sockets is not None
        if is_missing and not (self._has_streams and self._is_bound):
            self._bind_rep_stream()
        return self._rep_stream

    @rep_stream.setter
    def rep_stream(self, stream: Any) -> None:
        self._rep_stream = stream
        if self._sockets is not None:
            # Its address is the one to report, also if another stream was bound before.
            bound = self._sockets.uri_of(getattr(stream, 'socket', None))
            self.bound_address = bound or self.bound_address

    def _bind_rep_stream(self) -> None:
        self.rep_stream, _port = self.stream(self.socket_type, self.bind_addr, bind=True)

    def init_stream(self) -> None:
        """Handle the messages of `rep_stream`."""
        if self.rep_stream is None:  # a subclass has an attribute of its own
            self._bind_rep_stream()
        stream = self.rep_stream
        if not stream.receiving():  # else a subclass has done it
            stream.on_recv(make_handler(self.handler, self, stream))

    def stream(
        self,
        sock_type: int,
        addr: Any,
        bind: bool,
        callback: Callable[..., Any] | None = None,
        subscribe: bytes | str = b'',
    ) -> tuple[ZMQStream, int | None]:
        """Make a ZMQStream; see :meth:`pyams_zmq.interfaces.IZMQProcess.stream`."""
        endpoint = Endpoint.parse(addr, bind=bind)
        is_reply = sock_type == zmq.REP  # ReplyStream uses a ROUTER
        with closed_on_error(self.context.socket(zmq.ROUTER if is_reply else sock_type)) as socket:
            counts = is_reply and bind and endpoint.protocol == 'tcp'
            self.apply_limits(socket, self.max_message_size + SIZE_SLACK, counts=counts)
            socket.ipv6 = endpoint.is_ipv6 if bind else needs_ipv6(endpoint)
            if sock_type == zmq.SUB:
                socket.subscribe(subscribe)
            if bind:
                uri = self._sockets.bind(socket, endpoint.uri, self.access, path=endpoint.path)
                self._is_bound = self._is_bound or addr == self.bind_addr
                self.bound_address = self.bound_address or uri
                port = port_of(uri)
            else:
                socket.connect(endpoint.encoded)
                port = endpoint.port
        stream: ZMQStream
        if is_reply:
            stream = ReplyStream(
                socket,
                self.loop,
                concurrency=self.concurrency,
                listener=self._sockets and self._sockets.listeners.get(socket),
            )
            self._attend(stream)
        else:
            stream = ZMQStream(socket, self.loop)
        self._streams.add(stream)
        if callback is not None:
            stream.on_recv(callback)
        return stream, port

    def _attend(self, stream: ReplyStream) -> None:
        """Let a stream answer questions about this service, also while a method runs."""
        if self._inspection is None:
            return
        stream.answer = self._inspection.answer
        if self._attendant is None:
            attendant = Attendant(self.enter_thread)
            attendant.start()  # if that fails, there is none to stop
            self._attendant = attendant
        self._attendant.attend(stream)

    def _on_started(self) -> None:
        self.registry.notify(ZMQProcessStartedEvent(self))

    def _on_stopped(self) -> None:
        try:
            self.registry.notify(ZMQProcessStoppedEvent(self))
        except Exception:
            LOGGER.exception('A subscriber to the end of %s failed', self.name)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.drain_timeout - TERM_GRACE
        streams = [stream for stream in self._streams if isinstance(stream, ReplyStream)]
        received = self._count_received()
        for _turn in range(REFUSAL_TURNS):
            while self.owed_replies:
                await asyncio.wait(self.owed_replies)
            for stream in streams:
                stream.refuse()
            await asyncio.sleep(REFUSAL_TURN)
            former, received = received, self._count_received()
            if received == former and not any(stream.readable() for stream in self._streams):
                break
        if self._needs_replacement:
            deadline = loop.time()
        while (  # noqa: ASYNC110 - a stop is rare, an event would cost time for each message
            late := sum(stream.in_hand for stream in streams)
        ) and loop.time() < deadline:
            await asyncio.sleep(REFUSAL_TURN)
        if late:
            LOGGER.warning('%s ends %s methods that have passed their deadline', self.name, late)


def process_exit_func(process: Any = None) -> None:
    """End a process; meant for `atexit`.

    :param process: ZMQProcess, or None
    """
    if process is not None:
        process.stop()
