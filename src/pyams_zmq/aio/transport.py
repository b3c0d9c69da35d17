#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

"""PyAMS_zmq.aio.transport module: a ØMQ socket as a transport, on any loop with `add_reader`.

The descriptor of a socket is edge-triggered: it says that something has happened since anybody
looked, not what there is. Whatever is done with the socket looks, even a `send` or an option that
is read, and then the descriptor is silent about what came in before. So each turn ends with a
look which found nothing, or with another turn to come; and after all that is done outside of a
turn there is one.
"""

import asyncio
import logging
import os
import struct
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from itertools import count
from time import monotonic
from typing import Any

import zmq

from pyams_zmq.aio.protocol import SocketEvent
from pyams_zmq.link import as_os_error, make_os_error

__docformat__ = 'restructuredtext'

LOGGER = logging.getLogger('PyAMS (zmq)')

TURN = 0.005
"""Seconds after which other callbacks of the loop have their turn, though messages wait"""

MOST = 256
"""Messages after which they have"""

RETRY = 0.01
"""Seconds until a peer is tried again whose queue is full, while other peers of the socket have
room; libzmq tells of the room only"""

GUARD = 0.1
"""Seconds between looks at a socket which others may use, too: they take its wake-ups away"""

HIGH_WATER = 64 * 1024
"""Bytes in the write buffer above which writing is paused, unless limits are set"""

_numbers = count()
_sockets: set[Any] = set()  # of transports that have not ended: never collected before them
_EVENTS = zmq.EVENTS  # as it is: pyzmq would look up the number
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_POLLIN = int(zmq.POLLIN)
_POLLOUT = int(zmq.POLLOUT)
_LOST = frozenset((zmq.ETERM, zmq.ENOTSOCK))
_NOTHING = frozenset((zmq.EAGAIN, zmq.EFSM))
# A wake-up may well mean a message, except for these: PUB and PUSH have none, REQ and REP not now.
_SEND_ONLY = frozenset((zmq.PUB, zmq.PUSH))
_NOT_AT_ONCE = frozenset((*_SEND_ONLY, zmq.REQ, zmq.REP))


