# SPDX-License-Identifier: ZPL-2.1
"""Jobs as clients see them, and the clients that wait until one has changed."""

from collections.abc import Callable
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.job_messages import Wait, describe_job
from pyams_zmq.jobs.reader import JournalReader
from pyams_zmq.jobs.records import ENDED, JobRecord
from pyams_zmq.jobs.watchers import Watcher, Watchers
from pyams_zmq.pool.job_run import JobRun
from pyams_zmq.wire.clock import monotonic, time
from pyams_zmq.wire.message import DRAINING


class JobViews:
    """Jobs as clients see them.

    :param reader: reads the journal
    :param reply: sends a reply, from an envelope, a status and a payload
    :param find_run: returns a job in hand, from its id; or None
    """

    def __init__(
        self,
        reader: JournalReader,
        reply: Callable[[Any, int, Any], None],
        find_run: Callable[[str], JobRun | None],
    ):
        self._reader = reader
        self._reply = reply
        self._find_run = find_run
        self._watchers = Watchers()

    def __len__(self) -> int:
        """Return the number of clients that wait."""
        return len(self._watchers)

    def find(self, job_id: str) -> JobRecord:
        """Return a job.

        :raises ZMQMessageError: with status 404 if it is unknown
        """
        record = self._reader.get(job_id)
        if record is None:
            raise ZMQMessageError(404, 'There is no job with this id')
        return record

    def describe(self, job_id: str, record: JobRecord | None = None) -> dict[str, Any]:
        """Return a job as clients get it, with the id by which they ask for it.

        :param record: the job, if it is at hand
        :raises ZMQMessageError: with status 404 if it is unknown
        """
        record = record or self.find(job_id)
        run = self._find_run(record.id) if record.state not in ENDED else None
        return {**describe_job(record, time(), run), 'id': job_id}

    def wait(self, envelope: Any, wait: Wait) -> None:
        """Reply at the next change of a job that the client does not know.

        :raises ZMQMessageError: with status 404 if one of the jobs is unknown
        """
        records = {job_id: self.find(job_id) for job_id in wait.ids}
        jobs = [self.describe(job_id, record) for job_id, record in records.items()]
        new = [
            job for job in jobs if wait.is_new(job['id'], job['revision'], job['state'] in ENDED)
        ]
        if new:
            self._reply(envelope, 200, min(new, key=lambda job: job['revision']))
        else:
            ids = {job_id: record.id for job_id, record in records.items()}
            self._watchers.add(Watcher(wait, ids, envelope, monotonic() + wait.timeout))

    def notify(self, job_id: str) -> None:
        """Send a job that has changed to those who wait for it."""
        watchers = self._watchers.watchers_of(job_id)
        if watchers and (record := self._reader.get(job_id)) is not None:
            job = self.describe(job_id, record)
            for watcher in watchers:
                asked = watcher.find(job_id, job['revision'], job['state'] in ENDED)
                if asked is not None:
                    self._watchers.remove(watcher)
                    self._reply(watcher.envelope, 200, {**job, 'id': asked})

    def notify_number(self, number: int) -> None:
        """Do the same for a job of which the number is known."""
        self.notify(self._reader.find_id(number))

    def notify_all(self, ids: list[str]) -> None:
        """Send jobs that have changed to those who wait for them."""
        for job_id in ids:
            self.notify(job_id)

    def reply_late(self, now: float) -> None:
        """Send the present state to those who have waited for long enough.

        :param now: present time in seconds
        """
        for watcher in self._watchers.take_late(now):
            self._reply_late(watcher)

    def end(self) -> None:
        """Let nobody wait any more."""
        for watcher in self._watchers.take_all():
            self._reply(watcher.envelope, *DRAINING)

    def _reply_late(self, watcher: Watcher) -> None:
        try:
            self._reply(watcher.envelope, 200, self.describe(watcher.wait.ids[0]))
        except ZMQMessageError as error:  # it was removed meanwhile
            self._reply(watcher.envelope, error.status, error.text)
