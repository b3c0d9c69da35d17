# SPDX-License-Identifier: ZPL-2.1
"""Forks wait while a background thread uses an object whose locks the child would inherit."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

TIMEOUT = 1.0
"""Seconds that a fork waits for a barrier, at most: a database may not answer"""


class ForkBarrier:
    """Keeps this process from forking while its block runs, in one thread at a time.

    A lock that another thread holds at the fork is held in the child for ever. A fork made by C
    code (uWSGI) does not wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forking: int | None = None  # the thread whose fork holds the lock
        _barriers.add(self)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let forks wait until the block ends."""
        with self._lock:
            yield

    def before_fork(self) -> None:
        """Wait for the end of the block."""
        if self._lock.acquire(timeout=TIMEOUT):
            self._forking = threading.get_ident()

    def after_fork_in_parent(self) -> None:
        """Let the block run again."""
        if self._forking == threading.get_ident():
            self._forking = None
            self._lock.release()

    def after_fork_in_child(self) -> None:
        """Forget a thread that the child does not have."""
        self._lock = threading.Lock()
        self._forking = None


_barriers: WeakSet[ForkBarrier] = WeakSet()


def _before() -> None:
    for barrier in list(_barriers):
        barrier.before_fork()


def _after_in_parent() -> None:
    for barrier in list(_barriers):
        barrier.after_fork_in_parent()


def _after_in_child() -> None:
    for barrier in list(_barriers):
        barrier.after_fork_in_child()


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
