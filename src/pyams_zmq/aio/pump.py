# SPDX-License-Identifier: ZPL-2.1
"""Moves messages between a socket and a protocol, in turns of the event loop.

The descriptor of a ØMQ socket (`ZMQ_FD`) is edge-triggered: it announces that the state of the
socket has changed, and every access to the socket clears it, even a `send` or a `getsockopt`. So a
turn ends only when `ZMQ_EVENTS` shows that nothing is left to do, or when another turn is
scheduled, and every access outside of a turn schedules one.
"""

import asyncio
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import zmq

from pyams_zmq.aio.buffer import Message, WriteBuffer
from pyams_zmq.client.connection import as_os_error, make_os_error
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.close_hook import hook_close, unhook_close
from pyams_zmq.wire.frames import EVENTS, MORE, NOBLOCK, POLLIN, POLLOUT
from pyams_zmq.wire.linger import CLOSE_LINGER, lengthen

LOGGER = logging.getLogger('PyAMS (zmq)')

TURN = 0.005
"""Seconds after which a turn ends, so that other callbacks of the loop run"""

MOST = 256
"""Messages after which a turn ends"""

RETRY = 0.01
"""Seconds between attempts to send to a peer whose queue is full, while other peers of the socket
have room: libzmq does not announce room in one queue if another one has room"""

GUARD = 0.1
"""Seconds between turns of a socket that other code may access, which clears its descriptor"""

_open_sockets: set[Any] = set()  # keeps each socket alive until its pump has ended
_SOCKET_ENDED = frozenset((zmq.ETERM, zmq.ENOTSOCK))
_NO_MESSAGE = frozenset((zmq.EAGAIN, zmq.EFSM))  # EFSM: a REQ or REP socket must send first
# PUB and PUSH never receive. For REQ and REP, the descriptor often announces room to send.
_SEND_ONLY = frozenset((zmq.PUB, zmq.PUSH))
_SELDOM_READABLE = frozenset((*_SEND_ONLY, zmq.REQ, zmq.REP))


