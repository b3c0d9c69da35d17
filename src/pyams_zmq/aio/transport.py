# SPDX-License-Identifier: ZPL-2.1
"""A ØMQ socket as a transport of asyncio, on any loop with `add_reader`."""

import asyncio
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import zmq

from pyams_zmq.aio.address import AwaitableEndpoint, check_numeric, check_str, find_real
from pyams_zmq.aio.protocol import SocketEvent
from pyams_zmq.aio.pump import MessagePump
from pyams_zmq.wire.context import check_descriptors, raise_descriptor_limit
from pyams_zmq.wire.monitor import close_monitor, open_monitor, parse_event

LOGGER = logging.getLogger('PyAMS (zmq)')


class ZmqTransport(asyncio.BaseTransport):
    """Transport of a ØMQ socket, made by :func:`~pyams_zmq.aio.create_zmq_connection`.

    Use it in the thread of its loop only. After its end all methods can still be called: those that
    need the socket raise OSError (ENOTSOCK), the others do nothing.

    :param loop: event loop
    :param sock: `zmq.Socket`, which belongs to the transport from then on
    :param protocol: :class:`.ZmqProtocol`
    :param is_shared: true if other code may use the socket, too
    """

    def __init__(self, loop: Any, sock: Any, protocol: Any, *, is_shared: bool = False):
        self._pump = MessagePump(loop, sock, protocol, self, self._release)
        super().__init__({'zmq_socket': sock, 'zmq_type': self._pump.type})
        self._loop = loop
        self._sock = sock
        self._is_shared = is_shared
        # The form that was given, by the real form that libzmq has returned.
        self._listeners: dict[str, str] = {}
        self._connections: dict[str, str] = {}
        self._subscriptions: set[bytes] = set()
        self._monitor: MessagePump | None = None

    def __repr__(self) -> str:
        pump = self._pump
        state = 'closed' if pump.is_ended else 'closing' if pump.is_closing else 'open'
        reading = 'reading' if self.is_reading() else 'not reading'
        endpoints = ''.join(f', {each}' for each in (*self._listeners, *self._connections))
        return (
            f'<{type(self).__name__} {pump.type.name}, {state}, {reading}, '
            f'{len(pump.buffer)} messages ({pump.buffer.size} bytes) buffered{endpoints}>'
        )

    def start(self) -> None:
        """Call `connection_made`, and from then on the other methods of the protocol.

        :raises OSError: EMFILE, when the process has no descriptor left
        """
        self._pump.start()
        if self._is_shared:
            self._pump.guard()
        self._pump.call('connection_made', self)

    # Information and options

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return information about the transport.

        :param name: `'zmq_socket'`, for the `zmq.Socket`, or `'zmq_type'`; using the socket beside
            the transport may delay messages by a tenth of a second
        :param default: what is returned for other names
        """
        if name == 'zmq_socket':
            self._pump.guard()
        return super().get_extra_info(name, default)

    def get_protocol(self) -> Any:
        """Return the protocol."""
        return self._pump.protocol

    def set_protocol(self, protocol: Any) -> None:
        """Set the protocol that is called from now on, without a call of its `connection_made`.

        :param protocol: :class:`.ZmqProtocol`
        """
        self._pump.protocol = protocol

    def getsockopt(self, option: int) -> Any:
        """Return an option of the socket, see `zmq_getsockopt(3)`.

        :param option: a number of `zmq.SocketOption`
        :raises OSError: if there is no such option
        """
        with self._pump.outside_turn():
            return self._sock.getsockopt(option)

    def setsockopt(self, option: int, value: Any) -> None:
        """Set an option of the socket, see `zmq_setsockopt(3)`.

        :param option: a number of `zmq.SocketOption`
        :param value: its value, of the type that the option requires
        :raises OSError: if there is no such option, or the value is refused
        """
        if self._pump.type == zmq.SUB and option == zmq.SUBSCRIBE:
            self.subscribe(value)
        elif self._pump.type == zmq.SUB and option == zmq.UNSUBSCRIBE:
            self.unsubscribe(value)
        else:
            with self._pump.outside_turn():
                self._sock.setsockopt(option, value)

    # Addresses

    def bind(self, endpoint: str) -> AwaitableEndpoint:
        """Bind an endpoint, see `zmq_bind(3)`.

        For an `ipc://` endpoint this also raises the limit of the process on open files: libzmq
        ends a process that has no descriptor left when such a connection comes in.

        :param endpoint: URI, with or without wildcards
        :return: the endpoint that is bound, without wildcards; it can also be awaited
        :raises OSError: if it cannot be bound
        """
        return self._attach(self._bind, check_str(endpoint), self._listeners)

    def _bind(self, endpoint: str) -> None:
        if endpoint.startswith('ipc://'):
            raise_descriptor_limit()
        check_descriptors()
        self._sock.bind(os.fsencode(endpoint))

    def unbind(self, endpoint: str) -> AwaitableEndpoint:
        """Unbind an endpoint.

        :param endpoint: the one that was passed to `bind`, or that `bind` has returned
        :return: the endpoint that was bound; it can also be awaited
        :raises OSError: if it is not bound
        """
        bound = find_real(check_str(endpoint), self._listeners)
        with self._pump.outside_turn():
            self._sock.unbind(os.fsencode(bound))
        self._listeners.pop(bound, None)
        return AwaitableEndpoint(bound)

    def listeners(self) -> frozenset[str]:
        """Return the endpoints that the transport has bound."""
        return frozenset(self._listeners)

    bindings = listeners

    def connect(self, endpoint: str) -> AwaitableEndpoint:
        """Connect to an endpoint, see `zmq_connect(3)`.

        :param endpoint: URI; the host of a tcp endpoint is an IP address, not a name
        :return: the endpoint; it can also be awaited
        :raises ValueError: if the host is a name
        :raises OSError: if it cannot be connected to
        """
        check_numeric(check_str(endpoint))
        return self._attach(self._connect, endpoint, self._connections)

    def _connect(self, endpoint: str) -> None:
        self._sock.connect(os.fsencode(endpoint))

    def disconnect(self, endpoint: str) -> AwaitableEndpoint:
        """Disconnect from an endpoint.

        :param endpoint: the one that was passed to `connect`, or that `connect` has returned
        :return: the endpoint; it can also be awaited
        :raises OSError: if it is not connected
        """
        connected = find_real(check_str(endpoint), self._connections)
        with self._pump.outside_turn():
            # libzmq registers a connection under the form that was given.
            self._sock.disconnect(os.fsencode(self._connections.get(connected, connected)))
        self._connections.pop(connected, None)
        return AwaitableEndpoint(connected)

    def connections(self) -> frozenset[str]:
        """Return the endpoints that the transport has connected to."""
        return frozenset(self._connections)

    def _attach(self, attach: Any, endpoint: str, table: dict[str, str]) -> AwaitableEndpoint:
        with self._pump.outside_turn():
            if endpoint.startswith('tcp://['):
                self._sock.ipv6 = True
            attach(endpoint)
            real = os.fsdecode(self._sock.getsockopt(zmq.LAST_ENDPOINT))
        table[real] = endpoint
        return AwaitableEndpoint(real)

    # Subscriptions

    def subscribe(self, value: bytes) -> None:
        """Subscribe a SUB socket to messages that start with *value*; a second time has no effect.

        :param value: prefix of the first frame, `b''` for all messages
        :raises NotImplementedError: if it is not a SUB socket
        :raises TypeError: if *value* is not bytes
        """
        self._check_subscription(value)
        if value not in self._subscriptions:
            with self._pump.outside_turn():
                self._sock.setsockopt(zmq.SUBSCRIBE, value)
            self._subscriptions.add(value)

    def unsubscribe(self, value: bytes) -> None:
        """End a subscription.

        :param value: prefix that was subscribed to
        :raises NotImplementedError: if it is not a SUB socket
        :raises TypeError: if *value* is not bytes
        """
        self._check_subscription(value)
        with self._pump.outside_turn():
            self._sock.setsockopt(zmq.UNSUBSCRIBE, value)
        self._subscriptions.discard(value)

    def subscriptions(self) -> frozenset[bytes]:
        """Return the prefixes that the transport has subscribed to.

        :raises NotImplementedError: if it is not a SUB socket
        """
        self._check_subscription(b'')
        return frozenset(self._subscriptions)

    def _check_subscription(self, value: bytes) -> None:
        if self._pump.type != zmq.SUB:
            raise NotImplementedError(
                f'A {self._pump.type.name} socket has no subscriptions; use a SUB socket'
            )
        if not isinstance(value, bytes):
            raise TypeError(f'The subscription {value!r} is not bytes')

    # Monitor

    def enable_monitor(self, events: int | None = None) -> AwaitableEndpoint:
        """Call `event_received` of the protocol with the events of the connections.

        :param events: flags of `zmq.Event`, all by default
        :return: the endpoint of the monitor; it can also be awaited
        :raises OSError: if the monitor cannot be opened
        """
        self._drop_monitor()
        with self._pump.outside_turn():
            socket = open_monitor(self._sock, zmq.EVENT_ALL if events is None else events)
            protocol = _MonitorProtocol(partial(self._pump.call, 'event_received'))
            close = partial(close_monitor, self._sock, socket)
            monitor = MessagePump(self._loop, socket, protocol, self, close, is_monitor=True)
            try:
                monitor.start()
            except BaseException:
                close()
                raise
        self._monitor = monitor
        return AwaitableEndpoint(socket.getsockopt(zmq.LAST_ENDPOINT).decode())

    def disable_monitor(self) -> AwaitableEndpoint:
        """End what `enable_monitor` has started, if anything.

        :return: `''`; it can also be awaited
        """
        self._drop_monitor()
        return AwaitableEndpoint()

    def _drop_monitor(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.abort()

    def read_monitor(self) -> None:
        """Call `event_received` with the events that wait in the monitor now."""
        if self._monitor is not None:
            self._monitor.take_turn()

    # Reading

    def is_reading(self) -> bool:
        """Return True if messages are received."""
        return self._pump.is_reading and not self._pump.is_closing

    def pause_reading(self) -> None:
        """Receive no message until `resume_reading`; messages that arrive wait in the socket."""
        self._pump.pause_reading()

    def resume_reading(self) -> None:
        """Receive messages again."""
        self._pump.resume_reading()

    # Writing

    def write(self, data: Iterable[Any] | None = None) -> None:
        """Send a message now, or as soon as the socket takes it; an empty one is not sent.

        :param data: iterable of its frames, each bytes, bytearray, memoryview or another buffer;
            None is an empty message, as an empty iterable is
        :raises TypeError: if it is something else
        :raises OSError: if such a socket cannot send it, for example a REP without a request
        """
        frames = data if type(data) is tuple else _make_tuple(data)
        for part in frames:
            if type(part) is not bytes:
                frames = tuple(map(_make_bytes, frames))
                break
        pump = self._pump
        if not frames:
            return
        if pump.is_closing:
            LOGGER.warning('%r is closed: a message was dropped', self)
        else:
            pump.send(frames)

    def can_write_eof(self) -> bool:
        """Return False: a socket is closed as a whole."""
        return False

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes in the write buffer."""
        return self._pump.buffer.size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the limits of the write buffer in bytes, the low one first."""
        return self._pump.buffer.limits

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the limits of the write buffer.

        :param high: bytes above which `pause_writing` is called; 64 KiB or four times *low* by
            default
        :param low: bytes down to which `resume_writing` is called; a quarter of *high* by default
        :raises ValueError: unless `high >= low >= 0`
        """
        self._pump.buffer.set_limits(high, low)
        self._pump.pause_or_resume()

    # End

    def is_closing(self) -> bool:
        """Return True if the transport is closed or closing."""
        return self._pump.is_closing

    def close(self) -> None:
        """Receive no more, send the buffered messages, then call `connection_lost(None)`."""
        self._pump.close()

    def abort(self) -> None:
        """Close at once, drop the buffered messages, then call `connection_lost(None)`."""
        self._pump.abort()

    def __del__(self) -> None:
        # The loop holds an open transport, so the loop has ended and the transport was not closed.
        pump = getattr(self, '_pump', None)
        if pump is not None and pump.is_started and not pump.is_ended:
            warnings.warn(f'unclosed {self!r}', ResourceWarning, stacklevel=2, source=self)
            self.abort()

    def _release(self) -> None:
        self._drop_monitor()
        self._listeners.clear()
        self._connections.clear()
        self._subscriptions.clear()


class _MonitorProtocol(asyncio.BaseProtocol):
    """Protocol of the socket that receives the events of a monitor."""

    def __init__(self, handle_event: Callable[[SocketEvent], None]):
        self._handle_event = handle_event

    def msg_received(self, data: tuple[bytes, ...]) -> None:
        event, value = parse_event(data)
        self._handle_event(SocketEvent(zmq.Event(event), value, data[1].decode()))


def _make_tuple(data: Any) -> tuple[Any, ...]:
    if data is None or (not data and isinstance(data, (bytes, bytearray, memoryview))):
        return ()
    if isinstance(data, (bytes, bytearray, memoryview, str)):
        raise TypeError(f'A message is an iterable of frames: use write([{type(data).__name__}])')
    return tuple(data)


def _make_bytes(part: Any) -> bytes:
    return part if type(part) is bytes else bytes(memoryview(part))
