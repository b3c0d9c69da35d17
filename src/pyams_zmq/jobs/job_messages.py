# SPDX-License-Identifier: ZPL-2.1
"""The messages of clients about jobs: what they contain, and what they get."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from math import inf
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError, ZMQReplyError
from pyams_zmq.jobs.job_replies import DAMAGED
from pyams_zmq.jobs.reader import MAX_PAGE
from pyams_zmq.jobs.records import STATES, JobRecord, Submission
from pyams_zmq.wire.job_limits import (
    MAX_ATTEMPT,
    MAX_DELAY,
    MAX_IDS,
    MAX_KEY_SIZE,
    MAX_PRIORITY,
    MAX_RETRIES,
    is_job_id,
)
from pyams_zmq.wire.message import decode_reply, encode, split_request
from pyams_zmq.wire.tracing import trace_options
from pyams_zmq.wire.uuid7 import make_uuid7


def read_submission(frames: Sequence[bytes], index: int, user: str, address: str) -> Submission:
    """Return the job that a message submits.

    :param frames: frames of the message
    :param index: index of the frame with ``[type, args, options]``
    :param user: user id of the client
    :param address: IP address of the client
    :raises ZMQMessageError: with status 400 for a bad message or option, 504 if its deadline has
        passed
    """
    kept = list(frames)
    name, args, options = split_request(kept[index])
    given = {'id': make_uuid7(), **read_options(options)}
    # Without the deadline: the worker may get it long after that. With the trace, for each attempt.
    trace = trace_options(options)
    kept[index] = encode([name, args, trace] if trace else [name, args])
    return Submission(type=name, frames=kept, user=user, address=address, **given)


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a message that are given, and belong to the job.

    :raises ZMQMessageError: with status 400 for a bad option
    """
    given = {
        option: _read(options, option, check)
        for option, check in _OPTIONS.items()
        if options.get(option) is not None
    }
    if given.get('expires', inf) <= given.get('delay', 0):
        raise ZMQMessageError(400, 'Bad option expires: write more seconds than its delay has')
    return given


def describe_job(record: JobRecord, now: float, live: Any = None) -> dict[str, Any]:
    """Return a job as clients get it.

    :param now: present time, in seconds since the epoch
    :param live: what the broker knows beside the journal: has `progress` and `revision`; or None
    """
    progress = None if live is None else live.progress
    started = record.started
    return {
        'id': record.id,
        'type': record.type,
        'state': record.state,
        'attempt': record.attempt,
        'failures': record.failures,
        'created': _format_time(record.created),
        'due': _format_time(record.due),
        'started': _format_time(started),
        'ended': _format_time(record.ended),
        'progress': progress,
        'eta': None if started is None else _estimate(progress, now - started),
        'revision': record.revision if live is None else max(record.revision, live.revision),
        'reply': None if record.reply is None else _read_reply(record.reply),
    }


def check_id(value: Any) -> str:
    """Return the id of a job.

    :raises ValueError: for anything else; the text says what is allowed
    """
    if not isinstance(value, str) or not is_job_id(value):
        raise ValueError('1 to 64 ASCII letters, digits, or one of _ - .')
    return value


def read_id(args: Any) -> str:
    """Return the id that is the argument of a message.

    :raises ZMQMessageError: with status 400 for anything else
    """
    return str(_read({'id': args}, 'id', check_id, is_required=True))


class Wait:
    """The arguments of ``pyams_zmq.job.wait``.

    :ivar ids: ids of the jobs
    :ivar timeout: seconds
    :raises ZMQMessageError: with status 400 for bad arguments
    """

    def __init__(self, args: Any):
        options = _object(args)
        if isinstance(options.get('ids'), list):
            ids = options['ids']
            if not 1 <= len(ids) <= MAX_IDS:
                raise ZMQMessageError(400, f'Bad ids: write 1 to {MAX_IDS} of them')
            self.ids = list(dict.fromkeys(map(read_id, ids)))
        else:
            self.ids = [read_id(options.get('id'))]
        self.timeout: float = min(_read(options, 'timeout', _number(0, MAX_ATTEMPT), 20.0), 60.0)
        after = options.get('after')
        if isinstance(after, dict):
            if len(after) > MAX_IDS:
                raise ZMQMessageError(400, f'Bad after: write at most {MAX_IDS} revisions')
            self._after = {name: _read(after, name, _integer(-1, 2**63)) for name in self.ids}
            self._is_single = True
        else:
            revision = _read(options, 'after', _integer(-1, 2**63))
            self._after = dict.fromkeys(self.ids, revision)
            self._is_single = len(self.ids) == 1

    def is_new(self, job_id: str, revision: int, has_ended: bool) -> bool:
        """Return True if the client does not know this revision of a job."""
        after: int | None = self._after.get(job_id)
        if after is None:
            return True
        if self._is_single:
            return revision != after or (has_ended and len(self.ids) == 1)
        return revision > after


