# SPDX-License-Identifier: ZPL-2.1
"""The client for tests, with the handler in its own process, has the results of a real pool."""

import asyncio
import re
import time

from checks import TIMEOUT
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQBaseError, ZMQMessageError
from pyams_zmq.jobs import JobCancelled, zmq_job
from pyams_zmq.message import Multipart
from pyams_zmq.pool import ZMQPool
from pyams_zmq.testing import RecordingClient, running


class Jobs:
    """Jobs that succeed and fail, and a method that is not one."""

    @zmq_job(retries=2, backoff=0.01)
    def convert(self, clip: str, *, job):
        for number in range(4):
            job.progress(number, 4)
        return [200, f'{clip}.webm']

    @zmq_job(retries=2, backoff=0.01)
    def fail(self, args):
        raise ValueError

    @zmq_job
    def repeat(self, size):
        return [200, 'x' * size]

    @zmq_job
    def with_frames(self, args):
        return Multipart([200, 1], [b'x'])

    @zmq_job
    async def hang(self, args):
        await asyncio.Event().wait()

    @zmq_job(timeout=0.05)
    def nap(self, seconds):
        time.sleep(seconds)  # longer than its limit

    @zmq_job
    def refuse(self, status):
        raise ZMQMessageError(status, 'no')

    @zmq_job
    def end_as_if_cancelled(self, args):
        raise JobCancelled

    def ping(self, args):
        return [200, args]


def of_job(act, *submission, **options):
    """Return a function that submits a job, and returns what an action gets."""
    return lambda client: act(client, client.submit(*submission, **options).id)


def result(client, job_id):
    return client.result(job_id, timeout=TIMEOUT)


def end(client, job_id):
    """Return what remains of a job that has ended."""
    *_changes, info = client.watch(job_id, timeout=TIMEOUT)
    return info.state, info.attempt, info.failures, info.reply


def after_the_end(name):
    def act(client, job_id):
        end(client, job_id)
        return getattr(client, name)(job_id)

    return act


def message(*parts):
    return lambda client: client.request([*parts])


CASES = [
    lambda client: client.submit('ping', 1),
    lambda client: client.submit('nobody', 1),
    lambda client: list(client.call('convert', 'a.mov')),
    of_job(result, 'convert', 'a.mov'),
    of_job(end, 'convert', 'a.mov'),
    of_job(end, 'convert', 5, retries=0),
    of_job(result, 'fail', 1),
    of_job(end, 'fail', 1),
    of_job(end, 'fail', 1, retries=0),
    of_job(end, 'repeat', 2 * 1024 * 1024),
    of_job(end, 'with_frames', 1),
    of_job(end, 'hang', 1, timeout=0.05),
    of_job(end, 'nap', 0.2),
    of_job(end, 'refuse', 410),
    of_job(end, 'refuse', 503),
    of_job(end, 'end_as_if_cancelled', 1),
    of_job(after_the_end('cancel'), 'convert', 'a.mov'),
    of_job(after_the_end('retry'), 'convert', 'a.mov'),
    of_job(ZMQClient.retry, 'convert', 'a.mov', delay=60),
    of_job(ZMQClient.job, 'convert', 'a.mov', delay=60),
    lambda client: client.submit('convert', 'a.mov', delay=60, expires=30),
    lambda client: client.job('nobody'),
    lambda client: client.cancel('nobody'),
    lambda client: client.jobs(state='finished'),
    lambda client: client.jobs(limit=1000),
    lambda client: client.jobs(before='nobody'),
    lambda client: [info.state for info in client.jobs(state='cancelled')],
    message('convert', 'a', {'id': 'x', 'priority': 'high'}),
    message('convert', 'a', {'id': 'x', 'delay': -1}),
    message('convert', 'a', {'id': 'x', 'delay': 9, 'expires': 9}),
    message('convert', 'a', {'id': 'a b'}),
    message('convert', 'a', {'id': 'y', 'delay': 60, 'key': None, 'colour': 'red'}),
    message('convert', 'a', 'y'),
    message('convert', 'a', {'id': 'x'}, 'too much'),
    message('pyams_zmq.job', None),
    message('pyams_zmq.job', {'id': 'y'}),
    message('pyams_zmq.job.wait', {}),
    message('pyams_zmq.job.wait', 5),
    message('pyams_zmq.job.wait', {'ids': []}),
    message('pyams_zmq.job.wait', {'id': 'y', 'after': 'z'}),
    message('pyams_zmq.job.cancel', {'id': 'y', 'force': 1}),
    message('pyams_zmq.job.retry', ['y']),
    message('pyams_zmq.job.delete', 'y'),
    message('pyams_zmq.jobs', 'x'),
    message('pyams_zmq.jobs', {'state': 'cancelled', 'lmit': 5}),
    message('pyams_zmq.job', 'y'),
]


def run(client, case):
    """Return the result of a case, or its error, without ids, times and revisions."""
    try:
        text = repr(case(client))
    except (ZMQBaseError, ValueError) as error:
        text = f'{type(error).__name__}: {error}'
    text = re.sub(r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|id [0-9a-f]{12}', 'ID', text)
    return re.sub(r"'revision': \d+|'\d{4}-\d\d-\d\dT[0-9:.]+Z'", 'X', text)


def test_same_results(tmp_path):
    factory = type('Own', (ZMQPool,), {'journal': tmp_path / 'x.jobs'})
    with (
        running(factory, handler=Jobs) as process,
        ZMQClient(process.bound_address, timeout=TIMEOUT) as real,
        RecordingClient(handler=Jobs) as recorded,
    ):
        for number, case in enumerate(CASES):
            assert (number, run(recorded, case)) == (number, run(real, case))
