# SPDX-License-Identifier: ZPL-2.1
"""A ZMQStream that sends at once and survives failing callbacks, and one for replies."""

import asyncio
import logging
import os
import sys
import weakref
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import zmq
from zmq.eventloop.zmqstream import ZMQStream as BaseZMQStream

from pyams_zmq.process.connections import SHORT_FRAME, Envelope, Listener
from pyams_zmq.process.server_socket import LINGER
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.close_hook import hook_close, unhook_close
from pyams_zmq.wire.frames import EVENTS, NOBLOCK, POLLIN, POLLOUT, send_frames
from pyams_zmq.wire.message import encode, overloaded

LOGGER = logging.getLogger('PyAMS (zmq)')

REFUSAL_TIME = 0.2
"""Seconds for the replies to messages that wait when their process ends"""

CHECKED_MESSAGES = 8
"""After each of the first 8 messages EVENTS is read (cheaper than a failed recv); after more, recv
until it fails (cheaper than reading EVENTS each time)"""


_SOCKET_ENDED = (zmq.ETERM, zmq.ENOTSOCK)


class ZMQStream(BaseZMQStream):
    """The ZMQStream of pyzmq, with these differences.

    A message is sent at once if the socket accepts it, not on the next iteration of the loop.
    Waiting messages are handled together, for up to `time_slice`. The wake-up for waiting messages
    is not lost when a callback fails or a peer disconnects. If other code closes the socket or
    terminates its context, the stream is closed, with an error in the log.
    """

    socket: Any  # pyzmq types options as str | bytes | int

    time_slice: float = 0.005
    """Seconds after which other sockets and timers are served, even if messages wait"""

    max_tasks: int = 1000
    """Coroutines of callbacks that run at a time; further messages wait in the socket"""

    envelope: Any = None
    _delivered: Any = None  # envelope of the last message whose callback was called
    received = 0
    """Number of received messages"""

    listener: Listener | None = None  # what is known about the connections of the socket

    _is_handling = False
    _is_scheduled = False

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
        """Send a message now, or as soon as the socket accepts it.

        :raises zmq.ZMQError: if the socket can never accept it, for example a second reply
        """
        self._check_closed()
        flags |= zmq.NOBLOCK
        if not self.sending():
            try:
                status = self._transmit(msg, flags=flags, copy=copy, track=track, **kwargs)
            except BaseException as error:
                if not self._can_send_later(error):
                    self._rebuild_io_state()  # the attempt may have cleared the wake-up
                    raise
                # Else the queue of the base class waits for the socket.
            else:
                if callback is not None:
                    self.on_send(callback)
                if self._send_callback is not None:  # on the next iteration: it may send again
                    self.io_loop.add_callback(self._run_callback, self._send_callback, msg, status)
                self._rebuild_io_state()
                return
        super().send_multipart(msg, flags, copy, track, callback, **kwargs)

    def on_recv(self, callback: Any, copy: bool = True) -> None:
        """Set the function that is called with each message, as a list of its frames.

        :param callback: callable, or None to leave messages in the socket; if its attribute
            `wants_frames` is true, it gets :class:`zmq.Frame` objects
        :param copy: false for :class:`zmq.Frame` objects instead of bytes
        """
        super().on_recv(callback, copy=copy and not getattr(callback, 'wants_frames', False))

    def flush(self, flag: int = zmq.POLLIN | zmq.POLLOUT, limit: int | None = None) -> int:
        """Handle waiting messages now, without the loop; drop them if there is no callback.

        :param flag: events to handle
        :param limit: stop after this many messages
        :return: number of received and sent messages
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
        """Return True if a message waits; this does not lose its wake-up."""
        return not self.closed() and bool(self._read_events() & POLLIN)

    def _transmit(self, msg: Any, **kwargs: Any) -> Any:
        return self.socket.send_multipart(msg, **kwargs)

    def _can_send_later(self, error: BaseException) -> bool:
        if isinstance(error, zmq.Again):
            return True
        # A REQ socket takes the next request after the reply to the last one.
        is_early = isinstance(error, zmq.ZMQError) and error.errno == zmq.EFSM
        return is_early and self.socket.type == zmq.REQ

    def _receive(self) -> list[Any] | None:
        frames: list[Any] = self.socket.recv_multipart(zmq.NOBLOCK, copy=self._recv_copy)
        return frames

    def _can_receive(self) -> bool:
        return len(self._tasks) < self.max_tasks

    def _reply_to_failure(self, envelope: list[Any] | None) -> None:
        """Reply to a message whose callback has failed; most socket types do not need a reply."""

    # The FD of a socket is edge-triggered: it does not report messages that are there already. Code
    # that reads the events, which clears the wake-up, has to handle them, or to schedule that.

    def _init_io_state(self) -> None:
        # Registered at the asyncio loop: tornado would add a layer to each call.
        io_loop: Any = self.io_loop
        self._loop: asyncio.AbstractEventLoop = io_loop.asyncio_loop
        self._title = f'The {self.socket.type.name} stream {os.fsdecode(self.socket.last_endpoint)}'
        # A duplicate stays valid when other code closes the socket: the loop would watch the next
        # file that has the number of a closed descriptor.
        self._fd = os.dup(self._fd)
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        self._loop.add_reader(self._fd, self._handle_events, None, 0)
        hook_close(self.socket, self._notice_close)

    def _notice_close(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.closed)  # which closes the stream

    def close(self, linger: int | None = None) -> None:
        """Close the stream and its socket.

        :param linger: milliseconds that unsent messages are kept for; by default the option of the
            socket
        """
        # Without the method of the base class: it needs a socket that works.
        socket, self.socket = self.socket, None
        if socket is None:
            return
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        unhook_close(socket)
        self._close_fd()
        if socket.closed:
            LOGGER.error('%s ends: other code has closed its socket', self._title)
        socket.close(linger)
        if self._close_callback is not None:
            self._run_callback(self._close_callback)

    def _handle_events(self, fd: Any, events: int) -> None:
        deadline = monotonic() + self.time_slice
        many = self.received + CHECKED_MESSAGES
        more = True
        self._is_handling = True
        try:
            while more and self.socket is not None:
                if self._recv_callback is None or self._send_queue.queue or not self._can_receive():
                    more = self._handle(0 if self._recv_callback is None else POLLIN) > 0
                else:  # the usual case; a `recv` that finds no message has read the events
                    more = self._handle_recv() and (self.received > many or self._has_more())
                if more and monotonic() > deadline:
                    break
        except zmq.ZMQError as error:
            if error.errno not in _SOCKET_ENDED:
                raise
            if error.errno == zmq.ETERM:
                LOGGER.error('%s ends: other code has terminated its context', self._title)
            self.close(LINGER)  # with 0, libzmq aborts if a message of several frames is half sent
        except BaseException:  # a signal handler can raise it at any place
            self._loop.call_soon(self.recover)
            raise
        finally:
            self._is_handling = False
            if more and not self.closed():
                self._rebuild_io_state()
            elif self.listener is not None and self._can_receive():
                self.listener.drained = monotonic()

    def recover(self) -> None:
        """Continue after an exception that a signal handler has raised; the loop calls this."""
        self._is_handling = self._is_scheduled = False
        self._rebuild_io_state()

    def _refresh(self) -> None:
        """Update `listener.drained`, because the connections are checked."""
        if not self.closed() and not self._read_events() & POLLIN and self.listener is not None:
            self.listener.drained = monotonic()

    def _has_more(self) -> bool:
        if self.socket is None:
            return False
        return bool(self.socket.get(EVENTS) & POLLIN or self._send_queue.queue)

    def _handle(self, flag: int) -> int:
        """Send one message and receive one, if possible; return how many of both."""
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
        if self.socket is not None and not self._is_handling:
            self._read_events()

    def _read_events(self) -> int:
        events: int = self.socket.get(EVENTS)
        if not self._is_scheduled and (
            (events & POLLIN and self.receiving() and self._can_receive())
            or (events & POLLOUT and self.sending())
        ):
            self._is_scheduled = True
            self.io_loop.add_callback(self._handle_scheduled)
        return events

    def _handle_scheduled(self) -> None:
        self._is_scheduled = False
        self._handle_events(self.socket, 0)

    def _handle_recv(self) -> bool:
        try:
            msg = self._receive()
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EFSM:
                raise
            self.socket.get(EVENTS)  # a REQ that has to send first: the events are not read yet
            return False
        self.received += 1
        if msg is None or self._recv_callback is None:
            return True
        envelope = self._delivered = self.envelope
        try:
            result: Any = self._recv_callback(msg)
        except BaseException as error:  # noqa: BLE001 - SystemExit would end the loop
            self._end_failure(envelope, error)
            return True
        if result is not None and isinstance(result, Awaitable):
            task = asyncio.ensure_future(_await_result(result))
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
        except zmq.Again:  # the peer has disconnected since the events were read
            return
        except Exception as error:  # noqa: BLE001 - an unsendable message must not block the queue
            LOGGER.error('A message cannot be sent: %s', error)
            status = error
        self._send_queue.get()
        if self._send_callback is not None:
            self._run_callback(self._send_callback, msg, status)


async def _await_result(result: Awaitable[Any]) -> None:
    try:
        await result
    except (SystemExit, KeyboardInterrupt) as error:  # which would end the loop
        raise RuntimeError(f'{type(error).__name__} in a callback') from error


class ReplyStream(ZMQStream):
    """Stream of a REP socket that replies to every message, made of a ROUTER socket.

    The REP socket of libzmq silently drops a message without delimiter, and if the peer of such a
    message has disconnected, it loses the reply to another one. Here each message gets its reply,
    and the next one is received after that; meanwhile messages wait in the socket. If a callback
    fails, the peer gets `failure_reply`.

    A callback that calls `detach` replies later. Until then other messages are received, if fewer
    than `concurrency` messages are detached and have not ended. If these are all overdue, nobody
    knows when one of them ends: then other messages get status 503.

    :param concurrency: messages that are handled at a time
    :param listener: counts what each connection receives and sends, or None
    :ivar envelope: envelope of the message that needs a reply (RFC 28/REQREP), or None
    """

    failure_reply = b'[500,"Internal error"]'
    in_hand = 0
    """Number of messages that are detached and have not ended"""

    overdue = 0
    """Number of those whose deadline has passed"""

    no_delimiter_reply = b'[400,"Bad message: no delimiter, an empty frame, before the request"]'

    def __init__(
        self,
        socket: Any,
        *args: Any,
        concurrency: int = 1,
        listener: Listener | None = None,
        **kwargs: Any,
    ):
        if socket.type == zmq.ROUTER:
            # A message that is sent on the socket itself, without an envelope, raises an error.
            socket.router_mandatory = True
        self.concurrency = concurrency
        super().__init__(socket, *args, **kwargs)
        if listener is not None:
            self.listener = listener
            listener.counts = True
            listener.refresh = partial(self._loop.call_soon_threadsafe, self._refresh)

    def _can_receive(self) -> bool:
        return self.envelope is None and (
            self.in_hand < self.concurrency or self.overdue >= self.concurrency
        )

    def recover(self) -> None:
        """Also reply to a message whose callback was not called."""
        if self.envelope is not None and self.envelope is not self._delivered:
            self._reply_to_failure(self.envelope)
        super().recover()

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

    def count_overdue(self, change: int) -> None:
        """Count a detached message whose deadline has passed, or that has ended after that.

        :param change: 1 or -1
        """
        self.overdue += change
        if not self.closed():
            self._rebuild_io_state()

    def refuse(self) -> None:
        """Receive messages although late methods use up the concurrency: they will be refused."""
        self.concurrency = sys.maxsize
        self._rebuild_io_state()

    def refuse_waiting(self, data: bytes) -> None:
        """Reply to the messages that wait, without handling them; the loop has ended.

        :param data: the reply
        """
        end = monotonic() + REFUSAL_TIME
        with suppress(zmq.Again):
            while not self.closed() and monotonic() < end:
                if self._receive() is not None and self.envelope is not None:
                    envelope, self.envelope = self.envelope, None
                    self._route_reply(envelope, data)

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
        receive, copy, listener = self.socket.recv, self._recv_copy, self.listener
        overhead = 0 if listener is None else listener.overhead
        envelope = Envelope((receive(NOBLOCK),))
        body: list[Any] | None = None
        size = 0
        more = True
        while more:
            frame = receive(NOBLOCK, False)
            more = frame.more
            length = len(frame) + overhead  # `Listener.measure`, without its calls
            size += length + (2 if length <= SHORT_FRAME else 9)
            if body is not None:
                body.append(frame.bytes if copy else frame)
            else:
                envelope.append(frame.bytes)
                if not envelope[-1]:
                    body = []
        if listener is not None:
            envelope.connection = listener.count_received(frame, size)
        if body is None:
            if envelope.connection is not None:
                envelope.connection.count_sent(len(self.no_delimiter_reply))
            self._route([envelope[0], self.no_delimiter_reply])
            return None
        if self.overdue >= self.concurrency:
            self._route_reply(envelope, encode(overloaded(self.overdue)))
            return None
        self.envelope = envelope
        if self._recv_callback is None:  # `flush` drops the message
            self._reply_to_failure(self.envelope)
        return body

    def send(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Send the reply, or a part of it; see :meth:`send_multipart`."""
        if type(msg) is bytes and not (args or kwargs):
            self.reply(msg)
        else:
            super().send(msg, *args, **kwargs)

    def reply(self, data: bytes) -> None:
        """Send a reply of one frame, at the lowest cost.

        :raises zmq.ZMQError: EFSM, if no message needs a reply
        """
        envelope = self.envelope
        if envelope is None or self.socket is None or self._send_callback is not None:
            self.send_multipart([data])
            return
        self.envelope = None
        self._route_reply(envelope, data)
        if not self._is_handling:
            self._read_events()

    def send_multipart(self, msg: Any, flags: int = 0, *args: Any, **kwargs: Any) -> None:
        """Send the reply, or with `zmq.SNDMORE` a part of it.

        :raises zmq.ZMQError: EFSM, if no message needs a reply
        """
        if self.envelope is None and not self.closed():
            raise zmq.ZMQError(zmq.EFSM, 'There is no message to reply to')
        if flags & zmq.SNDMORE and self.envelope is not None:
            # A part that is not bytes raises here; later it would leave half a message.
            self.envelope.extend([bytes(memoryview(part)) for part in msg])
        else:
            super().send_multipart(msg, flags, *args, **kwargs)

    def _transmit(self, msg: Any, **kwargs: Any) -> Any:
        envelope = self.envelope
        status = self._route([*envelope, *msg], **kwargs)
        envelope.count_reply(sum(map(len, msg)))
        self.envelope = None
        return status

    def _route(self, frames: list[Any], flags: int = zmq.NOBLOCK, **kwargs: Any) -> Any:
        try:
            return self.socket.send_multipart(frames, flags, **kwargs)
        except zmq.ZMQError as error:
            self._check_lost(error)
        return None

    def _route_reply(self, envelope: list[bytes], data: bytes) -> None:
        size: int | None = len(data)
        try:
            send_frames(self.socket, [*envelope, data])
        except zmq.ZMQError as error:
            self._check_lost(error)
            size = None
        if type(envelope) is Envelope:
            envelope.count_reply(size)

    @staticmethod
    def _check_lost(error: zmq.ZMQError) -> None:
        # The peer has disconnected, or does not read its replies: this one is dropped.
        if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            raise error

    def _reply_to_failure(self, envelope: list[Any] | None) -> None:
        # Unless the callback has replied: then `envelope` is that of another message.
        if envelope is self.envelope and not self.closed():
            self.send(self.failure_reply)
