# SPDX-License-Identifier: ZPL-2.1
"""One direction of a loop in Python: the messages that one socket receives, and the other sends."""

import errno
from typing import Any

import zmq

from pyams_zmq.wire.frames import receive, send_frames

CANNOT_SEND = (zmq.PULL, zmq.SUB)
CANNOT_RECEIVE = (zmq.PUSH, zmq.PUB)

BURST = 100
"""Messages that one direction forwards before the other direction and the commands continue"""

# EFSM: a REQ or REP socket that has to receive before it sends.
UNDELIVERED = (errno.EAGAIN, zmq.EFSM, errno.EHOSTUNREACH)

# EFSM: a REQ or REP socket that has to send before it receives.
NO_MESSAGE = (errno.EAGAIN, errno.EINTR, zmq.EFSM)

_ONE_OF_MANY = (zmq.ROUTER, zmq.STREAM)

Prefix = bytes | str | None


class Direction:
    """One direction of a loop: from a source to a target."""

    def __init__(self, source: Any, target: Any, monitor: Any, prefix: Prefix):
        self.source = source
        self.target = target
        self._monitor = monitor
        if isinstance(prefix, str):
            prefix = prefix.encode()
        self._prefix = [] if prefix is None else [prefix]
        self._swaps = source.type == target.type == zmq.ROUTER and source is not target
        self._is_dead_end = target.type in CANNOT_SEND
        # One peer that does not read must not stop the others.
        self._drops = self._is_dead_end or target.type in _ONE_OF_MANY
        self.waiting = False  # the message in hand waits until the target can send
        # It waits although the target could send: XPUB_NODROP, and a subscriber does not read.
        self.is_stuck = False
        self.stalls = 0  # how often a message had to wait
        self._frames: list[Any] = []  # of the message in hand
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.messages = self.frames = self.bytes = self.unroutable = self.unmonitored = 0

    @property
    def poll_item(self) -> tuple[Any, int]:
        """Socket and event to wait for."""
        if not self.waiting:
            return self.source, zmq.POLLIN
        return self.target, 0 if self.is_stuck else zmq.POLLOUT

    def forward(self) -> None:
        """Forward a burst of messages."""
        for _ in range(BURST):
            if not (self.waiting or self._receive()):
                return
            if self._is_dead_end or not self._send():
                if not self._drops:
                    self.stalls += not self.waiting
                    self.waiting = True
                    return
                self._drop()
            self.waiting = False

    def _receive(self) -> bool:
        """Take the next message in hand; return False if there is none."""
        try:
            frames = receive(self.source)
        except zmq.ZMQError as error:
            if error.errno not in NO_MESSAGE:
                raise
            return False
        if frames is None:
            return False
        if self._swaps:
            # The sender comes first, then the addressee; libzmq routes by the first frame.
            frames[:2] = frames[1::-1]
        self._frames = frames
        return True

    def _drop(self) -> None:
        self.unroutable += 1
        self._frames = []

    def _send(self) -> bool:
        """Send the message in hand, and a copy to the monitor; return False if it stays in hand."""
        frames = self._frames
        if not _send(self.target, frames):
            return False
        self.messages += 1
        self.frames += len(frames)
        self.bytes += sum(map(len, frames))
        if self._monitor is not None and not _send(self._monitor, self._prefix + frames):
            self.unmonitored += 1
        return True


def _send(socket: Any, frames: list[bytes]) -> bool:
    """Return True if the message was sent, False if that would block or has no peer."""
    try:
        send_frames(socket, frames)
    except zmq.ZMQError as error:
        # All or nothing: libzmq finds the peer and room for the message at the first frame. When
        # the peer leaves between two frames (EAGAIN), libzmq drops the frames before.
        if error.errno not in UNDELIVERED:
            raise
        return False
    return True
