# SPDX-License-Identifier: ZPL-2.1
"""Watching jobs by long polls: what is asked next, and when to give up.

This module does no I/O, and takes the time as an argument; the client for threads and the client
for asyncio use it.
"""

from http import HTTPStatus
from math import inf
from typing import Any, TypeGuard

from pyams_zmq.client.connection import RETRIED
from pyams_zmq.client.job_info import JobInfo
from pyams_zmq.client.job_request import check_ids
from pyams_zmq.exceptions import ZMQJobError, ZMQTimeoutError
from pyams_zmq.wire.message import check_timeout

POLL = 20.0
"""Seconds of a long poll, at most"""

POLL_MARGIN = 10.0
"""Seconds that its reply may take after that"""

PATIENCE = 60.0
"""Seconds without a service until a watch fails, by default; a restart takes less"""

UNKNOWN = 2.0
"""Seconds in which a job may be unknown: one that is sent on commit arrives a moment later"""

FIRST_PAUSE, MAX_PAUSE = 0.05, 1.0
"""Seconds between two attempts"""

AWAY = (502, 503, 504)
"""Status of replies by a service that stops or starts, or by a device before it"""


class JobWatch:
    """A watch of some jobs.

    :param ids: id of a job, or an iterable of them
    :param timeout: seconds until the watch ends with an error, None for no limit
    :param patience: seconds without a service until it ends with an error
    :param now: seconds of a clock that never goes back
    :raises ValueError: if one of them is not valid
    :ivar pause: seconds to wait before the next message
    """

    def __init__(self, ids: Any, timeout: float | None, patience: float, now: float):
        self._revisions: dict[str, int | None] = dict.fromkeys(check_ids(ids))
        self._is_single = len(self._revisions) == 1
        self._timeout = timeout
        self._end = inf if timeout is None else now + check_timeout(timeout)
        self._patience = check_timeout(patience)
        self._begin = self._asked = self._answered = now
        self.pause = 0.0

    def __bool__(self) -> bool:
        """Return True until all jobs have ended."""
        return bool(self._revisions)

    def ask(self, now: float) -> tuple[list[Any], float]:
        """Return the next message, and the seconds to wait for its reply.

        :raises ZMQTimeoutError: if the time is up
        """
        left = self._end - now
        if left <= 0:
            names = ', '.join(list(self._revisions)[:3])
            raise ZMQTimeoutError(f'Job {names} has not ended within {self._timeout} s')
        self._asked = now
        known = {key: value for key, value in self._revisions.items() if value is not None}
        options: dict[str, Any] = {'timeout': min(POLL, left)}
        if self._is_single:
            [options['id']] = self._revisions
        else:
            options['ids'] = list(self._revisions)
        if known:
            options['after'] = known[options['id']] if self._is_single else known
        return ['pyams_zmq.job.wait', options], min(POLL + POLL_MARGIN, left)

    def handle(self, job: JobInfo | None, now: float) -> TypeGuard[JobInfo]:
        """Return True if a reply says something new.

        :param job: the job, None if nothing has changed
        """
        self._answered = now
        if job is None or self._revisions.get(job.id, job.revision) == job.revision:
            # A server that does not wait must not be asked without end.
            self._slow_down(now) if now < self._asked + MAX_PAUSE else self._go_on()
            return False
        self._go_on()
        if job.is_ended:
            del self._revisions[job.id]
        else:
            self._revisions[job.id] = job.revision
        return True

    def fail(self, error: Exception, now: float) -> None:
        """Go on after an error that a restart causes, and raise others.

        :raises Exception: the error, also if it lasts too long
        """
        if not self._is_temporary(error, now):
            raise error
        self._slow_down(now)

    def _is_temporary(self, error: Exception, now: float) -> bool:
        if isinstance(error, ZMQTimeoutError) and now >= self._end:
            return True  # the next message raises an error that names the job
        if isinstance(error, ZMQJobError) and error.status == HTTPStatus.NOT_FOUND:
            return None in self._revisions.values() and now < self._begin + UNKNOWN
        is_away = isinstance(error, ZMQJobError) and error.status in AWAY
        return (is_away or isinstance(error, RETRIED)) and now < self._answered + self._patience

    def _slow_down(self, now: float) -> None:
        self.pause = min(2 * self.pause or FIRST_PAUSE, MAX_PAUSE, max(0, self._end - now))

    def _go_on(self) -> None:
        self.pause = 0.0
