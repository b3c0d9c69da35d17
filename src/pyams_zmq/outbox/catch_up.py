# SPDX-License-Identifier: ZPL-2.1
"""Which entries for a service have to be read from the storage, and when."""

from math import inf
from typing import Any

from pyams_zmq.outbox.retry import Retry

PAUSE = 0.2
"""Seconds until the next attempt when the client takes no more entries, at first"""

MAX_PAUSE = 5.0
"""Seconds until the next attempt, at most"""


class CatchUp:
    """Entries for one service that were not posted after their commit.

    Until they are, further ones are not posted either, so that the order is kept.

    :ivar is_behind: true if the storage may have such entries
    :ivar reads_at: when to read them, in the seconds of `time.monotonic`
    :ivar after: key of the last entry that was read; None to begin with the first one
    :ivar misses: number of entries that were not posted
    :ivar retry: when to read again after an error of the database
    """

    def __init__(self) -> None:
        self.is_behind = False
        self.reads_at = -inf
        self.after: Any = None
        self.misses = 0
        self.retry = Retry()
        self._pause = PAUSE
        self._problem: str | None = None

    def is_due(self, now: float) -> bool:
        """Return True if the storage is to be read."""
        return self.is_behind and now >= self.reads_at

    def miss(self, key: Any = None, reads_at: float = -inf) -> None:
        """Note that an entry was not posted.

        :param key: its key; None to read all entries again
        :param reads_at: when to read it, at the earliest
        """
        if not self.is_behind:
            self.is_behind = True
            self.reads_at = reads_at
        if self.after is not None and (key is None or key <= self.after):
            self.after = None
        self.misses += 1

    def begin(self) -> None:
        """Read all entries, if that has not begun."""
        if not self.is_behind:
            self.miss()

    def pass_by(self, key: Any) -> None:
        """Note that an entry was posted."""
        self.after = key
        self._pause = PAUSE

    def wait(self, now: float) -> None:
        """Note that the client takes no more entries now."""
        self.reads_at = now + self._pause
        self._pause = min(2 * self._pause, MAX_PAUSE)

    def postpone(self, until: float) -> None:
        """Note that the storage could not be read."""
        self.reads_at = until

    def finish(self, misses: int) -> None:
        """Note that the last entry was read.

        :param misses: their number before it was read: there may be more now
        """
        if misses == self.misses:
            self.is_behind = False
            self.after = None

    def note_problem(self, problem: str | None) -> bool:
        """Note why entries cannot be posted; return True if that is new."""
        is_new = problem not in (None, self._problem)
        self._problem = problem
        return is_new
