# SPDX-License-Identifier: ZPL-2.1
"""Messages that wait for the socket, and when there are too many."""

from collections import deque

HIGH_WATER = 64 * 1024
"""Bytes in the write buffer above which writing is paused, unless limits are set"""

Message = tuple[bytes, ...]


class WriteBuffer(deque[Message]):
    """Messages that the socket has not taken.

    :ivar size: their bytes
    :ivar limits: bytes down to which, and above which writing is resumed and paused
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self.limits = (HIGH_WATER // 4, HIGH_WATER)
        self._is_paused = False

    def put(self, message: Message) -> None:
        """Add a message at the end."""
        self.append(message)
        self.size += sum(map(len, message))

    def take(self) -> Message:
        """Remove the first message."""
        message = self.popleft()
        self.size -= sum(map(len, message))
        return message

    def put_back(self, message: Message) -> None:
        """Add the message that was taken as the first one again."""
        self.appendleft(message)
        self.size += sum(map(len, message))

    def clear(self) -> None:
        """Remove all messages."""
        super().clear()
        self.size = 0

    def set_limits(self, high: int | None, low: int | None) -> None:
        """Set the limits, see :meth:`.ZmqTransport.set_write_buffer_limits`.

        :raises ValueError: unless `high >= low >= 0`
        """
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f'high ({high!r}) must be >= low ({low!r}) must be >= 0')
        self.limits = low, high

    def must_pause(self) -> bool:
        """Tell if writing must be paused now; once, until it may be resumed."""
        _low, high = self.limits
        # Empty frames have no size: without a limit, an empty buffer is what counts.
        if self._is_paused or not (self.size > high or (self and not high)):
            return False
        self._is_paused = True
        return True

    def may_resume(self) -> bool:
        """Tell if writing that was paused may be resumed now; once."""
        low, _high = self.limits
        if not self._is_paused or self.size > low or (self and not low):
            return False
        self._is_paused = False
        return True
