# SPDX-License-Identifier: ZPL-2.1
"""Jobs of a service, for coroutines."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import datetime
from typing import Any, TypeVar

from pyams_zmq.client.job_info import JobInfo, read_change, read_done, read_job, read_jobs
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

_T = TypeVar('_T')


class AsyncJobMethods:
    """The methods of an asynchronous client for jobs, which its method `request` sends.

    The arguments, the results and the errors are those of the methods of
    :class:`~pyams_zmq.client.ZMQClient`.
    """

    retries: int
    request: Callable[..., Any]

    async def submit(
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
        """Submit a job, and wait until it is on disk; see :meth:`.ZMQClient.submit`."""
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
        attempts = max(self.retries, SUBMIT_RETRIES)
        return await self._ask(submission.message, submission.read, retries=attempts, frames=frames)

    async def job(self, id: str) -> JobInfo:  # noqa: A002 - the name of the field
        """Return what the service knows about a job, see :meth:`.ZMQClient.job`."""
        return await self._ask(ask_job(id), read_job)

    async def jobs(
        self,
        *,
        state: str | None = None,
        type: str | None = None,  # noqa: A002 - the name of the field
        limit: int | None = None,
        before: str | None = None,
    ) -> list[JobInfo]:
        """Return a list of jobs, see :meth:`.ZMQClient.jobs`."""
        return await self._ask(ask_jobs(state, type, limit, before), read_jobs)

    async def cancel(
        self,
        id: str,  # noqa: A002 - the name of the field
        *,
        force: bool = False,
    ) -> None:
        """Cancel a job, see :meth:`.ZMQClient.cancel`."""
        await self._ask(ask_cancel(id, force), read_done)

    async def retry(self, id: str) -> None:  # noqa: A002 - the name of the field
        """Let a job begin again, see :meth:`.ZMQClient.retry`."""
        await self._ask(ask_retry(id), read_done)

    def watch(
        self,
        ids: str | Iterable[str],
        *,
        timeout: float | None = None,
        patience: float = PATIENCE,
    ) -> AsyncIterator[JobInfo]:
        """Return an asynchronous iterator of the changes of jobs, see :meth:`.ZMQClient.watch`."""
        return self._watch(JobWatch(ids, timeout, patience, monotonic()))

    async def _watch(self, watch: JobWatch) -> AsyncIterator[JobInfo]:
        while watch:
            message, timeout = watch.ask(monotonic())
            try:
                job = await self._ask(message, read_change, timeout=timeout, retries=0)
            except Exception as error:  # noqa: BLE001 - most of them are raised again
                watch.fail(error, monotonic())
            else:
                if watch.handle(job, monotonic()):
                    yield job
            if watch.pause:
                await asyncio.sleep(watch.pause)

    async def result(
        self,
        id: str,  # noqa: A002 - the name of the field
        *,
        timeout: float | None = None,
        patience: float = PATIENCE,
    ) -> Any:
        """Wait for the end of a job, and return its result, see :meth:`.ZMQClient.result`."""
        async for job in self.watch(check_id(id), timeout=timeout, patience=patience):
            last = job
        return last.result()

    async def _ask(self, message: list[Any], read: Callable[[Any], _T], **options: Any) -> _T:
        """Send a message, and return what a function reads in the reply."""
        return read(await self.request(message, **options))
