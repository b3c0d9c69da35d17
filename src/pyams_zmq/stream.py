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

"""PyAMS_zmq.stream module: a ZMQStream that replies at once and cannot be wedged."""

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from typing import Any

import zmq
from zmq.eventloop.zmqstream import ZMQStream as BaseZMQStream

__docformat__ = 'restructuredtext'

LOGGER = logging.getLogger('PyAMS (zmq)')


class ZMQStream(BaseZMQStream):
    """The ZMQStream of pyzmq, with these differences.

    What is sent goes out now, if the socket takes it, instead of on the next turn of the loop. A
    callback that fails on a REP socket gets its peer an answer, `failure_reply`: otherwise the
    socket would wait for a reply for ever, and receive nothing any more. Nor does a callback
    that fails, or a peer that leaves, lose the wake-up for what waits.
    """

    socket: Any  # pyzmq types options as str | bytes | int

    failure_reply = b'[500,"Internal error"]'

    _looks_again = False
    _sent = 0

    def __init__(self, *args: Any, **kwargs: Any):
        self._tasks: set[asyncio.Future[Any]] = set()
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
                status = self.socket.send_multipart(msg, flags, copy=copy, track=track, **kwargs)
            except zmq.Again:
                pass  # the queue of the base class waits for the socket
            else:
                self._sent += 1
                if callback is not None:
                    self.on_send(callback)
                if self._send_callback is not None:  # on the next turn: it may send again
                    self.io_loop.add_callback(self._run_callback, self._send_callback, msg, status)
                self._update_handler(self._state)
                return
        super().send_multipart(msg, flags, copy, track, callback, **kwargs)

    def readable(self) -> bool:
        """Tell if a message waits; looking does not lose its wake-up."""
        if self.closed():
            return False
        return bool(self._look(self._state) & zmq.POLLIN)

    def _handle_events(self, fd: Any, events: int) -> None:
        try:
            super()._handle_events(fd, events)
        except BaseException:
            self._rebuild_io_state()  # which the base class does only if all went well
            raise

    def _update_handler(self, state: int) -> None:
        if self.socket is not None:
            self._look(state)

    def _look(self, state: int) -> int:
        # The FD of a socket is edge-triggered, it says nothing of what is there already: whoever
        # reads the events, which ends the edge, has the loop look again on its next turn, once.
        events = int(self.socket.EVENTS)
        if state & events and not self._looks_again:
            self._looks_again = True
            self.io_loop.add_callback(self._look_again)
        return events

    def _look_again(self) -> None:
        self._looks_again = False
        if self.socket is not None:
            self._handle_events(self.socket, 0)

    def _handle_recv(self) -> None:
        if self._flushed:
            return
        try:
            msg = self.socket.recv_multipart(zmq.NOBLOCK, copy=self._recv_copy)
        except zmq.Again:
            return
        if self._recv_callback is None:  # `flush` drops what nobody wants
            return
        sent = self._sent
        try:
            result: Any = self._recv_callback(msg)
        except BaseException:
            self._reply_to_failure(sent)
            raise  # the loop logs it
        if isinstance(result, Awaitable):
            task = asyncio.ensure_future(result)
            self._tasks.add(task)
            task.add_done_callback(partial(self._end_task, sent))

    def _end_task(self, sent: int, task: 'asyncio.Future[Any]') -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            LOGGER.error('A callback failed', exc_info=error)
        if error is not None or task.cancelled():
            self._reply_to_failure(sent)

    def _reply_to_failure(self, sent: int) -> None:
        # Unless its callback had replied already: then the socket owes a reply to another message.
        if self.socket is not None and self.socket.type == zmq.REP:
            if self._sent == sent and self.socket.EVENTS & zmq.POLLOUT:
                with suppress(zmq.ZMQError):
                    self.socket.send(self.failure_reply, zmq.NOBLOCK)
                    self._sent += 1
            self._update_handler(self._state)

    def _handle_send(self) -> None:
        if self._flushed or not self.sending():
            return
        msg, kwargs = self._send_queue.queue[0]
        try:
            status = self.socket.send_multipart(msg, **kwargs)
        except zmq.Again:  # the peer has left since the events were read
            return
        except zmq.ZMQError as error:
            LOGGER.error('A message cannot be sent: %s', error)
            status = error
        self._send_queue.get()
        self._sent += 1
        if self._send_callback is not None:
            self._run_callback(self._send_callback, msg, status)
