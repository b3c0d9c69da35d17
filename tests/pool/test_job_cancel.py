# SPDX-License-Identifier: ZPL-2.1
"""Cancelling jobs, and their progress."""

import time
from functools import partial

import pytest

from app.program import is_running
from checks import TIMEOUT, wait_until
from job_checks import Asker, lines_of
from pyams_zmq.pool.job_verdict import MAX_DEATHS


@pytest.fixture
def held(tmp_path):
    """Return the arguments of jobs that run until the file in them is removed."""
    path = tmp_path / 'hold'
    path.touch()
    return {'path': str(path), 'log': str(tmp_path / 'log')}


def test_progress(asker, held, tmp_path):
    job_id = asker.submit('work', {**held, 'total': 10**6})
    lines_of(tmp_path / 'log')
    start = time.monotonic()
    job = asker.wait(job_id, until=lambda job: job['progress'])
    assert time.monotonic() - start < 2  # the benchmark measures it
    assert job['state'] == 'running'
    assert job['progress']['total'] == 10**6
    assert job['progress']['text'] == 'working'
    assert job['eta'] > 0
    done = job['progress']['done']
    later = asker.wait(job_id, until=lambda job: job['progress']['done'] > done)
    assert later['revision'] > job['revision']
    (tmp_path / 'hold').unlink()
    job = asker.wait(job_id)
    assert (job['state'], job['progress'], job['eta']) == ('done', None, None)


@pytest.mark.parametrize('name', ['work', 'work_async'])
def test_cancel(asker, held, tmp_path, name):
    job_id = asker.submit(name, held)
    lines_of(tmp_path / 'log')
    assert asker.ask('pyams_zmq.job.cancel', {'id': job_id}) == [200, None]
    job = asker.wait(job_id)
    assert (job['state'], job['attempt'], job['reply']) == ('cancelled', 1, None)
    assert asker.ask('pyams_zmq.job.cancel', {'id': job_id})[0] == 409
    assert asker.ask('pyams_zmq.job.retry', job_id) == [200, None]
    assert asker.wait(job_id, 'running')['attempt'] == 2
    (tmp_path / 'hold').unlink()
    assert asker.wait(job_id)['state'] == 'done'
    assert asker.ask('pyams_zmq.job.retry', job_id)[0] == 409


def test_cancel_of_a_waiting_job(asker):
    job_id = asker.submit('add', [1], delay=60)
    assert asker.ask('pyams_zmq.job.cancel', job_id) == [200, None]
    assert asker.job(job_id)['state'] == 'cancelled'


def test_success_after_a_cancel(asker, held, tmp_path):
    """A job that ends before it notices the cancel is done."""
    job_id = asker.submit('stubborn', held)
    lines_of(tmp_path / 'log')
    assert asker.ask('pyams_zmq.job.cancel', job_id) == [200, None]
    (tmp_path / 'hold').unlink()
    assert asker.wait(job_id)['state'] == 'done'


def test_forced_cancel_of_another_job(job_pool, held, tmp_path):
    """It ends the worker of a job that is not the cause: for that one it does not count."""
    pool = job_pool(workers=1, concurrency=3, jobs=2)
    other = {'path': held['path'], 'log': str(tmp_path / 'other')}
    with Asker(pool) as asker:
        job_id = asker.submit('work', held)
        for number in range(1, MAX_DEATHS + 1):
            lines_of(tmp_path / 'log', number)
            cancelled = asker.submit('stubborn', other)
            lines_of(tmp_path / 'other', number)
            cancel = {'id': cancelled, 'force': True}
            assert asker.ask('pyams_zmq.job.cancel', cancel) == [200, None]
            assert asker.wait(cancelled)['state'] == 'cancelled'
        lines_of(tmp_path / 'log', MAX_DEATHS + 1)
        (tmp_path / 'hold').unlink()
        job = asker.wait(job_id)
    assert (job['state'], job['attempt']) == ('done', MAX_DEATHS + 1)


@pytest.mark.parametrize(('force', 'grace'), [(True, 30), (False, 0.3), (False, 0)])
def test_worker_is_killed_with_its_programs(job_pool, held, tmp_path, force, grace):
    with Asker(job_pool(cancel_grace=grace)) as asker:
        job_id = asker.submit('stubborn', held)
        [[_id, _attempt, worker, program]] = lines_of(tmp_path / 'log')
        assert asker.ask('pyams_zmq.job.cancel', {'id': job_id, 'force': force}) == [200, None]
        job = asker.wait(job_id)
        assert (job['state'], job['attempt']) == ('cancelled', 1)
        for pid in worker, program:
            wait_until(partial(lambda pid: not is_running(int(pid)), pid), TIMEOUT)
        assert asker.run('add', [1])['state'] == 'done'
        assert len(lines_of(tmp_path / 'log')) == 1
