# SPDX-License-Identifier: ZPL-2.1
"""The jobs that a worker has in hand, and the replies that its broker has not recorded yet."""

import asyncio
import logging
import os
import signal
from collections.abc import Iterator

from pyams_zmq.handler.job import RunningJob
from pyams_zmq.pool.protocol import JobHeader
from pyams_zmq.process.descendants import descendants
from pyams_zmq.wire.body import Reply
from pyams_zmq.wire.log_fields import extra
from pyams_zmq.wire.message import encode, is_error

LOGGER = logging.getLogger('PyAMS (zmq)')


class WorkerJobs:
    """The jobs of a worker, by key.

    :ivar running: the jobs whose methods run
    :ivar replies: frames of the replies without ACK
    """

    def __init__(self) -> None:
        self.running: dict[bytes, RunningJob] = {}
        self.replies: dict[bytes, list[bytes]] = {}
        self._stopped: set[bytes] = set()
        self._on_acks: asyncio.Event | None = None

    def begin(self, key: bytes, header: JobHeader) -> RunningJob:
        """Return a job whose method is about to be called."""
        job = RunningJob(header.id, header.type, header.attempt, header.timeout)
        self.running[key] = job
        return job

    def end(self, key: bytes, reply: list[bytes]) -> None:
        """Keep the reply to a job."""
        job = self.running.pop(key, None)
        if job is not None:
            job.cancel()  # its thread may still run, after its time limit
        self.replies[key] = reply

    def acknowledge(self, key: bytes) -> None:
        """Forget the reply to a job: it was recorded."""
        self.replies.pop(key, None)
        if not self.replies and self._on_acks is not None:
            self._on_acks.set()

    async def wait_for_acks(self) -> None:
        """Wait until no reply is kept."""
        self._on_acks = asyncio.Event()
        while self.replies:
            self._on_acks.clear()
            await self._on_acks.wait()

    def cancel(self, key: bytes, force: bool) -> None:
        """Cancel a job.

        :param force: true to end this process, if the job is in hand
        """
        job = self.running.get(key)
        if job is not None:
            job.cancel()
            if force:
                LOGGER.warning(
                    'This worker ends, because a job does not end after a cancel',
                    extra=extra(method=job.type, job=job.id),
                )
                for program in descendants():
                    program.send(signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    def stop(self) -> None:
        """Cancel all jobs; they begin again when this process has ended and there is a broker."""
        for job in list(self.running.values()):
            job.cancel()
        self._stopped.update(self.running)

    def is_stopped(self, key: bytes, reply: Reply) -> bool:
        """Return True if `stop` has cancelled a job, and its reply is not a success."""
        last = reply[-1] if isinstance(reply, list) else reply
        return key in self._stopped and is_error(last)

    def repeat_progress(self) -> None:
        """Let `take_progress` return the last progress of all jobs: there is a new broker."""
        for job in list(self.running.values()):
            job.sent = None

    def take_progress(self) -> Iterator[tuple[bytes, bytes]]:
        """Return the keys and the encoded progress of jobs that have published something."""
        for key, job in list(self.running.items()):  # another thread calls this
            published = job.published
            if published is not None and job.sent is not published:
                job.sent = published
                yield key, encode(published)
