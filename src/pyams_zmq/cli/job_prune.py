# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq jobs INI NAME prune``: removes jobs that have ended."""

from typing import Any

from msgspec import Struct, ValidationError, convert

from pyams_zmq.client.job_info import read_payload
from pyams_zmq.exceptions import ZMQReplyError
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.job_limits import MAX_DELAY


class _Pruned(Struct):
    removed: int
    has_more: bool


def prune_jobs(client: Any, older_than: float) -> int:
    """Remove the jobs of a service that have ended some time ago; return their number.

    Each message removes some of them, so that the service answers others meanwhile.

    :param older_than: seconds since their end
    :raises ZMQJobError: if the service does not do that
    """
    begin, removed = monotonic(), 0
    while True:
        # Jobs that end meanwhile stay.
        age = min(older_than + (monotonic() - begin), MAX_DELAY)
        step = _read(client.request(['pyams_zmq.jobs.prune', {'older_than': age}]))
        removed += step.removed
        if not step.has_more:
            return removed


def _read(reply: Any) -> _Pruned:
    try:
        return convert(read_payload(reply), _Pruned)
    except ValidationError as error:
        raise ZMQReplyError(f'The reply is not that of a service with jobs: {error}') from None
