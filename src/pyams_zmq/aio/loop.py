# SPDX-License-Identifier: ZPL-2.1
"""Makes transports, on any running loop or on an event loop with a ØMQ context."""

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio
import zmq.eventloop.future

from pyams_zmq.aio.address import check_numeric, check_str
from pyams_zmq.aio.transport import ZmqTransport
from pyams_zmq.client.connection import as_os_error
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.context import MAX_SUBSCRIPTION_SIZE, PUBLISHERS, check_descriptors
from pyams_zmq.wire.linger import CLOSE_LINGER

LINGER = 1000
"""Milliseconds for which messages are still sent after a socket that was made here is closed"""

Endpoints = str | Iterable[str] | None
Pair = tuple[ZmqTransport, Any]

_contexts: set[zmq.Context[Any]] = set()  # of open loops; keeps them alive

_FUTURES = (zmq.asyncio.Socket, zmq.eventloop.future.Socket)

if TYPE_CHECKING:
    _Policy = asyncio.DefaultEventLoopPolicy
else:
    with warnings.catch_warnings():
        # Policies are deprecated in Python 3.14, where their bare name warns, and gone in 3.16.
        warnings.simplefilter('ignore', DeprecationWarning)
        _Policy = getattr(asyncio, 'DefaultEventLoopPolicy', object)


async def create_zmq_connection(
    protocol_factory: Callable[[], Any],
    zmq_type: int,
    *,
    bind: Endpoints = None,
    connect: Endpoints = None,
    zmq_sock: Any = None,
) -> Pair:
    """Make a transport and its protocol on the running loop, which must have `add_reader`.

    On a :class:`ZmqEventLoop` the socket is made in the context of the loop, otherwise in
    `zmq.Context.instance()`. To set options before the socket is bound or connected, pass no
    endpoints, set the options on the transport, and call its `bind` or `connect`; or pass a socket
    of your own. A PUB or XPUB socket that is made here refuses messages of subscribers that are
    larger than 4 KiB (`zmq.MAXMSGSIZE`).

    :param protocol_factory: callable that makes a :class:`.ZmqProtocol`
    :param zmq_type: type of the socket, for example `zmq.DEALER`
    :param bind: endpoint or endpoints to bind
    :param connect: endpoint or endpoints to connect to, see :meth:`.ZmqTransport.connect`
    :param zmq_sock: a `zmq.Socket`, which belongs to the transport from then on
    :return: the transport and the protocol, after the call of its `connection_made`
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if more than one of *bind*, *connect* and *zmq_sock* is given, or if an
        endpoint to connect to has a host name
    :raises OSError: if an endpoint cannot be bound or connected to; EMFILE, when the process has no
        descriptor left
    """
    loop = asyncio.get_running_loop()
    socket_type, addresses = _check(protocol_factory, zmq_type, bind, connect, zmq_sock)
    protocol = protocol_factory()
    if zmq_sock is not None:
        transport = ZmqTransport(loop, zmq_sock, protocol, is_shared=True)
        transport.start()
        return transport, protocol
    with as_os_error():
        socket: Any = get_context(loop).socket(socket_type, socket_class=zmq.Socket)
    try:
        socket.linger = LINGER
        if socket_type in PUBLISHERS:
            socket.maxmsgsize = MAX_SUBSCRIPTION_SIZE
        transport = ZmqTransport(loop, socket, protocol)
        for address in addresses:
            (transport.connect if bind is None else transport.bind)(address)
        transport.start()
    except BaseException:
        socket.close(0)
        raise
    return transport, protocol


def get_context(loop: asyncio.AbstractEventLoop) -> zmq.Context[Any]:
    """Return the context for the sockets of a loop: its own, or the one of this process.

    :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
    """
    check_descriptors()
    return loop.zmq_context if isinstance(loop, ZmqEventLoop) else zmq.Context.instance()


def _check(
    protocol_factory: Any, zmq_type: Any, bind: Any, connect: Any, zmq_sock: Any
) -> tuple[zmq.SocketType, list[str]]:
    """Check the arguments before a socket is opened; return the type and the endpoints."""
    if not callable(protocol_factory):
        raise TypeError(f'The protocol factory {protocol_factory!r} is not callable')
    if isinstance(zmq_type, bool) or not isinstance(zmq_type, int):
        raise TypeError(f'zmq_type {zmq_type!r} is not a socket type; pass for example zmq.DEALER')
    socket_type = zmq.SocketType(zmq_type)
    if sum(given is not None for given in (bind, connect, zmq_sock)) > 1:
        raise ValueError('Pass only one of bind, connect and zmq_sock')
    if zmq_sock is not None:
        _check_socket(zmq_sock, socket_type)
    endpoints = connect if bind is None else bind
    addresses = [] if endpoints is None else _check_endpoints(endpoints)
    if connect is not None:
        for address in addresses:
            check_numeric(address)
    return socket_type, addresses


