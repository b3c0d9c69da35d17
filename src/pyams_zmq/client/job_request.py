# SPDX-License-Identifier: ZPL-2.1
"""The messages that submit jobs, and ask for them.

This module does no I/O; the client for threads and the client for asyncio use it.
"""

from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from math import isfinite
from typing import Any, NamedTuple

from msgspec import Struct, ValidationError, convert

from pyams_zmq.exceptions import ZMQReplyError
from pyams_zmq.wire.clock import time
from pyams_zmq.wire.job_limits import (
    MAX_ATTEMPT,
    MAX_DELAY,
    MAX_IDS,
    MAX_KEY_SIZE,
    MAX_PRIORITY,
    MAX_RETRIES,
    is_job_id,
)
from pyams_zmq.wire.message import (
    check_boolean,
    check_integer,
    check_timeout,
    payload_of,
    status_of,
)
from pyams_zmq.wire.uuid7 import make_uuid7

SUBMIT_RETRIES = 1
"""Further attempts to submit a job, at least: the service knows its id, so it is made once"""

ACCEPTED = 202


class SubmittedJob(Struct, frozen=True):
    """A job that was submitted.

    :ivar id: id of the job; that of another one, if its *key* was known. A job that is submitted on
        commit has its id before: if another job has its *key*, that job answers to both ids
    :ivar is_new: False if the id or the key was known; None before the commit of a transaction
    """

    id: str
    is_new: bool | None = None


class Submission(NamedTuple):
    """A job before it is sent.

    :ivar message: the message, ``[type, args, options]``
    """

    message: list[Any]
    is_own_id: bool

    @property
    def id(self) -> str:
        """Id of the job."""
        job_id: str = self.message[2]['id']
        return job_id

    def read(self, reply: Any) -> SubmittedJob:
        """Return the job that the service has accepted.

        :raises ZMQRemoteError: if it has not accepted it
        :raises ZMQReplyError: if it does not know jobs
        """
        found = None
        if status_of(reply) is not None:
            payload = payload_of(reply)
            with suppress(ValidationError):
                found = convert(payload, SubmittedJob)
        if found is None or (found.id != self.id and 'key' not in self.message[2]):
            raise ZMQReplyError(
                f'{self.message[0]!r} was not accepted as a job, and may have run as a call: the '
                'service has no journal, or the method is not a job'
            )
        # A known id that nobody else can have is that of an attempt whose reply was lost.
        is_new = status_of(reply) == ACCEPTED or (self.is_own_id and found.id == self.id)
        return SubmittedJob(found.id, is_new)


def make_submission(
    type: str,  # noqa: A002 - the name of the field
    args: Any,
    *,
    id: str | None = None,  # noqa: A002 - the name of the field
    key: str | None = None,
    delay: float | None = None,
    due: datetime | None = None,
    expires: float | None = None,
    priority: int = 0,
    timeout: float | None = None,
    retries: int | None = None,
) -> Submission:
    """Return a job that can be sent; the arguments are those of `ZMQClient.submit`.

    :raises ValueError, TypeError: if one of them is not valid
    """
    if not isinstance(type, str):
        kind = type.__class__.__name__  # without its value: it may be the arguments
        raise TypeError(f'Bad message type ({kind}): write a string, the name of the method')
    if due is not None:
        if delay is not None:
            raise ValueError('Bad due: a job has a delay or a due, not both')
        delay = _seconds_until(due)
    if delay is not None:
        delay = _check_seconds('delay', delay)
    if expires is not None and _check_seconds('expires', expires) <= (delay or 0):
        raise ValueError(f'Bad expires {expires!r}: write more seconds than its delay has')
    options = {
        'id': make_uuid7() if id is None else check_id(id),
        'key': None if key is None else _check_key(key),
        'delay': delay or None,
        'expires': expires,
        'priority': check_integer('priority', priority, -MAX_PRIORITY, MAX_PRIORITY) or None,
        'timeout': None if timeout is None else check_timeout(timeout, most=MAX_ATTEMPT),
        'retries': None if retries is None else check_integer('retries', retries, 0, MAX_RETRIES),
    }
    options = {name: value for name, value in options.items() if value is not None}
    return Submission([type, args, options], id is None)


def check_id(id: Any) -> str:  # noqa: A002 - the name of the field
    """Check the id of a job, and return it.

    :raises ValueError: if it is not a valid one
    """
    if not isinstance(id, str) or is_job_id(id) is None:
        text = '1 to 64 ASCII letters, digits, "_", "-" and "."'
        raise ValueError(f'Bad id {id!r}: write {"its `id`" if hasattr(id, "id") else text}')
    return id


def check_ids(ids: Any) -> list[str]:
    """Return the ids of jobs, each once, in their order.

    :param ids: an id, or an iterable of them
    :raises ValueError: if one is not valid, or there are more than 100
    """
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        ids = [ids]
    found = list(dict.fromkeys(check_id(each) for each in ids))
    if len(found) > MAX_IDS:
        raise ValueError(f'Bad ids: there are {len(found)}; write {MAX_IDS} at most')
    return found


def _check_key(key: Any) -> str:
    if not isinstance(key, str) or not 0 < len(key.encode(errors='replace')) <= MAX_KEY_SIZE:
        raise ValueError(f'Bad key: write a string of 1 to {MAX_KEY_SIZE} bytes')  # not its value
    return key


def _check_seconds(name: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not isfinite(value)
        or not 0 <= value <= MAX_DELAY
    ):
        raise ValueError(f'Bad {name} {value!r}: write seconds, from 0 to ten years')
    return value


def _seconds_until(due: Any) -> float:
    if not isinstance(due, datetime) or due.tzinfo is None:
        raise ValueError(
            f'Bad due {due!r}: write a datetime with a time zone, such as '
            'datetime.now(timezone.utc) + timedelta(hours=1)'
        )
    # Not `due.timestamp() - time()`: that of an aware datetime is exact, but may be out of range.
    now = datetime.fromtimestamp(time(), timezone.utc)
    seconds = (due - now).total_seconds()
    if seconds > MAX_DELAY:
        raise ValueError(f'Bad due {due!r}: write a time within the next ten years')
    return max(0.0, seconds)


def ask_job(id: str) -> list[Any]:  # noqa: A002 - the name of the field
    """Return the message that asks for a job.

    :raises ValueError: if the id is not valid
    """
    return ['pyams_zmq.job', check_id(id)]


def ask_jobs(
    state: str | None,
    type: str | None,  # noqa: A002 - the name of the field
    limit: int | None,
    before: str | None,
) -> list[Any]:
    """Return the message that asks for a list of jobs.

    :raises ValueError: if the limit or the id is not valid
    """
    options = {
        'state': state,
        'type': type,
        'limit': None if limit is None else check_integer('limit', limit, 1),
        'before': None if before is None else check_id(before),
    }
    return ['pyams_zmq.jobs', {key: value for key, value in options.items() if value is not None}]


def ask_cancel(id: str, force: bool) -> list[Any]:  # noqa: A002 - the name of the field
    """Return the message that cancels a job.

    :raises ValueError, TypeError: if the id is not valid, or *force* not a boolean
    """
    return ['pyams_zmq.job.cancel', {'id': check_id(id), 'force': check_boolean('force', force)}]


def ask_retry(id: str) -> list[Any]:  # noqa: A002 - the name of the field
    """Return the message that lets a job begin again.

    :raises ValueError: if the id is not valid
    """
    return ['pyams_zmq.job.retry', check_id(id)]
