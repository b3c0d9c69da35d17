# SPDX-License-Identifier: ZPL-2.1
"""Who may see, cancel and retry which jobs; what happens at limits and at the end."""

import json
import os
import signal
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from threading import Thread

import pytest
import zmq

from checks import TIMEOUT, freeze, wait_until
from job_checks import Asker, lines_of
from job_handlers import Calls, Jobs
from namespaces import mount, run_unshared
from pool_checks import wait_for_workers
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.exceptions import ZMQBaseError
from pyams_zmq.jobs import watchers as watchers_module
from pyams_zmq.jobs import writer as writer_module
from pyams_zmq.jobs.writer import JournalWriter
from pyams_zmq.pool import job_owners, job_verdict
from pyams_zmq.pool.broker import PoolBroker
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.process import inspection as inspection_module
from pyams_zmq.socket import zmq_socket
from pyams_zmq.testing import running
from pyams_zmq.wire.message import encode


@pytest.fixture
def held(tmp_path):
    """Return the arguments of jobs that run until the file in them is removed."""
    path = tmp_path / 'hold'
    path.touch()
    return {'path': str(path), 'log': str(tmp_path / 'log')}


def test_jobs_of_others(job_pool, monkeypatch):
    monkeypatch.setattr(inspection_module, 'parse_ip', lambda address: ip_address('192.0.2.1'))
    pool = job_pool(auth=['alice:a', 'bob:b', 'carol:c'], stats_users={'carol'})
    alice, bob, carol = (Asker(pool, auth=auth) for auth in ('alice:a', 'bob:b', 'carol:c'))
    with alice, bob, carol:
        job_id = alice.submit('add', [1], delay=60)
        assert bob.job(job_id)['state'] == 'waiting'  # who knows an id may read the job
        for message in ('pyams_zmq.job.cancel', job_id), ('pyams_zmq.job.retry', job_id):
            assert bob.ask(*message)[0] == 403
        assert bob.ask('pyams_zmq.jobs')[0] == 403
        assert alice.ask('pyams_zmq.jobs')[0] == 403
        assert [job['id'] for job in carol.ask('pyams_zmq.jobs')[1]] == [job_id]
        assert alice.ask('pyams_zmq.job.cancel', job_id) == [200, None]
        assert carol.ask('pyams_zmq.job.retry', job_id) == [200, None]
        assert alice.wait(job_id)['state'] == 'done'


def test_jobs_of_this_machine(job_pool):
    pool = job_pool(auth=['alice:a', 'bob:b'])
    with Asker(pool, auth='alice:a') as alice, Asker(pool, auth='bob:b') as bob:
        job_id = alice.submit('add', [1], delay=60)
        assert bob.ask('pyams_zmq.job.cancel', job_id) == [200, None]


def test_too_many_watchers(job_pool, monkeypatch):
    monkeypatch.setattr(watchers_module, 'MAX_SIZE', 0)
    with Asker(job_pool()) as asker:
        job_id = asker.submit('add', [1], delay=60)
        args = {'id': job_id, 'after': asker.job(job_id)['revision']}
        assert asker.ask('pyams_zmq.job.wait', args)[0] == 503


def test_wait_for_jobs_that_are_removed(job_pool):
    """A client that knows a later revision waits, until the time is over."""
    with Asker(job_pool(keep=1e-6)) as asker:
        ids = [asker.submit('add', [1], delay=0.3), asker.submit('add', [1], delay=60)]
        args = {'ids': ids, 'after': 2**62, 'timeout': 5}
        assert asker.ask('pyams_zmq.job.wait', args)[0] == 404


def test_job_for_a_pool_without_journal(job_pool, tmp_path):
    """A worker of another machine does not know that the pool has none."""
    options = {'worker_address': '127.0.0.1', 'worker_auth': 'worker:secret'}
    pool = job_pool(handler=Calls, journal=None, workers=1, **options)
    worker = PoolWorker(pool.bound_worker_address, Jobs, 'worker:secret')
    with Asker(pool) as asker, running(worker):
        wait_for_workers(pool)
        replies = wait_until(lambda: [r for r in [asker.ask('add', [1])] if r[0] == 500], TIMEOUT)
        assert replies == [[500, "'add' is a job, and was sent as a call"]]
        assert asker.ask('pyams_zmq.job', 'x')[0] == 404


