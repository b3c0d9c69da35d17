# SPDX-License-Identifier: ZPL-2.1
"""A thread that writes to a journal: all changes that wait, in one transaction."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import partial
from operator import attrgetter
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.change import Change
from pyams_zmq.jobs.job_table import JobTable
from pyams_zmq.jobs.journal import CLOCK_SLACK, Journal
from pyams_zmq.jobs.records import Accepted, Cancelled, Claim, Pruned, Submission
from pyams_zmq.wire.clock import boottime, monotonic, time
from pyams_zmq.wire.message import DRAINING

LOGGER = logging.getLogger('PyAMS (zmq)')

CLOSE_TIMEOUT = 10.0
"""Seconds in which the thread has to end"""

MAX_BACKLOG = 64 * 1024 * 1024
"""Bytes of what clients have asked for, and that waits to be written"""

_BATCH = 1000  # changes of one transaction
_BATCH_SIZE = 16 * 1024 * 1024  # bytes of its messages and results
_JOIN_SLACK = 1.0  # seconds to end after that
_RETRY_PAUSE = 0.5  # seconds after which a journal that could not be written is tried again
_RECOVERED = 0.95  # part of the limit of the size; else each job that is removed would be logged
_TIDY_INTERVAL = 1.0  # seconds between two looks for old jobs
_TIDY_PAUSE = 0.05  # seconds between two steps, so that they take a small part of the time


class JournalWriter:
    """Writes changes to a journal in a thread, so that the loop does not wait for the disk.

    The methods are called in the thread of the loop, and their callbacks are, too. They get the
    result of the method of the same name of :class:`~pyams_zmq.jobs.job_table.JobTable`, after it
    was written, or a ZMQMessageError. All changes that wait are written in one transaction, in
    their order, and claims last, so that one wait for the disk serves them all.

    While the journal cannot be written, because the disk is full for instance, what clients ask for
    fails with status 507; what has become of jobs is kept until it can be written. If too many
    bytes wait for the disk, the methods for clients raise a ZMQMessageError with status 503; each
    client has to leave as much room for others as it has.

    :param journal: the journal, which only this object writes until it is closed
    :param post: calls a function in the thread of the loop, as `loop.call_soon_threadsafe` does
    :param on_expired: called in the loop with the ids of jobs that have expired, or have failed
        without having begun; or None
    :param clock: returns the seconds since the epoch
    :param steady: returns the seconds of a clock that nobody sets
    :ivar unanswered: number of changes that clients have asked for, and that have no outcome yet
    """

    def __init__(
        self,
        journal: Journal,
        post: Callable[[Callable[[], None]], object],
        on_expired: Callable[[list[str]], object] | None = None,
        clock: Callable[[], float] = time,
        steady: Callable[[], float] = boottime,
    ):
        self._journal = journal
        self._post = post
        self._on_expired = on_expired
        self._clock = clock
        self._steady = steady
        self._offset = clock() - steady()
        self._pid = os.getpid()
        self._queue: SimpleQueue[Change | None] = SimpleQueue()
        self._backlog = self.unanswered = 0
        self._held: Counter[Any] = Counter()  # bytes of the backlog, by client
        self._kept: list[Change] = []
        self._problem = ''
        self._is_too_large = False  # that is the problem
        self._retry_at = self._tidy_at = self._give_up_at = 0.0
        self._is_closing = self._is_closed = False
        self._thread = Thread(target=self._run, name='pyams_zmq journal', daemon=True)
        self._thread.start()

    # In the thread of the loop

    def accept(
        self,
        job: Submission,
        callback: Callable[[Accepted | ZMQMessageError], object],
        client: Any = None,
    ) -> None:
        """Add a job.

        :param client: its client, any hashable object
        :raises ZMQMessageError: with status 503, if too many bytes wait for the disk
        """
        size = sum(map(len, job.frames))
        call = partial(JobTable.accept, job=job)
        self._put(call, callback, is_new=True, size=size, client=client)

    def cancel(
        self,
        job_id: str,
        callback: Callable[[Cancelled | ZMQMessageError], object],
        client: Any = None,
    ) -> None:
        """Cancel a job; the other arguments are those of `accept`."""
        self._put(partial(JobTable.cancel, job_id=job_id), callback, client=client)

    def retry(
        self,
        job_id: str,
        callback: Callable[[str | ZMQMessageError], object],
        client: Any = None,
    ) -> None:
        """Let a job that has ended without success begin again."""
        self._put(partial(JobTable.retry, job_id=job_id), callback, client=client)

    def prune(
        self,
        age: float,
        callback: Callable[[Pruned | ZMQMessageError], object],
        client: Any = None,
    ) -> None:
        """Remove some of the jobs that have ended for some seconds."""
        call = partial(JobTable.prune, age=age)
        self._put(call, callback, is_durable=False, client=client)

    def end(
        self,
        number: int,
        attempt: int,
        state: str,
        reply: bytes | None,
        callback: Callable[[bool | ZMQMessageError], object] | None = None,
        *,
        failures: int | None = None,
        deaths: int | None = None,
        revision: int = 0,
    ) -> None:
        """Record the end of a job."""
        call = partial(
            JobTable.end,
            number=number,
            attempt=attempt,
            state=state,
            reply=reply,
            failures=failures,
            deaths=deaths,
            revision=revision,
        )
        self._put(call, callback, is_kept=True, size=len(reply or b''))

    def change(
        self,
        number: int,
        attempt: int,
        callback: Callable[[str | ZMQMessageError | None], object] | None = None,
        *,
        delay: float = 0.0,
        failures: int | None = None,
        deaths: int | None = None,
        revision: int = 0,
    ) -> None:
        """Let a running job wait for another attempt."""
        call = partial(
            JobTable.change,
            number=number,
            attempt=attempt,
            delay=delay,
            failures=failures,
            deaths=deaths,
            revision=revision,
        )
        self._put(call, callback, is_kept=True, is_durable=False)

    def assign(self, number: int, attempt: int, owner: str) -> None:
        """Note what runs an attempt."""
        call = partial(JobTable.assign, number=number, attempt=attempt, owner=owner)
        self._put(call, None, is_kept=True, is_durable=False)

    def claim(
        self,
        count: int,
        types: Collection[str],
        callback: Callable[[Claim], object],
        owner: str | None = None,
    ) -> None:
        """Let jobs begin. The callback is called when the journal can be written."""
        call = partial(JobTable.claim, count=count, types=tuple(types), owner=owner)
        self._put(call, callback, is_kept=True, is_durable=False, is_claim=True)

    def close(self, timeout: float = CLOSE_TIMEOUT) -> bool:
        """Write what waits, and end the thread; later changes raise 503.

        Callbacks are still called, when the loop runs.

        :param timeout: seconds; changes that cannot be written in this time are given up
        :return: False if the thread still waits for the disk: do not close the journal then
        """
        if not self._is_closed:
            self._is_closed = True
            self._give_up_at = monotonic() + timeout
            self._queue.put(None)
        self._thread.join(timeout + _JOIN_SLACK)
        return not self._thread.is_alive()

    @property
    def problem(self) -> str:
        """Why no job is accepted; empty if jobs are."""
        return self._problem

    @property
    def is_stuck(self) -> bool:
        """True while what has become of jobs cannot be written either."""
        return bool(self._kept)

    def _put(self, call: Callable[[JobTable], Any], callback: Any, **options: Any) -> None:
        if self._is_closed or self._pid != os.getpid():  # a fork has no thread
            raise ZMQMessageError(*DRAINING)
        change = Change(call, callback, **options)
        total = self._backlog + self._held[change.client] + change.size
        if not change.is_kept and self._backlog and total > MAX_BACKLOG:
            raise ZMQMessageError(503, 'The disk of the journal is too slow, try again later')
        self._count(change, 1)
        self._queue.put(change)

    def _count(self, change: Change, number: int) -> None:
        """Count a change that waits (1), or no longer does (-1)."""
        size = number * change.size
        self._backlog += size
        if not change.is_kept:
            self.unanswered += number
            self._held[change.client] += size
            if not self._held[change.client]:
                del self._held[change.client]

    def _deliver(self, outcomes: Iterable[tuple[Change, Any]], expired: list[str]) -> None:
        for change, outcome in outcomes:
            self._count(change, -1)
            if change.callback is not None:
                _call_back(change.callback, outcome)
        if expired and self._on_expired is not None:
            _call_back(self._on_expired, expired)

    # In the thread that writes

    def _run(self) -> None:
        while not self._is_closing or (self._kept and monotonic() < self._give_up_at):
            changes = self._take()
            if changes or (self._kept and monotonic() >= self._retry_at):
                self._turn(self._kept + changes)
            self._tidy()
        if self._kept:
            LOGGER.error(
                'The journal %s lacks %d changes, which could not be written: %s; these jobs may '
                'run again',
                self._journal.path,
                len(self._kept),
                self._problem,
            )

    def _take(self) -> list[Change]:
        """Return the changes that wait; wait for one until something else is to be done."""
        until = min(self._tidy_at, self._retry_at) if self._kept else self._tidy_at
        changes: list[Change] = []
        size = 0
        with suppress(Empty):
            change = self._queue.get(timeout=max(0.0, until - monotonic()))
            while change is not None:
                changes.append(change)
                size += change.size
                if len(changes) >= _BATCH or size >= _BATCH_SIZE:
                    return changes
                change = self._queue.get_nowait()
            self._is_closing = True
        return changes

    def _turn(self, changes: list[Change]) -> None:
        """Write changes; those that cannot be written fail, or are kept."""
        changes.sort(key=attrgetter('is_claim'))
        if any(change.is_new for change in changes):
            check_room = partial(_check, self._journal.check_room)
            too_large = _check(self._journal.check_size)
            error = too_large or self._try(check_room)
            if error is not None:  # the others need less room
                self._refuse([change for change in changes if change.is_new], error)
                self._is_too_large = too_large is not None
                changes = [change for change in changes if not change.is_new]
        error = self._try(partial(self._write, changes)) if changes else None
        if error is None:
            self._kept = []
            self._check_problem()
            return
        self._refuse([change for change in changes if not change.is_kept], error)
        kept = [change for change in changes if change.is_kept]
        # What has happened needs less room than new jobs.
        self._kept = kept if kept and self._write(kept) is not None else []
        self._retry_at = monotonic() + _RETRY_PAUSE

    def _try(self, write: Callable[[], Exception | None]) -> Exception | None:
        """Call a function, and if there is an error, again when some room was made."""
        error = write()
        if error is not None:
            self._journal.make_room()
            error = write()
        return error

    def _refuse(self, changes: Iterable[Change], error: Exception) -> None:
        """Let changes fail, and log why."""
        if not self._problem:
            LOGGER.error(
                'The journal %s cannot be written: %s; no job is accepted until it can',
                self._journal.path,
                error,
            )
        self._problem = str(error) or type(error).__name__
        self._is_too_large = False
        # Without the path, which is of no concern to clients.
        reason = getattr(error, 'strerror', None) or self._problem
        text = f'The journal cannot be written: {reason}; try again later'
        self._report([(change, ZMQMessageError(507, text)) for change in changes])

    def _check_problem(self) -> None:
        """Log that the journal can be written again, if new jobs are accepted again, too."""
        if self._problem and not self._kept:
            part = _RECOVERED if self._is_too_large else 1.0
            check_size = partial(self._journal.check_size, part)
            if (_check(check_size) or _check(self._journal.check_room)) is None:
                self._problem = ''
                LOGGER.warning('The journal %s can be written again', self._journal.path)

    def _write(self, changes: list[Change]) -> Exception | None:
        """Write changes in a transaction; return the error if that is not possible."""
        is_durable = any(change.is_durable for change in changes)
        self._reach('before begin')
        try:
            with self._journal.transaction(self._now(), is_durable) as jobs:
                self._reach('begun')
                outcomes = [(change, change.run(jobs)) for change in changes]
                self._reach('before commit')
        except Exception as error:  # noqa: BLE001 - the thread has to go on; the caller logs it
            return error
        self._reach('committed')
        self._report(outcomes, jobs.expired)
        self._reach('reported')
        return None

    def _now(self) -> float:
        """Return the time of the system; if it was set, that of the journal goes on all the same.

        The time for which the machine has slept has passed for both.
        """
        now = self._clock()
        step = now - self._steady() - self._offset  # also the sum of small ones
        if abs(step) > CLOCK_SLACK:
            self._offset += step
            self._journal.ahead -= step
        return now

    def _report(
        self, outcomes: Iterable[tuple[Change, Any]], expired: Collection[str] = ()
    ) -> None:
        if outcomes or expired:
            with suppress(RuntimeError):  # the loop is closed
                self._post(partial(self._deliver, outcomes, list(expired)))

    def _tidy(self) -> None:
        """Remove old jobs and keep the log short; it is tried again after an error."""
        try:
            self._journal.checkpoint()
            if monotonic() < self._tidy_at:
                return
            self._tidy_at = monotonic() + _TIDY_INTERVAL
            expired, has_more = self._journal.tidy(self._now())
            self._check_problem()
        except Exception as error:  # noqa: BLE001 - the thread has to go on
            LOGGER.debug('The journal %s cannot be tidied: %s', self._journal.path, error)
        else:
            self._report([], expired)
            if has_more:
                self._tidy_at = monotonic() + _TIDY_PAUSE

    def _reach(self, step: str) -> None:
        """Do nothing: tests end the process at a step."""


def _check(function: Callable[[], None]) -> Exception | None:
    """Return the error of a check, or None."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 - the thread has to go on; the caller logs it
        return error
    return None


def _call_back(callback: Callable[[Any], object], outcome: Any) -> None:
    try:
        callback(outcome)
    except Exception:
        LOGGER.exception('An outcome of the journal could not be handled')
