# SPDX-License-Identifier: ZPL-2.1
"""What a service says about a job: a snapshot, which does not change any more.

This module does no I/O; the client for threads and the client for asyncio use it.
"""

from datetime import datetime, timedelta
from typing import Annotated, Any

from msgspec import Meta, Struct, ValidationError, convert, field

from pyams_zmq.exceptions import ZMQJobError, ZMQRemoteError, ZMQReplyError
from pyams_zmq.wire.message import payload_of, status_of

_Time = Annotated[datetime, Meta(tz=True)]
_Seconds = Annotated[float, Meta(ge=0, le=1e11)]

_ENDS = {
    'cancelled': (410, 'The job {id} was cancelled'),
    'expired': (504, 'The job {id} has expired before it began'),
}
"""Status and text for jobs that have ended without a reply, by state"""

_NO_REPLY = (409, 'The job {id} is {state} and has no result')

NO_JOURNAL = (501, 'The service keeps no jobs: it has no journal')
"""Status and text instead of the 404 of a service that does not know messages about jobs"""

_UNKNOWN_TYPE = "Unknown message type 'pyams_zmq.job"


class JobProgress(Struct, frozen=True):
    """How far a job has come.

    :ivar done: what is done
    :ivar total: the same when all is done, None if that is not known
    :ivar text: what the job does now
    """

    done: float | None = None
    total: float | None = None
    text: str | None = None

    @property
    def fraction(self) -> float | None:
        """The part that is done, from 0 to 1; None if it is not known."""
        if self.done is None or not self.total:
            return None
        return min(1.0, max(0.0, self.done / self.total))


class JobInfo(Struct, frozen=True, kw_only=True):
    """A job as it was when the service has replied; times are UTC.

    :ivar id: id of the job
    :ivar type: type of its message, the name of the method
    :ivar state: `waiting`, `running`, `done`, `failed`, `cancelled` or `expired`
    :ivar attempt: number of the last attempt, 0 before the first one
    :ivar failures: attempts that have failed
    :ivar created: when it was submitted
    :ivar due: when it may begin; None for at once
    :ivar started: when the last attempt began, or None
    :ivar ended: when it ended, or None
    :ivar progress: a :class:`JobProgress`, or None
    :ivar revision: number of this version; a later one differs
    :ivar reply: the reply of the method, ``[status, payload]`` by convention; None before the end,
        and in lists
    """

    id: str
    type: str
    state: str
    revision: int
    attempt: int = 0
    failures: int = 0
    created: _Time | None = None
    due: _Time | None = None
    started: _Time | None = None
    ended: _Time | None = None
    progress: JobProgress | None = None
    eta_seconds: _Seconds | None = field(default=None, name='eta')
    reply: Any = None

    @property
    def eta(self) -> timedelta | None:
        """The time that the job will still take, by its progress; None if that is not known."""
        return None if self.eta_seconds is None else timedelta(seconds=self.eta_seconds)

    @property
    def is_ended(self) -> bool:
        """True if the job has ended; `ZMQClient.retry` can let it begin again."""
        return self.ended is not None

    def result(self) -> Any:
        """Return the payload of the reply of a job that has ended.

        :raises ZMQRemoteError: if its status is not 2xx; 410 for a cancelled job, 504 for an
            expired one, and 409 for others, if they have no reply
        """
        if self.reply is None and self.state != 'done':
            status, text = _ENDS.get(self.state, _NO_REPLY)
            raise ZMQRemoteError(status, text.format(id=self.id, state=self.state))
        return payload_of(self.reply)

    def __repr__(self) -> str:  # without the result
        return f'{type(self).__name__}({self.type!r}, id={self.id!r}, {self.state!r})'


def check_keeps_jobs(client: Any) -> None:
    """Check that it is not known that the service of a client keeps no jobs.

    :raises ZMQJobError: with status 501, if that is known: the method would run as a call
    """
    if not getattr(client, 'keeps_jobs', True):
        raise ZMQJobError(*NO_JOURNAL)


def read_payload(reply: Any) -> Any:
    """Return the payload of a reply about jobs.

    :raises ZMQJobError: if its status is not 2xx
    :raises ZMQReplyError: if it has no status
    """
    if status_of(reply) is None:
        raise ZMQReplyError(f'The reply about a job is not [status, payload]: {_kind_of(reply)}')
    try:
        return payload_of(reply)
    except ZMQRemoteError as error:
        if error.text.startswith(_UNKNOWN_TYPE):
            raise ZMQJobError(*NO_JOURNAL) from None
        raise ZMQJobError(error.status, error.payload) from None


def read_job(reply: Any) -> JobInfo:
    """Return the job of a reply; it may have members that are not known here.

    :raises ZMQJobError: if the status is not 2xx
    :raises ZMQReplyError: if it is not a job
    """
    job: JobInfo = _convert(read_payload(reply), JobInfo)
    return job


def read_change(reply: Any) -> JobInfo | None:
    """Return the job of a reply, or None if it says that nothing has changed.

    :raises: the errors of `read_job`
    """
    job: JobInfo | None = _convert(read_payload(reply), JobInfo | None)
    return job


def read_jobs(reply: Any) -> list[JobInfo]:
    """Return the jobs of a reply.

    :raises: the errors of `read_job`
    """
    jobs: list[JobInfo] = _convert(read_payload(reply), list[JobInfo])
    return jobs


def read_done(reply: Any) -> None:
    """Check a reply without a payload.

    :raises: the errors of `read_payload`
    """
    read_payload(reply)


def _convert(payload: Any, cls: Any) -> Any:
    try:
        return convert(payload, cls)
    except ValidationError as error:
        raise ZMQReplyError(f'The reply is not what a service says about jobs: {error}') from None


def _kind_of(value: Any) -> str:
    """Return the name of a type, for errors without the value: that may be secret."""
    return type(value).__name__
