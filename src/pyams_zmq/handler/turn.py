# SPDX-License-Identifier: ZPL-2.1
"""Which of two threads may use a socket: that of the loop, or one that helps it meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock


class Turn:
    """Lets another thread use a socket while a method runs in the thread of the loop.

    The loop sets `is_free` before a method and clears it after the method, and then calls `wait`
    if the turn `is_taken`. That is cheaper than a lock. It needs the order of these steps, which
    the interpreter lock keeps: the helper sets `is_taken` before it reads `is_free`, so at least
    one of both threads notices the other.

    :ivar is_free: true while a method runs
    :ivar is_taken: true while the other thread uses the socket
    :ivar is_asleep: true while the other thread may have to be woken when a method begins
    :ivar wake: does that
    """

    __slots__ = ('_lock', 'is_asleep', 'is_free', 'is_taken', 'wake')

    def __init__(self) -> None:
        self.is_free = False
        self.wake: Callable[[], None] = lambda: None
        self.forget()

    def forget(self) -> None:
        """Forget the other thread, which does not exist in a fork that a method makes."""
        self.is_taken = self.is_asleep = False
        self._lock = Lock()

    def take(self) -> bool:
        """Take the turn, if it is free; the other thread calls this."""
        self._lock.acquire()
        self.is_taken = True
        if not self.is_free:
            self.give_back()
            return False
        return True

    def give_back(self) -> None:
        """End the turn of the other thread."""
        self.is_taken = False
        self._lock.release()

    def wait(self) -> None:
        """Wait until the other thread has given the turn back; the loop calls this."""
        with self._lock:
            pass

    @contextmanager
    def taken_back(self) -> Iterator[None]:
        """Return a context in which the loop has the turn, because a method uses the socket."""
        was_free, self.is_free = self.is_free, False
        if self.is_taken:
            self.wait()
        try:
            yield
        finally:
            self.is_free = was_free
