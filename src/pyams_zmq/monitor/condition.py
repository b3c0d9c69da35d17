# SPDX-License-Identifier: ZPL-2.1
"""The condition of a service, as its answer to a question shows."""

from typing import NamedTuple

from pyams_zmq.exceptions import (
    ZMQRefusedError,
    ZMQRemoteError,
    ZMQReplyError,
    ZMQTimeoutError,
    ZMQUnreachableError,
    ZMQVersionError,
)
from pyams_zmq.monitor.question import Answer

UP = 'up'
DRAINING = 'draining'
DOWN = 'down'

_UNAUTHORIZED = 401
_UNAVAILABLE = 503
_REFUSED = 'it refuses this application: compare the users and keys of both'
_SILENT = 'it does not answer: it is down, or hangs'
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (ZMQRefusedError, _REFUSED),
    (ZMQUnreachableError, _SILENT),
    (ZMQTimeoutError, _SILENT),
    (ZMQReplyError, 'what answers is not a service of pyams_zmq'),
)
_UNKNOWN = 'it cannot be asked'


class Condition(NamedTuple):
    """The condition of a service.

    :ivar status: `UP`, `DRAINING` (it finishes its calls, and takes no others) or `DOWN`
    :ivar reason: why it is down, without an address or another secret; None if it is not
    """

    status: str
    reason: str | None = None


def condition_of(answer: Answer) -> Condition:
    """Return the condition of a service that was asked for `pyams_zmq.ping` or `pyams_zmq.stats`.

    One that knows no such question is up: it has answered. So is one of pyams_zmq 2, which was not
    asked: it has completed the handshake.
    """
    error = answer.exception
    if error is None:
        is_draining = isinstance(answer.result, dict) and answer.result.get('state') == DRAINING
        return Condition(DRAINING if is_draining else UP)
    if isinstance(error, ZMQVersionError):
        return Condition(UP)
    if isinstance(error, ZMQRemoteError):
        if error.status == _UNAUTHORIZED:
            return Condition(DOWN, _REFUSED)
        return Condition(DRAINING if error.status == _UNAVAILABLE else UP)
    reasons = (text for kind, text in _REASONS if isinstance(error, kind))
    return Condition(DOWN, next(reasons, _UNKNOWN))
