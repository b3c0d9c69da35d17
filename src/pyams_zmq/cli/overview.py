# SPDX-License-Identifier: ZPL-2.1
"""A table of services: one row for each, from the answers of all of them."""

from collections.abc import Mapping
from http import HTTPStatus

from pyams_zmq.cli.outcome import ERROR, OK, REFUSED, TIMEOUT, UNREACHABLE, code_of
from pyams_zmq.cli.output import format_age
from pyams_zmq.cli.printable import printable
from pyams_zmq.cli.snapshot import Change, Snapshot, read_snapshot
from pyams_zmq.exceptions import ZMQBaseError, ZMQRemoteError, ZMQReplyError, ZMQVersionError
from pyams_zmq.monitor.inquiry import Answer

TITLES = (
    *('SERVICE', 'STATE', 'CALLS/S', 'ERRORS', 'IN FLIGHT', 'WAITING', 'OLDEST', 'P50', 'P99'),
    *('WORKERS', 'MEMORY', 'JOBS RUN', 'JOBS WAIT'),
)

_STATES = {REFUSED: 'refused', UNREACHABLE: 'down', TIMEOUT: 'no answer'}
_UNKNOWN = '-'


class Overview:
    """The rows of the table; rates and durations are those since the answers before.

    :ivar rows: the rows, each with as many texts as there are titles
    :ivar problems: a line for each service without statistics
    :ivar code: exit code of a command that ends now: that of the first of these services
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.problems: list[str] = []
        self.code = OK
        self._before: dict[str, tuple[float, Snapshot]] = {}

    def update(self, answers: Mapping[str, Answer], now: float) -> None:
        """Show other answers.

        :param now: time of the answers, in seconds of a clock that never goes back
        """
        self.rows, self.problems, self.code = [], [], OK
        for name, answer in answers.items():
            self.rows.append((printable(name), *self._describe(name, answer, now)))

    def _describe(self, name: str, answer: Answer, now: float) -> tuple[str, ...]:
        error = answer.exception
        if error is None:
            try:
                snapshot = read_snapshot(answer.result)
            except ZMQReplyError as problem:
                error = problem
            else:
                then, before = self._before.get(name, (now, None))
                self._before[name] = now, snapshot
                return _describe(snapshot, Change(snapshot, before, now - then))
        self._before.pop(name, None)
        self.problems.append(printable(f'{name}: {" ".join(str(error).split())}'))
        code = code_of(error) if isinstance(error, ZMQBaseError) else ERROR
        self.code = self.code or code
        state = 'no statistics' if _is_unknown(error) else _STATES.get(code, 'error')
        return state, *[_UNKNOWN] * (len(TITLES) - 2)


def _is_unknown(error: Exception) -> bool:
    """Return True if a service does not know the question, as one of pyams_zmq 2."""
    if isinstance(error, ZMQRemoteError):
        return error.status == HTTPStatus.NOT_FOUND
    return isinstance(error, ZMQVersionError)


def _describe(snapshot: Snapshot, change: Change) -> tuple[str, ...]:
    jobs = None if snapshot.jobs is None else snapshot.jobs.states
    return (
        printable(snapshot.state),
        _number(change.rate, '.1f'),
        _number(snapshot.errors),
        _number(snapshot.in_flight),
        _number(snapshot.queue),
        _UNKNOWN if snapshot.oldest is None else format_age(snapshot.oldest),
        _format_duration(change.percentile(50)),
        _format_duration(change.percentile(99)),
        _UNKNOWN if snapshot.workers is None else str(len(snapshot.workers)),
        _UNKNOWN if snapshot.memory is None else f'{snapshot.memory:.0f} MiB',
        _UNKNOWN if jobs is None else str(jobs.get('running', 0)),
        _UNKNOWN if jobs is None else str(jobs.get('waiting', 0)),
    )


def _number(value: float | None, spec: str = '') -> str:
    return _UNKNOWN if value is None else format(value, spec)


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    return f'{seconds:.1f} s' if seconds >= 1 else f'{seconds * 1000:.1f} ms'
