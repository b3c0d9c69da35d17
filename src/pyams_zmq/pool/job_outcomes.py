# SPDX-License-Identifier: ZPL-2.1
"""What has become of jobs, on its way to the journal."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.records import FAILED
from pyams_zmq.wire.message import encode

LOGGER = logging.getLogger('PyAMS (zmq)')


class JobOutcomes:
    """Writes ends and retries of jobs, and calls functions when they are on disk.

    :param journal: the JournalWriter
    :ivar unrecorded: number of those that are not written yet
    """

    def __init__(self, journal: Any):
        self._journal = journal
        self.unrecorded = 0

    def end(
        self,
        number: int,
        attempt: int,
        state: str,
        reply: bytes | None,
        then: Callable[[], object],
        revision: int = 0,
        **counts: int,
    ) -> None:
        """Record the end of a job; see :meth:`~pyams_zmq.jobs.job_table.JobTable.end`.

        :param then: called when it is on disk
        :param revision: that of the last progress
        """
        self.unrecorded += 1
        callback = partial(self._on_end, number, attempt, state, then, revision)
        self._journal.end(number, attempt, state, reply, callback, revision=revision, **counts)

    def _on_end(
        self,
        number: int,
        attempt: int,
        state: str,
        then: Callable[[], object],
        revision: int,
        outcome: Any,
    ) -> None:
        self.unrecorded -= 1
        if isinstance(outcome, ZMQMessageError):
            text = f'The result could not be recorded: {outcome.text}'
            LOGGER.error('Job number %s, %s: %s', number, state, text)
            if state != FAILED:  # it would be begun again and again
                self.end(number, attempt, FAILED, encode([500, text]), then, revision)
                return
        then()

    def try_again(
        self,
        number: int,
        attempt: int,
        delay: float,
        then: Callable[[], object],
        revision: int,
        **counts: int,
    ) -> None:
        """Let a job wait for another attempt; see `JobTable.change`.

        :param delay: seconds
        :param then: called when it is written
        :param revision: that of the last progress
        """
        self.unrecorded += 1
        callback = partial(self._on_change, then)
        self._journal.change(number, attempt, callback, delay=delay, revision=revision, **counts)

    def _on_change(self, then: Callable[[], object], _outcome: Any) -> None:
        self.unrecorded -= 1
        then()