def test_workers_that_are_replaced_after_each_job(job_pool):
    with Asker(job_pool(max_calls=1)) as asker:
        jobs = [asker.run('add', [number]) for number in range(4)]
    assert [(job['reply'], job['attempt']) for job in jobs] == [
        ([200, number], 1) for number in range(4)
    ]


def test_watchers_at_the_end(job_pool):
    pool = job_pool()
    replies = []
    with Asker(pool) as asker, Asker(pool) as other:
        job_id = asker.submit('add', [1], delay=60)
        args = {'id': job_id, 'after': asker.job(job_id)['revision']}
        thread = Thread(target=lambda: replies.append(asker.ask('pyams_zmq.job.wait', args)))
        thread.start()
        wait_until(lambda: pool.stats()['jobs']['watchers'], TIMEOUT)
        del other
        pool.stop()
        thread.join(TIMEOUT)
    assert replies[0][0] == 503


def test_messages_while_draining(job_pool, tmp_path):
    """A call holds the pool; jobs are refused, and one that ends meanwhile is recorded."""
    path, held = tmp_path / 'call', tmp_path / 'hold'
    path.touch()
    held.touch()
    journal = tmp_path / 'x.jobs'
    pool = job_pool(journal=journal, drain_timeout=15.0)
    with Asker(pool) as asker, Asker(pool) as caller:
        job_id = asker.submit('work', {'path': str(held), 'log': str(tmp_path / 'log')})
        lines_of(tmp_path / 'log')
        call = Thread(target=caller.ask, args=('hold', str(path)))
        call.start()
        wait_until(lambda: pool.stats()['in_flight'], TIMEOUT)
        stop = Thread(target=pool.stop)
        stop.start()
        wait_until(lambda: asker.ask('pyams_zmq.job', job_id)[0] == 503, TIMEOUT)
        held.unlink()
        wait_until(lambda: not pool_has_jobs(pool), TIMEOUT)
        path.unlink()
        call.join(TIMEOUT)
        stop.join(TIMEOUT)
    pool = job_pool(journal=journal)
    with Asker(pool) as asker:
        assert asker.job(job_id)['state'] == 'done'


@pytest.mark.parametrize('name', ['add', 'pyams_zmq.job.cancel', 'pyams_zmq.job.retry'])
def test_slow_disk_at_the_end(job_pool, tmp_path, monkeypatch, name):
    """What is being written when the pool stops gets its reply."""
    slow, reached = tmp_path / 'slow', tmp_path / 'reached'
    turns = []  # of the loop while the broker drains
    count_received = PoolBroker._count_received

    def count_turn(broker):
        turns.append(1)
        return count_received(broker)

    def reach(_writer, step):
        if step == 'before commit' and slow.exists():
            reached.touch()
            wait_until(lambda: len(turns) > 10, TIMEOUT)

    monkeypatch.setattr(PoolBroker, '_count_received', count_turn)
    monkeypatch.setattr(JournalWriter, '_reach', reach)
    pool = job_pool(drain_timeout=TIMEOUT)
    replies = []
    with Asker(pool) as asker, Asker(pool) as other:
        job_id = other.submit('add', [1], delay=60)
        if name == 'pyams_zmq.job.retry':
            assert other.ask('pyams_zmq.job.cancel', job_id) == [200, None]
        message = (name, [1] if name == 'add' else job_id)
        slow.touch()
        question = Thread(target=lambda: replies.append(asker.ask(*message)))
        question.start()
        wait_until(reached.exists, TIMEOUT)
        pool.stop()
        question.join(TIMEOUT)
    assert [status for status, _payload in replies] == [202 if name == 'add' else 200]


def pool_has_jobs(pool):
    return pool.stats()['jobs']['in_hand']


