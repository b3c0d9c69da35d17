# SPDX-License-Identifier: ZPL-2.1
"""What becomes of a job whose attempt has ended: an end, or another attempt."""

import logging
from random import uniform
from typing import Any, NamedTuple

from pyams_zmq.handler.job import JobPolicy
from pyams_zmq.jobs.records import CANCELLED, DONE, FAILED
from pyams_zmq.pool.job_run import JobRun
from pyams_zmq.wire.job_limits import MAX_BACKOFF
from pyams_zmq.wire.log_fields import extra
from pyams_zmq.wire.message import decode_reply, encode, is_error, status_of

LOGGER = logging.getLogger('PyAMS (zmq)')

MAX_DEATHS = 3
"""Workers that may die during a job before the job fails"""

DEATH, SHARED_DEATH = 3, 1
"""By how much a death counts in `deaths` of a job. That of a worker together with its broker counts
less: somebody has killed the whole service, or its machine has failed, which is rarely the job"""

# Seconds until the attempts after the first and the second death: several kills within a second,
# of a service that is being ended or short of memory, are not the fault of one job.
_DEATH_DELAYS = (1.0, 4.0)
_JITTER = (0.8, 1.2)  # so that jobs that have failed together do not begin together
_SERVER_ERROR = 500


class Verdict(NamedTuple):
    """What becomes of a job.

    :ivar state: the state in which it ends; None if it is tried again
    :ivar reply: its reply, or None
    :ivar delay: seconds until the next attempt
    :ivar counts: new numbers of `failures` or `deaths`
    """

    state: str | None
    reply: bytes | None
    delay: float
    counts: dict[str, int]


def _end(state: str, reply: bytes | None = None, **counts: int) -> Verdict:
    return Verdict(state, reply, 0.0, counts)


def _try_again(delay: float, **counts: int) -> Verdict:
    return Verdict(None, None, delay, counts)


def judge_reply(run: JobRun, frames: list[Any], policy: JobPolicy) -> Verdict:
    """Decide what becomes of a job that has a reply.

    :param frames: frames of the reply
    :param policy: that of its method
    """
    reply, record = bytes(frames[-1]), run.record
    if len(frames) > 1:
        text = 'The result of a job cannot have binary frames: store them in a file'
        return _end(FAILED, encode([500, text]))
    if not is_error(reply):
        return _end(DONE, reply)
    if run.is_cancelled:
        return _end(CANCELLED)
    if (status_of(decode_reply(reply)) or 0) < _SERVER_ERROR:
        return _end(FAILED, reply)
    retries = policy.retries if record.retries is None else record.retries
    failures = record.failures + 1
    if failures > retries:
        return _end(FAILED, reply, failures=failures)
    # The exponent has a limit: numbers have one, too.
    delay = min(policy.backoff * 2.0 ** min(failures - 1, 60), MAX_BACKOFF)
    delay *= uniform(*_JITTER)  # noqa: S311 - no secret
    return _try_again(delay, failures=failures)


def judge_death(run: JobRun, reason: str, weight: int = DEATH) -> Verdict:
    """Decide what becomes of a job whose worker has died.

    :param reason: verb for its error
    :param weight: by how much that counts
    """
    deaths = run.record.deaths + weight
    if deaths >= MAX_DEATHS * DEATH:
        text = f'The worker {reason} during this job, as others did before'
        return _end(FAILED, encode([502, text]), deaths=deaths)
    LOGGER.warning(
        'The worker %s during the job %s (%s), which is tried again',
        reason,
        run.record.id,
        run.record.type,
        extra=extra(method=run.record.type, job=run.record.id),
    )
    return _try_again(_DEATH_DELAYS[deaths >= 2 * DEATH], deaths=deaths)
