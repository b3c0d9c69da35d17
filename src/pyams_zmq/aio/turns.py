# SPDX-License-Identifier: ZPL-2.1
"""What a transport does with its socket when it is its turn.

The descriptor of a socket is edge-triggered: it says that something has happened since anybody
looked, not what there is. Whatever is done with the socket looks, even a `send` or an option that
is read, and then the descriptor is silent about what came in before. So each turn ends with a
look which found nothing, or with another turn to come; and after all that is done outside of a
turn there is one.
"""

import asyncio
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import zmq

from pyams_zmq.aio.buffer import Message, WriteBuffer
from pyams_zmq.client.connection import as_os_error, make_os_error
from pyams_zmq.wire.frames import EVENTS, MORE, NOBLOCK, POLLIN, POLLOUT

TURN = 0.005
"""Seconds after which other callbacks of the loop have their turn, though messages wait"""

MOST = 256
"""Messages after which they have"""

RETRY = 0.01
"""Seconds until a peer is tried again whose queue is full, while other peers of the socket have
room; libzmq tells of the room only"""

GUARD = 0.1
"""Seconds between looks at a socket which others may use, too: they take its wake-ups away"""

_sockets: set[Any] = set()  # of transports that have not ended: never collected before them
_LOST = frozenset((zmq.ETERM, zmq.ENOTSOCK))
_NOTHING = frozenset((zmq.EAGAIN, zmq.EFSM))
# A wake-up may well mean a message, except for these: PUB and PUSH have none, REQ and REP not now.
_SEND_ONLY = frozenset((zmq.PUB, zmq.PUSH))
_NOT_AT_ONCE = frozenset((*_SEND_ONLY, zmq.REQ, zmq.REP))


