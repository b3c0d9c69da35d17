# SPDX-License-Identifier: ZPL-2.1
"""A job that takes longer than the life of several brokers."""

import os
import signal
from contextlib import suppress

from checks import TIMEOUT, wait_until
from job_checks import Asker, lines_of
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQTimeoutError


def broker_of(pool):
    def look():
        with suppress(ZMQTimeoutError):  # it is being replaced
            return pool.stats()['pid']

    return wait_until(look, TIMEOUT)


def test_brokers_are_killed_under_a_long_job(job_pool, tmp_path):
    """It is not begun again, and whoever watches it sees the end."""
    pool = job_pool()
    log = tmp_path / 'log'
    with Asker(pool) as asker, ZMQClient(pool.bound_address) as client:
        job_id = asker.submit('nap', {'seconds': 5, 'log': str(log)})
        watch = client.watch(job_id, timeout=TIMEOUT)
        states = [next(watch).state]
        lines_of(log)
        for _turn in range(3):  # after more of them in a row, the supervisor would wait
            killed = broker_of(pool)
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: broker_of(pool) != killed, TIMEOUT)  # noqa: B023 - called here
            assert asker.job(job_id)['attempt'] == 1
        states += [job.state for job in watch]
        job = asker.job(job_id)
    assert set(states) <= {'waiting', 'running', 'done'}
    assert (states[-1], job['attempt'], job['reply']) == ('done', 1, [200, 1])
    assert [words[2] for words in lines_of(log, 2)] == ['begin', 'end']
