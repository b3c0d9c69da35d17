# SPDX-License-Identifier: ZPL-2.1
"""What happens to jobs when workers, brokers or the whole pool are killed, stopped or replaced."""

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from functools import partial

import psutil
import pytest

from checks import TIMEOUT, freeze, wait_until
from job_checks import Asker, lines_of
from job_handlers import Jobs
from pool_checks import wait_for_workers
from pyams_zmq.exceptions import ZMQTimeoutError
from pyams_zmq.pool import job_owners, job_verdict
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.testing import running


@pytest.fixture
def held(tmp_path):
    """Return the arguments of jobs that run until the file in them is removed."""
    path = tmp_path / 'hold'
    path.touch()
    return {'path': str(path), 'log': str(tmp_path / 'log')}


def broker_of(pool):
    def look():
        with suppress(ZMQTimeoutError):  # it is being replaced
            return pool.stats()['pid']

    return wait_until(look, TIMEOUT)


def kill_broker(pool, num=signal.SIGKILL):
    pid = broker_of(pool)
    os.kill(pid, num)
    wait_until(lambda: broker_of(pool) != pid, TIMEOUT)


@pytest.fixture
def asker(job_pool, monkeypatch):
    """Return a client of a pool that does not wait after the death of a worker."""
    monkeypatch.setattr(job_verdict, '_DEATH_DELAYS', (0.01, 0.01))
    with Asker(job_pool()) as asker:
        yield asker


def test_death_of_a_worker(asker, tmp_path):
    job = asker.run('die', {'log': str(tmp_path / 'log'), 'until': 3})
    assert (job['state'], job['attempt'], job['failures']) == ('done', 3, 0)


def test_third_death(asker, tmp_path):
    job = asker.run('die', {'log': str(tmp_path / 'log'), 'until': 9})
    assert (job['state'], job['attempt']) == ('failed', 3)
    assert job['reply'] == [502, 'The worker died during this job, as others did before']


def test_job_that_kills_workers_which_leave(job_pool, held, tmp_path, monkeypatch):
    """A job that needs much memory makes its worker leave, before the kernel kills it."""
    monkeypatch.setattr(job_verdict, '_DEATH_DELAYS', (0.01, 0.01))
    pool = job_pool(workers=1, max_memory=1.0)
    with Asker(pool) as asker:
        job_id = asker.submit('work', held)
        for number in range(1, 4):
            pid = int(lines_of(tmp_path / 'log', number)[-1][2])
            wait_until(partial(is_leaving, pool, pid), TIMEOUT)
            os.kill(pid, signal.SIGKILL)
        job = asker.wait(job_id)
    assert (job['state'], job['attempt']) == ('failed', 3)


def is_leaving(pool, pid):
    with suppress(ZMQTimeoutError):  # the broker is being replaced
        workers = pool.stats()['workers']
        return (pid, 'leaving') in [(worker['pid'], worker['state']) for worker in workers]


