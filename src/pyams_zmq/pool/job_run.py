# SPDX-License-Identifier: ZPL-2.1
"""A job in hand, and the workers that jobs need."""

from math import inf
from typing import Any, Protocol

from pyams_zmq.jobs.records import JobRecord
from pyams_zmq.pool.protocol import make_job_key
from pyams_zmq.wire.clock import time


class JobRun:
    """A job in hand.

    :ivar record: the job as it was when it began
    :ivar key: key of its call
    :ivar worker: worker that has it, a WorkerState; None while it waits for one
    :ivar progress: what its method has published, as clients get it; or None
    :ivar revision: revision that it has with this progress
    :ivar is_cancelled: true if somebody has cancelled it
    :ivar is_forced: true if its worker has to end
    :ivar kill_at: time when its worker is killed
    """

    __slots__ = (
        'is_cancelled',
        'is_forced',
        'key',
        'kill_at',
        'progress',
        'record',
        'revision',
        'worker',
    )

    def __init__(self, record: JobRecord):
        self.record = record
        self.key = make_job_key(record.number, record.attempt)
        self.worker: Any = None
        self.progress: dict[str, Any] | None = None
        self.revision = record.revision
        self.is_cancelled = record.cancel is not None
        self.is_forced = False
        self.kill_at = inf

    def publish(self, done: float, total: float | None, text: str) -> None:
        """Note how far the job is."""
        self.progress = {'done': done, 'total': total, 'text': text}
        self.revision = max(self.revision + 1, int(time() * 1000))


class Workers(Protocol):
    """What the book needs of the :class:`~pyams_zmq.pool.job_scheduler.JobScheduler`."""

    @property
    def slots(self) -> int:
        """Number of requests that open workers handle at a time."""

    @property
    def open_slots(self) -> int:
        """Number of these that no job occupies."""

    @property
    def free_slots(self) -> int:
        """Number of requests that they can begin now."""

    @property
    def job_types(self) -> set[str]:
        """Types of the jobs that they know."""

    def take_free(self, job_type: str) -> Any:
        """Return a worker that can begin a job now, or None."""
