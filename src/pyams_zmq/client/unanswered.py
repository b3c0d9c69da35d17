# SPDX-License-Identifier: ZPL-2.1
"""The messages that a client has sent and that have no reply yet.

This module does no I/O, and takes the time as an argument.
"""

from collections.abc import Iterator
from itertools import islice
from math import inf

from pyams_zmq.client.pace import WINDOW_SIZE
from pyams_zmq.client.problem import QueuedMessage

PATIENCE = 30.0
"""Seconds without a reply after which a message is late, and after which one more is sent"""

MAX_LATE = 1000
"""Late messages whose reply is still waited for, at most"""

MAX_LATE_SIZE = 16 * 1024 * 1024
"""Bytes of the late messages that can be sent again after status 503, at most"""


class UnansweredMessages:
    """The messages that were sent through one connection.

    A device in between, or another broker, keeps the connection when a service behind it dies. Then
    a message never has a reply. It is late when later messages have one: it does not count for the
    window any more. If no reply comes at all, one message may be sent beyond the number of the
    window, whose reply shows that. The bytes of the window are never exceeded, and there is no
    second such message before a reply.

    :ivar size: bytes of the messages, without late ones
    :ivar last: serial number of the last message that was sent
    """

    def __init__(self) -> None:
        self.size = 0
        self.last = 0
        self._sent: dict[bytes, QueuedMessage] = {}
        self._late: dict[bytes, QueuedMessage] = {}
        self._late_size = 0
        self._answered = 0
        self._active_at = -inf
        self._has_probed = False

    def __len__(self) -> int:
        return len(self._sent)

    def __iter__(self) -> Iterator[QueuedMessage]:
        return iter(self._sent.values())

    def has_room(self, message: QueuedMessage) -> bool:
        """Return True if the bytes of a message may be sent; a large one is sent alone."""
        return not self._sent or self.size + message.size <= WINDOW_SIZE

    def probes_at(self) -> float:
        """Return when one more message may be sent, because no reply comes."""
        return self._active_at + PATIENCE if self._sent and not self._has_probed else inf

    def add(self, number: bytes, message: QueuedMessage, now: float, *, is_probe: bool) -> None:
        """Add a message that was sent.

        :param number: the number in its envelope
        """
        self.last += 1
        message.serial = self.last
        message.sent_at = self._active_at = now
        self._has_probed |= is_probe
        self._sent[number] = message
        self.size += message.size

    def answer(self, number: bytes, now: float) -> tuple[QueuedMessage | None, bool]:
        """Remove the message that a reply belongs to; return it, and whether it was late."""
        self._active_at = now
        self._has_probed = False
        message = self._sent.pop(number, None)
        if message is not None:
            self.size -= message.size
            self._answered = max(self._answered, message.serial)
            return message, False
        message = self._late.pop(number, None)
        if message is not None:
            self._late_size -= message.size
        return message, True

    def late_at(self) -> float:
        """Return when the first message is late."""
        for first in islice(self._sent.values(), 1):
            if first.serial < self._answered:
                return first.sent_at + PATIENCE
        return inf

    @property
    def has_late_to_await(self) -> bool:
        """True if a late message is stored elsewhere until its reply comes."""
        late = self._late.values()
        return any(each.on_reply is not None and not each.is_withdrawn for each in late)

    def take_late(self) -> list[QueuedMessage]:
        """Remove the late messages with `on_reply`, and return them."""
        stored = {number: each for number, each in self._late.items() if each.on_reply is not None}
        for number, message in stored.items():
            del self._late[number]
            self._late_size -= message.size
        return list(stored.values())

    def find_late(self, now: float) -> list[QueuedMessage]:
        """Return the messages that have become late; those are not counted any more."""
        numbers = []
        for number, message in self._sent.items():
            if message.serial > self._answered or now < message.sent_at + PATIENCE:
                break
            numbers.append(number)
        messages = [self._sent.pop(number) for number in numbers]
        size = sum(message.size for message in messages)
        self.size -= size
        self._late_size += size
        self._late.update(zip(numbers, messages, strict=True))
        return messages

    def limit_late(self) -> list[QueuedMessage]:
        """Drop the oldest late messages, and the data of the oldest ones of the others.

        :return: the messages whose replies are not waited for any more
        """
        dropped = []
        while len(self._late) > MAX_LATE:
            dropped.append(self._late.pop(next(iter(self._late))))
            self._late_size -= dropped[-1].size
        oldest = iter(self._late.values())
        while self._late_size > MAX_LATE_SIZE:
            message = next(oldest)
            self._late_size -= message.size
            message.drop_data()
        return dropped
