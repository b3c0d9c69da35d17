# SPDX-License-Identifier: ZPL-2.1
"""Jobs of a service: submitting them, and what has become of them."""

import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, TypeVar

from pyams_zmq.client.job_info import (
    JobInfo,
    JobProgress,
    check_keeps_jobs,
    read_change,
    read_done,
    read_job,
    read_jobs,
)
from pyams_zmq.client.job_request import (
    SUBMIT_RETRIES,
    SubmittedJob,
    ask_cancel,
    ask_job,
    ask_jobs,
    ask_retry,
    check_id,
    make_submission,
)
from pyams_zmq.client.job_watch import PATIENCE, JobWatch
from pyams_zmq.wire.clock import monotonic

__all__ = ['JobInfo', 'JobProgress', 'SubmittedJob']

_T = TypeVar('_T')


class JobMethods:
    """The methods of a client for jobs, which its method `request` sends.

    :ivar retries: see :class:`~pyams_zmq.client.ZMQClient`
    :ivar keeps_jobs: False if it is known that the service has no journal: `submit` raises an error
    """

    retries: int
    request: Callable[..., Any]
    keeps_jobs: bool = True

    def submit(
        self,
        type: str,  # noqa: A002 - the name of the field
        args: Any = None,
        *,
        id: str | None = None,  # noqa: A002 - the name of the field
        key: str | None = None,
        delay: float | None = None,
        due: datetime | None = None,
        expires: float | None = None,
        priority: int = 0,
        timeout: float | None = None,
        retries: int | None = None,
        frames: Iterable[Any] | None = None,
    ) -> SubmittedJob:
        """Submit a job, and wait until the service has it on disk.

        It is submitted again after a time-out or a lost connection, at least once, also if
        `retries` of the client is 0: the service knows it by its id, and keeps it once.

        :param type: type of the message, the name of the method
        :param args: arguments, any value with a JSON form
        :param id: id of the job, 1 to 64 ASCII letters, digits, `_`, `-` and `.`, which no other
            job of the service has; by default a UUID of version 7
        :param key: text, unique among the unfinished jobs of this type and user: if another job
            has it, no job is made, and the id is that of the other one
        :param delay: seconds until it may begin
        :param due: when it may begin instead, a datetime with a time zone; it is sent as a delay,
            so that the clocks need not agree
        :param expires: seconds after which it does not begin any more, more than the delay; further
            attempts of one that has begun in time do
        :param priority: from -1000 to 1000; jobs with a higher one begin earlier
        :param timeout: seconds of an attempt, by default those of the method
        :param retries: attempts after the first one, by default those of the method
        :param frames: binary frames, see :meth:`.ZMQClient.call`; they are kept with the job
        :raises ZMQRemoteError: if the service does not accept it; with status 507, if its disk or
            journal is full; ZMQJobError with status 501, if it is declared without a journal
        :raises ZMQReplyError: if the method is not a job, or the service has no journal: then it
            may have run as a call
        :raises: the errors of :meth:`.ZMQClient.call`
        """
        submission = make_submission(
            type,
            args,
            id=id,
            key=key,
            delay=delay,
            due=due,
            expires=expires,
            priority=priority,
            timeout=timeout,
            retries=retries,
        )
        check_keeps_jobs(self)
        attempts = max(self.retries, SUBMIT_RETRIES)
        return self._ask(submission.message, submission.read, retries=attempts, frames=frames)

    def job(self, id: str) -> JobInfo:  # noqa: A002 - the name of the field
        """Return what the service knows about a job.

        :raises ZMQJobError: with status 404, if it is not known
        :raises: the errors of :meth:`.ZMQClient.call`
        """
        return self._ask(ask_job(id), read_job)

    def jobs(
        self,
        *,
        state: str | None = None,
        type: str | None = None,  # noqa: A002 - the name of the field
        limit: int | None = None,
        before: str | None = None,
    ) -> list[JobInfo]:
        """Return a list of jobs without their replies, the newest one first.

        Only users of `stats_users`, and clients of the machine of the service, may do that.

        :param state: state of the jobs, by default all
        :param type: type of the jobs, by default all
        :param limit: number of jobs, 100 at most and by default
        :param before: id of the last job of the list before
        :raises ZMQJobError: with status 403, if the user may not
        :raises: the errors of :meth:`.ZMQClient.call`
        """
        return self._ask(ask_jobs(state, type, limit, before), read_jobs)

    def cancel(
        self,
        id: str,  # noqa: A002 - the name of the field
        *,
        force: bool = False,
    ) -> None:
        """Cancel a job: one that runs ends at its next progress, or a little later.

        :param force: end its worker at once, with its programs
        :raises ZMQJobError: with status 409, if it has ended; 404, if it is not known; 403, if
            another user has submitted it
        :raises: the errors of :meth:`.ZMQClient.call`
        """
        self._ask(ask_cancel(id, force), read_done)

    def retry(self, id: str) -> None:  # noqa: A002 - the name of the field
        """Let a job that has ended without success begin again.

        :raises ZMQJobError: with status 409, if it has not ended, or was successful; 404 and 403
            as for `cancel`
        :raises: the errors of :meth:`.ZMQClient.call`
        """
        self._ask(ask_retry(id), read_done)

    def watch(
        self,
        ids: str | Iterable[str],
        *,
        timeout: float | None = None,
        patience: float = PATIENCE,
    ) -> Iterator[JobInfo]:
        """Return an iterator of what becomes of a job: now, and after each change until its end.

        If it is not asked for the next change in time, it leaves out those in between. It goes on
        after a restart of the service.

        :param ids: id of the job, or of several ones; then it yields the changes of each
        :param timeout: seconds until it raises an error, by default none
        :param patience: seconds without a service until it raises the error
        :raises ZMQTimeoutError: if the jobs have not ended in time
        :raises ZMQJobError: with status 404, if a job is not known
        :raises: the errors of :meth:`.ZMQClient.call`
        """
        return self._watch(JobWatch(ids, timeout, patience, monotonic()))

    def _watch(self, watch: JobWatch) -> Iterator[JobInfo]:
        while watch:
            job = self._poll(watch)
            if job is not None:
                yield job
            if watch.pause:
                time.sleep(watch.pause)

    def _poll(self, watch: JobWatch) -> JobInfo | None:
        """Ask for the next change of a watch; return None if there is none yet."""
        message, timeout = watch.ask(monotonic())
        try:
            job = self._ask(message, read_change, timeout=timeout, retries=0)
        except Exception as error:  # noqa: BLE001 - most of them are raised again
            watch.fail(error, monotonic())
            return None
        return job if watch.handle(job, monotonic()) else None

    def result(
        self,
        id: str,  # noqa: A002 - the name of the field
        *,
        timeout: float | None = None,
        patience: float = PATIENCE,
    ) -> Any:
        """Wait for the end of a job, and return the payload of its reply, as `call` does.

        :param timeout: seconds, by default without limit
        :param patience: see `watch`
        :raises ZMQRemoteError: if the status of the reply is not 2xx; 410, if the job was
            cancelled; 504, if it has expired
        :raises: the errors of `watch`
        """
        for job in self.watch(check_id(id), timeout=timeout, patience=patience):
            last = job
        return self._result_of(last)

    def _result_of(self, job: JobInfo) -> Any:
        return job.result()

    def _ask(self, /, message: list[Any], read: Callable[[Any], _T], **options: Any) -> _T:
        """Send a message, and return what a function reads in the reply."""
        return read(self.request(message, **options))