class MessagePump:
    """Receives and sends the messages of one socket without blocking the loop.

    :param loop: event loop with `add_reader`
    :param sock: `zmq.Socket`, which the pump closes at its end
    :param protocol: :class:`.ZmqProtocol`
    :param transport: transport that is passed to the exception handler of the loop
    :param release: called once, before the socket is closed
    :param is_monitor: true for a monitor, which ends with the socket of the transport
    :ivar type: the `zmq.SocketType` of the socket
    :ivar buffer: messages that the socket has not taken
    :ivar is_reading: true if messages are received
    :ivar is_closing: true after `close` and `abort`, and after an error of the socket
    :ivar is_ended: true when the socket is not watched any more
    """

    def __init__(
        self,
        loop: Any,
        sock: Any,
        protocol: Any,
        transport: Any,
        release: Callable[[], None],
        *,
        is_monitor: bool = False,
    ):
        with as_os_error():
            self.type = zmq.SocketType(sock.getsockopt(zmq.TYPE))
        self.protocol = protocol
        self.buffer = WriteBuffer()
        self.is_reading = True
        self.is_started = self.is_closing = self.is_ended = False
        self._loop = loop
        self._sock = sock
        self._transport = transport
        self._release = release
        self._is_monitor = is_monitor
        self._may_receive_at_once = self.type not in _SELDOM_READABLE
        # A REQ socket takes the next request after the reply to the last one: EFSM means "later".
        # A second reply on a REP socket must fail, because it would answer the next request.
        self._send_later = {zmq.EAGAIN, zmq.EFSM} if self.type == zmq.REQ else {zmq.EAGAIN}
        self._receive_frame = sock.recv
        self._send_frame = _get_send(sock)
        self._get_option = sock.getsockopt
        self._is_in_turn = False
        self._has_checked = False
        self._next_turn: asyncio.Handle | None = None
        self._retry: asyncio.Handle | None = None
        self._guard: asyncio.Handle | None = None

    # Start and end

    def start(self) -> None:
        """Receive and send from now on.

        :raises OSError: EMFILE, when the process has no descriptor left
        """
        with as_os_error():
            fd = self._sock.getsockopt(zmq.FD)
        # A duplicate stays valid when other code closes the socket. uvloop aborts if a descriptor
        # that it watches is closed, and the number of a closed descriptor may be used again.
        self._fd = os.dup(fd)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        self.is_started = True
        _open_sockets.add(self._sock)
        self._loop.add_reader(self._fd, self._on_readable)
        hook_close(self._sock, self._notice_close)
        self.schedule_turn()  # for messages that arrived before the descriptor was watched

    def _notice_close(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.schedule_turn)

    def close(self) -> None:
        """Receive nothing more, send the buffered messages, then end."""
        if not self.is_closing:
            self.is_closing = True
            # A REQ socket must receive each reply before it can send the next buffered request.
            self.is_reading = self.type == zmq.REQ
            if self.buffer and not self._loop.is_closed():
                self.schedule_turn()
            else:
                self._stop(None)

    def abort(self) -> None:
        """Drop the buffered messages and close the socket now."""
        self._stop(None)
        self._close_socket(CLOSE_LINGER)

    def _has_ended(self) -> bool:
        return self.is_ended or self._loop.is_closed()

    def _fail(self, error: zmq.ZMQError) -> None:
        if not (self.is_ended or self._is_monitor):
            LOGGER.error(
                '%r ends: other code has closed its socket, or terminated its context (%s)',
                self._transport,
                error,
            )
        self._stop(make_os_error(error))

    def _stop(self, error: OSError | None) -> None:
        self.is_closing = True
        if self.is_ended:
            return
        self.is_ended = True
        self.is_reading = False
        self.buffer.clear()
        if self._loop.is_closed():  # it can call neither `_end` nor the protocol
            self._close_fd()
            self._close_socket(None)
            return
        self._loop.remove_reader(self._fd)
        self._close_fd()
        for handle in (self._next_turn, self._retry, self._guard):
            if handle is not None:
                handle.cancel()
        self._loop.call_soon(self._end, error)

    def _end(self, error: OSError | None) -> None:
        self._close_socket(None)
        self.pause_or_resume()
        self.call('connection_lost', error)

    def _close_socket(self, linger: int | None) -> None:
        unhook_close(self._sock)
        if linger is None:
            linger = CLOSE_LINGER
            with suppress(Exception):  # other code has closed it, or the interpreter ends
                linger = lengthen(self._sock.getsockopt(zmq.LINGER))
        if self._sock in _open_sockets:
            _open_sockets.remove(self._sock)
            self._release()
        self._sock.close(linger)

    # Turns

    @contextmanager
    def outside_turn(self) -> Iterator[None]:
        """Access the socket outside of a turn, with its errors as OSError."""
        try:
            with as_os_error():
                yield
        finally:
            self.schedule_turn()

    def guard(self) -> None:
        """Take turns at regular intervals from now on, because other code accesses the socket."""
        if self._guard is None:
            self._repeat_guard()

    def _repeat_guard(self) -> None:
        if not self._has_ended():
            self._guard = self._loop.call_later(GUARD, self._repeat_guard)
            self.schedule_turn()

    def schedule_turn(self) -> None:
        """Take a turn in the next iteration of the loop."""
        if self._next_turn is None and self.is_started and not self._has_ended():
            self._next_turn = self._loop.call_soon(self._on_scheduled)

    def _on_scheduled(self) -> None:
        self._next_turn = None
        self.take_turn()

    def _on_retry(self) -> None:
        self._retry = None
        self.schedule_turn()

    def _on_readable(self) -> None:
        self.take_turn(has_message=self._may_receive_at_once and not self.buffer)

    def take_turn(self, *, has_message: bool = False) -> None:
        """Receive and send until nothing is left to do, or the turn has lasted long enough.

        :param has_message: true if a message is likely to be there
        """
        self._is_in_turn = True
        self._has_checked = False
        try:
            # Most wake-ups are for one message. After it, reading ZMQ_EVENTS is cheaper than the
            # exception of a failed `recv`. If there are many, one exception at the end is cheaper
            # than reading ZMQ_EVENTS after each.
            most = 1
            if has_message and self.is_reading:
                self._receive()
                if self.is_ended:
                    return
                most = MOST
            events = self._get_option(EVENTS)
            if self.buffer or (events & POLLIN and self.is_reading):
                self._work(events, most)
        except zmq.ZMQError as error:
            self._fail(error)
        except BaseException:
            self.schedule_turn()
            raise
        finally:
            self._is_in_turn = False

    def _work(self, events: int, most: int) -> None:
        deadline = monotonic() + TURN
        while True:
            is_blocked = False
            if events & POLLIN and self.is_reading:
                for _number in range(most):
                    if not self._receive() or monotonic() > deadline:
                        break
            if events & POLLOUT and self.buffer:
                is_blocked = not self._flush(deadline)
            if self.is_ended:
                return
            events = self._get_option(EVENTS)
            has_room = bool(events & POLLOUT and self.buffer)
            if is_blocked and has_room and self._retry is None:
                self._retry = self._loop.call_later(RETRY, self._on_retry)
            has_messages = bool(events & POLLIN and self.is_reading)
            if not has_messages and (is_blocked or not has_room):
                return
            if most == MOST or monotonic() > deadline:
                self.schedule_turn()
                return
            most = MOST

    # Receive

    def pause_reading(self) -> None:
        """Leave messages in the socket until `resume_reading`."""
        if not self.is_closing:
            self.is_reading = False

    def resume_reading(self) -> None:
        """Receive messages again."""
        if not self.is_closing:
            self.is_reading = True
            self.schedule_turn()

    def _receive(self) -> bool:
        """Pass a message to the protocol; return True if there may be another one to receive."""
        try:  # not by `receive` of wire.frames, with which an echo takes 8 % more processor time
            frame = self._receive_frame(NOBLOCK, False)
            frames = [frame.bytes]
            while frame.more:
                frame = self._receive_frame(NOBLOCK, False)
                frames.append(frame.bytes)
        except zmq.ZMQError as error:
            if error.errno not in _NO_MESSAGE:
                raise
            return False
        if not self.is_closing:
            try:
                self.protocol.msg_received(tuple(frames))
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - the loop's exception handler gets it
                self._report('The protocol failed in msg_received', error)
        return self.is_reading

    # Send

    def send(self, frames: Message) -> None:
        """Send a message now, or buffer it if the socket does not take it.

        :raises OSError: if the socket can never send it
        """
        try:
            is_sent = not self.buffer and self._transmit(frames)
        except zmq.ZMQError as error:
            if error.errno in _SOCKET_ENDED:
                self._fail(error)
                return
            self.schedule_turn()  # the attempt has cleared the descriptor
            raise make_os_error(error) from error
        except BaseException:
            self.schedule_turn()
            raise
        if not is_sent:
            self.buffer.put(frames)
            self.pause_or_resume()
        if not self._is_in_turn and self._next_turn is None:
            self._check_after_send()

    def _check_after_send(self) -> None:
        # For the first message since the last turn, reading ZMQ_EVENTS is cheaper than another
        # turn. For many in a row, the second one schedules a turn and the others do nothing.
        if self._has_checked:
            self.schedule_turn()
        elif self.buffer or (self.is_reading and self.type not in _SEND_ONLY):
            self._has_checked = True
            try:
                events = self._get_option(EVENTS)
            except zmq.ZMQError as error:
                self._fail(error)
                return
            if self.buffer or (events & POLLIN and self.is_reading):
                self.schedule_turn()

    def _flush(self, deadline: float) -> bool:
        """Send buffered messages until *deadline*; return False if the socket takes no more."""
        is_sent = True
        while self.buffer:
            frames = self.buffer.take()
            try:
                is_sent = self._transmit(frames)
            except Exception as error:
                if isinstance(error, zmq.ZMQError):
                    if error.errno in _SOCKET_ENDED:
                        raise
                    error = make_os_error(error)
                self._report('A message cannot be sent and was dropped', error)
            if not is_sent:
                self.buffer.put_back(frames)
            if not is_sent or monotonic() > deadline:
                break
        self.pause_or_resume()
        if self.is_closing and not self.buffer:
            self._stop(None)
        return is_sent

    def _transmit(self, frames: Message) -> bool:
        """Send a message; return False if the socket cannot take it now.

        A message whose peer is unknown is reported and dropped.
        """
        try:
            for number in range(len(frames) - 1):
                self._send_frame(frames[number], MORE)
            self._send_frame(frames[-1], NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in self._send_later:
                return False
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._report('A message has no peer to go to and was dropped', make_os_error(error))
        return True

    def pause_or_resume(self) -> None:
        """Call `pause_writing` or `resume_writing` if the size of the buffer requires it."""
        method = self.buffer.update_state()
        if method is not None:
            self.call(method)

    # Call the protocol

    def call(self, name: str, *arguments: Any) -> None:
        """Call a method of the protocol; the exception handler of the loop gets its errors."""
        try:
            getattr(self.protocol, name)(*arguments)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - the loop's exception handler gets it
            self._report(f'The protocol failed in {name}', error)

    def _report(self, message: str, error: BaseException) -> None:
        self._loop.call_exception_handler(
            {
                'message': message,
                'exception': error,
                'transport': self._transport,
                'protocol': self.protocol,
            }
        )


def _get_send(sock: Any) -> Any:
    """Return the method that sends a frame: compiled, unless a subclass overrides it."""
    return super(zmq.Socket, sock).send if type(sock).send is zmq.Socket.send else sock.send
