# SPDX-License-Identifier: ZPL-2.1
"""Functions that another thread wants to be called in the thread of the loop."""

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress


class Mailbox:
    """Functions for the thread of the loop, and a descriptor that can be read when there are some.

    The broker polls the descriptor beside its sockets. The loop alone would call the functions when
    the broker has waited for the next message in vain, milliseconds later. It is open until the
    process ends: the thread may still use it.
    """

    def __init__(self) -> None:
        self._functions: deque[Callable[[], None]] = deque()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def post(self, function: Callable[[], None]) -> None:
        """Let a function be called by `read`; any thread may call this."""
        self._functions.append(function)
        os.eventfd_write(self._fd, 1)

    def read(self) -> None:
        """Call the functions; those that they post are called when the sockets had their turn."""
        with suppress(BlockingIOError):  # they were called just now
            os.eventfd_read(self._fd)
        for _number in range(len(self._functions)):
            self._functions.popleft()()
