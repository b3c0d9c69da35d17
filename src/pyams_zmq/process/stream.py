# SPDX-License-Identifier: ZPL-2.1
"""A ZMQStream that sends at once and survives failing callbacks."""

import asyncio
import logging
import os
import weakref
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import zmq
from zmq.eventloop.zmqstream import ZMQStream as BaseZMQStream

from pyams_zmq.process.connections import Listener
from pyams_zmq.process.server_socket import LINGER
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.close_hook import hook_close, unhook_close
from pyams_zmq.wire.frames import EVENTS, POLLIN, POLLOUT

LOGGER = logging.getLogger('PyAMS (zmq)')

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

    takes_jobs = False
    """True if its messages may be jobs, see :func:`pyams_zmq.jobs.zmq_job`"""

    _is_handling = False
    _is_scheduled = False
    _peers: Mapping[bytes, Any] = {}  # those whose messages were read, and wait

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

    def _can_drain(self) -> bool:
        """Return True if nothing but the socket itself ends the receiving of messages."""
        return self.receiving() and self._can_receive()

    def _has_ready(self) -> bool:
        """Return True if a message can be handled that was read before."""
        return False

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
            elif self.listener is not None and self._can_drain():
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
        return bool(self.socket.get(EVENTS) & POLLIN or self._send_queue.queue or self._peers)

    def _handle(self, flag: int) -> int:
        """Send one message and receive one, if possible; return how many of both."""
        if self.socket is None:
            return 0
        events = self.socket.get(EVENTS)
        handled = 0
        if events & POLLOUT and self.sending():
            self._handle_send()
            handled = 1
        is_readable = events & POLLIN or self._has_ready()
        if is_readable and flag & POLLIN and self.socket is not None and self._can_receive():
            handled += self._handle_recv()
        return handled

    def _rebuild_io_state(self) -> None:
        self._update_handler(0)

    def _update_handler(self, state: int) -> None:
        if self.socket is not None and not self._is_handling:
            self._read_events()

    def _read_events(self) -> int:
        events: int = self.socket.get(EVENTS)
        if not self._is_scheduled and (
            ((events & POLLIN or self._has_ready()) and self.receiving() and self._can_receive())
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
