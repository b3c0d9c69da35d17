# SPDX-License-Identifier: ZPL-2.1
"""The scheduler of a pool with a journal: workers get calls and jobs."""

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import ValidationError, convert

from pyams_zmq.handler.job import JobPolicy
from pyams_zmq.pool.job_book import JobBook
from pyams_zmq.pool.job_owners import Owner
from pyams_zmq.pool.protocol import JOB_MARK
from pyams_zmq.pool.queue import Call
from pyams_zmq.pool.scheduler import Scheduler, WorkerState


class JobScheduler(Scheduler):
    """Assigns jobs to free workers, and calls to the others.

    :ivar book: the jobs
    :ivar submit: submits a call as a job: its type became known when it was in the queue
    :ivar is_local: returns True if a worker runs on this machine
    """

    book: JobBook
    submit: Callable[[Call], None]
    is_local: Callable[[WorkerState], bool]

    @property
    def slots(self) -> int:
        """Number of requests that open workers handle at a time."""
        return sum(worker.slots for worker in self.workers.values() if worker.is_open)

    @property
    def open_slots(self) -> int:
        """Number of these that no job occupies."""
        workers = self.workers.values()
        return sum(worker.slots - len(worker.jobs) for worker in workers if worker.is_open)

    @property
    def free_slots(self) -> int:
        """Number of requests that they can begin now."""
        return sum(worker.is_open for worker in self._free)

    @property
    def job_types(self) -> set[str]:
        """Types of the jobs that they know."""
        workers = self.workers.values()
        return set().union(*(worker.job_types for worker in workers if worker.is_open))

    def take_free(self, job_type: str) -> WorkerState | None:
        """Return the worker that can begin a job and has been free for the longest time, or None.

        It has one free slot less after that.
        """
        for worker in self._free:
            if worker.is_open and job_type in worker.job_types:
                self._free.remove(worker)
                return worker
        return None

    def assign_queued(self) -> None:
        """Assign jobs that wait, then calls, to free workers; let further jobs begin."""
        self.book.assign()
        super().assign_queued()
        self.book.claim()

    def _assign(self, call: Call) -> bool:
        if call.name.decode() in self.book.policies:
            self.submit(call)
            return True
        return super()._assign(call)

    def handle_reply(self, route: bytes, key: bytes, reply: list[Any], now: float) -> None:
        """Send the reply of a worker to its client, or record it."""
        if key[0] != JOB_MARK:
            super().handle_reply(route, key, reply, now)
            return
        worker = self.workers.get(route)
        if worker is None:
            return
        self.book.handle_reply(worker, key, reply)
        if key in worker.jobs or key in worker.unknown_calls:
            worker.jobs.discard(key)
            worker.unknown_calls.discard(key)
            worker.replies += 1
            self._release(worker)

    def handle_reject(self, route: bytes, key: bytes) -> None:
        """Put a call, or a job, that a worker has not started in front of the others."""
        worker = self.workers.get(route)
        if worker is not None and key in worker.jobs:
            worker.jobs.discard(key)
            self.book.take_back(key)
            self._release(worker)
        else:
            super().handle_reject(route, key)

    def handle_ready(
        self, route: bytes, info: Mapping[str, Any], now: float, **options: Any
    ) -> WorkerState:
        """Register a worker, see :meth:`.Scheduler.handle_ready`.

        :raises ValueError: if its jobs cannot be read; then nothing has changed
        """
        _read_policies(info)
        return super().handle_ready(route, info, now, **options)

    def _register_jobs(
        self, worker: WorkerState, info: Mapping[str, Any], keys: set[bytes]
    ) -> None:
        policies = _read_policies(info)
        replies = {bytes.fromhex(key) for key in info.get('replies', ())}
        worker.job_types = frozenset(policies)
        if worker.owner is None:
            worker.owner = Owner.of_worker(worker.pid, worker.route, self.is_local(worker))
        known = set().union(*(each.job_types for each in self.workers.values()))
        kept = {name: policy for name, policy in self.book.policies.items() if name in known}
        self.book.policies = kept | policies
        self.book.expect(0.0)
        jobs = {key for key in keys if key[:1] == bytes([JOB_MARK])}
        self.book.forget(worker, jobs | replies)
        worker.jobs = {key for key in jobs if self.book.adopt(worker, key)}
        for key in replies:
            self.book.adopt(worker, key)
        for key in jobs - worker.jobs:
            self.book.cancel_former(worker, key)
        self.book.note_workers()
        for call in self._queue.take_types({name.encode() for name in policies}):
            self.submit(call)  # it waits for the disk, not for a worker

    def handle_disconnect(self, route: bytes, was_asked: bool = False) -> None:
        """Note that a worker accepts no more, see :meth:`.Scheduler.handle_disconnect`."""
        super().handle_disconnect(route, was_asked)
        self.book.note_workers()
        self.book.claim()

    def remove(self, route: bytes, now: float, reason: str = 'died') -> None:
        """Remove a worker, and repeat or fail its calls and jobs."""
        worker = self.workers.get(route)
        if worker is not None:
            worker.is_open = False
            self.book.handle_death(worker, reason)
        super().remove(route, now, reason)
        self.book.note_workers()


def _read_policies(info: Mapping[str, Any]) -> dict[str, JobPolicy]:
    """Return how often the jobs of a worker are tried, by type."""
    try:
        policies: dict[str, JobPolicy] = convert(info.get('jobs', {}), dict[str, JobPolicy])
    except ValidationError as error:
        worker = f'{info.get("pid")} on {info.get("host")}'
        raise ValueError(f'The jobs of the worker {worker} cannot be read: {error}') from None
    return policies