class AwaitableEndpoint(str):
    """An endpoint; to await it gives it, too."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, str]:
        yield from ()
        return self


def check_numeric(endpoint: str) -> None:
    """Check that libzmq need not look up a name, while other sockets of the context would wait.

    :raises ValueError: if a tcp endpoint has no IP address
    """
    host, colon, port = endpoint.removeprefix('tcp://').rpartition(';')[2].rpartition(':')
    if not endpoint.startswith('tcp://') or not colon:  # without a port it is refused as it is
        return
    try:
        ip_address(host.strip('[]'))
    except ValueError:
        raise ValueError(
            f'Bad endpoint {endpoint!r}: {host!r} is no IP address; resolve a name first, for '
            f'example by "await loop.getaddrinfo({host!r}, {port!r})"'
        ) from None


class ZmqTransport(asyncio.BaseTransport):
    """Transport of a ØMQ socket, made by :func:`~pyams_zmq.aio.loop.create_zmq_connection`.

    It is for the thread of its loop only. After its end all methods can be called: those that
    need the socket raise OSError (ENOTSOCK), the others do nothing.

    :param loop: event loop
    :param sock: `zmq.Socket`, which belongs to the transport from then on
    :param protocol: :class:`.ZmqProtocol`
    :param is_shared: true if somebody else may use the socket, too
    """

    def __init__(self, loop: Any, sock: Any, protocol: Any, *, is_shared: bool = False):
        with as_os_error():
            self._type = zmq.SocketType(sock.getsockopt(zmq.TYPE))
        super().__init__({'zmq_socket': sock, 'zmq_type': self._type})
        self._loop = loop
        self._sock = sock
        self._protocol = protocol
        self._is_shared = is_shared
        self._at_wake_up = 0 if self._type in _NOT_AT_ONCE else _POLLIN
        # A REQ takes the next request when it has the reply to the last one. A second reply of a
        # REP must not wait for the next request, however: it would answer that.
        self._not_now = _NOTHING if self._type == zmq.REQ else frozenset((zmq.EAGAIN,))
        self._receive_frame = sock.recv
        self._send_frame = _get_send(sock)
        self._get_option = sock.getsockopt
        self._buffer: deque[tuple[bytes, ...]] = deque()
        self._size = 0
        self._high = HIGH_WATER
        self._low = HIGH_WATER // 4
        self._is_writing_paused = False
        self._is_reading = True
        self._is_closing = False
        self._is_ending = False
        self._is_started = False
        self._is_in_turn = False
        self._has_looked = False
        self._looks: asyncio.Handle | None = None
        self._retries: asyncio.Handle | None = None
        self._guards: asyncio.Handle | None = None
        self._listeners: dict[str, str] = {}
        self._connections: dict[str, str] = {}
        self._subscriptions: set[bytes] = set()
        self._monitor: ZmqTransport | None = None

    def __repr__(self) -> str:
        state = 'closed' if self._is_ending else 'closing' if self._is_closing else 'open'
        reading = 'reading' if self.is_reading() else 'not reading'
        return (
            f'<{type(self).__name__} {self._type.name}, {state}, {reading}, '
            f'{len(self._buffer)} messages ({self._size} bytes) buffered>'
        )

    def start(self) -> None:
        """Call `connection_made`, and from then on the other methods of the protocol.

        :raises OSError: EMFILE, when the process has no descriptor left
        """
        with as_os_error():
            fd = self._sock.getsockopt(zmq.FD)
        # Ours: if somebody else closes the socket, the loop still watches what it was told to.
        # (A descriptor that vanishes makes uvloop abort, and its number may be used again.)
        self._fd = os.dup(fd)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        self._is_started = True
        _sockets.add(self._sock)
        self._loop.add_reader(self._fd, self._wake_up)
        if self._is_shared:
            self._guard()
        self._look_soon()  # what was there before the descriptor was watched
        self._call('connection_made', self)

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
        return self._attach(self._sock.bind, endpoint, self._listeners)

    def unbind(self, endpoint: str) -> AwaitableEndpoint:
        """Unbind an endpoint.

        :param endpoint: as it was given to `bind`, or as that returned it
        :return: the endpoint that was bound; it can be awaited, too
        :raises OSError: if it is not bound
        """
        bound = _find(_check_str(endpoint), self._listeners)
        with self._touch():
            self._sock.unbind(bound)
        self._listeners.pop(bound, None)
        return AwaitableEndpoint(bound)

    def listeners(self) -> frozenset[str]:
        """Get the endpoints that are bound, those which were bound by the transport."""
        return frozenset(self._listeners)

    bindings = listeners

    def connect(self, endpoint: str) -> AwaitableEndpoint:
        """Connect to an endpoint, see `zmq_connect(3)`.

        :param endpoint: URI; with tcp its host is an IP address, no name
        :return: the endpoint; it can be awaited, too
        :raises ValueError: if the host is a name
        :raises OSError: if it cannot be connected to
        """
        check_numeric(_check_str(endpoint))
        return self._attach(self._sock.connect, endpoint, self._connections)

    def disconnect(self, endpoint: str) -> AwaitableEndpoint:
        """Disconnect from an endpoint.

        :param endpoint: as it was given to `connect`, or as that returned it
        :return: the endpoint; it can be awaited, too
        :raises OSError: if it is not connected
        """
        connected = _find(_check_str(endpoint), self._connections)
        with self._touch():
            self._sock.disconnect(self._connections.get(connected, connected))
        self._connections.pop(connected, None)
        return AwaitableEndpoint(connected)

    def connections(self) -> frozenset[str]:
        """Get the endpoints it is connected to, those which were connected by the transport."""
        return frozenset(self._connections)

    def _attach(self, attach: Any, endpoint: str, table: dict[str, str]) -> AwaitableEndpoint:
        _check_str(endpoint)
        with self._touch():
            if endpoint.startswith('tcp://['):
                self._sock.ipv6 = True
            attach(endpoint)
            real = self._sock.getsockopt(zmq.LAST_ENDPOINT).decode()
        table[real] = endpoint
        return AwaitableEndpoint(real)

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
        endpoint = f'inproc://pyams_zmq.aio.monitor-{next(_numbers)}'
        with self._touch():
            pair: Any = self._sock.context.socket(zmq.PAIR, socket_class=zmq.Socket)
            try:
                pair.rcvhwm = 0  # events that wait for a reader would stop the I/O thread
                self._sock.monitor(endpoint, zmq.EVENT_ALL if events is None else events)
                pair.connect(endpoint)
                self._monitor = ZmqTransport(self._loop, pair, _MonitorProtocol(self._call))
            except BaseException:
                self._end_monitor()
                pair.close(0)
                raise
        self._monitor.start()
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
            self._end_monitor()
            monitor.abort()

    def look_at_events(self) -> None:
        """Call `event_received` with what the monitor has to tell now, before the loop does."""
        if self._monitor is not None and not self._monitor._has_ended():
            self._monitor._turn(0)

    def _end_monitor(self) -> None:
        with suppress(zmq.ZMQError):  # the socket or its context may have ended already
            self._sock.monitor(None, 0)

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
            self._buffer.append(frames)
            self._size += sum(map(len, frames))
            self._pause_or_resume()
        if not self._is_in_turn and self._looks is None:
            self._look_after_write()

    def _write_now(self, frames: tuple[bytes, ...]) -> bool:
        try:
            return self._transmit(frames)
        except zmq.ZMQError as error:
            if error.errno not in _LOST:
                raise make_os_error(error) from error
            self._fail(error)
            return True

    def get_write_buffer_size(self) -> int:
        """Get the number of bytes in the write buffer."""
        return self._size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Get the limits of the write buffer in bytes, the low one first."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the limits of the write buffer.

        :param high: bytes above which `pause_writing` is called; 64 KiB or four times *low* by
            default
        :param low: bytes down to which `resume_writing` is called; a quarter of *high* by default
        :raises ValueError: unless `high >= low >= 0`
        """
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f'high ({high!r}) must be >= low ({low!r}) must be >= 0')
        self._high = high
        self._low = low
        self._pause_or_resume()

    def _pause_or_resume(self) -> None:
        if self._is_writing_paused:
            # Empty frames have no size: without a limit, an empty buffer is what counts.
            if self._size <= self._low and not (self._buffer and not self._low):
                self._is_writing_paused = False
                self._call('resume_writing')
        elif self._size > self._high or (self._buffer and not self._high):
            self._is_writing_paused = True
            self._call('pause_writing')

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

    def _has_ended(self) -> bool:
        return self._is_ending or self._loop.is_closed()

    def _fail(self, error: zmq.ZMQError) -> None:
        self._stop(make_os_error(error))

    def _stop(self, error: OSError | None) -> None:
        self._is_closing = True
        if self._is_ending:
            return
        self._is_ending = True
        self._is_reading = False
        self._buffer.clear()
        self._size = 0
        if self._loop.is_closed():  # and calls nobody any more
            self._close_fd()
            self._close_socket(None)
            return
        self._loop.remove_reader(self._fd)
        self._close_fd()
        for handle in (self._looks, self._retries, self._guards):
            if handle is not None:
                handle.cancel()
        self._loop.call_soon(self._end, error)

    def _end(self, error: OSError | None) -> None:
        self._close_socket(None)
        self._pause_or_resume()
        self._call('connection_lost', error)

    def _close_socket(self, linger: int | None) -> None:
        self._drop_monitor()
        self._sock.close(linger)
        _sockets.discard(self._sock)
        self._listeners.clear()
        self._connections.clear()
        self._subscriptions.clear()

    # Turns

    @contextmanager
    def _touch(self) -> Iterator[None]:
        """Do something with the socket, which takes its wake-up away."""
        try:
            with as_os_error():
                yield
        finally:
            self._look_soon()

    def _look_soon(self) -> None:
        if self._looks is None and self._is_started and not self._has_ended():
            self._looks = self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._looks = None
        self._turn(0)

    def _look_after_write(self) -> None:
        # The first time since the last turn, to look at once is cheaper than one more turn of the
        # loop; of many writes in a row, only two look.
        if self._has_looked:
            self._look_soon()
        elif self._buffer or self._is_reading and self._type not in _SEND_ONLY:
            self._has_looked = True
            try:
                events = self._get_option(_EVENTS)
            except zmq.ZMQError as error:
                self._fail(error)
                return
            if self._buffer or events & _POLLIN and self._is_reading:
                self._look_soon()

    def _retry(self) -> None:
        self._retries = None
        self._look_soon()

    def _guard(self) -> None:
        if not self._has_ended():
            self._guards = self._loop.call_later(GUARD, self._guard)
            self._look_soon()

    def _wake_up(self) -> None:
        self._turn(0 if self._buffer else self._at_wake_up)

    def _turn(self, events: int) -> None:
        """Receive and send until there is nothing to do, or others have their turn.

        :param events: what the socket is ready for; 0 to ask it
        """
        self._is_in_turn = True
        self._has_looked = False
        try:
            # Most wake-ups are for one message. To ask the socket for more is cheaper than the
            # exception of a `recv` in vain, which is cheaper than to ask after each of many.
            most = 1
            if events and self._is_reading:
                self._receive()
                if self._is_ending:
                    return
                most = MOST
            events = self._get_option(_EVENTS)
            if self._buffer or events & _POLLIN and self._is_reading:
                self._work(events, most)
        except zmq.ZMQError as error:
            self._fail(error)
        except BaseException:
            self._look_soon()
            raise
        finally:
            self._is_in_turn = False

    def _work(self, events: int, most: int) -> None:
        deadline = monotonic() + TURN
        while True:
            is_blocked = False
            if events & _POLLIN and self._is_reading:
                for _number in range(most):
                    if not self._receive() or not self._is_reading or monotonic() > deadline:
                        break
            if events & _POLLOUT and self._buffer:
                is_blocked = not self._flush(deadline)
            if self._is_ending:
                return
            events = self._get_option(_EVENTS)
            has_room = bool(events & _POLLOUT and self._buffer)
            if is_blocked and has_room and self._retries is None:
                self._retries = self._loop.call_later(RETRY, self._retry)
            has_messages = bool(events & _POLLIN and self._is_reading)
            if not has_messages and (is_blocked or not has_room):
                return
            if most == MOST or monotonic() > deadline:
                self._look_soon()
                return
            most = MOST

    def _receive(self) -> bool:
        """Receive a message and give it to the protocol; tell if there was one."""
        try:
            frame = self._receive_frame(_NOBLOCK, False)
            data: tuple[bytes, ...] = (frame.bytes,)
            while frame.more:
                frame = self._receive_frame(_NOBLOCK, False)
                data += (frame.bytes,)
        except zmq.ZMQError as error:
            if error.errno not in _NOTHING:
                raise
            return False
        if not self._is_closing:
            try:
                self._protocol.msg_received(data)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - of others, told to the loop
                self._report('The protocol failed in msg_received', error)
        return True

    def _flush(self, deadline: float) -> bool:
        """Send what is buffered; tell if the socket has taken it, or would take more."""
        is_sent = True
        while self._buffer:
            frames = self._buffer.popleft()
            size = sum(map(len, frames))
            self._size -= size
            try:
                is_sent = self._transmit(frames)
            except zmq.ZMQError as error:
                if error.errno in _LOST:
                    raise
                self._report('A message cannot be sent and was dropped', make_os_error(error))
            except Exception as error:  # noqa: BLE001 - of a subclass which refuses the message
                self._report('A message cannot be sent and was dropped', error)
            if not is_sent:
                self._buffer.appendleft(frames)
                self._size += size
            if not is_sent or monotonic() > deadline:
                break
        self._pause_or_resume()
        if self._is_closing and not self._buffer:
            self._stop(None)
        return is_sent

    def _transmit(self, frames: tuple[bytes, ...]) -> bool:
        """Send a message; tell if it is gone, which it is too if its peer is unknown."""
        try:
            for number in range(len(frames) - 1):
                self._send_frame(frames[number], _NOBLOCK_MORE)
            self._send_frame(frames[-1], _NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in self._not_now:
                return False
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._report('A message has no peer to go to and was dropped', make_os_error(error))
        return True

    # What goes to others

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            getattr(self._protocol, name)(*arguments)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - of others, told to the loop
            self._report(f'The protocol failed in {name}', error)

    def _report(self, message: str, error: BaseException) -> None:
        self._loop.call_exception_handler(
            {
                'message': message,
                'exception': error,
                'transport': self,
                'protocol': self._protocol,
            }
        )


class _MonitorProtocol(asyncio.BaseProtocol):
    """Protocol of the transport of a monitor: gives its events to the monitored one's protocol."""

    def __init__(self, tell: Callable[..., None]):
        self._tell = tell

    def msg_received(self, data: tuple[bytes, bytes]) -> None:
        event, value = struct.unpack('=Hi', data[0])
        self._tell('event_received', SocketEvent(zmq.Event(event), value, data[1].decode()))


def _make_tuple(data: Any) -> tuple[Any, ...]:
    if isinstance(data, (bytes, bytearray, memoryview, str)):
        raise TypeError(f'A message is an iterable of frames: write([{type(data).__name__}])')
    return tuple(data)


def _make_bytes(part: Any) -> bytes:
    return part if type(part) is bytes else bytes(memoryview(part))


def _get_send(sock: Any) -> Any:
    """Get the method that sends a frame: of pyzmq's compiled class, unless a subclass has one."""
    return super(zmq.Socket, sock).send if type(sock).send is zmq.Socket.send else sock.send


def _check_str(endpoint: Any) -> str:
    if not isinstance(endpoint, str):
        raise TypeError(f'The endpoint {endpoint!r} is no str')
    return endpoint


def _find(endpoint: str, table: dict[str, str]) -> str:
    """Find the real form of an endpoint, of the last one that was given so."""
    if endpoint not in table:
        for real, given in reversed(table.items()):
            if given == endpoint:
                return real
    return endpoint
