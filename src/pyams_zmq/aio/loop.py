# SPDX-License-Identifier: ZPL-2.1
"""Makes transports, on any running loop or on one with a context."""

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio
import zmq.eventloop.future

from pyams_zmq.aio.address import check_numeric
from pyams_zmq.aio.transport import ZmqTransport
from pyams_zmq.client.connection import as_os_error

LINGER = 1000
"""Milliseconds that messages wait for their peer after the end of a socket that was made here"""

Endpoints = str | Iterable[str] | None
Pair = tuple[ZmqTransport, Any]

_contexts: set[zmq.Context[Any]] = set()  # of loops which are not closed; never collected

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
    """Make a transport and its protocol on the running loop, whichever has `add_reader`.

    The socket belongs to the context of a :class:`ZmqEventLoop`, or to `zmq.Context.instance()`.
    Options that must be set before it is connected are set on the transport after `connect=()`,
    which connects it to nothing, or on a socket which is handed over.

    :param protocol_factory: callable that makes a :class:`.ZmqProtocol`
    :param zmq_type: type of the socket, `zmq.DEALER` for instance
    :param bind: endpoint or endpoints to bind
    :param connect: endpoint or endpoints to connect to, see :meth:`.ZmqTransport.connect`
    :param zmq_sock: a `zmq.Socket` to take over; from then on it belongs to the transport
    :return: the transport and the protocol; `connection_made` was called
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: unless exactly one of *bind*, *connect* and *zmq_sock* is given, or if an
        endpoint to connect to is the name of a host
    :raises OSError: if an endpoint cannot be bound or connected to
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
        transport = ZmqTransport(loop, socket, protocol)
        for address in addresses:
            (transport.connect if bind is None else transport.bind)(address)
    except BaseException:
        socket.close(0)
        raise
    transport.start()
    return transport, protocol


def get_context(loop: asyncio.AbstractEventLoop) -> zmq.Context[Any]:
    """Give the context for the sockets of a loop: its own, or the one of this process."""
    return loop.zmq_context if isinstance(loop, ZmqEventLoop) else zmq.Context.instance()


def _check(
    protocol_factory: Any, zmq_type: Any, bind: Any, connect: Any, zmq_sock: Any
) -> tuple[zmq.SocketType, list[str]]:
    """Check what can be known before there is a socket; return the type and the endpoints."""
    if not callable(protocol_factory):
        raise TypeError(f'The protocol factory {protocol_factory!r} is not callable')
    if isinstance(zmq_type, bool) or not isinstance(zmq_type, int):
        raise TypeError(f'The type {zmq_type!r} is none of a socket, zmq.DEALER for instance is')
    socket_type = zmq.SocketType(zmq_type)
    if sum(given is not None for given in (bind, connect, zmq_sock)) != 1:
        raise ValueError('Give exactly one of bind, connect and zmq_sock')
    if zmq_sock is not None:
        _check_socket(zmq_sock, socket_type)
        return socket_type, []
    addresses = _check_endpoints(connect if bind is None else bind)
    if connect is not None:
        for address in addresses:
            check_numeric(address)
    return socket_type, addresses


def _check_socket(zmq_sock: Any, socket_type: zmq.SocketType) -> None:
    if not isinstance(zmq_sock, zmq.Socket) or isinstance(zmq_sock, _FUTURES):
        raise TypeError(f'zmq_sock {zmq_sock!r} is no zmq.Socket; those of zmq.asyncio are not')
    if zmq_sock.closed:
        raise ValueError(f'zmq_sock {zmq_sock!r} is closed')
    with as_os_error():
        actual_type = zmq_sock.getsockopt(zmq.TYPE)
    if actual_type != socket_type:
        raise ValueError(f'zmq_sock {zmq_sock!r} is of another type than {socket_type.name}')


def _check_endpoints(endpoints: Any) -> list[str]:
    if not isinstance(endpoints, Iterable):
        raise TypeError(f'{endpoints!r} is neither an endpoint nor an iterable of them')
    addresses = [endpoints] if isinstance(endpoints, str) else list(endpoints)
    for address in addresses:
        if not isinstance(address, str):
            raise TypeError(f'The endpoint {address!r} is no str')
    return addresses


class ZmqEventLoop(asyncio.SelectorEventLoop):
    """Event loop of asyncio with a ØMQ context, which ends with the loop.

    `asyncio.Runner(loop_factory=ZmqEventLoop)` uses it, no policy is needed. A transport does not
    need it either: see :func:`create_zmq_connection`.

    :ivar zmq_context: the `zmq.Context` of its sockets
    :param io_threads: number of I/O threads of the context (`ZMQ_IO_THREADS`)
    :raises TypeError: if that is no number
    :raises ValueError: if that is negative
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

    async def create_zmq_connection(
        self,
        protocol_factory: Callable[[], Any],
        zmq_type: int,
        *,
        bind: Endpoints = None,
        connect: Endpoints = None,
        zmq_sock: Any = None,
    ) -> Pair:
        """Make a transport and its protocol, see :func:`create_zmq_connection`."""
        return await create_zmq_connection(
            protocol_factory, zmq_type, bind=bind, connect=connect, zmq_sock=zmq_sock
        )

    def close(self) -> None:
        """Close the loop, its context, and the sockets which are still open in there.

        It takes as long as messages of closed sockets linger, one second unless you say more.
        """
        super().close()
        if not self._is_collected:
            self.zmq_context.destroy(linger=0)
            _contexts.discard(self.zmq_context)

    def __del__(self) -> None:
        # If it was not closed its sockets may be collected with it, and nobody knows them any more:
        # the context would wait for them for ever. It is left, and asyncio warns.
        self._is_collected = True
        super().__del__()


class _LocalFlag(threading.local):
    is_set = False


class ZmqEventLoopPolicy(_Policy):  # the base exists as long as policies do
    """Policy that makes each loop a :class:`ZmqEventLoop`.

    :param io_threads: number of I/O threads of the context of each loop
    """

    def __init__(self, *, io_threads: int = 1):
        _check_io_threads(io_threads)
        super().__init__()
        self._io_threads = io_threads
        self._has_loop = _LocalFlag()

    def get_event_loop(self) -> asyncio.AbstractEventLoop:
        """Get the loop of this thread; the main thread gets one if it has none.

        :raises RuntimeError: if another thread has none
        """
        if not self._has_loop.is_set and threading.current_thread() is threading.main_thread():
            self.set_event_loop(self.new_event_loop())
        return super().get_event_loop()

    def new_event_loop(self) -> ZmqEventLoop:
        """Make a loop."""
        return ZmqEventLoop(io_threads=self._io_threads)

    def set_child_watcher(self, watcher: Any) -> None:
        """Set the child watcher, which Python 3.14 has no more.

        :param watcher: the watcher or None
        :raises TypeError: for anything else
        """
        try:
            super().set_child_watcher(watcher)
        except AssertionError:
            raise TypeError(f'{watcher!r} is no child watcher') from None

    def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        """Set the loop of this thread.

        :param loop: the loop or None
        :raises TypeError: for anything else
        """
        if loop is not None and not isinstance(loop, asyncio.AbstractEventLoop):
            raise TypeError(f'{loop!r} is no event loop')
        super().set_event_loop(loop)
        self._has_loop.is_set = True


def _check_io_threads(io_threads: Any) -> None:
    if isinstance(io_threads, bool) or not isinstance(io_threads, int):
        raise TypeError(f'io_threads {io_threads!r} is no number of threads')
    if io_threads < 0:
        raise ValueError(f'io_threads {io_threads!r} is negative')
