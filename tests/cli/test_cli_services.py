# SPDX-License-Identifier: ZPL-2.1
"""The commands with real services: idle, busy, draining, supervised, and a pool."""

import json
import re
import signal
from contextlib import contextmanager
from threading import Thread

import pytest

from checks import TIMEOUT, wait_until
from handlers import PatientProcess
from pool_handlers import PoolHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.pool import ZMQPool

PING = r'\d+\.\d ms, up \d+ (s|min), '


class ConcurrentProcess(PatientProcess):
    """Runs two messages at a time."""

    concurrency = 2


def make_pool():
    pool = ZMQPool('127.0.0.1:0', PoolHandler, workers=2)
    pool.drain_timeout = 60.0
    return pool


SERVICES = pytest.mark.parametrize(
    ('make', 'workers'),
    [(PatientProcess, '1 worker'), (ConcurrentProcess, '1 worker'), (make_pool, '2 workers')],
    ids=['process', 'concurrent process', 'pool'],
)


@pytest.fixture
def serve(run_program):
    """Run the services of an ini file, until they answer."""

    def start(ini, address):
        quiet = ('-W', 'ignore:pkg_resources is deprecated')
        program = run_program(*quiet, '-m', 'pyams_zmq', 'serve', ini)
        with ZMQClient(address, timeout=1) as client:
            wait_until(lambda: answers(client))
        return program

    return start


def answers(client):
    try:
        return client.call('pyams_zmq.ping')
    except OSError:
        return None


@contextmanager
def busy(process, path):
    """Let a method of a service run for the block; it waits until a file is removed."""

    def call():
        with ZMQClient(process.bound_address, timeout=60) as client:
            client.call('wait_for', str(path))

    thread = Thread(target=call)
    thread.start()
    try:
        wait_until(path.exists)
        yield
    finally:
        path.unlink(missing_ok=True)
        thread.join()


@SERVICES
def test_busy_service(run, start, tmp_path, make, workers):
    process = start(factory=make)
    target = ('--address', process.bound_address)
    with busy(process, tmp_path / 'wait'):
        code, out, err = run('ping', *target)
        assert (code, err) == (0, '')
        assert re.fullmatch(PING + workers + '\n', out)
        stats = json.loads(run('stats', *target, '--json').out)
        assert (stats['state'], stats['in_flight']) == ('up', 1)
        assert [each['state'] for each in stats['workers']].count('busy') == 1
        methods = json.loads(run('methods', *target, '--json').out)
        assert methods['wait_for']['signature'] == '(path)'
        assert 'wait_for(path)' in run('methods', *target).out
        code, out, err = run('stats', *target)
        assert (code, err) == (0, '')
        assert '\n1 in hand, ' in out
        assert run('reload', *target).code == 0


@SERVICES
def test_draining_service(run, start, tmp_path, make, workers):
    process = start(factory=make)
    target = ('--address', process.bound_address)
    stop = Thread(target=process.stop)
    with busy(process, tmp_path / 'wait'):
        stop.start()
        wait_until(lambda: 'draining' in run('ping', *target).out)
        code, out, err = run('ping', *target)
        assert (code, err) == (0, '')
        assert re.fullmatch(PING + workers + ', draining\n', out)
        assert ', draining, started ' in run('stats', *target).out
        assert run('restart', *target) == (
            1,
            '',
            'pyams_zmq: error: 503 The service is stopping, try again later\n',
        )
    stop.join()


def test_call_of_a_draining_service(run, start, tmp_path):
    process = start(factory=make_pool)
    target = ('--address', process.bound_address)
    stop = Thread(target=process.stop)
    with busy(process, tmp_path / 'wait'):
        stop.start()
        wait_until(lambda: 'draining' in run('ping', *target).out)
        assert run('call', *target, 'echo') == (
            1,
            '',
            'pyams_zmq: error: 503 The service is stopping, try again later\n',
        )
    stop.join()


def test_users_are_read_again(run, start, tmp_path):
    users, mine = tmp_path / 'users', tmp_path / 'mine'
    users.write_text('alice:secret\n')
    mine.write_text('alice:secret\n')
    process = start(auth=users)
    target = ('--address', process.bound_address, '--auth-file', str(mine))
    assert run('ping', *target).code == 0
    users.write_text('bob:secret\n')
    assert run('reload', *target) == (
        0,
        f'{process.bound_address} reads its users and keys again\n',
        '',
    )
    wait_until(lambda: run('ping', *target).code == 3)


def test_restart_of_a_pool(run, start):
    target = ('--address', start(factory=make_pool).bound_address)
    code, out, err = run('restart', *target)
    assert (code, err) == (0, '')
    pids = re.fullmatch(r'\S+: pid (\d+), (\d+) replaced by pid (\d+), (\d+)\n', out).groups()
    assert len(set(pids)) == 4


def test_restart_of_a_process_without_supervisor(run, start):
    code, out, err = run('restart', '--address', start().bound_address)
    assert (code, out) == (1, '')
    assert re.fullmatch(r'pyams_zmq: error: 409 .* no supervisor .* "pyams_zmq serve".*\n', err)


@pytest.mark.parametrize('workers', [0, 2])
def test_restart_of_a_supervised_service(run, declare, address, serve, workers):
    settings = {'handler': 'handlers.Handler', 'start': 'external'}
    ini, name = declare(address, **settings, **({'workers': workers} if workers else {}))
    program = serve(ini, address)
    former = json.loads(run('stats', ini, name, '--json').out)
    code, out, err = run('restart', ini, name)
    assert (code, err) == (0, '')
    later = json.loads(run('stats', ini, name, '--json').out)
    pids = [sorted(each['pid'] for each in stats['workers']) for stats in (former, later)]
    assert out == '{}: pid {} replaced by pid {}\n'.format(
        name, *(', '.join(map(str, each)) for each in pids)
    )
    program.send_signal(signal.SIGTERM)
    assert program.wait(TIMEOUT) == 0
