# SPDX-License-Identifier: ZPL-2.1
"""The jobs that a broker has in hand, and what becomes of them.

It does no I/O: changes go to a :class:`~pyams_zmq.jobs.writer.JournalWriter`, and functions send
messages to workers.
"""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from math import inf
from typing import Any

from pyams_zmq.handler.job import JobPolicy
from pyams_zmq.jobs.records import CANCELLED, DONE, Cancelled, Claim, JobRecord
from pyams_zmq.pool.job_outcomes import JobOutcomes
from pyams_zmq.pool.job_owners import BROKER, STOPPING, Owner
from pyams_zmq.pool.job_run import JobRun, Workers
from pyams_zmq.pool.job_verdict import SHARED_DEATH, Verdict, judge_death, judge_reply
from pyams_zmq.pool.protocol import make_job_key, parse_job_key
from pyams_zmq.pool.scheduler import LOST_ACCESS, SILENT
from pyams_zmq.wire.clock import boottime, monotonic, time
from pyams_zmq.wire.message import is_error


class JobBook:
    """Decides which jobs begin, and what becomes of those that end.

    :param journal: the JournalWriter
    :param workers: the scheduler
    :param send: sends a job to a worker; returns False if that is unreachable
    :param acknowledge: lets a worker forget its reply to a job
    :param cancel: lets a worker cancel a job
    :param kill: ends the worker of a job
    :param on_change: called with the id of a job that has changed
    :param on_late_end: called with the number of a job that has ended after it was given up
    :param limit: jobs at a time; 0 for one less than all workers handle requests at a time
    :param cancel_grace: seconds from a cancel until the worker is killed
    """

    def __init__(
        self,
        journal: Any,
        workers: Workers,
        *,
        send: Callable[[Any, JobRun], bool],
        acknowledge: Callable[[Any, bytes], object],
        cancel: Callable[[Any, bytes], object],
        kill: Callable[[JobRun], object],
        on_change: Callable[[str], object],
        on_late_end: Callable[[int], object],
        limit: int,
        cancel_grace: float,
    ):
        self._journal = journal
        self._workers = workers
        self._send = send
        self._acknowledge = acknowledge
        self._cancel = cancel
        self._kill = kill
        self._on_change = on_change
        self._on_late_end = on_late_end
        self._limit = limit
        self._full_at = -1  # number of jobs in hand with which no more may begin
        self._cancel_grace = cancel_grace
        self.policies: dict[str, JobPolicy] = {}
        self.live: dict[bytes, JobRun] = {}
        self._by_id: dict[str, JobRun] = {}
        self._ready: deque[JobRun] = deque()
        self._orphans: dict[bytes, JobRun] = {}
        self._orphaned: dict[bytes, float] = {}  # since when
        self._claimed = 0  # jobs that were asked for
        self._claim_at = 0.0  # when there may be more of them; the sleep of the machine counts
        self.is_draining = False
        self._outcomes = JobOutcomes(journal)

    @property
    def unrecorded(self) -> int:
        """Number of ends and retries that the journal has not written yet."""
        return self._outcomes.unrecorded

    def find(self, job_id: str) -> JobRun | None:
        """Return a job in hand, also after its end until that is on disk."""
        return self._by_id.get(job_id)

    # Begin

    def expect(self, wait: float | None) -> None:
        """Look for jobs that wait again in so many seconds; None: not without another reason."""
        if wait is not None:
            self._claim_at = min(self._claim_at, boottime() + wait)

    def note_workers(self) -> None:
        """Note that a worker has come or goes."""
        self._full_at = -1

    def claim(self) -> None:
        """Ask the journal for as many jobs as can begin now."""
        in_hand = len(self.live) + len(self._orphans) + self._claimed
        # Each submit and each reply comes here, and most of the time all that may run do.
        if self.is_draining or in_hand == self._full_at or boottime() < self._claim_at:
            return
        workers = self._workers
        coming = len(self._ready) + self._claimed
        if self._limit:
            room = self._limit - in_hand
        else:  # one slot is for calls, if there are several; workers that leave have others
            room = workers.open_slots - (workers.slots > 1) - len(self._orphans) - coming
        if room <= 0:
            self._full_at = in_hand
            return
        # One more than can begin at once, else calls that wait for workers would starve the jobs.
        room = min(room, min(workers.open_slots, max(workers.free_slots, 1)) - coming)
        types = workers.job_types
        if room > 0 and types:
            self._claimed += room
            self._journal.claim(room, types, partial(self._begin, room, types), BROKER)

    def _begin(self, count: int, types: set[str], claim: Claim) -> None:
        self._claimed -= count
        # Workers with other types may have registered since the claim.
        if len(claim.jobs) < count and self._workers.job_types <= types:
            self._claim_at = inf
            self.expect(claim.wait)
        for record in claim.jobs:
            if self.is_draining:
                self._journal.change(record.number, record.attempt)
            else:
                run = JobRun(record)
                self._add(run)
                self._ready.append(run)
                self._on_change(record.id)
        self.assign()
        self.claim()

    def _add(self, run: JobRun) -> None:
        self.live[run.key] = self._by_id[run.record.id] = run

    def _take_orphan(self, key: bytes) -> JobRun | None:
        run = self._orphans.pop(key, None)
        if run is not None:
            del self._orphaned[key]
            self._add(run)
        return run

    def _remove(self, run: JobRun) -> None:
        del self.live[run.key]
        if run in self._ready:
            self._ready.remove(run)

    def assign(self) -> None:
        """Send jobs that wait for a worker to those that are free."""
        for run in list(self._ready):
            while (worker := self._workers.take_free(run.record.type)) is not None:
                if self._send(worker, run):
                    self._ready.remove(run)
                    self._give(run, worker)
                    break
                worker.is_open = False  # its connection is lost
                worker.needs_ready = True

    def _give(self, run: JobRun, worker: Any) -> None:
        run.worker = worker
        worker.jobs.add(run.key)
        self._note_owner(run, str(worker.owner))

    def _note_owner(self, run: JobRun, owner: str) -> None:
        record = run.record
        record.owner = owner
        self._journal.assign(record.number, record.attempt, record.owner)

    def take_back(self, key: bytes) -> None:
        """Let a job wait for another worker: its worker has not begun it."""
        run = self.live[key]
        run.worker = None
        if run.is_cancelled:
            self._end(run, CANCELLED)
        elif self.is_draining:
            self._try_again(run, 0.0)
        else:
            self._ready.appendleft(run)

    # End

    def handle_reply(self, worker: Any, key: bytes, frames: list[Any]) -> None:
        """Record what has become of a job."""
        run = self.live.get(key) or self._take_orphan(key)
        if run is not None:
            run.worker = worker
            policy = self.policies.get(run.record.type, JobPolicy())
            self._apply(run, judge_reply(run, frames, policy))
        elif len(frames) == 1 and not is_error(frames[0]):
            # A success also counts if the attempt was given up, unless the next one has begun.
            number, attempt = parse_job_key(key)
            then = partial(self._on_late_success, worker, key, number)
            self._outcomes.end(number, attempt, DONE, bytes(frames[0]), then)
        else:
            for unrecorded in self._by_id.values():
                if unrecorded.key == key:  # its acknowledgement follows
                    unrecorded.worker = worker
                    return
            self._acknowledge(worker, key)

    def handle_death(self, worker: Any, reason: str) -> None:
        """Decide what becomes of the jobs of a worker that is gone.

        :param reason: verb for their errors
        """
        for run in [each for each in self.live.values() if each.worker is worker]:
            run.worker = None
            if self.is_draining:
                self._remove(run)  # the next broker finds it in the journal
                del self._by_id[run.record.id]
            elif run.is_cancelled:
                self._end(run, CANCELLED)
            elif reason == SILENT and worker.owner.kind == 'remote':
                self._wait_for_worker(run, worker)
            elif worker.was_asked or reason == LOST_ACCESS:
                self._try_again(run, 0.0)
            else:
                self._apply(run, judge_death(run, reason))

    def _wait_for_worker(self, run: JobRun, worker: Any) -> None:
        """Let a job be an orphan: its worker is silent, and may register again."""
        if worker.was_asked:
            run.record.owner = f'{STOPPING} {worker.owner}'
        del self.live[run.key]
        self._orphans[run.key] = run
        self._orphaned[run.key] = monotonic()

    def _apply(self, run: JobRun, verdict: Verdict) -> None:
        state, reply, delay, counts = verdict
        if state is None:
            self._try_again(run, delay, **counts)
        else:
            self._end(run, state, reply, **counts)

    def _end(self, run: JobRun, state: str, reply: bytes | None = None, **counts: int) -> None:
        self._remove(run)
        number, attempt = run.record.number, run.record.attempt
        then = partial(self._on_recorded, run)
        self._outcomes.end(number, attempt, state, reply, then, run.revision, **counts)

    def _try_again(self, run: JobRun, delay: float, **counts: int) -> None:
        self._remove(run)
        number, attempt = run.record.number, run.record.attempt
        then = partial(self._on_changed, run, delay)
        self._outcomes.try_again(number, attempt, delay, then, run.revision, **counts)

    def _on_recorded(self, run: JobRun) -> None:
        del self._by_id[run.record.id]  # before the next attempt: claims come last in the journal
        if run.worker is not None:
            self._acknowledge(run.worker, run.key)
        self._on_change(run.record.id)

    def _on_changed(self, run: JobRun, delay: float) -> None:
        self._on_recorded(run)
        self.expect(delay)
        self.claim()

    def _on_late_success(self, worker: Any, key: bytes, number: int) -> None:
        self._acknowledge(worker, key)
        self._on_late_end(number)

    # What clients ask for

    def cancel(self, found: Cancelled, force: bool) -> None:
        """Cancel a job that runs."""
        key = make_job_key(found.number, found.attempt)
        if (orphan := self._orphans.get(key)) is not None:  # its worker learns of it by `adopt`
            orphan.is_cancelled = True
            orphan.is_forced = orphan.is_forced or force
            return
        run = self.live.get(key)
        if run is None:  # has ended just now
            return
        if run.worker is None:
            self._end(run, CANCELLED)
            return
        if not run.is_cancelled:
            run.is_cancelled = True
            self._send_cancel(run)
        if force:
            self._end_worker(run)

    def _send_cancel(self, run: JobRun) -> None:
        """Let a worker cancel a job; it has `cancel_grace` seconds, unless that was forced."""
        self._cancel(run.worker, run.key)
        due = 0.0 if run.is_forced else monotonic() + self._cancel_grace
        run.kill_at = min(run.kill_at, due)

    def _end_worker(self, run: JobRun) -> None:
        run.is_forced = True  # also if the worker does not hear of it, and registers again
        run.kill_at = inf
        self._kill(run)

    def cancel_former(self, worker: Any, key: bytes) -> None:
        """Cancel an attempt that was given up, and that a worker still runs."""
        self._cancel(worker, key)

    # What workers of a former broker have, and those that are silent

    def add_orphans(self, records: Iterable[JobRecord]) -> None:
        """Add the jobs that run, as the journal says when a broker starts."""
        now, clock = monotonic(), time()
        for record in records:
            key = make_job_key(record.number, record.attempt)
            self._orphans[key] = JobRun(record)
            # If the clock is set back, they would wait for so long; without a time, on a full disk
            # for instance, they wait from now on.
            since = clock if record.orphaned is None else record.orphaned
            self._orphaned[key] = now - max(0.0, clock - since)

    def adopt(self, worker: Any, key: bytes) -> bool:
        """Note that a worker has a job; return False if it is not wanted any more."""
        run = self.live.get(key)
        if run is None:
            run = self._take_orphan(key)
            if run is None:
                return False
            self._note_owner(run, str(worker.owner))
        run.worker = worker
        if run.is_cancelled:
            self._send_cancel(run)
        return True

    def forget(self, worker: Any, listed: set[bytes]) -> None:
        """Take back the jobs that a worker should have, and has not.

        :param listed: keys of its jobs and of its replies
        """
        for run in list(self.live.values()):
            if run.worker is worker and run.key not in listed:
                self.take_back(run.key)
        for key, orphan in list(self._orphans.items()):
            owner = Owner.parse(orphan.record.owner)._replace(is_stopping=False)
            if owner == worker.owner and key not in listed:
                self._give_up(orphan, 'was connected again without this job', is_death=False)

    def _give_up(self, run: JobRun, reason: str, *, is_death: bool) -> None:
        self._take_orphan(run.key)
        if run.is_cancelled:
            self._end(run, CANCELLED)
        elif is_death:
            self._apply(run, judge_death(run, reason, SHARED_DEATH))
        else:
            self._try_again(run, 0.0)

    def check(self, now: float) -> None:
        """Give up orphans, kill workers that do not end cancelled jobs, and begin others.

        :param now: present time in seconds
        """
        for key, orphan in list(self._orphans.items()):
            owner = Owner.parse(orphan.record.owner)
            if owner.is_gone(now - self._orphaned[key]):
                reason = 'and its broker died' if owner.kind == 'local' else 'disappeared'
                self._give_up(orphan, reason, is_death=owner.has_died)
        for run in list(self.live.values()):
            if run.kill_at <= now and run.worker is not None:
                self._end_worker(run)
        self.claim()

    def drain(self) -> None:
        """Begin no more jobs; those that run may end, or be adopted by the next broker."""
        self.is_draining = True
        for run in list(self.live.values()):
            if run.worker is None:
                self._try_again(run, 0.0)
            else:
                self._note_owner(run, f'{STOPPING} {run.worker.owner}')
