# SPDX-License-Identifier: ZPL-2.1
"""A process that serves a ØMQ socket beside the application."""

import asyncio
import logging
import os
import signal
import socket as tcp
import stat
import sys
from collections.abc import Callable, Iterable
from threading import local
from time import monotonic
from typing import Any
from weakref import WeakSet

import zmq
from pyramid.threadlocal import get_current_registry
from tornado.ioloop import IOLoop
from zmq.utils.monitor import recv_monitor_message
from zope.interface import implementer

from pyams_zmq.auth import AccessPolicy, Authenticator, Users, parse_clients, parse_users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.interfaces import (
    IZMQProcess,
    ZMQProcessStartedEvent,
    ZMQProcessStoppedEvent,
)
from pyams_zmq.process.base import ReadyProcess
from pyams_zmq.process.descendants import become_subreaper, end_tree, start_no_more, wait_for_tree
from pyams_zmq.process.lock import IPCLock
from pyams_zmq.process.server_socket import LINGER, bind, limit, protect, warn_of_exposure
from pyams_zmq.process.stream import ReplyStream, ZMQStream
from pyams_zmq.process.watchdog import END_GRACE, SIGNALS, STOP_SIGNALS
from pyams_zmq.wire.endpoint import Endpoint, port_of
from pyams_zmq.wire.message import check_concurrency

LOGGER = logging.getLogger('PyAMS (zmq)')

SIZE_SLACK = 16 * 1024 * 1024
"""Bytes above `max_message_size` that still get a 413; libzmq drops the peer beyond"""

SWITCH_INTERVAL = 0.001
"""Seconds after which a method that computes lets the loop, and other methods, have the
interpreter; Python has 0.005, and an answer takes three of them"""

LIMITS = (
    'max_message_size',
    'drain_timeout',
    'orphan_timeout',
    'bind_timeout',
    'handshake_timeout',
    'heartbeat_interval',
    'heartbeat_timeout',
    'receive_hwm',
    'send_hwm',
    'backlog',
)
"""Class attributes of a process that a setting may change"""

REFUSAL_TURNS = 10
REFUSAL_TURN = 0.02
"""A stopping process refuses the messages that are on their way, until none comes in during a turn
of 0.02 s, for 10 turns at most"""

TERM_GRACE = 0.5
"""Seconds at the end of `drain_timeout` in which descendants that still run are terminated"""

KILL_GRACE = 1.0
"""Seconds that descendants get for a SIGTERM, if the process does not have to end before"""


