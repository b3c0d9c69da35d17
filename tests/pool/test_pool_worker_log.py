# SPDX-License-Identifier: ZPL-2.1
"""What a worker of another machine, and its pool, say in their logs."""

import logging
import signal
from contextlib import closing, contextmanager, nullcontext

import pytest

from app.program import reserved_port
from checks import wait_until
from job_checks import Asker
from job_handlers import JobPool, Jobs
from plain_handlers import Plain
from pool_checks import TIMEOUT, client_of, held_calls, wait_for_workers, workers_of
from pool_handlers import Pool
from pyams_zmq.pool.local_port import LocalPort, LocalSecret
from pyams_zmq.pool.supervisor import PoolSupervisor
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.testing import running

WORKER = """
import sys
from pyams_zmq.cli import main
from pyams_zmq.pool import worker
worker.BROKER_TIMEOUT = 0.3
sys.argv[0] = 'worker.py'
sys.exit(main(['worker', *sys.argv[1:]]))
"""
ACCESS = 'worker:secret'


@pytest.fixture
def join(run_program, tmp_path):
    """Start a program with a worker."""
    (tmp_path / 'auth').write_text(ACCESS)

    def start(address, *args, handler='pool_handlers.PoolMessageHandler'):
        options = ('-W', 'ignore:pkg_resources is deprecated', '-c', WORKER, address, handler)
        return run_program(*options, '--auth-file', str(tmp_path / 'auth'), *args)

    return start


@contextmanager
def logged(path):
    """Log to a file, also in the children of this process."""
    logger = logging.getLogger('PyAMS (zmq)')
    former, handler = logger.level, logging.FileHandler(path)
    handler.setFormatter(logging.Formatter('%(levelname)s %(message)s'))
    logger.addHandler(handler)
    logger.setLevel('INFO')
    try:
        yield
    finally:
        logger.setLevel(former)
        logger.removeHandler(handler)
        handler.close()


def warnings_of(program):
    return program.log.read_text().count('gets no calls from')


def serves(program):
    return program.log.read_text().count('serves')


def test_no_broker(join):
    """The worker says so once, and that it serves only when it does, each time."""
    with reserved_port() as port:
        address = f'tcp://127.0.0.1:{port}'
        program = join(address, handler='plain_handlers.Plain')
        wait_until(lambda: warnings_of(program), TIMEOUT)
        text = program.log.read_text()
        assert f'gets no calls from {address}, and tries again: it cannot connect: check' in text
        assert 'WARNING' in text
        assert 'serves' not in text
        for count in (1, 2):
            with running(Pool, worker_address=address, worker_auth=ACCESS, workers=1) as pool:
                wait_until(lambda number=count: serves(program) == number, TIMEOUT)
                assert warnings_of(program) == count
                wait_for_workers(pool, count=2)
            wait_until(lambda number=count: warnings_of(program) == number + 1, TIMEOUT)
        program.send_signal(signal.SIGTERM)
        assert program.wait(TIMEOUT) == 0
    assert 'secret' not in program.log.read_text()


def test_broker_came_in_time(caplog):
    worker = PoolWorker('127.0.0.1:1', Plain)
    worker._is_registered = True
    worker._warn_without_broker()
    assert not caplog.records


def test_another_address_of_the_pool(join):
    """That of its clients."""
    with running(Pool, auth=ACCESS, workers=1) as pool:
        program = join(pool.bound_address)
        wait_until(lambda: warnings_of(program), TIMEOUT)
        assert 'it is connected, but not registered' in program.log.read_text()
        assert 'serves' not in program.log.read_text()
        program.send_signal(signal.SIGTERM)
        assert program.wait(TIMEOUT) == 0


def test_local_workers(tmp_path):
    """They do not warn, and say that they serve when the broker knows them."""
    log = tmp_path / 'pool.log'
    with logged(log), running(Pool, workers=2):
        wait_until(lambda: log.read_text().count(' worker ') >= 2, TIMEOUT)
    assert 'gets no calls' not in log.read_text()


@pytest.mark.parametrize('how', ['idle', 'busy', 'group', 'replaced', 'both signals'])
def test_orderly_end(how, join, tmp_path):
    """The pool does not log an error when a worker leaves, and no call is lost."""
    log = tmp_path / 'pool.log'
    with (
        logged(log),
        running(Pool, workers=1, worker_address='127.0.0.1', worker_auth=ACCESS) as pool,
        client_of(pool) as client,
    ):
        local = workers_of(pool)
        program = join(pool.bound_worker_address)
        [remote] = wait_for_workers(pool, count=2) - local
        with held_calls(client, tmp_path, 2) if how == 'busy' else nullcontext(((), [])) as held:
            if how == 'replaced':
                program.send_signal(signal.SIGHUP)
                wait_for_workers(pool, {remote}, count=2)
            if how == 'both signals':
                program.send_signal(signal.SIGINT)
            send = program.send_signal_to_all if how == 'group' else program.send_signal
            send(signal.SIGTERM)
        assert program.wait(TIMEOUT) == 0
        wait_for_workers(pool, count=1)
        pids, results = held
        assert sorted(results) == sorted(pids)
    lines = log.read_text().splitlines()  # a loaded machine may need another signal: a warning
    assert [line for line in lines if not line.startswith(('INFO', 'WARNING'))] == []


@pytest.mark.parametrize('name', ['', 'nap', 'work'])
def test_orderly_stop_of_the_pool(name, tmp_path):
    """Also while a job runs, which begins again later."""
    log, path = tmp_path / 'pool.log', tmp_path / 'path'
    path.touch()
    arguments = {'path': str(path), 'log': str(tmp_path / 'jobs.log'), 'seconds': 60}
    pool = JobPool('127.0.0.1', Jobs, workers=2)
    pool.journal = tmp_path / 'journal'
    with logged(log), running(pool), Asker(pool) as asker:
        if name:
            asker.submit(name, arguments)
            wait_until((tmp_path / 'jobs.log').exists, TIMEOUT)
    lines = log.read_text().splitlines()
    assert [line for line in lines if not line.startswith('INFO')] == []
    assert ('its job begins again later' in log.read_text()) == (name == 'nap')


def test_late_broker(caplog):
    """Only workers have jobs that begin again: a broker which does not end in time is a warning."""
    caplog.set_level('INFO')
    pool = Pool()
    with closing(LocalPort(LocalSecret(), 1)) as port:
        supervisor = PoolSupervisor(pool, port)
        for child in supervisor._children:
            child.process = child.factory()
            supervisor._log_late(child)
    levels = [record.levelname for record in caplog.records if 'ended' in record.getMessage()]
    assert levels == ['WARNING'] + ['INFO'] * (len(levels) - 1)
    assert len(levels) == 1 + pool.workers
