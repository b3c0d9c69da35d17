# SPDX-License-Identifier: ZPL-2.1
"""A ZMQStream that replies at once and cannot be wedged."""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from typing import Any

import zmq
from zmq.eventloop.zmqstream import ZMQStream as BaseZMQStream

from pyams_zmq.wire.frames import EVENTS, MORE, NOBLOCK, POLLIN, POLLOUT, send_frame

LOGGER = logging.getLogger('PyAMS (zmq)')

FEW = 8
"""Messages of a turn after each of which the socket is asked for more: to ask is cheaper than the
exception of a `recv` in vain, which is cheaper than to ask after each of many"""


class ZMQStream(BaseZMQStream):
    """The ZMQStream of pyzmq, with these differences.

    What is sent goes out now, if the socket takes it, instead of on the next turn of the loop.
    Messages that wait are handled together, as many as `turn` allows. Nor does a callback that
    fails, or a peer that leaves, lose the wake-up for what waits.
    """

    socket: Any  # pyzmq types options as str | bytes | int

    turn: float = 0.005
    """Seconds after which other sockets and timers have their turn, though messages wait"""

    most_tasks: int = 1000
    """Coroutines of callbacks that run at a time; further messages wait in the socket"""

    envelope: list[Any] | None = None
    received = 0
    """Messages that have come in"""

    _in_turn = False
    _looks_again = False

    def __init__(self, *args: Any, **kwargs: Any):
        self._tasks: set[asyncio.Task[None]] = set()
        super().__init__(*args, **kwargs)

    def send_multipart(
        self,
        msg: Any,
        flags: int = 0,
        copy: bool = True,
        track: bool = False,
        callback: Any = None,
        **kwargs: Any,
    ) -> None:
        """Send a message now, or as soon as the socket takes it.

        :raises zmq.ZMQError: if the socket can never take it, a second reply for instance
        """
        self._check_closed()
        flags |= zmq.NOBLOCK
        if not self.sending():
            try:
                status = self._transmit(msg, flags=flags, copy=copy, track=track, **kwargs)
            except zmq.Again:
                pass  # the queue of the base class waits for the socket
            else:
                if callback is not None:
                    self.on_send(callback)
                if self._send_callback is not None:  # on the next turn: it may send again
                    self.io_loop.add_callback(self._run_callback, self._send_callback, msg, status)
                self._rebuild_io_state()
                return
        super().send_multipart(msg, flags, copy, track, callback, **kwargs)

    def on_recv(self, callback: Any, copy: bool = True) -> None:
        """Call back with each message, as a list of its frames.

        :param callback: callable, or None to leave messages in the socket; one which has a true
            attribute `wants_frames` gets :class:`zmq.Frame` objects
        :param copy: false for :class:`zmq.Frame` objects instead of bytes
        """
        super().on_recv(callback, copy=copy and not getattr(callback, 'wants_frames', False))

    def flush(self, flag: int = zmq.POLLIN | zmq.POLLOUT, limit: int | None = None) -> int:
        """Handle what waits now, without the loop; drop messages if no callback wants them.

        :param flag: what to handle
        :param limit: stop after this many messages
        :return: number of messages that were received and sent
        """
        self._check_closed()
        count = 0
        while not limit or count < limit:
            handled = self._handle(flag)
            if not handled:
                break
            count += handled
        self._rebuild_io_state()
        return count

    def readable(self) -> bool:
        """Tell if a message waits; looking does not lose its wake-up."""
        return not self.closed() and bool(self._look() & POLLIN)

    def _transmit(self, msg: Any, **kwargs: Any) -> Any:
        return self.socket.send_multipart(msg, **kwargs)

    def _receive(self) -> list[Any] | None:
        frames: list[Any] = self.socket.recv_multipart(zmq.NOBLOCK, copy=self._recv_copy)
        return frames

    def _can_receive(self) -> bool:
        return len(self._tasks) < self.most_tasks

    def _reply_to_failure(self, envelope: list[Any] | None) -> None:
        """Answer a message whose callback has failed; most sockets owe no answer."""

    # The FD of a socket is edge-triggered, it says nothing of what is there already. Whoever
    # reads the events, which ends the edge, handles what they show, or has the loop do it on
    # its next turn.

    def _init_io_state(self) -> None:
        # The loop below that of tornado calls us without detours.
        io_loop: Any = self.io_loop
        self._loop: asyncio.AbstractEventLoop = io_loop.asyncio_loop
        self._loop.add_reader(self._fd, self._handle_events, None, 0)

    def close(self, linger: int | None = None) -> None:
        """Close the stream and its socket.

        :param linger: milliseconds that unsent messages are kept for; by default the option of the
            socket
        """
        if self.socket is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        super().close(linger)

    def _handle_events(self, fd: Any, events: int) -> None:
        deadline = monotonic() + self.turn
        many = self.received + FEW
        more = True
        self._in_turn = True
        try:
            while more and self.socket is not None:
                if self._recv_callback is None or self._send_queue.queue or not self._can_receive():
                    more = self._handle(0 if self._recv_callback is None else POLLIN) > 0
                else:  # the usual case; to find no message has the effect of a look at the events
                    more = self._handle_recv() and (self.received > many or self._may_go_on())
                if more and monotonic() > deadline:
                    break
        except zmq.ZMQError as error:
            if error.errno not in (zmq.ETERM, zmq.ENOTSOCK):
                raise
            # Its context was terminated, or somebody has closed it: it does not even tell its FD.
            self._loop.remove_reader(self._fd)
            self.socket.close(0)
            self.socket = None
        finally:
            self._in_turn = False
            if more and not self.closed():
                self._rebuild_io_state()

    def _may_go_on(self) -> bool:
        if self.socket is None:
            return False
        return bool(self.socket.get(EVENTS) & POLLIN or self._send_queue.queue)

    def _handle(self, flag: int) -> int:
        """Send a message and receive one, if there are any; return their number."""
        if self.socket is None:
            return 0
        events = self.socket.get(EVENTS)
        handled = 0
        if events & POLLOUT and self.sending():
            self._handle_send()
            handled = 1
        if events & flag & POLLIN and self.socket is not None and self._can_receive():
            self._handle_recv()
            handled += 1
        return handled

    def _rebuild_io_state(self) -> None:
        self._update_handler(0)

    def _update_handler(self, state: int) -> None:
        if self.socket is not None and not self._in_turn:
            self._look()

    def _look(self) -> int:
        events: int = self.socket.get(EVENTS)
        if not self._looks_again and (
            (events & POLLIN and self.receiving() and self._can_receive())
            or (events & POLLOUT and self.sending())
        ):
            self._looks_again = True
            self.io_loop.add_callback(self._look_again)
        return events

    def _look_again(self) -> None:
        self._looks_again = False
        self._handle_events(self.socket, 0)

    def _handle_recv(self) -> bool:
        try:
            msg = self._receive()
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EFSM:
                raise
            self.socket.get(EVENTS)  # it is not the turn of a REQ, and nothing was looked at
            return False
        self.received += 1
        if msg is None or self._recv_callback is None:
            return True
        envelope = self.envelope
        try:
            result: Any = self._recv_callback(msg)
        except BaseException as error:  # noqa: BLE001 - SystemExit would end the loop
            self._end_failure(envelope, error)
            return True
        if result is not None and isinstance(result, Awaitable):
            task = asyncio.ensure_future(_contain(result))
            self._tasks.add(task)
            task.add_done_callback(partial(self._end_task, envelope))
        return True

    def _end_task(self, envelope: list[Any] | None, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self._end_failure(envelope, error)
        if not self.closed():
            self._rebuild_io_state()

    def _end_failure(self, envelope: list[Any] | None, error: BaseException) -> None:
        self._reply_to_failure(envelope)
        if not isinstance(error, asyncio.CancelledError):
            LOGGER.error('A callback failed', exc_info=error)

    def _handle_send(self) -> None:
        msg, kwargs = self._send_queue.queue[0]
        try:
            status = self._transmit(msg, **kwargs)
        except zmq.Again:  # the peer has left since the events were read
            return
        except Exception as error:  # noqa: BLE001 - whatever cannot be sent must not stay in front
            LOGGER.error('A message cannot be sent: %s', error)
            status = error
        self._send_queue.get()
        if self._send_callback is not None:
            self._run_callback(self._send_callback, msg, status)


async def _contain(result: Awaitable[Any]) -> None:
    try:
        await result
    except (SystemExit, KeyboardInterrupt) as error:  # which would end the loop
        raise RuntimeError(f'{type(error).__name__} in a callback') from error


class ReplyStream(ZMQStream):
    """Stream of a REP socket that answers every message, made of a ROUTER socket.

    The REP socket of libzmq drops a message without delimiter in silence, and when the peer of
    such a message has left already, it loses the reply to another one. Here each message gets
    its reply, and the next one is received when it was sent: the messages that wait do so in the
    socket. A callback that fails gets its peer an answer, `failure_reply`.

    A callback that calls `detach` replies later. Meanwhile other messages come in, if `concurrency`
    is above the number of those that are detached, and have not ended.

    :param concurrency: messages in hand at a time
    :ivar envelope: envelope of the message that is owed a reply (RFC 28/REQREP), None without one
    """

    failure_reply = b'[500,"Internal error"]'
    in_hand = 0
    """Messages that are detached, and have not ended"""

    no_delimiter_reply = b'[400,"Bad message: no delimiter, an empty frame, before the request"]'

    def __init__(self, socket: Any, *args: Any, concurrency: int = 1, **kwargs: Any):
        self._prepare(socket)
        self.concurrency = concurrency
        super().__init__(socket, *args, **kwargs)

    @staticmethod
    def _prepare(socket: Any) -> None:
        # Then nobody can send past this stream, on the socket, without hearing of it.
        socket.router_mandatory = True

    def _can_receive(self) -> bool:
        return self.envelope is None and self.in_hand < self.concurrency

    def detach(self) -> tuple[Callable[[bytes], None], Callable[[], None]]:
        """Return functions that reply to the current message later.

        :return: a function that sends the reply, to be called once, and one to be called when the
            message no longer counts for the `concurrency`
        :raises zmq.ZMQError: EFSM, if no message is owed a reply
        """
        envelope, self.envelope = self.envelope, None
        if envelope is None:
            raise zmq.ZMQError(zmq.EFSM, 'There is no message to reply to')
        self.in_hand += 1
        return partial(self._reply_to, envelope), self._end_reply

    def refuse(self) -> None:
        """Take messages though late methods have all places: from now on they are refused."""
        self.concurrency = sys.maxsize
        self._rebuild_io_state()

    def _reply_to(self, envelope: list[Any], data: bytes) -> None:
        if not self.closed():
            self._route_reply(envelope, data)
            if self._send_callback is not None:
                self.io_loop.add_callback(self._run_callback, self._send_callback, [data], None)
            self._rebuild_io_state()

    def _end_reply(self) -> None:
        self.in_hand -= 1
        if not self.closed():
            self._rebuild_io_state()

    def _receive(self) -> list[Any] | None:
        receive, copy = self.socket.recv, self._recv_copy
        envelope: list[bytes] = [receive(NOBLOCK)]
        body: list[Any] | None = None
        more = True
        while more:
            frame = receive(NOBLOCK, False)
            more = frame.more
            if body is not None:
                body.append(frame.bytes if copy else frame)
            else:
                envelope.append(frame.bytes)
                if not envelope[-1]:
                    body = []
        if body is None:
            self._route([envelope[0], self.no_delimiter_reply])
            return None
        self.envelope = envelope
        if self._recv_callback is None:  # `flush` drops what nobody wants
            self._reply_to_failure(self.envelope)
        return body

    def send(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Send the reply, or a part of it; see `send_multipart`."""
        if type(msg) is bytes and not (args or kwargs):
            self.reply(msg)
        else:
            super().send(msg, *args, **kwargs)

    def reply(self, data: bytes) -> None:
        """Send the reply, without detours.

        :raises zmq.ZMQError: EFSM, if no message is owed a reply
        """
        envelope = self.envelope
        if envelope is None or self.socket is None or self._send_callback is not None:
            self.send_multipart([data])
            return
        self.envelope = None
        self._route_reply(envelope, data)
        if not self._in_turn:
            self._look()

    def send_multipart(self, msg: Any, flags: int = 0, *args: Any, **kwargs: Any) -> None:
        """Send the reply, or with `zmq.SNDMORE` a part of it.

        :raises zmq.ZMQError: EFSM, if no message is owed a reply
        """
        if self.envelope is None and not self.closed():
            raise zmq.ZMQError(zmq.EFSM, 'There is no message to reply to')
        if flags & zmq.SNDMORE and self.envelope is not None:
            # Here a part that is no bytes is an error; later it would leave half a message.
            self.envelope.extend([bytes(memoryview(part)) for part in msg])
        else:
            super().send_multipart(msg, flags, *args, **kwargs)

    def _transmit(self, msg: Any, **kwargs: Any) -> Any:
        status = self._route([*(self.envelope or ()), *msg], **kwargs)
        self.envelope = None
        return status

    def _route(self, frames: list[Any], flags: int = zmq.NOBLOCK, **kwargs: Any) -> Any:
        try:
            return self.socket.send_multipart(frames, flags, **kwargs)
        except zmq.ZMQError as error:
            self._check_lost(error)
        return None

    def _route_reply(self, envelope: list[bytes], data: bytes) -> None:
        # As `send_multipart` does, which looks at the type of each frame first.
        try:
            for frame in envelope:
                send_frame(self.socket, frame, MORE)
            send_frame(self.socket, data, NOBLOCK)
        except zmq.ZMQError as error:
            self._check_lost(error)

    @staticmethod
    def _check_lost(error: zmq.ZMQError) -> None:
        # The peer is gone, or reads none of its replies: it loses this one.
        if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            raise error

    def _reply_to_failure(self, envelope: list[Any] | None) -> None:
        # Unless its callback had replied already: then another message is owed a reply.
        if envelope is self.envelope and not self.closed():
            self.send(self.failure_reply)