class Cancel:
    """The arguments of ``pyams_zmq.job.cancel``: an object, or the id only.

    :raises ZMQMessageError: with status 400 for bad arguments
    """

    def __init__(self, args: Any):
        options = args if isinstance(args, dict) else {'id': args}
        self.id = read_id(options.get('id'))
        self.force = options.get('force', False)
        if not isinstance(self.force, bool):
            raise ZMQMessageError(400, 'Bad option force: write true or false')


def read_page(args: Any) -> dict[str, Any]:
    """Return the arguments of :meth:`~pyams_zmq.jobs.reader.JournalReader.page`.

    :raises ZMQMessageError: with status 400 for bad arguments
    """
    options = {} if args is None else _object(args)
    return {
        'state': _read(options, 'state', _check_state),
        'type': _read(options, 'type', _check_text),
        'limit': _read(options, 'limit', _integer(1, MAX_PAGE), MAX_PAGE),
        'before': _read(options, 'before', check_id),
    }


def read_age(args: Any) -> float:
    """Return the argument of ``pyams_zmq.jobs.prune``: seconds since the end of the jobs.

    :raises ZMQMessageError: with status 400 for bad arguments
    """
    return float(_read(_object(args), 'older_than', _number(0, MAX_DELAY), is_required=True))


def _read(
    options: Mapping[str, Any],
    name: str,
    check: Callable[[Any], Any],
    default: Any = None,
    *,
    is_required: bool = False,
) -> Any:
    value = options.get(name)
    if value is None and not is_required:
        return default
    try:
        return check(value)
    except ValueError as error:
        raise ZMQMessageError(400, f'Bad option {name}: write {error}') from None


def _object(args: Any) -> dict[str, Any]:
    if not isinstance(args, dict):
        raise ZMQMessageError(400, 'Bad arguments: write an object')
    return args


def _number(least: float, most: float, *, is_open: bool = False) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or (is_open and value == least):
            kind = 'above' if is_open else 'from'
            raise ValueError(f'a number {kind} {least:g} to {most:g}')
        return float(value)

    return check


def _integer(least: int, most: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f'an integer from {least} to {most}')
        return value

    return check


def _check_key(value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(value.encode()) <= MAX_KEY_SIZE:
        raise ValueError(f'a text of 1 to {MAX_KEY_SIZE} bytes')
    return value


_OPTIONS: dict[str, Callable[[Any], Any]] = {
    'id': check_id,
    'key': _check_key,
    'priority': _integer(-MAX_PRIORITY, MAX_PRIORITY),
    'delay': _number(0, MAX_DELAY),
    'expires': _number(0, MAX_DELAY),
    'retries': _integer(0, MAX_RETRIES),
    'timeout': _number(0, MAX_ATTEMPT, is_open=True),
}


def _check_state(value: Any) -> str:
    if value not in STATES:
        raise ValueError(f'one of {", ".join(STATES)}')
    return str(value)


def _check_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError('a text')  # noqa: TRY004 - `_read` makes a reply of it
    return value


def _format_time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat('T', 'milliseconds')[:-6] + 'Z'


def _read_reply(reply: bytes) -> Any:
    try:
        return decode_reply(reply)
    except ZMQReplyError:
        return DAMAGED


def _estimate(progress: Mapping[str, Any] | None, elapsed: float) -> float | None:
    """Return the seconds until the end of a job, if it goes on as it did so far."""
    if progress is None or progress['total'] is None:
        return None
    done, total = progress['done'], progress['total']
    if not 0 < done <= total or elapsed < 0:
        return None
    return round(float(elapsed * (total - done) / done), 1)