def test_jobs_in_the_queue_of_calls(job_pool, address, tmp_path, held):
    """A new broker does not know that a message is a job before a worker has registered.

    The worker is busy with another job then.
    """
    pool = job_pool(address=address, workers=1)
    with Asker(pool) as asker:
        [worker] = wait_for_workers(pool, count=1)
        first = asker.submit('work', held)
        lines_of(tmp_path / 'log')
        freeze(worker)
        pid = pool.stats()['pid']
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: broker_pid(pool) not in (None, pid), TIMEOUT)
        threads = [Thread(target=asker.ask, args=('add', [1]), kwargs={'id': 'x'})]
        with Asker(pool) as bad:
            threads.append(Thread(target=bad.ask, args=('add', [1]), kwargs={'id': ''}))
            for thread in threads:
                thread.start()
            wait_until(lambda: pool.stats()['queue'] == 2, TIMEOUT)
            os.kill(worker, signal.SIGCONT)
            for thread in threads:
                thread.join(TIMEOUT)
        assert [asker.job(job_id)['state'] for job_id in ('x', first)] == ['waiting', 'running']
        (tmp_path / 'hold').unlink()
        assert asker.wait('x')['reply'] == [200, 1]


def broker_pid(pool):
    with suppress(ZMQBaseError):
        return pool.stats()['pid']


def check_full_disk(job_pool, folder):
    mount('-t', 'tmpfs', '-o', 'size=20m', 'tmpfs', folder)
    with Asker(job_pool(journal=folder / 'x.jobs')) as asker:
        accepted = [asker.submit('add', [1], delay=1)]
        ballast = folder / 'ballast'
        with suppress(OSError), ballast.open('wb', buffering=0) as file:
            while True:
                file.write(bytes(4096))
        status, text = asker.ask('add', [2])
        assert status == 507
        assert str(folder) not in text
        assert asker.ask('ping')[0] == 200
        ballast.unlink()
        wait_until(lambda: asker.ask('add', [2])[0] == 202, TIMEOUT)
        assert asker.wait(accepted[0])['state'] == 'done'


def test_full_disk(job_pool, tmp_path):
    folder = tmp_path / 'disk'
    folder.mkdir()

    def check():
        pools = []

        def start(**options):
            pools.append(job_pool(**options))
            return pools[-1]

        try:
            check_full_disk(start, folder)
        finally:
            for pool in pools:
                pool.stop()

    run_unshared(check)


@pytest.fixture
def remote(job_pool, keys):
    """Start a pool with one worker on this machine and another one that connects with CURVE."""
    curve = CurveServer(keys / 'broker.key_secret', keys / 'workers')
    pool = job_pool(workers=1, worker_address='127.0.0.1', worker_curve=curve, cancel_grace=0.3)
    [local] = wait_for_workers(pool, count=1)

    keys_of_worker = CurveClient(keys / 'broker.key', keys / 'workers' / 'worker.key_secret')
    worker = PoolWorker(pool.bound_worker_address, Jobs, curve=keys_of_worker)
    worker.beat_interval = 0.1
    with running(worker):
        wait_for_workers(pool)
        yield pool, worker, local


def test_worker_of_another_machine(remote, held, tmp_path):
    pool, worker, local = remote
    with Asker(pool) as asker:
        jobs = [asker.submit('work', held)]
        [[_id, _attempt, pid]] = lines_of(tmp_path / 'log')
        if int(pid) == local:
            (tmp_path / 'hold').unlink()
            asker.wait(jobs[0])
            (tmp_path / 'hold').touch()
            jobs.append(asker.submit('work', held))
            *_former, [_id, _attempt, pid] = lines_of(tmp_path / 'log', 2)
        assert int(pid) == worker.pid
        broker = pool.stats()['pid']
        os.kill(broker, signal.SIGKILL)
        wait_until(lambda: broker_pid(pool) not in (None, broker), TIMEOUT)
        asker.wait(jobs[-1], until=lambda job: job['progress'])
        (tmp_path / 'hold').unlink()
        job = asker.wait(jobs[-1])
        assert (job['state'], job['attempt']) == ('done', 1)


def submit_to(worker, asker, name, held, log):
    """Submit a job until it runs on a worker; return its id."""
    for number in (1, 2):
        job_id = asker.submit(name, held)
        if int(lines_of(log, number)[-1][2]) == worker.pid:
            return job_id
        Path(held['path']).unlink()
        asker.wait(job_id)
        Path(held['path']).touch()
    raise AssertionError('jobs do not go to the worker that has been free for the longest time')


