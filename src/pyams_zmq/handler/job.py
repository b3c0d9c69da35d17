# SPDX-License-Identifier: ZPL-2.1
"""Methods that are jobs: how they are declared, and what they know of the job that they run."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar, overload

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.wire.job_limits import MAX_BACKOFF, MAX_RETRIES
from pyams_zmq.wire.message import check_integer, check_timeout

MAX_PROGRESS = 2**53
"""The largest number of a progress: in JSON, larger ones are not exact"""

MAX_TEXT = 200
"""Characters of the text of a progress; more are cut off"""

_T = TypeVar('_T')


class JobPolicy(NamedTuple):
    """How often a job is tried.

    :ivar retries: further attempts after a failure
    :ivar backoff: seconds until the first one of these; it doubles with each of them
    """

    retries: int = 0
    backoff: float = 1.0


@overload
def zmq_job(method: _T, /) -> _T: ...
@overload
def zmq_job(
    *, retries: int = 0, backoff: float = 1, timeout: float | None = None
) -> Callable[[_T], _T]: ...
def zmq_job(
    method: Any = None,
    /,
    *,
    retries: int = 0,
    backoff: float = 1,
    timeout: float | None = None,
) -> Any:
    """Declare that a method is a job of a pool with a journal; a decorator, also without arguments.

    It runs at least once, and again when its worker has died. A keyword-only parameter `job` gets
    the :class:`Job`.

    :param retries: further attempts after an exception, or a result with status 5xx
    :param backoff: seconds until the second attempt; they double with each further one,
        up to an hour
    :param timeout: seconds of an attempt, after which it has failed; None for no limit
    :raises ValueError: if *retries* is not an integer from 0 to 1000, *backoff* not a number above
        0 and up to 3600, or *timeout* not a number above 0
    :raises TypeError: if it decorates something else
    """
    check_integer('retries', retries, 0, MAX_RETRIES)
    check_timeout(backoff, 'backoff', MAX_BACKOFF)  # infinity has no JSON form
    if timeout is not None:
        check_timeout(timeout)

    def declare(method: Any) -> Any:
        try:
            method.zmq_job = JobPolicy(retries, float(backoff)), timeout
        except AttributeError:
            raise TypeError(
                f'Bad method {method!r}: write @zmq_job, or the options by name, as in '
                '@zmq_job(retries=3)'
            ) from None
        return method

    return declare if method is None else declare(method)


class JobCancelled(ZMQMessageError):  # noqa: N818 - as CancelledError, it is not a fault
    """Raised by `progress` of a job that somebody has cancelled."""

    def __init__(self, text: str = 'The job was cancelled'):
        super().__init__(410, text)


class Job:
    """The job that a method runs.

    :ivar id: id of the job
    :ivar type: type of the message, the name of the method
    :ivar attempt: 1 for the first attempt; a later one finds what the former ones have left
    """

    def __init__(self, job_id: str, job_type: str, attempt: int = 1, timeout: float | None = None):
        self.id = job_id
        self.type = job_type
        self.attempt = attempt
        self._timeout = timeout
        self._progress: tuple[float, float | None, str] | None = None
        self._is_cancelled = False
        self._task: asyncio.Task[Any] | None = None

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.type!r}, id={self.id!r}, attempt={self.attempt})'

    @property
    def is_cancelled(self) -> bool:
        """True if somebody has cancelled the job, or the attempt has passed its time limit."""
        return self._is_cancelled

    def progress(self, done: float, total: float | None = None, text: str = '') -> None:
        """Publish how far the job is; any thread may call it, at any rate.

        :param done: what is done, in any unit
        :param total: the same for the whole job, or None if it is not known
        :param text: what the job does now, up to 200 characters
        :raises JobCancelled: if the job is cancelled
        :raises TypeError, ValueError: if *done* or *total* is not a number, or is too large
        """
        for value in (done, 0 if total is None else total):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f'Bad progress {value!r}: write a number')
            if not abs(value) <= MAX_PROGRESS:  # NaN is not, either
                raise ValueError(f'Bad progress {value!r}: write a number up to 2**53')
        if self._is_cancelled:
            raise JobCancelled
        # Lone surrogates, of the name of a file for instance, have no JSON form.
        text = str(text)[:MAX_TEXT].encode(errors='replace').decode()
        self._progress = done, total, text


class RunningJob(Job):
    """A job as the process that runs it sees it: what it has published, and how to cancel it.

    :ivar sent: the progress that the broker has got, or None
    """

    sent: tuple[float, float | None, str] | None = None

    @property
    def timeout(self) -> float | None:
        """Seconds of the attempt, if the job was submitted with a limit."""
        return self._timeout

    @property
    def published(self) -> tuple[float, float | None, str] | None:
        """The last progress, a new object each time."""
        return self._progress

    def cancel(self) -> None:
        """Let `progress` raise, and end a coroutine; called in the loop."""
        self._is_cancelled = True
        if self._task is not None:
            self._task.cancel()

    async def wait(self, result: Awaitable[Any]) -> Any:
        """Return the result of an `async def` method, which `cancel` ends.

        :raises JobCancelled: if it was cancelled
        """
        if self._is_cancelled:
            if asyncio.iscoroutine(result):
                result.close()
            raise JobCancelled
        self._task = asyncio.current_task()
        try:
            return await result
        except asyncio.CancelledError:
            if self._is_cancelled:
                raise JobCancelled from None
            raise
        finally:
            self._task = None


def call_job(job: RunningJob, call: Callable[[], Any]) -> Any:
    """Call a method that runs a job.

    :return: its result, or an awaitable of it
    """
    result = call()
    return job.wait(result) if isinstance(result, Awaitable) else result
