# SPDX-License-Identifier: ZPL-2.1
"""Messages that wait for the socket, and the flow control of their producer."""

from collections import deque

HIGH_WATER = 64 * 1024
"""Bytes in the write buffer above which writing is paused, unless limits are set"""

Message = tuple[bytes, ...]


class WriteBuffer(deque[Message]):
    """Messages that the socket has not taken yet.

    :ivar size: number of their bytes
    :ivar limits: number of bytes at which writing is resumed, and above which it is paused
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
        """Remove and return the first message."""
        message = self.popleft()
        self.size -= sum(map(len, message))
        return message

    def put_back(self, message: Message) -> None:
        """Add a message at the front."""
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

    def update_state(self) -> str | None:
        """Return the method to call, `pause_writing` or `resume_writing`, each once in turn."""
        low, high = self.limits
        limit = low if self._is_paused else high
        # Empty frames have no size. With a limit of 0, any message in the buffer counts.
        is_full = self.size > limit or (not limit and len(self) > 0)
        if is_full == self._is_paused:
            return None
        self._is_paused = is_full
        return 'pause_writing' if is_full else 'resume_writing'