@pytest.mark.parametrize('num', [signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize('is_adopted', [False, True])
def test_death_of_a_worker_that_was_asked_to_leave(job_pool, held, tmp_path, num, is_adopted):
    """It does not count as a death, also if the worker has told an earlier broker only."""
    pool = job_pool(workers=1, drain_timeout=TIMEOUT)
    with Asker(pool) as asker:
        job_id = asker.submit('work', held)
        for number in range(1, job_verdict.MAX_DEATHS + 1):
            pid = int(lines_of(tmp_path / 'log', number)[-1][2])
            os.kill(pid, num)
            wait_until(partial(is_leaving, pool, pid), TIMEOUT)
            if is_adopted:
                kill_broker(pool)
                wait_until(partial(is_leaving, pool, pid), TIMEOUT)
            os.kill(pid, signal.SIGKILL)
        lines_of(tmp_path / 'log', job_verdict.MAX_DEATHS + 1)
        (tmp_path / 'hold').unlink()
        job = asker.wait(job_id)
    assert (job['state'], job['attempt']) == ('done', job_verdict.MAX_DEATHS + 1)


@pytest.mark.parametrize('num', [signal.SIGKILL, signal.SIGTERM])
def test_broker_is_replaced(job_pool, held, tmp_path, num):
    """The new broker adopts the job that runs, with its progress."""
    pool = job_pool()
    with Asker(pool) as asker:
        job_id = asker.submit('work', held)
        asker.wait(job_id, until=lambda job: job['progress'])
        kill_broker(pool, num)
        asker.wait(job_id, until=lambda job: job['progress'])
        (tmp_path / 'hold').unlink()
        job = asker.wait(job_id)
    assert (job['state'], job['attempt']) == ('done', 1)
    assert len(lines_of(tmp_path / 'log')) == 1


def test_job_ends_while_there_is_no_broker(job_pool, held, tmp_path):
    pool = job_pool()
    with Asker(pool) as asker:
        job_id = asker.submit('work', held)
        lines_of(tmp_path / 'log')
        pid = broker_of(pool)
        freeze(pid)  # until the job has ended, which no event announces
        (tmp_path / 'hold').unlink()
        os.kill(pid, signal.SIGKILL)
        job = asker.wait(job_id)
    assert (job['state'], job['attempt'], job['reply'][1][0]) == ('done', 1, 1)
    assert len(lines_of(tmp_path / 'log')) == 1


def test_broker_and_worker_are_killed(job_pool, held, tmp_path):
    """The job begins again at once: its owner is gone."""
    pool = job_pool()
    with Asker(pool) as asker:
        job_id = asker.submit('work', held)
        [[*_ids, worker]] = lines_of(tmp_path / 'log')
        os.kill(broker_of(pool), signal.SIGKILL)
        os.kill(int(worker), signal.SIGKILL)
        lines_of(tmp_path / 'log', 2)
        (tmp_path / 'hold').unlink()
        job = asker.wait(job_id)
    assert (job['state'], job['attempt'], job['failures']) == ('done', 2, 0)


def test_cancel_while_there_is_no_broker(job_pool, held, tmp_path):
    """A cancel is on disk before its reply; a worker that the next broker adopts learns of it."""
    pool = job_pool(cancel_grace=0.5)
    with Asker(pool) as asker:
        job_id = asker.submit('stubborn', held)
        lines_of(tmp_path / 'log')
        assert asker.ask('pyams_zmq.job.cancel', job_id) == [200, None]
        kill_broker(pool)
        assert asker.wait(job_id)['state'] == 'cancelled'


def test_worker_is_stopped_while_there_is_no_broker(job_pool, held, tmp_path):
    """Its job is told to end, but nobody has cancelled it: it begins again."""
    pool = job_pool(workers=1, drain_timeout=TIMEOUT)
    with Asker(pool) as asker:
        job_id = asker.submit('report', held)
        worker = int(lines_of(tmp_path / 'log')[0][2])
        broker, former = broker_of(pool), connections_of(worker)
        freeze(pool.pid)  # it must not start another one before the worker knows that this is gone
        os.kill(broker, signal.SIGKILL)
        wait_until(lambda: not former & connections_of(worker), TIMEOUT)
        os.kill(worker, signal.SIGTERM)
        os.kill(pool.pid, signal.SIGCONT)
        wait_until(partial(is_leaving, pool, worker), TIMEOUT)
        (tmp_path / 'hold').unlink()
        assert asker.wait(job_id)['state'] == 'done'


def connections_of(pid):
    found = psutil.Process(pid).net_connections('tcp')
    return {each.laddr for each in found if each.status == psutil.CONN_ESTABLISHED}


@pytest.mark.parametrize('force', [True, False])
def test_cancel_before_a_worker_has_registered(job_pool, held, tmp_path, force):
    pool = job_pool(cancel_grace=30 if force else 0.3)
    with Asker(pool) as asker:
        job_id = asker.submit('stubborn', held)
        worker = int(lines_of(tmp_path / 'log')[0][2])
        freeze(worker)
        kill_broker(pool)
        cancel = {'id': job_id, 'force': force}
        assert asker.ask('pyams_zmq.job.cancel', cancel) == [200, None]
        os.kill(worker, signal.SIGCONT)
        job = asker.wait(job_id)
    assert (job['state'], job['attempt']) == ('cancelled', 1)


def test_stop_and_start(job_pool, held, tmp_path, address):
    """A stop does not count as a death."""
    for number in range(1, 5):
        pool = job_pool(address=address, drain_timeout=1.0)
        with Asker(pool) as asker:
            if number == 1:
                job_id = asker.submit('work', held)
            attempts = [line[1] for line in lines_of(tmp_path / 'log', number)]
            assert attempts == [str(each + 1) for each in range(number)]
            if number < 4:
                pool.stop()
                pool.join(TIMEOUT)
            else:
                (tmp_path / 'hold').unlink()
                job = asker.wait(job_id)
    assert (job['state'], job['attempt'], job['failures']) == ('done', 4, 0)


def test_reload(job_pool, held, tmp_path):
    """Workers are replaced when their jobs have ended."""
    pool = job_pool()
    before = {worker['pid'] for worker in pool.stats()['workers']}
    with Asker(pool) as asker:
        job_id = asker.submit('work', held)
        lines_of(tmp_path / 'log')
        pool.reload()
        asker.wait(job_id, until=lambda job: job['progress'])
        (tmp_path / 'hold').unlink()
        assert asker.wait(job_id)['attempt'] == 1
        wait_for_workers(pool, before)
        assert asker.run('add', [1])['state'] == 'done'


def test_type_that_no_worker_knows(job_pool, address, capfd):
    pool = job_pool(address=address)
    with Asker(pool) as asker:
        job_id = asker.submit('add', [1], delay=0.5)
    pool.stop()
    pool.join(TIMEOUT)
    pool = job_pool(handler=type('Others', (Jobs,), {'add': None}), address=address)
    with Asker(pool) as asker:
        assert asker.run('text', 1)['state'] == 'done'
        asker.wait(asker.submit('text', 1, delay=0.7))
        assert asker.job(job_id)['state'] == 'waiting'
    pool.stop()
    pool.join(TIMEOUT)
    pool = job_pool(address=address)
    with Asker(pool) as asker:
        assert asker.wait(job_id)['reply'] == [200, 1]


def test_kills_at_random_times(job_pool, address, tmp_path):
    """No job is lost, and none begins again after its success was recorded."""
    log, number = tmp_path / 'log', 40
    seed = random.randrange(10**6)
    print('seed', seed)
    chance = random.Random(seed)
    pool = job_pool(address=address, workers=3)
    with Asker(pool) as asker:
        args = {'log': str(log), 'seconds': 0.1}
        ids = [asker.submit('nap', args) for _number in range(number)]
        for _kill in range(6):
            time.sleep(chance.uniform(0.1, 0.4))  # a random time is what is tested
            children = psutil.Process(pool.pid).children()
            with suppress(psutil.NoSuchProcess):
                chance.choice(children).kill()
        jobs = {job_id: asker.wait(job_id) for job_id in ids}
    assert {job['state'] for job in jobs.values()} == {'done'}
    begins = Counter(line[0] for line in lines_of(log) if line[2] == 'begin')
    assert set(begins) == set(ids)
    assert all(begins[job_id] <= job['attempt'] for job_id, job in jobs.items())


def test_worker_is_suspended_with_a_job_on_its_way(job_pool, tmp_path, monkeypatch):
    """It does not begin the job when it continues: another worker has done it meanwhile."""
    monkeypatch.setattr(job_owners, 'REMOTE_TIME', 0.5)
    log = tmp_path / 'log'
    args = {'log': str(log), 'seconds': 0}
    remote = {'worker_address': '127.0.0.1', 'worker_auth': 'worker:secret'}
    pool = job_pool(workers=1, jobs=2, **remote)
    worker = PoolWorker(pool.bound_worker_address, Jobs, 'worker:secret')
    worker.beat_interval = 1.0  # the broker misses it after three seconds: first it sends a job
    with running(worker), Asker(pool) as asker:
        wait_for_workers(pool)
        freeze(worker.pid)
        ids = [asker.submit('nap', args) for _worker in range(2)]
        jobs = [asker.wait(job_id) for job_id in ids]
        assert {job['state'] for job in jobs} == {'done'}
        assert max(job['attempt'] for job in jobs) == 2
        os.kill(worker.pid, signal.SIGCONT)
        assert worker.pid in wait_for_workers(pool)
        jobs = [asker.run('nap', args) for _number in range(4)]
        assert {job['attempt'] for job in jobs} == {1}
    begins = Counter(line[0] for line in lines_of(log) if line[2] == 'begin')
    assert set(begins.values()) == {1}, log.read_text()
