# SPDX-License-Identifier: ZPL-2.1
"""Messages that were read from their socket, and wait for a method."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pyams_zmq.process.connections import Envelope

MAX_WAITING = 1000
"""Messages that are read while methods run; further ones wait in the socket"""

MAX_WAITING_SIZE = 4 * 1024 * 1024
"""Bytes of these messages, from which on further ones wait in the socket"""

_FRAME_OVERHEAD = 64  # bytes of memory for a frame beside its data, approximately


@dataclass(slots=True, eq=False)
class WaitingMessage:
    """A message that waits.

    :ivar envelope: frames in front of its reply
    :ivar body: its other frames; None if it has no delimiter in front of them
    :ivar since: when it was read, in seconds
    :ivar size: bytes
    """

    envelope: Envelope = field(repr=False)
    body: list[Any] | None = field(repr=False)
    since: float
    size: int


class WaitingMessages:
    """The messages of a socket that wait: those of a peer in their order, each peer in its turn.

    :ivar peers: the messages of each peer, by its routing id
    :ivar count: number of messages
    :ivar size: bytes of them
    """

    def __init__(self) -> None:
        self.peers: dict[bytes, deque[WaitingMessage]] = {}
        self.count = 0
        self.size = 0

    @property
    def is_full(self) -> bool:
        """True if further messages have to wait in the socket; see `is_overfull`."""
        return self.count >= MAX_WAITING or self.size >= MAX_WAITING_SIZE

    @property
    def is_overfull(self) -> bool:
        """True if even those of another peer have to, which may be questions."""
        return self.count >= 2 * MAX_WAITING or self.size >= 2 * MAX_WAITING_SIZE

    def add(self, envelope: Envelope, body: list[Any] | None, now: float) -> None:
        """Add a message that was read *now*."""
        frames = [*envelope, *(body or ())]
        size = sum(map(len, frames)) + _FRAME_OVERHEAD * len(frames)
        message = WaitingMessage(envelope, body, now, size)
        self.peers.setdefault(envelope[0], deque()).append(message)
        self.count += 1
        self.size += size

    def take(self) -> WaitingMessage:
        """Remove the next message, and return it.

        :raises StopIteration: if no message waits
        """
        peer, messages = next(iter(self.peers.items()))
        message = messages[0]
        # Without a call: a signal handler, which may raise, runs after one.
        del messages[0], self.peers[peer]
        if messages:
            self.peers[peer] = messages  # behind the other peers
        self.count -= 1
        self.size -= message.size
        return message

    def age(self, now: float) -> float:
        """Return the seconds for which the oldest message waits; 0 if none waits."""
        return max((now - messages[0].since for messages in self.peers.values()), default=0.0)