@implementer(IZMQProcess)
class ZMQProcess(ReadyProcess):
    """Process that serves a ØMQ socket.

    It forks, whatever the start method of the program: a registry and schedulers do not pickle,
    and its child forks for the same reason. It is not daemonic, so that its handlers may start
    children of their own. It ends with its owner, the process that started it.

    :param bind_addr: address to bind, see :class:`pyams_zmq.endpoint.Endpoint`
    :param handler: class of the message handler
    :param auth: `'user:password'` that a client must present (RFC 24/PLAIN), or several, see
        :func:`pyams_zmq.auth.parse_users`
    :param clients: IP addresses that may connect, see :func:`pyams_zmq.auth.parse_clients`
    :param registry: registry of the application, by default the current one
    :param curve: keys of the server and its clients (RFC 26/CURVEZMQ), by default those of the
        class attribute
    :raises ValueError: for an address, credentials or clients that cannot be understood
    """

    socket_type: int = zmq.REP
    concurrency: int = 1
    max_message_size: int = 16 * 1024 * 1024
    orphan_timeout: float = 0.5
    bind_timeout: float = 2.0
    handshake_timeout: float = 5.0
    heartbeat_interval: float = 5.0
    heartbeat_timeout: float = 5.0
    receive_hwm: int = 1000
    send_hwm: int = 1000
    backlog: int = 100
    curve: CurveServer | None = None
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = staticmethod(asyncio.new_event_loop)

    context: Any = None
    loop: Any = None
    auth_thread: Authenticator | None = None
    rep_stream: Any = None
    draining: bool = False

    _started = False
    _stopping = False

    def __init__(
        self,
        bind_addr: Any,
        handler: Callable[..., Any],
        auth: Users = None,
        clients: str | Iterable[str] | None = None,
        registry: Any = None,
        *,
        curve: CurveServer | None = None,
    ):
        super().__init__(get_current_registry() if registry is None else registry)
        Endpoint.parse(bind_addr, bind=True)
        self.bind_addr = bind_addr
        self.handler = handler
        self._auth = auth
        self.passwords = parse_users(auth)
        if curve is not None:
            self.curve = curve
        if self.curve is not None and self.passwords:
            raise ValueError('Give auth or curve: a socket has one mechanism')
        self.clients = parse_clients(clients)
        self.owed_replies: set[asyncio.Future[Any]] = set()
        self._streams: WeakSet[ZMQStream] = WeakSet()
        self._locks: dict[str, IPCLock] = {}
        self._listeners: dict[int, tuple[Any, ...]] = {}

    # In the parent

    def start(self) -> None:
        """Fork the child and return at once.

        :raises ValueError: if `concurrency` is no number above 0, or above 1 for a socket that is
            not a REP
        :raises ZMQStartError: in a program that gevent has patched
        """
        check_concurrency(self.concurrency)
        if self.concurrency > 1 and self.socket_type != zmq.REP:
            raise ValueError(
                f'A concurrency of {self.concurrency} is for the socket type REP: only there a '
                'reply finds its peer by itself'
            )
        super().start()

    def stop(self) -> None:
        """End the process; see :meth:`pyams_zmq.interfaces.IZMQProcess.stop`."""
        if self.loop is not None:
            self.loop.add_callback(self.exit)
        else:
            super().stop()

    def _stop_loop(self) -> None:
        self._stopping = True
        self.loop.stop()

    def reload(self) -> None:
        """Read users and keys again; see :meth:`pyams_zmq.interfaces.IZMQProcess.reload`."""
        if self._is_owner():
            super().reload()
            return
        try:
            passwords = parse_users(self._auth)
            if self.curve is not None:
                self.curve.reload()
        except ValueError as error:
            LOGGER.error('%s keeps its users and keys: %s', self.name, error)
            return
        self.passwords = passwords
        if self.auth_thread is not None:
            self.auth_thread.policy = self._make_policy()
        LOGGER.info('%s has read its users and keys again', self.name)

    def _make_policy(self) -> AccessPolicy:
        keys = () if self.curve is None else self.curve.clients
        return AccessPolicy(self.passwords, self.clients, keys)

    @property
    def has_credentials(self) -> bool:
        """True when peers have to present something."""
        return bool(self.passwords or self.curve)

    # In the child

    def _bootstrap(self, *args: Any, **kwargs: Any) -> int:
        # A subclass may do its own work in `run` before it calls ours: wrap them both.
        self.run = self._run_child  # type: ignore[method-assign] # on this instance
        code: int = super()._bootstrap(*args, **kwargs)  # type: ignore[misc] # it has one
        start_no_more()
        end_tree(END_GRACE)  # of what a thread has started since it was done before
        if self._watchdog is not None:
            self._watchdog.rest()  # two threads that leave at once would give either exit code
        return code

    def _run_child(self) -> None:
        del self.run
        self._enter_child()
        try:
            self.run()
        except Exception as error:
            LOGGER.exception('%s failed', self.name)
            self._send_report(None, error)
            sys.exit(1)
        finally:
            self._leave_child()

    def _enter_child(self) -> None:
        self._cut_off()
        become_subreaper()
        self._masks = local()
        os.register_at_fork(
            before=self._mask_signals,
            after_in_parent=self._unmask_signals,
            after_in_child=self._enter_grandchild,
        )
        self._start_watchdog()
        for num in STOP_SIGNALS:
            signal.signal(num, self.exit)
        signal.signal(signal.SIGHUP, self._on_hangup)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _mask_signals(self) -> None:
        # A child which is told to end before it has dropped our handlers would not hear it.
        self._masks.signals = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _unmask_signals(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.signals)

    def _enter_grandchild(self) -> None:
        """Give a child of ours, which may outlive us, neither our signals nor our address."""
        signal.set_wakeup_fd(-1)
        for num in SIGNALS:
            signal.signal(num, signal.SIG_DFL)
        # The listeners, and the connections that came in by them: they have the same address.
        addresses = set(self._listeners.values())
        for fd in map(int, os.listdir('/proc/self/fd')) if addresses else ():
            if not addresses.isdisjoint(_local_addresses(fd)):
                os.close(fd)
        self.loop = self._watchdog = None
        self._unmask_signals()

    def _leave_child(self) -> None:
        assert self._watchdog is not None  # noqa: S101 - for mypy: `_enter_child` made it
        deadline = self._watchdog.arm(self.drain_timeout + 1)
        if not wait_for_tree(max(END_GRACE, deadline - TERM_GRACE - monotonic())):
            start_no_more()
            end_tree(KILL_GRACE)

    def run(self) -> None:
        """Set up everything and serve until `stop`."""
        try:
            self.setup()
            self.registry.notify(ZMQProcessStartedEvent(self))
            self._started = True
            if not self.draining:
                LOGGER.info('%s serves %s', self.name, self.bound_address)
                self.loop.add_callback(self._send_report, [self.bound_address], None)
                self._serve()
        finally:
            self._teardown()

    def _serve(self) -> None:
        is_over = False
        while not is_over:
            try:
                self.loop.start()
                is_over = True
            except (SystemExit, KeyboardInterrupt):  # of a task, which asyncio lets through
                LOGGER.exception('A task of %s tried to end it', self.name)
                is_over = self._stopping

    def setup(self) -> None:
        """Create context, loop, authenticator and streams."""
        self.context = zmq.Context()
        asyncio.set_event_loop(None)  # else Python 3.12 warns that there is none yet
        self.loop = IOLoop(make_current=True, asyncio_loop=self.loop_factory())
        self._wake_for_signals()
        if self.concurrency > 1:
            sys.setswitchinterval(SWITCH_INTERVAL)
        # Always there: without it libzmq would not check the addresses of NULL peers, and would
        # keep peers that send garbage.
        self.auth_thread = Authenticator(self.context, self._make_policy(), self._enter_thread)
        self.auth_thread.start()
        self.init_stream()

    def _wake_for_signals(self) -> None:
        # A signal which comes in just before the loop sleeps, or in another thread, would not be
        # heard before the next message: asyncio also writes a byte to a socket of its loop. Our
        # handler stays, which a loop that is busy hears too.
        for num in SIGNALS:
            handler = signal.getsignal(num)
            self.loop.asyncio_loop.add_signal_handler(num, int)
            signal.signal(num, handler)

    def init_stream(self) -> None:
        """Bind the stream on which messages come in."""
        if self.rep_stream is None:
            self.rep_stream, _port = self.stream(self.socket_type, self.bind_addr, bind=True)
            self.rep_stream.on_recv(self.handler(self, self.rep_stream, self.stop))

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
        # What a REP socket of libzmq cannot do, see ReplyStream.
        is_reply = sock_type == zmq.REP
        socket = self.context.socket(zmq.ROUTER if is_reply else sock_type)
        try:
            limit(socket, self, self.max_message_size + SIZE_SLACK)
            socket.ipv6 = endpoint.is_ipv6
            if sock_type == zmq.SUB:
                socket.subscribe(subscribe)
            if bind:
                port = self._bind(socket, endpoint)
            else:
                socket.connect(endpoint.uri)
                port = endpoint.port
        except BaseException:
            socket.close(0)
            raise
        if is_reply:
            stream: ZMQStream = ReplyStream(socket, self.loop, concurrency=self.concurrency)
        else:
            stream = ZMQStream(socket, self.loop)
        self._streams.add(stream)
        if callback is not None:
            stream.on_recv(callback)
        return stream, port

    def _bind(self, socket: Any, endpoint: Endpoint) -> int | None:
        protect(socket, self.curve, bool(self.passwords))
        uri = self._listen(socket, endpoint)
        warn_of_exposure(self.name, uri, self.curve, bool(self.passwords))
        if self.bound_address is None:
            self.bound_address = uri
        return port_of(uri)

    def _listen(self, socket: Any, endpoint: Endpoint) -> str:
        monitor = socket.get_monitor_socket(zmq.EVENT_LISTENING)
        try:
            bind(
                socket,
                endpoint.uri,
                endpoint.path,
                self._locks,
                self.bind_timeout,
                self._leave_if_draining,
            )
            listener = recv_monitor_message(monitor)['value']
            self._listeners[listener] = _local_addresses(listener)[0]
        finally:
            socket.disable_monitor()
            monitor.close()
        uri: str = socket.last_endpoint.decode()
        return uri

    def _leave_if_draining(self) -> None:
        if self.draining:
            sys.exit(0)

    def exit(self, num: int | None = None, frame: Any = None) -> None:
        """Finish the message in hand, refuse others, then stop."""
        if self._watchdog is None and self.loop is None:
            self.stop()
        elif not self.draining:
            self.draining = True
            if self._watchdog is not None:
                self._watchdog.arm(self.drain_timeout)
            if self.loop is not None:
                self.loop.asyncio_loop.call_soon_threadsafe(self._start_drain)
        if self._watchdog is not None and num is not None and not self._watchdog.has_asked():
            # This one only: the other may be under way, from the terminal or from the owner.
            signal.signal(num, signal.SIG_DFL)

    def _on_hangup(self, num: int, frame: Any) -> None:
        if self.loop is None:
            self.reload()
        else:  # not in the middle of a message
            self.loop.asyncio_loop.call_soon_threadsafe(self.reload)

    def _start_drain(self) -> None:
        self._drain_task = asyncio.ensure_future(self._drain())

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
        while (  # noqa: ASYNC110 - a stop is rare, an event would cost each message something
            late := sum(stream.in_hand for stream in streams)
        ) and loop.time() < deadline:
            await asyncio.sleep(REFUSAL_TURN)
        if late:
            LOGGER.warning('%s ends %s methods that have passed their deadline', self.name, late)
        self._stop_loop()

    def _count_received(self) -> int:
        return sum(stream.received for stream in self._streams)

    def _teardown(self) -> None:
        if self._watchdog is not None:
            self._watchdog.arm(self.drain_timeout + 1)
        if self._started:
            try:
                self.registry.notify(ZMQProcessStoppedEvent(self))
            except Exception:
                LOGGER.exception('A subscriber to the end of %s failed', self.name)
        for stream in self._streams:
            stream.close()
        if self.auth_thread is not None:
            self.auth_thread.stop()
        if self.loop is not None:
            loop, self.loop = self.loop, None
            _cancel_tasks(loop.asyncio_loop)
            # asyncio takes its handlers off, and with them ours, which children may need for long.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            handlers = [signal.getsignal(num) for num in SIGNALS]
            loop.close()
            for num, handler in zip(SIGNALS, handlers, strict=True):
                signal.signal(num, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if self.context is not None:
            self.context.destroy(LINGER)
        for lock in self._locks.values():
            lock.release()


def process_exit_func(process: Any = None) -> None:
    """End a process; meant for `atexit`.

    :param process: ZMQProcess, or None
    """
    if process is not None:
        process.stop()


def _cancel_tasks(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=1))


def _local_addresses(fd: int) -> list[tuple[Any, ...]]:
    """List the addresses that the listener may have by which a socket came in."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return []
        socket = tcp.socket(fileno=fd)
        try:
            address = socket.getsockname()
        finally:
            socket.detach()
    except OSError:  # it is closed by now
        return []
    if not isinstance(address, tuple):
        return [(address,)] if address else []
    host, port = address[:2]
    return [(host, port), ('0.0.0.0', port), ('::', port)]  # noqa: S104 - to compare with
