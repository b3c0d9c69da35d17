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

from typing import Any

import zmq
from zmq.eventloop.zmqstream import ZMQStream as BaseZMQStream

__docformat__ = 'restructuredtext'


class ZMQStream(BaseZMQStream):
    """The ZMQStream of pyzmq, with two differences.

    What is sent goes out now, if the socket takes it, instead of on the next turn of the loop.
    A callback that raises on a REP socket gets its peer an answer, `failure_reply`: otherwise the
    socket would wait for a reply for ever, and receive nothing any more.
    """

    socket: Any  # pyzmq types options as str | bytes | int

    failure_reply = b'[500,"Internal error"]'

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
        if not self.sending():
            try:
                status = self.socket.send_multipart(
                    msg, flags | zmq.NOBLOCK, copy=copy, track=track, **kwargs
                )
            except zmq.Again:
                pass  # the queue of the base class waits for the socket
            else:
                if callback is not None:
                    self.on_send(callback)
                if self._send_callback is not None:
                    self._run_callback(self._send_callback, msg, status)
                # The FD of a socket is edge-triggered: a message may have come in unnoticed.
                self._update_handler(self._state)
                return
        super().send_multipart(msg, flags, copy, track, callback, **kwargs)

    def readable(self) -> bool:
        """Tell if a message waits; looking does not lose its wake-up."""
        if self.closed() or not self.socket.EVENTS & zmq.POLLIN:
            return False
        self._update_handler(self._state)
        return True

    def _handle_recv(self) -> None:
        try:
            super()._handle_recv()
        except Exception:
            self._reply_to_failure()
            raise  # the loop logs it

    def _reply_to_failure(self) -> None:
        # A REP socket is writable only while it owes a reply.
        socket = self.socket
        if socket is not None and socket.type == zmq.REP and socket.EVENTS & zmq.POLLOUT:
            socket.send(self.failure_reply, zmq.NOBLOCK)