def _check_socket(zmq_sock: Any, socket_type: zmq.SocketType) -> None:
    if not isinstance(zmq_sock, zmq.Socket) or isinstance(zmq_sock, _FUTURES):
        raise TypeError(
            f'zmq_sock {zmq_sock!r} is not a plain zmq.Socket; pass one of a zmq.Context, '
            f'not of zmq.asyncio.Context'
        )
    if zmq_sock.closed:
        raise ValueError(f'zmq_sock {zmq_sock!r} is closed; pass an open socket')
    with as_os_error():
        actual_type = zmq_sock.getsockopt(zmq.TYPE)
    if actual_type != socket_type:
        raise ValueError(f'zmq_sock {zmq_sock!r} is not of zmq_type {socket_type.name}')


def _check_endpoints(endpoints: Any) -> list[str]:
    if not isinstance(endpoints, Iterable):
        raise TypeError(f'{endpoints!r} is neither an endpoint nor an iterable of them')
    return [check_str(each) for each in ([endpoints] if isinstance(endpoints, str) else endpoints)]


class ZmqEventLoop(asyncio.SelectorEventLoop):
    """Event loop of asyncio with a ØMQ context, which is terminated when the loop is closed.

    Use it with `asyncio.Runner(loop_factory=ZmqEventLoop)`; it needs no event loop policy. A
    transport works on other loops, too: see :func:`create_zmq_connection`.

    :param io_threads: number of I/O threads of the context (`ZMQ_IO_THREADS`)
    :ivar zmq_context: the `zmq.Context` of its sockets
    :raises TypeError: if *io_threads* is not an int
    :raises ValueError: if *io_threads* is negative
    """

    _is_collected = False

    def __init__(self, *, io_threads: int = 1):
        super().__init__()
        try:
            _check_io_threads(io_threads)
            with as_os_error():
                self.zmq_context: zmq.Context[Any] = zmq.Context(io_threads)
        except BaseException:
            super().close()
            raise
        _contexts.add(self.zmq_context)
        self.zmq_context.linger = LINGER
        self.zmq_context.max_sockets = self.zmq_context.get(zmq.SOCKET_LIMIT)  # by default 1023

    create_zmq_connection = staticmethod(create_zmq_connection)
    time = staticmethod(monotonic)

    def close(self) -> None:
        """Close the loop, its context, and the open sockets of the context.

        This waits for unsent messages up to a second, or up to the linger period of a socket that
        was closed before, if that is longer.
        """
        super().close()
        if not self._is_collected:
            self.zmq_context.destroy(linger=CLOSE_LINGER)
            _contexts.discard(self.zmq_context)

    def __del__(self) -> None:
        # If the loop was not closed, its sockets may be collected together with it, and can no
        # longer be closed. The context would wait for them forever, so it is not terminated.
        # asyncio warns about the loop.
        self._is_collected = True
        super().__del__()


class ZmqEventLoopPolicy(_Policy):
    """Event loop policy that makes loops of :class:`ZmqEventLoop`.

    :param io_threads: number of I/O threads of the context of each loop
    """

    def __init__(self, *, io_threads: int = 1):
        _check_io_threads(io_threads)
        super().__init__()
        self._io_threads = io_threads
        self._thread_state = threading.local()

    def get_event_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop of this thread; in the main thread, make it first if needed.

        :raises RuntimeError: if another thread has none
        """
        has_loop = getattr(self._thread_state, 'has_loop', False)
        if not has_loop and threading.current_thread() is threading.main_thread():
            self.set_event_loop(self.new_event_loop())
        return super().get_event_loop()

    def new_event_loop(self) -> ZmqEventLoop:
        """Make a loop."""
        return ZmqEventLoop(io_threads=self._io_threads)

    def set_child_watcher(self, watcher: Any) -> None:
        """Set the child watcher, which Python 3.14 does not have.

        :param watcher: the watcher, or None
        :raises TypeError: if it is something else
        """
        try:
            super().set_child_watcher(watcher)
        except AssertionError:
            raise TypeError(f'{watcher!r} is not a child watcher') from None

    def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Set the loop of this thread.

        :param loop: the loop, or None
        :raises TypeError: if it is something else
        """
        if loop is not None and not isinstance(loop, asyncio.AbstractEventLoop):
            raise TypeError(f'{loop!r} is not an event loop')
        super().set_event_loop(loop)
        self._thread_state.has_loop = True


def _check_io_threads(io_threads: Any) -> None:
    if isinstance(io_threads, bool) or not isinstance(io_threads, int):
        raise TypeError(f'io_threads {io_threads!r} is not an int')
    if io_threads < 0:
        raise ValueError(f'io_threads {io_threads!r} is negative')
