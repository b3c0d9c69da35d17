# SPDX-License-Identifier: ZPL-2.1
"""The sockets of the broker, and how their messages are read."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from pyams_zmq.auth import Access
from pyams_zmq.process.stream import ZMQStream
from pyams_zmq.wire.frames import NOBLOCK, send_frames

LOGGER = logging.getLogger('PyAMS (zmq)')

_NO_COPY_SIZE = 64 * 1024  # bytes; larger frames are not copied
_UNREACHABLE = frozenset({zmq.EHOSTUNREACH, zmq.EAGAIN})


class RouterStream(ZMQStream):
    """Stream of a ROUTER socket from which the broker reads, because it polls all its sockets.

    :param broker: has `loop`, `name`, and the `pump` that reads this stream
    :param socket: the socket
    :param on_message: called with the stream, the routing id and the other frames of each message
    :ivar access: access rules of its peers
    :ivar listener: what is known about their connections
    """

    listener: Any

    def __init__(self, broker: Any, socket: Any, access: Access, on_message: Callable[..., None]):
        self.access = access
        self._broker = broker
        self._on_message = on_message
        self._receive_frame = socket.recv
        socket.router_mandatory = True
        super().__init__(socket, broker.loop)

    def _handle_events(self, fd: Any, events: int) -> None:
        if not (self.closed() or self._broker.pump.is_scheduled):
            self._broker.pump.run()

    def read(self) -> None:
        """Receive a message, which must be there, and handle it."""
        receive = self._receive_frame
        first = frame = receive(NOBLOCK, False)
        self.received += 1
        frames = []
        while frame.more:
            frame = receive(NOBLOCK, False)
            frames.append(frame.bytes if len(frame) < _NO_COPY_SIZE else frame)
        try:
            self._on_message(self, first, frames)
        except Exception:
            LOGGER.exception('%s could not handle a message', self._broker.name)

    def send_frames(self, frames: Sequence[Any]) -> bool:
        """Send a message; return False if its peer is gone, or does not read."""
        try:
            send_frames(self.socket, frames)
        except zmq.ZMQError as error:
            if error.errno not in _UNREACHABLE:
                raise
            return False
        return True