class Turns(asyncio.BaseTransport):
    """Receives and sends when the loop lets it, until the socket ends.

    :param loop: event loop
    :param sock: `zmq.Socket`
    :param protocol: :class:`.ZmqProtocol`
    :param is_shared: true if somebody else may use the socket, too
    """

    def __init__(self, loop: Any, sock: Any, protocol: Any, is_shared: bool):
        with as_os_error():
            self._type = zmq.SocketType(sock.getsockopt(zmq.TYPE))
        super().__init__({'zmq_socket': sock, 'zmq_type': self._type})
        self._loop = loop
        self._sock = sock
        self._protocol = protocol
        self._is_shared = is_shared
        self._has_message_at_wake_up = self._type not in _NOT_AT_ONCE
        # A REQ takes the next request when it has the reply to the last one. A second reply of a
        # REP must not wait for the next request, however: it would answer that.
        self._not_now = _NOTHING if self._type == zmq.REQ else frozenset((zmq.EAGAIN,))
        self._receive_frame = sock.recv
        self._send_frame = _get_send(sock)
        self._get_option = sock.getsockopt
        self._buffer = WriteBuffer()
        self._is_reading = True
        self._is_closing = False
        self._is_ending = False
        self._is_started = False
        self._is_in_turn = False
        self._has_looked = False
        self._looks: asyncio.Handle | None = None
        self._retries: asyncio.Handle | None = None
        self._guards: asyncio.Handle | None = None

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
        self._sock.close(linger)
        _sockets.discard(self._sock)

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
        self._turn(has_message=False)

    def _look_after_write(self) -> None:
        # The first time since the last turn, to look at once is cheaper than one more turn of the
        # loop; of many writes in a row, only two look.
        if self._has_looked:
            self._look_soon()
        elif self._buffer or (self._is_reading and self._type not in _SEND_ONLY):
            self._has_looked = True
            try:
                events = self._get_option(EVENTS)
            except zmq.ZMQError as error:
                self._fail(error)
                return
            if self._buffer or (events & POLLIN and self._is_reading):
                self._look_soon()

    def _retry(self) -> None:
        self._retries = None
        self._look_soon()

    def _guard(self) -> None:
        if not self._has_ended():
            self._guards = self._loop.call_later(GUARD, self._guard)
            self._look_soon()

    def _wake_up(self) -> None:
        self._turn(has_message=self._has_message_at_wake_up and not self._buffer)

    def _turn(self, *, has_message: bool) -> None:
        """Receive and send until there is nothing to do, or others have their turn.

        :param has_message: true if there may well be a message to receive
        """
        self._is_in_turn = True
        self._has_looked = False
        try:
            # Most wake-ups are for one message. To ask the socket for more is cheaper than the
            # exception of a `recv` in vain, which is cheaper than to ask after each of many.
            most = 1
            if has_message and self._is_reading:
                self._receive()
                if self._is_ending:
                    return
                most = MOST
            events = self._get_option(EVENTS)
            if self._buffer or (events & POLLIN and self._is_reading):
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
            if events & POLLIN and self._is_reading:
                for _number in range(most):
                    if not self._receive() or monotonic() > deadline:
                        break
            if events & POLLOUT and self._buffer:
                is_blocked = not self._flush(deadline)
            if self._is_ending:
                return
            events = self._get_option(EVENTS)
            has_room = bool(events & POLLOUT and self._buffer)
            if is_blocked and has_room and self._retries is None:
                self._retries = self._loop.call_later(RETRY, self._retry)
            has_messages = bool(events & POLLIN and self._is_reading)
            if not has_messages and (is_blocked or not has_room):
                return
            if most == MOST or monotonic() > deadline:
                self._look_soon()
                return
            most = MOST

    def _receive(self) -> bool:
        """Receive a message and give it to the protocol; tell if it may want the next one."""
        try:
            frame = self._receive_frame(NOBLOCK, False)
            parts = [frame.bytes]
            while frame.more:
                frame = self._receive_frame(NOBLOCK, False)
                parts.append(frame.bytes)
        except zmq.ZMQError as error:
            if error.errno not in _NOTHING:
                raise
            return False
        if not self._is_closing:
            try:
                self._protocol.msg_received(tuple(parts))
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - of others, told to the loop
                self._report('The protocol failed in msg_received', error)
        return self._is_reading

    def _write_now(self, frames: Message) -> bool:
        try:
            return self._transmit(frames)
        except zmq.ZMQError as error:
            if error.errno not in _LOST:
                raise make_os_error(error) from error
            self._fail(error)
            return True

    def _flush(self, deadline: float) -> bool:
        """Send what is buffered; tell if the socket has taken it, or would take more."""
        is_sent = True
        while self._buffer:
            frames = self._buffer.take()
            try:
                is_sent = self._transmit(frames)
            except zmq.ZMQError as error:
                if error.errno in _LOST:
                    raise
                self._report('A message cannot be sent and was dropped', make_os_error(error))
            except Exception as error:  # noqa: BLE001 - of a subclass which refuses the message
                self._report('A message cannot be sent and was dropped', error)
            if not is_sent:
                self._buffer.put_back(frames)
            if not is_sent or monotonic() > deadline:
                break
        self._pause_or_resume()
        if self._is_closing and not self._buffer:
            self._stop(None)
        return is_sent

    def _transmit(self, frames: Message) -> bool:
        """Send a message; tell if it is gone, which it is too if its peer is unknown."""
        try:
            for number in range(len(frames) - 1):
                self._send_frame(frames[number], MORE)
            self._send_frame(frames[-1], NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in self._not_now:
                return False
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._report('A message has no peer to go to and was dropped', make_os_error(error))
        return True

    def _pause_or_resume(self) -> None:
        if self._buffer.must_pause():
            self._call('pause_writing')
        elif self._buffer.may_resume():
            self._call('resume_writing')

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


def _get_send(sock: Any) -> Any:
    """Get the method that sends a frame: of pyzmq's compiled class, unless a subclass has one."""
    return super(zmq.Socket, sock).send if type(sock).send is zmq.Socket.send else sock.send
