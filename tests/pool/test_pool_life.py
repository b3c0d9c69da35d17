# SPDX-License-Identifier: ZPL-2.1
"""Start, options, drain and end of a pool."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import zmq
from pyramid.registry import Registry

from app.program import wait_for_end, wait_until
from handlers import MessageHandler
from pool_checks import (
    OWNER,
    TIMEOUT,
    client_of,
    in_threads,
    wait_for_ends,
    wait_for_file,
    wait_for_files,
    wait_for_workers,
    workers_of,
)
from pool_handlers import FailingMessageHandler, Pool, PoolHandler, PoolMessageHandler
from pyams_zmq.curve import CurveServer
from pyams_zmq.exceptions import (
    ZMQBindError,
)
from pyams_zmq.interfaces import IZMQProcessGivenUpEvent, IZMQProcessStartedEvent
from pyams_zmq.pool import ZMQPool
from pyams_zmq.supervisor import Supervisor, SupervisorProcess
from pyams_zmq.testing import running

PUBLIC, SECRET = zmq.curve_keypair()
KEYS = CurveServer(SECRET, [PUBLIC])


def test_echo(pool):
    process = pool()
    with client_of(process) as client:
        assert client.call('echo', {'a': 1}) == {'a': 1}
        assert len(workers_of(process)) == 2
    process.stop()
    assert process.exitcode == 0


def test_running():
    with running(Pool, workers=1) as process, client_of(process) as client:
        assert client.call('echo', 1) == 1
    with running(ZMQPool, handler=MessageHandler, workers=1) as process:
        assert process.bound_address.startswith('tcp://127.0.0.1:')


def test_started_event_in_workers_only(pool, tmp_path):
    registry = Registry()

    def note(event):
        Path(tmp_path, f'{type(event.object).__name__}.{os.getpid()}').touch()

    registry.registerHandler(note, [IZMQProcessStartedEvent])
    process = pool(registry=registry)
    pids = {int(path.suffix[1:]) for path in tmp_path.glob('PoolWorker.*')}
    assert pids == workers_of(process)
    assert not list(tmp_path.glob('PoolBroker.*'))
    with client_of(process) as client:
        assert client.call('registry') is True


@pytest.mark.parametrize('workers', [0, 2.5, True, '4', None])
def test_bad_workers(workers):
    with pytest.raises(ValueError, match=f'Bad workers {workers!r}: write an integer, 1 or more'):
        Pool(workers=workers)


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'bind_addr': 'a b'}, 'Bad ØMQ address'),
        ({'auth': 'nonsense'}, 'Bad credentials'),
        ({'clients': 'nonsense'}, 'Bad client address'),
        ({'worker_address': '127.0.0.1'}, 'worker_auth or worker_curve'),
        ({'worker_address': 'a b', 'worker_auth': 'u:p'}, 'Bad ØMQ address'),
        ({'worker_auth': 'u:p'}, 'need a worker_address'),
        (
            {'worker_address': '127.0.0.1', 'worker_auth': 'u:p', 'worker_curve': KEYS},
            'one mechanism',
        ),
        ({'curve': 'secret'}, 'Bad curve, a str: pass a CurveServer'),
    ],
)
def test_bad_options(options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        Pool(**options)


def test_access_attributes(pool, tmp_path):
    """They are those of a process: None without users or clients, and as given otherwise."""
    assert (Pool().passwords, Pool().clients) == (None, None)
    users = tmp_path / 'users'
    users.write_text('alice:a')
    process = pool(auth=users, clients='127.0.0.1 10.0.0.0/8')
    for _reload in range(2):
        assert process.passwords == {'alice': 'a'}
        assert process.clients == ('127.0.0.1', '10.0.0.0/8')
        process.reload()


def test_address_in_use(pool):
    process = pool()
    second = Pool(process.bound_address)
    second.bind_timeout = 0
    second.start()
    with pytest.raises(ZMQBindError, match='Address already in use'):
        second.wait_ready()
    second.join(TIMEOUT)
    assert second.exitcode == 1


def test_handler_fails():
    process = Pool(handler=FailingMessageHandler)
    process.start()
    with pytest.raises(LookupError, match='no such tool: ffmpeg'):
        process.wait_ready()
    process.join(TIMEOUT)
    assert process.exitcode == 1


def test_bad_concurrency():
    """The pool does not start; its workers would fail one after the other."""
    process = type('Narrow', (Pool,), {'concurrency': 0})('127.0.0.1', PoolMessageHandler)
    with pytest.raises(ValueError, match=r'^Bad concurrency 0: write an integer, 1 or more$'):
        process.start()


@pytest.mark.parametrize('interval', [0, -1, 100, float('nan')])
def test_bad_beat_interval(interval):
    """Heartbeats without a pause would keep worker and broker busy."""
    pool = type('Restless', (Pool,), {'beat_interval': interval})()
    worker = pool.make_worker('ipc://@nowhere')
    for process in (pool, worker):
        with pytest.raises(ValueError, match='Bad beat_interval'):
            process.start()


def test_handler_stops_its_process(pool):
    process = pool()
    before = workers_of(process)
    with client_of(process) as client:
        assert client.call('stop') == 'stopping'
        wait_until(lambda: len(before & workers_of(process)) == 1, TIMEOUT)
        wait_until(lambda: len(workers_of(process)) == 2, TIMEOUT)
        assert client.call('echo', 1) == 1


def test_killed_pool():
    process = Pool()
    process.start()
    process.wait_ready()
    pids = {process.stats()['pid'], *workers_of(process)}
    process.kill()
    process.join(TIMEOUT)
    for pid in pids:
        wait_for_end(pid, 5)


@pytest.mark.parametrize('num', [signal.SIGKILL, None], ids=['killed', 'ends'])
def test_owner_ends(run_program, tmp_path, num):
    program = run_program('-c', OWNER)
    pids = program.read(TIMEOUT)
    if num is None:
        program.write(None)
    else:
        program.send_signal(num)
    wait_for_ends(pids)


def test_drain(pool, tmp_path):
    process = pool(workers=1)
    path = tmp_path / 'hold'
    with client_of(process) as client:
        with in_threads(partial(client.call, 'wait_for'), str(path)) as running:
            wait_for_file(path)
            with in_threads(partial(client.call, 'echo'), 1) as queued:
                wait_until(lambda: process.stats()['queue'], TIMEOUT)
                os.kill(process.pid, signal.SIGTERM)
            assert queued[0].status == 503
            assert running == []
            path.unlink()
        assert running == [str(path)]
    process.join(TIMEOUT)
    assert process.exitcode == 0


def test_drain_takes_too_long(pool, tmp_path):
    process = pool(factory=type('Quick', (Pool,), {'drain_timeout': 0.5}))
    with client_of(process) as client, in_threads(partial(client.call, 'sleep'), 60) as results:
        wait_until(lambda: process.stats()['in_flight'], TIMEOUT)
        start = time.monotonic()
        process.stop()
        seconds = time.monotonic() - start
    assert results[0].status == 502
    assert process.exitcode == 0
    assert seconds < 5


def test_interrupt_of_all(run_program, tmp_path):
    program = run_program('-c', OWNER)
    pids = program.read(TIMEOUT)
    program.send_signal_to_all(signal.SIGINT)
    wait_for_ends(pids)


def test_under_a_supervisor(tmp_path, ask):
    address = f'ipc://{tmp_path}/pool'
    supervisor = SupervisorProcess({'pool': partial(Pool, address)})
    supervisor.start()
    try:
        stats = ask(address, ['pyams_zmq.stats', None], timeout=TIMEOUT)[1]
        pool = Path(f'/proc/{stats["pid"]}/stat').read_text().rpartition(')')[2].split()[1]
        os.kill(int(pool), signal.SIGSTOP)
        wait_for_end(int(pool), TIMEOUT)

        def serves():
            reply = ask(address, ['pyams_zmq.stats', None], timeout=1)
            return reply[0] == 200 and reply[1]['pid'] != stats['pid']

        wait_until(serves, TIMEOUT)
    finally:
        supervisor.stop()
    assert supervisor.exitcode == 0


def test_workers_that_cannot_start(tmp_path, monkeypatch):
    """The pool tries again and again, and serves when it can."""
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)
    monkeypatch.setattr(Supervisor, 'give_up_delay', 0.2)
    flag = tmp_path / 'flag'

    class Later:
        def __init__(self):
            if flag.exists():
                raise LookupError('no such tool: ffmpeg')

        def pid(self, args):
            return [200, os.getpid()]

    class LaterMessageHandler(PoolMessageHandler):
        handler = Later

    registry = Registry()
    registry.registerHandler(
        lambda event: Path(tmp_path, event.name).touch(), [IZMQProcessGivenUpEvent]
    )
    process = Pool(handler=LaterMessageHandler, registry=registry)
    process.start()
    process.wait_ready()
    flag.touch()
    process.reload()  # the new workers fail, the old ones stay
    wait_for_file(tmp_path / f'{process.name} worker 1')
    pids = workers_of(process)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for_file(tmp_path / process.name)
    assert (tmp_path / f'{process.name} worker 2').exists()
    flag.unlink()
    wait_for_workers(process)
    process.stop()
    assert process.exitcode == 0


@pytest.mark.parametrize('workers', [1, 2])
def test_new_worker_fails_while_the_old_one_finishes_a_call(tmp_path, monkeypatch, workers):
    """The call is answered, and the next reload starts the new worker again."""
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)
    flag = tmp_path / 'flag'
    paths = [tmp_path / f'hold {number}' for number in range(workers)]

    class Later(PoolHandler):
        def __init__(self):
            if flag.exists():
                raise LookupError('no such tool: ffmpeg')

    class LaterMessageHandler(PoolMessageHandler):
        handler = Later

    registry = Registry()
    registry.registerHandler(
        lambda event: Path(tmp_path, event.name).touch(), [IZMQProcessGivenUpEvent]
    )
    process = Pool(handler=LaterMessageHandler, registry=registry, workers=workers)
    process.start()
    process.wait_ready()

    def find(state):
        return [each['pid'] for each in process.stats()['workers'] if each['state'] == state]

    with client_of(process) as client:
        with in_threads(partial(client.call, 'async_wait_for'), *map(str, paths)) as results:
            wait_for_files(tmp_path, 'hold *', workers)
            process.reload()
            wait_until(lambda: find('leaving'), TIMEOUT)
            [new] = find('idle')
            flag.touch()
            os.kill(new, signal.SIGKILL)
            wait_for_file(tmp_path / f'{process.name} worker 1')
            for path in paths:
                path.unlink()
        assert sorted(results) == sorted(map(str, paths))
    flag.unlink()
    process.reload()
    wait_for_workers(process, count=workers)
    process.stop()
    assert process.exitcode == 0
