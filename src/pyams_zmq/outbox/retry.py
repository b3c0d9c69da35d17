# SPDX-License-Identifier: ZPL-2.1
"""Uses of the database in the background: lasting errors are logged once, and it is used again."""

import logging
from collections.abc import Callable
from math import inf

from pyams_zmq.client.problem import write_log
from pyams_zmq.wire.fork_barrier import ForkBarrier

RETRY_DELAY = 1.0
"""Seconds until the next attempt after an error, at first"""

MAX_RETRY_DELAY = 30.0
"""Seconds until the next attempt, at most"""

LOGGED_FROM = 3
"""Number of the failure in a row that is logged first: sqlite is locked now and then"""


class Retry:
    """The attempts of one use of the database: after each error they pause twice as long.

    :ivar at: time of the next attempt after an error, in the seconds of `time.monotonic`
    :ivar failures: number of errors in a row
    """

    def __init__(self) -> None:
        self.at = -inf
        self.failures = 0
        self._delay = RETRY_DELAY

    @property
    def has_failed(self) -> bool:
        """True after an error, until an attempt has none."""
        return self.failures > 0

    def fail(self, now: float) -> None:
        """Note an error."""
        self.failures += 1
        self.at = now + self._delay
        self._delay = min(2 * self._delay, MAX_RETRY_DELAY)

    def succeed(self) -> None:
        """Note that the attempt had no error."""
        self.at = -inf
        self.failures = 0
        self._delay = RETRY_DELAY


class Database:
    """The database as the thread of the relay uses it: forks wait meanwhile."""

    def __init__(self) -> None:
        self.barrier = ForkBarrier()
        self._failing: set[Retry] = set()
        self._logged: set[str] = set()  # until no use fails any more

    def use(self, now: float, retry: Retry, function: Callable[[], None]) -> bool:
        """Call a function that uses the database; return False after an error.

        :param retry: the attempts of this use
        """
        try:
            with self.barrier.hold():
                function()
        except Exception as error:  # noqa: BLE001 - databases raise errors of any class
            retry.fail(now)
            self._failing.add(retry)
            if retry.failures >= LOGGED_FROM:
                self._report(error)
            return False
        retry.succeed()
        self._failing.discard(retry)
        if self._logged and not self._failing:
            self._logged.clear()
            write_log(logging.INFO, 'The outbox can use its database again')
        return True

    def _report(self, error: Exception) -> None:
        # Only the first line: those of SQLAlchemy go on with the parameters of the statement.
        text = f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'
        if text not in self._logged:
            self._logged.add(text)
            write_log(
                logging.WARNING, 'The outbox cannot use its database now, it tries again: %s', text
            )