def test_silent_worker_of_another_machine(remote, held, tmp_path):
    """It goes on with its job."""
    pool, worker, _local = remote
    with Asker(pool) as asker:
        job_id = submit_to(worker, asker, 'work', held, tmp_path / 'log')
        freeze(worker.pid)
        wait_until(lambda: worker.pid not in pids_of(pool), TIMEOUT)
        os.kill(worker.pid, signal.SIGCONT)
        wait_until(lambda: worker.pid in pids_of(pool), TIMEOUT)
        (tmp_path / 'hold').unlink()
        job = asker.wait(job_id)
    assert (job['state'], job['attempt'], job['reply'][1]) == ('done', 1, [1, worker.pid])


def pids_of(pool):
    return [worker['pid'] for worker in pool.stats()['workers']]


@pytest.fixture
def no_patience(monkeypatch):
    monkeypatch.setattr(job_owners, 'REMOTE_TIME', 0.0)
    monkeypatch.setattr(job_verdict, '_DEATH_DELAYS', (600.0, 600.0))


def test_success_of_a_job_that_was_given_up(no_patience, remote, held, tmp_path):
    """Those who wait hear of it."""
    pool, worker, _local = remote
    replies = []
    with Asker(pool) as asker, Asker(pool) as other:
        job_id = submit_to(worker, asker, 'stubborn', held, tmp_path / 'log')
        freeze(worker.pid)
        job = asker.wait(job_id, 'waiting')
        args = {'id': job_id, 'after': job['revision'], 'timeout': 60}
        thread = Thread(target=lambda: replies.append(other.ask('pyams_zmq.job.wait', args)))
        thread.start()
        wait_until(lambda: pool.stats()['jobs']['watchers'], TIMEOUT)
        (tmp_path / 'hold').unlink()
        os.kill(worker.pid, signal.SIGCONT)
        thread.join(TIMEOUT * 0.8)  # the client asks again after TIMEOUT
        is_late = not replies
        thread.join()
    assert not is_late
    assert (replies[0][1]['state'], replies[0][1]['attempt']) == ('done', 1)


def test_forced_cancel_on_another_machine(remote, held, tmp_path):
    pool, worker, _local = remote
    with Asker(pool) as asker:
        for number in range(1, 3):
            job_id = asker.submit('stubborn', held)
            *_former, [_id, _attempt, pid, _program] = lines_of(tmp_path / 'log', number)
            if int(pid) == worker.pid:
                break
            (tmp_path / 'hold').unlink()
            asker.wait(job_id)
            (tmp_path / 'hold').touch()
        assert asker.ask('pyams_zmq.job.cancel', {'id': job_id, 'force': True}) == [200, None]
        assert asker.wait(job_id)['state'] == 'cancelled'
        wait_until(partial(worker.join, 0.1), TIMEOUT) if worker.is_alive() else None
    assert not worker.is_alive()


def test_client_that_submits_more_than_the_disk_can_write(job_pool, tmp_path, monkeypatch):
    """Its jobs are refused, and those of another one are accepted."""
    slow, reached = tmp_path / 'slow', tmp_path / 'reached'

    def reach(_writer, step):
        if step == 'before commit' and slow.exists():
            reached.touch()
            wait_until(lambda: not slow.exists(), TIMEOUT)

    monkeypatch.setattr(JournalWriter, '_reach', reach)
    monkeypatch.setattr(writer_module, 'MAX_BACKLOG', 1_000_000)
    address = job_pool().bound_address
    slow.touch()
    with (
        zmq_socket(address, zmq.DEALER) as greedy,
        zmq_socket(address, zmq.DEALER) as modest,
    ):

        def submit(socket, count=1):
            for _number in range(count):
                socket.send_multipart([b'', encode(['text', 'x' * 100_000, {'delay': 60}])])

        def read_status(socket, count=1):
            assert all(socket.poll(TIMEOUT * 1000) for _number in range(count))
            return [json.loads(socket.recv_multipart()[-1])[0] for _number in range(count)]

        submit(greedy)
        wait_until(reached.exists, TIMEOUT)
        submit(greedy, 9)
        assert read_status(greedy, 5) == [503] * 5
        submit(modest)
        modest.send_multipart([b'', b'["pyams_zmq.stats", null]'])
        assert read_status(modest) == [200]  # its job waits for the disk
        slow.unlink()
        assert read_status(modest) == [202]
        assert read_status(greedy, 5) == [202] * 5
        submit(greedy)
        assert read_status(greedy) == [202]
