# SPDX-License-Identifier: ZPL-2.1
"""A ØMQ socket as a transport, on any loop with `add_reader`."""

import logging
import warnings
from collections.abc import Iterable
from typing import Any

import zmq

from pyams_zmq.aio.address import Addresses, AwaitableEndpoint, check_numeric, check_str
from pyams_zmq.aio.monitor import MonitorProtocol, close_monitor, open_monitor
from pyams_zmq.aio.turns import Turns

LOGGER = logging.getLogger('PyAMS (zmq)')


class ZmqTransport(Turns):
    """Transport of a ØMQ socket, made by :func:`~pyams_zmq.aio.loop.create_zmq_connection`.

    It is for the thread of its loop only. After its end all methods can be called: those that
    need the socket raise OSError (ENOTSOCK), the others do nothing.

    :param loop: event loop
    :param sock: `zmq.Socket`, which belongs to the transport from then on
    :param protocol: :class:`.ZmqProtocol`
    :param is_shared: true if somebody else may use the socket, too
    """

    def __init__(self, loop: Any, sock: Any, protocol: Any, *, is_shared: bool = False):
        super().__init__(loop, sock, protocol, is_shared)
        self._addresses = Addresses(sock)
        self._subscriptions: set[bytes] = set()
        self._monitor: ZmqTransport | None = None

    def __repr__(self) -> str:
        state = 'closed' if self._is_ending else 'closing' if self._is_closing else 'open'
        reading = 'reading' if self.is_reading() else 'not reading'
        return (
            f'<{type(self).__name__} {self._type.name}, {state}, {reading}, '
            f'{len(self._buffer)} messages ({self._buffer.size} bytes) buffered>'
        )

    # What the transport is

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Get information.

        :param name: `'zmq_socket'`, for the `zmq.Socket`, or `'zmq_type'`; who uses the socket
            beside the transport may delay messages by a tenth of a second
        :param default: what is returned for other names
        """
        if name == 'zmq_socket' and not self._is_shared:
            self._is_shared = True
            self._guard()
        return super().get_extra_info(name, default)

    def get_protocol(self) -> Any:
        """Get the protocol."""
        return self._protocol

    def set_protocol(self, protocol: Any) -> None:
        """Set the protocol that is called from now on; its `connection_made` is not.

        :param protocol: :class:`.ZmqProtocol`
        """
        self._protocol = protocol

    def getsockopt(self, option: int) -> Any:
        """Get an option of the socket, see `zmq_getsockopt(3)`.

        :param option: a number of `zmq.SocketOption`
        :raises OSError: if there is no such option
        """
        with self._touch():
            return self._sock.getsockopt(option)

    def setsockopt(self, option: int, value: Any) -> None:
        """Set an option of the socket, see `zmq_setsockopt(3)`.

        :param option: a number of `zmq.SocketOption`
        :param value: its value, as its type demands
        :raises OSError: if there is no such option, or the value is refused
        """
        if self._type == zmq.SUB and option == zmq.SUBSCRIBE:
            self.subscribe(value)
        elif self._type == zmq.SUB and option == zmq.UNSUBSCRIBE:
            self.unsubscribe(value)
        else:
            with self._touch():
                self._sock.setsockopt(option, value)

    # Addresses

    def bind(self, endpoint: str) -> AwaitableEndpoint:
        """Bind an endpoint, see `zmq_bind(3)`.

        :param endpoint: URI, with wildcards or without
        :return: the endpoint that is bound, without wildcards; it can be awaited, too
        :raises OSError: if it cannot be bound
        """
        check_str(endpoint)
        with self._touch():
            return self._addresses.bind(endpoint)

    def unbind(self, endpoint: str) -> AwaitableEndpoint:
        """Unbind an endpoint.

        :param endpoint: as it was given to `bind`, or as that returned it
        :return: the endpoint that was bound; it can be awaited, too
        :raises OSError: if it is not bound
        """
        check_str(endpoint)
        with self._touch():
            return self._addresses.unbind(endpoint)

    def listeners(self) -> frozenset[str]:
        """Get the endpoints that are bound, those which were bound by the transport."""
        return self._addresses.listeners

    bindings = listeners

    def connect(self, endpoint: str) -> AwaitableEndpoint:
        """Connect to an endpoint, see `zmq_connect(3)`.

        :param endpoint: URI; with tcp its host is an IP address, no name
        :return: the endpoint; it can be awaited, too
        :raises ValueError: if the host is a name
        :raises OSError: if it cannot be connected to
        """
        check_numeric(check_str(endpoint))
        with self._touch():
            return self._addresses.connect(endpoint)

    def disconnect(self, endpoint: str) -> AwaitableEndpoint:
        """Disconnect from an endpoint.

        :param endpoint: as it was given to `connect`, or as that returned it
        :return: the endpoint; it can be awaited, too
        :raises OSError: if it is not connected
        """
        check_str(endpoint)
        with self._touch():
            return self._addresses.disconnect(endpoint)

    def connections(self) -> frozenset[str]:
        """Get the endpoints it is connected to, those which were connected by the transport."""
        return self._addresses.connections

    # Subscriptions

    def subscribe(self, value: bytes) -> None:
        """Subscribe a SUB socket to messages that start with *value*; again makes no difference.

        :param value: prefix of the first frame, `b''` for all messages
        :raises NotImplementedError: if it is no SUB socket
        :raises TypeError: if *value* is not bytes
        """
        self._check_subscription(value)
        if value not in self._subscriptions:
            with self._touch():
                self._sock.setsockopt(zmq.SUBSCRIBE, value)
            self._subscriptions.add(value)

    def unsubscribe(self, value: bytes) -> None:
        """End a subscription.

        :param value: prefix that it was made for
        :raises NotImplementedError: if it is no SUB socket
        :raises TypeError: if *value* is not bytes
        """
        self._check_subscription(value)
        with self._touch():
            self._sock.setsockopt(zmq.UNSUBSCRIBE, value)
        self._subscriptions.discard(value)

    def subscriptions(self) -> frozenset[bytes]:
        """Get the prefixes that the transport has subscribed to.

        :raises NotImplementedError: if it is no SUB socket
        """
        self._check_subscription(b'')
        return frozenset(self._subscriptions)

    def _check_subscription(self, value: bytes) -> None:
        if self._type != zmq.SUB:
            raise NotImplementedError(f'A {self._type.name} socket has no subscriptions, SUB has')
        if not isinstance(value, bytes):
            raise TypeError(f'The subscription {value!r} is not bytes')

    # Monitor

    def enable_monitor(self, events: int | None = None) -> AwaitableEndpoint:
        """Call `event_received` of the protocol with what happens to the connections.

        :param events: flags of `zmq.Event`, all by default
        :return: the endpoint of the monitor; it can be awaited, too
        :raises OSError: if there cannot be one
        """
        self._drop_monitor()
        with self._touch():
            pair, endpoint = open_monitor(self._sock, events)
            try:
                monitor = ZmqTransport(self._loop, pair, MonitorProtocol(self._call))
                monitor.start()
            except BaseException:
                close_monitor(self._sock)
                pair.close(0)
                raise
        self._monitor = monitor
        return AwaitableEndpoint(endpoint)

    def disable_monitor(self) -> AwaitableEndpoint:
        """End what `enable_monitor` began, if it did.

        :return: `''`; it can be awaited, too
        """
        self._drop_monitor()
        return AwaitableEndpoint()

    def _drop_monitor(self) -> None:
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            close_monitor(self._sock)
            monitor.abort()

    def look_at_events(self) -> None:
        """Call `event_received` with what the monitor has to tell now, before the loop does."""
        if self._monitor is not None and not self._monitor._has_ended():
            self._monitor._turn(has_message=False)

    # Reading

    def is_reading(self) -> bool:
        """Tell if messages are received."""
        return self._is_reading and not self._is_closing

    def pause_reading(self) -> None:
        """Receive no message until `resume_reading`; further ones wait in the socket."""
        if not self._is_closing:
            self._is_reading = False

    def resume_reading(self) -> None:
        """Receive messages again."""
        if not self._is_closing:
            self._is_reading = True
            self._look_soon()

    # Writing

    def write(self, data: Iterable[Any]) -> None:
        """Send a message now, or as soon as the socket takes it; nothing is sent of an empty one.

        :param data: iterable of its frames, which are bytes, bytearray, memoryview or the like
        :raises TypeError: if it is something else
        :raises OSError: if such a socket cannot send it, a REP without a request for instance
        """
        frames = data if type(data) is tuple else _make_tuple(data)
        for part in frames:
            if type(part) is not bytes:
                frames = tuple(map(_make_bytes, frames))
                break
        if self._is_closing:
            LOGGER.warning('%r is closed: a message was dropped', self)
            return
        if not frames:
            return
        if self._buffer or not self._write_now(frames):
            self._buffer.put(frames)
            self._pause_or_resume()
        if not self._is_in_turn and self._looks is None:
            self._look_after_write()

    def get_write_buffer_size(self) -> int:
        """Get the number of bytes in the write buffer."""
        return self._buffer.size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Get the limits of the write buffer in bytes, the low one first."""
        return self._buffer.limits

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the limits of the write buffer.

        :param high: bytes above which `pause_writing` is called; 64 KiB or four times *low* by
            default
        :param low: bytes down to which `resume_writing` is called; a quarter of *high* by default
        :raises ValueError: unless `high >= low >= 0`
        """
        self._buffer.set_limits(high, low)
        self._pause_or_resume()

    # End

    def is_closing(self) -> bool:
        """Tell if the transport is closed, or will be."""
        return self._is_closing

    def close(self) -> None:
        """Receive no more, send what is buffered, then call `connection_lost(None)`."""
        if not self._is_closing:
            self._is_closing = True
            # Requests that wait for the reply to the last one; nobody wants their replies now.
            self._is_reading = self._type == zmq.REQ
            if self._buffer and not self._loop.is_closed():
                self._look_soon()
            else:
                self._stop(None)

    def abort(self) -> None:
        """Close at once, drop what was not sent, then call `connection_lost(None)`."""
        self._stop(None)
        self._close_socket(0)

    def __del__(self) -> None:
        # The loop holds it until its end: so that has come, and nobody has closed the transport.
        if getattr(self, '_is_started', False) and not self._is_ending:
            warnings.warn(f'unclosed {self!r}', ResourceWarning, stacklevel=2, source=self)
            self.abort()

    def _close_socket(self, linger: int | None) -> None:
        self._drop_monitor()
        super()._close_socket(linger)
        self._addresses.clear()
        self._subscriptions.clear()


def _make_tuple(data: Any) -> tuple[Any, ...]:
    if isinstance(data, (bytes, bytearray, memoryview, str)):
        raise TypeError(f'A message is an iterable of frames: write([{type(data).__name__}])')
    return tuple(data)


def _make_bytes(part: Any) -> bytes:
    return part if type(part) is bytes else bytes(memoryview(part))
