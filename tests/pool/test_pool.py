# SPDX-License-Identifier: ZPL-2.1
"""A pool, with real clients, workers and signals."""

import errno
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq
import zmq.auth
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationError
from pyramid.registry import Registry
from pyramid.threadlocal import manager
from tornado.ioloop import IOLoop

from app.program import Program, is_running, wait_for_end, wait_until
from handlers import FuzzMessageHandler, MessageHandler
from pool_handlers import FailingMessageHandler, Pool, PoolMessageHandler
from pyams_zmq.cli import main
from pyams_zmq.client import ZMQClient
from pyams_zmq.config import services_of
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.exceptions import (
    ZMQBaseError,
    ZMQBindError,
    ZMQRefusedError,
    ZMQRemoteError,
    ZMQStartError,
    ZMQTimeoutError,
)
from pyams_zmq.interfaces import IZMQProcessGivenUpEvent, IZMQProcessStartedEvent
from pyams_zmq.pool import ZMQPool
from pyams_zmq.pool import broker as broker_module
from pyams_zmq.pool import worker as worker_module
from pyams_zmq.pool.worker import ForwardedFrame, PoolWorker, WorkerStream
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process import lock as lock_module
from pyams_zmq.process.base import RECYCLED
from pyams_zmq.process.heartbeat import HANG_TIMEOUT
from pyams_zmq.supervisor import Supervisor, SupervisorProcess
from pyams_zmq.testing import running

TIMEOUT = 20
"""Seconds to wait for what has to happen, however busy the machine is"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder of private folders."""
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr(lock_module.tempfile, 'tempdir', str(tmp_path / 'tmp'))
    return tmp_path / 'tmp' / f'pyams_zmq-{os.geteuid()}'


@pytest.fixture
def pool(start, folder):
    """Start a pool of two workers."""
    return partial(start, factory=Pool)


@contextmanager
def client_of(pool, **options):
    with ZMQClient(pool.bound_address, timeout=TIMEOUT, **options) as client:
        yield client


@contextmanager
def in_threads(function, *arguments):
    """Call a function in threads, once for each argument; give the list of their results."""
    results = []

    def call(argument):
        try:
            results.append(function(argument))
        except ZMQBaseError as error:
            results.append(error)

    threads = [threading.Thread(target=call, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    try:
        yield results
    finally:
        for thread in threads:
            thread.join(TIMEOUT)


def workers_of(pool):
    """Pids of the workers that have announced themselves."""
    return {worker['pid'] for worker in pool.stats()['workers']}


def wait_for_workers(pool, but=(), count=2):
    """Wait until as many other workers are there; return their pids."""

    def look():
        try:
            workers = workers_of(pool)
        except ZMQTimeoutError:  # the broker is away
            return None
        return workers if len(workers) == count and not workers & set(but) else None

    return wait_until(look, TIMEOUT)


def wait_for_queue(pool, length):
    """Wait until so many calls wait."""

    def look():
        try:
            return pool.stats()['queue'] == length
        except ZMQTimeoutError:  # the broker is away
            return False

    wait_until(look, TIMEOUT)


def wait_for_file(path):
    wait_until(path.exists, TIMEOUT)


def wait_for_files(folder, pattern, count):
    return wait_until(
        lambda: files if len(files := list(folder.glob(pattern))) == count else None, TIMEOUT
    )


# Life


def test_echo(pool, folder):
    process = pool()
    with client_of(process) as client:
        assert client.call('echo', {'a': 1}) == {'a': 1}
        assert len(workers_of(process)) == 2
    [private] = folder.glob('pool-*')
    assert private.stat().st_mode & 0o077 == 0
    process.stop()
    assert process.exitcode == 0
    assert list(folder.glob('pool-*')) == []


def test_running(folder):
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


def test_no_workers():
    with pytest.raises(ValueError, match='1 worker or more, not 0'):
        Pool(workers=0)


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'bind_addr': 'a b'}, 'Bad ØMQ address'),
        ({'auth': 'nonsense'}, 'Bad credentials'),
        ({'clients': 'nonsense'}, 'Bad client address'),
        ({'worker_address': '127.0.0.1'}, 'worker_auth or worker_curve'),
        ({'worker_address': 'a b', 'worker_auth': 'u:p'}, 'Bad ØMQ address'),
        ({'worker_auth': 'u:p'}, 'for a worker_address'),
        (
            {'worker_address': '127.0.0.1', 'worker_auth': 'u:p', 'worker_curve': object()},
            'one mechanism',
        ),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        Pool(**options)


def test_address_in_use(pool, folder):
    process = pool()
    second = Pool(process.bound_address)
    second.bind_timeout = 0
    second.start()
    with pytest.raises(ZMQBindError, match='Address already in use'):
        second.wait_ready()
    second.join(TIMEOUT)
    assert second.exitcode == 1
    assert len(list(folder.glob('pool-*'))) == 1


def test_handler_fails(folder):
    process = Pool(handler=FailingMessageHandler)
    process.start()
    with pytest.raises(LookupError, match='no such tool: ffmpeg'):
        process.wait_ready()
    process.join(TIMEOUT)
    assert process.exitcode == 1


def test_folder_of_somebody_else(folder):
    folder.mkdir(mode=0o755)
    process = Pool()
    process.start()
    with pytest.raises(PermissionError, match='nobody else may enter'):
        process.wait_ready()
    process.join(TIMEOUT)
    assert process.exitcode == 1


def test_stats_before_ready():
    with pytest.raises(ZMQStartError, match='was not started'):
        Pool().stats()


# Which worker


def test_calls_at_the_same_time(pool, tmp_path):
    process = pool()
    hold = tmp_path / 'hold'
    hold.touch()
    with client_of(process) as client:
        with in_threads(partial(client.call, 'wait_again'), str(hold), str(hold)) as results:
            wait_for_files(tmp_path, 'hold.*', 2)
            hold.unlink()
        assert set(results) == workers_of(process)


def test_no_call_for_a_busy_worker(pool, tmp_path):
    process = pool()
    hold = tmp_path / 'hold'
    hold.touch()
    with client_of(process) as client:
        with in_threads(partial(client.call, 'wait_again'), str(hold)) as results:
            wait_for_files(tmp_path, 'hold.*', 1)
            pids = {client.call('pid') for _ in range(50)}
            hold.unlink()
        assert pids == workers_of(process) - set(results)


def test_concurrency(pool, tmp_path):
    process = pool(factory=type('Wide', (Pool,), {'concurrency': 3}), workers=1)
    hold = tmp_path / 'hold'
    paths = [f'{hold}{number}' for number in range(3)]
    with client_of(process) as client, in_threads(partial(client.call, 'wait_for'), *paths):
        wait_for_files(tmp_path, 'hold*', 3)
        [worker] = process.stats()['workers']
        assert (worker['slots'], worker['in_flight']) == (3, 3)
        for path in tmp_path.glob('hold*'):
            path.unlink()


def test_bad_concurrency():
    """As of a process: its workers would be started, and given up."""
    process = type('Narrow', (Pool,), {'concurrency': 0})('127.0.0.1', PoolMessageHandler)
    with pytest.raises(ValueError, match=r'^Bad concurrency 0: write 1 or more$'):
        process.start()


@pytest.mark.parametrize('interval', [0, -1, 100, float('nan')])
def test_bad_beat_interval(interval):
    """Without a pause, heartbeats would keep worker and broker busy."""
    pool = type('Restless', (Pool,), {'beat_interval': interval})()
    worker = pool.make_worker('ipc://@nowhere')
    for process in (pool, worker):
        with pytest.raises(ValueError, match='Bad beat_interval'):
            process.start()


@pytest.mark.parametrize('type_', ['again', 'echo', 'async_echo'])
def test_order_of_a_connection(pool, type_):
    process = pool(workers=1)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(process.bound_address)
        for number in range(200):
            socket.send_multipart([b'', json.dumps([type_, number]).encode()])
        replies = []
        for _ in range(200):
            assert socket.poll(TIMEOUT * 1000)
            payload = json.loads(socket.recv_multipart()[-1])[1]
            replies.append(payload[1] if type_ == 'again' else payload)
    assert replies == list(range(200))


# Messages


def test_large(pool):
    process = pool(workers=1)
    with client_of(process) as client:
        assert client.call('size', 'x' * 5_000_000) == 5_000_000
        assert len(client.call('big', 20_000_000)) == 20_000_000


def test_too_large(pool, ask):
    process = pool(factory=type('Small', (Pool,), {'max_message_size': 1000}), workers=1)
    assert ask(process, ['size', 'x' * 1000]) == [
        413,
        'Message of 1012 bytes, the service takes 1000',
    ]
    assert ask(process, ['size', 'x' * 988]) == [200, 988]


def test_several_frames(pool):
    process = pool(workers=1)
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(process.bound_address)
        socket.send_multipart([b'1', b'x' * 100_000, b'["many",1]'])
        assert socket.poll(TIMEOUT * 1000)
        assert json.loads(socket.recv()) == [200, 3]


@pytest.mark.parametrize(
    ('frames', 'status'),
    [([b'["echo",1]'], 400), ([b''], 400), ([b'', b''], 400), ([b'', b'["nothing_such",1]'], 404)],
)
def test_malformed(pool, frames, status):
    process = pool(workers=1)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(process.bound_address)
        socket.send_multipart(frames)
        assert socket.poll(TIMEOUT * 1000)
        assert json.loads(socket.recv_multipart()[-1])[0] == status
        socket.send_multipart([b'', b'["echo",1]'])
        assert socket.poll(TIMEOUT * 1000)
        assert json.loads(socket.recv_multipart()[-1]) == [200, 1]


def test_another_json_load(pool, ask):
    process = pool(factory=type('First', (Pool,), {'json_load': 5}), workers=1)
    assert ask(process, ['echo', 1]) == [200, 1]
    assert process.stats()['methods']['(others)']['calls'] == 1


def test_client_is_gone(pool, ask, tmp_path):
    process = pool(workers=1)
    path = tmp_path / 'hold'
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.connect(process.bound_address)
        socket.send_json(['wait_for', str(path)])
        wait_for_file(path)
    path.unlink()
    assert ask(process, ['echo', 1]) == [200, 1]


# Access


def test_peer(pool, ask, tmp_path):
    users = tmp_path / 'users'
    users.write_text('alice:a\nbob:b\n')
    process = pool(auth=users)
    assert ask(process, ['who', 1], auth='alice:a') == [200, ['alice', '127.0.0.1', 1]]
    assert ask(process, ['who', 2], auth='bob:b') == [200, ['bob', '127.0.0.1', 2]]
    assert ask(process, ['echo', 2], auth='bob:c')[0] == 401
    with ZMQClient(process.bound_address, auth='bob:b') as bob:
        assert bob.call('echo', 1) == 1
        users.write_text('alice:a\n')
        before = workers_of(process)
        process.reload()
        wait_for_workers(process, before)
        with pytest.raises(ZMQRemoteError, match='401 Your access was withdrawn'):
            bob.call('echo', 2)
    assert ask(process, ['echo', 2], auth='alice:a') == [200, 2]


@pytest.mark.parametrize('auth', [None, 'alice:a'])
def test_handler_that_wants_no_peer(pool, ask, auth):
    process = pool(handler=FuzzMessageHandler, workers=1, auth=auth)
    assert ask(process, ['echo', 1], auth=auth) == [200, 1]


def test_peer_without_credentials(pool, ask, tmp_path):
    process = pool(f'ipc://{tmp_path}/pool')
    [status, [user, address, _args]] = ask(process, ['who', 1])
    assert (status, user) == (200, 'anonymous')
    assert address == f'localhost:{os.geteuid()}:{os.getegid()}:{os.getpid()}'


def test_peer_of_a_call_that_waited_for_the_first_worker(pool, tmp_path):
    process = pool(workers=1, auth='alice:a')
    path = tmp_path / 'hold'
    with client_of(process, auth='alice:a') as client:
        with in_threads(partial(client.call, 'wait_for'), str(path)):
            wait_for_file(path)
            os.kill(process.stats()['pid'], signal.SIGKILL)
        with in_threads(partial(client.call, 'who', retries=9), 1) as results:
            wait_for_queue(process, 1)
            path.unlink()
        assert results == [['alice', '127.0.0.1', 1]]


# Deaths


def test_killed_worker(pool, tmp_path):
    process = pool()
    hold = tmp_path / 'hold'
    hold.touch()
    with client_of(process) as client:
        with in_threads(partial(client.call, 'wait_again'), str(hold)) as results:
            [path] = wait_for_files(tmp_path, 'hold.*', 1)
            first = int(path.suffix[1:])
            os.kill(first, signal.SIGKILL)
            wait_for_files(tmp_path, 'hold.*', 2)
            hold.unlink()
        assert results[0] in wait_for_workers(process)
        assert results != [first]
        assert process.stats()['repeated'] == 1


def test_killed_worker_whose_call_may_not_be_repeated(pool, tmp_path):
    process = pool()
    path = tmp_path / 'hold'
    with client_of(process) as client:
        with in_threads(lambda _: ask_who_waits(client, path), 1) as results:
            wait_for_file(path)
            [busy] = [each for each in process.stats()['workers'] if each['state'] == 'busy']
            start = time.monotonic()
            os.kill(busy['pid'], signal.SIGKILL)
        assert time.monotonic() - start < HANG_TIMEOUT
        [error] = results
        assert error.status == 502
        assert 'died while it had this call in hand' in error.text
        path.unlink()
        wait_for_workers(process, {busy['pid']})


def ask_who_waits(client, path):
    return client.call('wait_for', str(path))


def test_message_that_kills_every_worker(pool):
    process = pool()
    with client_of(process) as client:
        with pytest.raises(ZMQRemoteError, match='502'):
            client.call('die')
        assert client.call('echo', 1) == 1
        assert process.stats()['repeated'] == 2
        wait_for_workers(process)


def kill_workers(process, kills, calls):
    """Kill workers while clients call; return the replies and the seconds until all were back."""
    numbers = iter(range(calls))
    lock = threading.Lock()
    replies, times, done = [], [], []

    def call(client):
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            reply = client.call('again', number)
            done.append(number)
            replies.append((number, reply[1]))

    with client_of(process) as client, in_threads(call, *[client] * 4) as results:
        for number in range(kills):
            wait_until(lambda number=number: len(done) >= number * calls // kills, 60)
            workers = workers_of(process)
            pid = sorted(workers)[number % 2]
            start = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            wait_for_workers(process, {pid})
            times.append(time.monotonic() - start)
    assert results == [None] * 4
    return replies, times


def test_killed_again_and_again(pool):
    kills, calls = 50, 5000
    process = pool()
    replies, times = kill_workers(process, kills, calls)
    assert sorted(replies) == [(number, number) for number in range(calls)]
    # Sometimes the machine is busy with something else.
    assert sorted(times)[len(times) // 2] < 1
    assert process.stats()['lost'] == 0


def test_stopped_worker(pool, tmp_path):
    process = pool()
    hold = tmp_path / 'hold'
    hold.touch()
    with client_of(process) as client:
        with in_threads(partial(client.call, 'wait_again'), str(hold)) as results:
            [path] = wait_for_files(tmp_path, 'hold.*', 1)
            stopped = int(path.suffix[1:])
            os.kill(stopped, signal.SIGSTOP)
            start = time.monotonic()
            while is_running(stopped):  # meanwhile the others serve
                assert client.call('echo', 1) == 1
            seconds = time.monotonic() - start
            wait_for_files(tmp_path, 'hold.*', 2)
            hold.unlink()
        wait_for_workers(process, {stopped})
        assert results[0] != stopped
    assert seconds < HANG_TIMEOUT + 0.5  # on a busy machine


def test_who_computes_does_not_hang(pool):
    process = pool()
    with client_of(process) as client:
        pids = workers_of(process)
        size = 10_000_000
        while client.call('hold', size) < HANG_TIMEOUT * 1.5:
            size *= 2
        assert workers_of(process) == pids


def test_killed_broker(pool):
    process = pool()
    workers = workers_of(process)
    pid = process.stats()['pid']
    with client_of(process) as client:
        with in_threads(partial(client.call, 'sleep'), 60) as results:
            wait_until(lambda: process.stats()['in_flight'], TIMEOUT)
            os.kill(pid, signal.SIGKILL)
            start = time.monotonic()
        assert time.monotonic() - start < 5
        assert isinstance(results[0], ConnectionError)
        assert client.call('echo', 1, retries=20) == 1
    stats = process.stats()
    assert stats['pid'] != pid
    assert {worker['pid'] for worker in stats['workers']} <= workers


def test_killed_broker_of_a_busy_worker(pool, tmp_path):
    """The new one asks who it is with each heartbeat, and has to get one answer: a second one would
    not speak of the call that it has sent since.
    """
    process = pool(factory=type('Quick', (Pool,), {'beat_interval': 0.05}), workers=1)
    path = tmp_path / 'hold'
    with client_of(process) as client:
        with in_threads(partial(client.call, 'wait_for'), str(path)):
            wait_for_file(path)
            os.kill(process.stats()['pid'], signal.SIGKILL)

        def call(number):
            while True:
                try:
                    return client.call('echo', number)
                except ConnectionError:
                    time.sleep(0.01)  # there is nothing to wait for

        with in_threads(call, *range(20)) as results:
            wait_for_queue(process, 20)
            time.sleep(0.5)  # so many heartbeats
            path.unlink()
    assert set(results) == set(range(20))


def test_killed_broker_of_a_worker_with_a_task(pool, tmp_path):
    """It announces itself while it is busy, and gets no call until it is free."""
    process = pool(workers=1)
    before = workers_of(process)
    path = tmp_path / 'hold'
    with client_of(process) as client:
        with in_threads(partial(client.call, 'async_wait_for'), str(path)):
            wait_for_file(path)
            os.kill(process.stats()['pid'], signal.SIGKILL)
        wait_for_workers(process, count=1)
        with in_threads(partial(client.call, 'pid', retries=3), None) as results:
            wait_for_queue(process, 1)
            [worker] = process.stats()['workers']
            path.unlink()
    assert (worker['state'], worker['in_flight']) == ('busy', 1)
    assert set(results) == before


def test_stopped_broker(pool):
    process = pool()
    pid = process.stats()['pid']
    os.kill(pid, signal.SIGSTOP)
    with client_of(process) as client:
        assert client.call('echo', 1, retries=20) == 1
    assert not is_running(pid)
    wait_for_workers(process)


def test_worker_that_is_told_to_end(pool, tmp_path):
    process = pool()
    hold = tmp_path / 'hold'
    hold.touch()
    with client_of(process) as client:
        with in_threads(partial(client.call, 'wait_again'), str(hold)) as results:
            [path] = wait_for_files(tmp_path, 'hold.*', 1)
            pid = int(path.suffix[1:])
            os.kill(pid, signal.SIGTERM)
            hold.unlink()
        assert results == [pid]
        wait_for_workers(process, {pid})


def test_handler_stops_its_process(pool):
    process = pool()
    before = workers_of(process)
    with client_of(process) as client:
        assert client.call('stop') == 'stopping'
        wait_until(lambda: len(before & workers_of(process)) == 1, TIMEOUT)
        wait_until(lambda: len(workers_of(process)) == 2, TIMEOUT)
        assert client.call('echo', 1) == 1


def test_killed_pool(folder):
    process = Pool()
    process.start()
    process.wait_ready()
    pids = {process.stats()['pid'], *workers_of(process)}
    process.kill()
    process.join(TIMEOUT)
    for pid in pids:
        wait_for_end(pid, 5)
    assert len(list(folder.glob('pool-*'))) == 1
    with running(Pool):
        assert len(list(folder.glob('pool-*'))) == 1
    assert list(folder.glob('pool-*')) == []


OWNER = """
import json, os, sys
from pool_handlers import Pool
pool = Pool()
pool.start()
pool.wait_ready()
stats = pool.stats()
pids = [pool.pid, stats['pid'], *[each['pid'] for each in stats['workers']]]
os.write(1, (json.dumps(pids) + '\\n').encode())
sys.stdin.readline()
"""


def check_nothing_is_left(pids, folder):
    """Wait for the end of processes; the folders of their pools are gone with them."""
    for pid in pids:
        wait_for_end(pid, 10)
    assert list(folder.glob('pyams_zmq-*/pool-*')) == []


@pytest.mark.parametrize('num', [signal.SIGKILL, None], ids=['killed', 'ends'])
def test_owner_ends(tmp_path, num):
    program = Program(tmp_path, '-c', OWNER, TMPDIR=str(tmp_path))
    try:
        pids = program.read(TIMEOUT)
        if num is None:
            program.write(None)
        else:
            program.send_signal(num)
        check_nothing_is_left(pids, tmp_path)
    finally:
        program.end()


# Recycling


def test_max_calls(pool):
    process = pool(factory=type('Short', (Pool,), {'max_calls': 20}))
    with (
        client_of(process) as client,
        in_threads(
            lambda client: [client.call('pid') for _ in range(100)], *[client] * 3
        ) as results,
    ):
        pass
    pids = [pid for result in results for pid in result]
    assert max(pids.count(pid) for pid in pids) <= 20
    assert len(set(pids)) >= 15
    assert process.stats()['lost'] == process.stats()['repeated'] == 0


def test_max_memory(pool):
    process = pool(factory=type('Small', (Pool,), {'max_memory': 400}))
    with client_of(process) as client:
        pid = client.call('leak', 500 * 1024 * 1024)
        wait_for_workers(process, {pid})
    assert process.stats()['lost'] == 0


@pytest.mark.parametrize('type_', ['late', 'async_late'])
def test_late_method(pool, tmp_path, type_):
    process = pool(workers=1)
    path = tmp_path / 'hold'
    pids = workers_of(process)
    with client_of(process) as client:
        with pytest.raises(ZMQRemoteError, match='504'):
            client.call(type_, str(path))
        assert client.call('echo', 1) == 1
    if type_ == 'late':
        wait_for_workers(process, pids, count=1)
        for pid in pids:
            wait_for_end(pid, TIMEOUT)
    else:
        assert workers_of(process) == pids


def test_late_coroutine_has_ended():
    """By the time that its worker would leave."""
    worker = PoolWorker('127.0.0.1:1', PoolMessageHandler)
    worker.rep_stream = SimpleNamespace(is_late=False)
    worker._leave_if_late()
    assert not worker.is_leaving


def test_late_method_and_no_further_call(pool, tmp_path):
    process = pool(workers=1)
    pids = workers_of(process)
    with client_of(process) as client, pytest.raises(ZMQRemoteError, match='504'):
        client.call('late', str(tmp_path / 'hold'))
    wait_for_workers(process, pids, count=1)


# Limits


def test_queue_limit(pool, tmp_path):
    process = pool(factory=type('Short', (Pool,), {'queue_limit': 3}), workers=1)
    path = tmp_path / 'hold'
    with client_of(process) as client:
        with in_threads(partial(client.call, 'wait_for'), *[str(path)] * 4) as results:
            wait_until(lambda: process.stats()['queue'] == 3, TIMEOUT)
            with pytest.raises(ZMQRemoteError, match='503 The service is overloaded: 3 calls wait'):
                client.call('echo', 1)
            while len(results) < 4:
                path.unlink(missing_ok=True)
        assert results == [str(path)] * 4
        assert process.stats()['refused'] == 1


@pytest.mark.parametrize(
    'frames', [[b'x' * 1_000_000, b'', b'["echo",1]'], [b'', *[b''] * 20_000, b'["echo",1]']]
)
def test_queue_size(pool, tmp_path, frames):
    """Envelope and empty frames take memory, too."""
    process = pool(factory=type('Narrow', (Pool,), {'queue_size': 1_000_000}), workers=1)
    path = tmp_path / 'hold'
    with client_of(process) as client, in_threads(partial(client.call, 'wait_for'), str(path)):
        wait_for_file(path)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(process.bound_address)
            socket.send_multipart(frames)
            assert socket.poll(TIMEOUT * 1000)
            assert json.loads(socket.recv_multipart()[-1])[0] == 503
        path.unlink()


def test_small_send_hwm(pool):
    """It is for clients: what broker and workers say to each other has its limit in the slots."""
    narrow = {'send_hwm': 1, 'concurrency': 8}
    process = pool(factory=type('Narrow', (Pool,), narrow), workers=1)

    def call(size):
        with client_of(process) as client:
            return len(client.call('big', size))

    with in_threads(call, *[3_000_000] * 16) as results:
        pass
    assert results == [3_000_000] * 16


# The end


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


def test_interrupt_of_all(tmp_path):
    program = Program(tmp_path, '-c', OWNER, TMPDIR=str(tmp_path))
    try:
        pids = program.read(TIMEOUT)
        program.send_signal_to_all(signal.SIGINT)
        check_nothing_is_left(pids, tmp_path)
    finally:
        program.end()


def test_rolling_restart(pool):
    process = pool()
    stop = threading.Event()

    def call(client):
        count = 0
        while not stop.is_set():
            client.call('pid')
            count += 1
        return count

    pids = set()
    with client_of(process) as client, in_threads(call, *[client] * 3) as results:
        for _ in range(3):
            pids |= (before := workers_of(process))
            process.reload()
            wait_for_workers(process, before)
        stop.set()
    assert len(pids) == 6
    assert all(isinstance(result, int) for result in results), results
    assert process.stats()['lost'] == process.stats()['repeated'] == 0


def test_rolling_restart_again_before_it_is_over(folder, tmp_path):
    """The second one finds workers that the first one has replaced; their number stays."""
    flag = tmp_path / 'flag'

    class Waiting:
        def __init__(self):
            Path(f'{flag}.{os.getpid()}').touch()
            wait_until(lambda: not flag.exists(), TIMEOUT)

    class WaitingMessageHandler(PoolMessageHandler):
        handler = Waiting

    with running(Pool, handler=WaitingMessageHandler) as process:
        before = workers_of(process)
        flag.touch()
        process.reload()
        [first] = wait_until(
            lambda: {int(path.suffix[1:]) for path in tmp_path.glob('flag.*')} - before, TIMEOUT
        )
        process.reload()
        flag.unlink()
        wait_for_workers(process, before | {first})
        assert len(list(tmp_path.glob('flag.*'))) == 5


def test_worker_is_stopped_before_it_says_anything(pool):
    """It is replaced, and the rolling restart goes on."""
    process = pool()
    before = workers_of(process)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    known = set(children.read_text().split())
    process.reload()
    [new] = wait_until(lambda: set(children.read_text().split()) - known, TIMEOUT)
    os.kill(int(new), signal.SIGSTOP)
    assert int(new) not in wait_for_workers(process, before)


@pytest.mark.parametrize('type_', ['wait_for', 'async_wait_for'])
def test_rolling_restart_waits_for_a_long_call(pool, tmp_path, type_):
    process = pool(factory=type('Quick', (Pool,), {'drain_timeout': 0.2}))
    path = tmp_path / 'hold'
    before = workers_of(process)
    with client_of(process) as client:
        with in_threads(partial(client.call, type_), str(path)) as results:
            wait_for_file(path)
            [busy] = [each for each in process.stats()['workers'] if each['state'] == 'busy']
            process.reload()
            wait_until(lambda: len(workers_of(process) - before) >= 1, TIMEOUT)
            os.kill(busy['pid'], signal.SIGHUP)  # once more changes nothing
            stop = time.monotonic() + 0.5  # longer than `drain_timeout`
            while time.monotonic() < stop:
                assert client.call('echo', 1) == 1
            os.kill(busy['pid'], signal.SIGHUP)
            assert client.call('echo', 1) == 1
            path.unlink()
        assert results == [str(path)]
    wait_for_workers(process, before)


# Statistics


def test_stats(pool, monkeypatch):
    process = pool()
    with client_of(process) as client:
        for _ in range(10):
            client.call('echo', 1)
        with pytest.raises(ZMQRemoteError, match='404'):
            client.call('nothing_such')
        stats = client.call('pyams_zmq.stats')
    assert stats['calls'] == 11
    assert stats['errors'] == 1
    assert stats['methods']['echo']['calls'] == 10
    assert 0 < stats['methods']['echo']['p50'] <= stats['methods']['echo']['max'] < TIMEOUT
    assert stats['methods']['(others)']['errors'] == 1
    assert stats['addresses'][0] == process.bound_address
    for worker in stats['workers']:
        assert is_running(worker['pid'])
        assert worker['state'] == 'idle'
    wait_until(lambda: process.stats()['workers'][0]['memory'] > 5, TIMEOUT)


def test_right_to_stats(pool, monkeypatch):
    monkeypatch.setattr(broker_module, 'is_here', lambda address: False)
    process = pool(
        factory=type('Open', (Pool,), {'stats_users': {'alice'}}),
        auth=['alice:a', 'bob:b'],
        workers=1,
    )
    with client_of(process, auth='alice:a') as client:
        assert client.call('pyams_zmq.stats')['calls'] == 0
    with client_of(process, auth='bob:b') as client:
        with pytest.raises(ZMQRemoteError, match=r'403 .*stats_users') as error:
            client.call('pyams_zmq.stats')
        assert error.value.status == 403
        assert client.call('echo', 1) == 1
    assert process.stats()['calls'] == 1


def test_stats_of_a_pool_whose_broker_is_away(pool):
    process = pool(workers=1)
    os.kill(process.stats()['pid'], signal.SIGSTOP)
    with pytest.raises(ZMQTimeoutError, match=r'no statistics within 0\.1 s'):
        process.stats(timeout=0.1)


# Under a supervisor


def test_under_a_supervisor(folder, tmp_path, ask):
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


def test_given_up(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)
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
    process.reload()  # in vain: the old ones stay
    wait_for_file(tmp_path / 'worker 1')
    pids = workers_of(process)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.join(TIMEOUT)
    assert process.exitcode == 1
    assert (tmp_path / 'worker 2').exists()


# Workers of other machines


CALLS = """
import os
from pyams_zmq.cli import main
import sys
sys.argv[0] = 'worker.py'
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def keys(tmp_path):
    """Keys of a broker and of a worker."""
    folder = tmp_path / 'keys'
    (folder / 'workers').mkdir(parents=True)
    zmq.auth.create_certificates(folder, 'broker')
    zmq.auth.create_certificates(folder, 'stranger')
    zmq.auth.create_certificates(folder / 'workers', 'worker')
    return folder


@pytest.fixture
def join(tmp_path):
    """Start programs with workers."""
    programs = []

    def start(pool, *args):
        address = pool.bound_worker_address
        handler = 'pool_handlers.PoolMessageHandler'
        options = ('-W', 'ignore:pkg_resources is deprecated')
        program = Program(tmp_path, *options, '-c', CALLS, 'worker', address, handler, *args)
        programs.append(program)
        return program

    yield start
    for program in programs:
        program.end()


def test_join_by_plain(pool, join, tmp_path):
    (tmp_path / 'auth').write_text('worker:secret')
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    local = workers_of(process)
    program = join(process, '--auth-file', str(tmp_path / 'auth'), '--workers', '2')
    remote = wait_for_workers(process, count=3) - local
    with client_of(process) as client:
        assert {client.call('pid') for _ in range(30)} == local | remote
        before = remote
        program.send_signal(signal.SIGHUP)
        wait_until(lambda: not before & (now := workers_of(process)) and len(now) == 3, TIMEOUT)
        program.send_signal(signal.SIGTERM)
        assert program.wait(TIMEOUT) == 0
        assert {client.call('pid') for _ in range(30)} == local
    wait_for_workers(process, count=1)
    assert 'secret' not in program.log.read_text()


def test_join_by_curve(pool, join, keys):
    curve = CurveServer(keys / 'broker.key_secret', keys / 'workers')
    process = pool(workers=1, worker_address='127.0.0.1', worker_curve=curve)
    key = str(keys / 'workers' / 'worker.key_secret')
    join(process, '--key', key, '--server-key', str(keys / 'broker.key'), '--concurrency', '2')
    wait_for_workers(process, count=2)
    assert sorted(worker['slots'] for worker in process.stats()['workers']) == [1, 2]
    (keys / 'workers' / 'worker.key').unlink()
    (keys / 'stranger.key').rename(keys / 'workers' / 'stranger.key')
    before = workers_of(process)
    process.reload()
    wait_for_workers(process, before, count=1)


@pytest.mark.parametrize('number', [0, 1])
def test_join_by_a_stranger(pool, join, keys, tmp_path, number):
    """Neither a client of the pool nor anybody else is a worker."""
    (tmp_path / 'auth').write_text('alice:a')
    options = (
        ['--auth-file', str(tmp_path / 'auth')],
        ['--key', str(keys / 'stranger.key_secret'), '--server-key', str(keys / 'broker.key')],
    )[number]
    curve = CurveServer(keys / 'broker.key_secret', keys / 'workers')
    how = ({'worker_auth': 'worker:secret'}, {'worker_curve': curve})[number]
    process = pool(auth='alice:a', workers=1, worker_address='127.0.0.1', **how)
    program = join(process, *options)
    wait_until(lambda: 'refuses this worker' in program.log.read_text(), TIMEOUT)
    assert len(workers_of(process)) == 1


def test_killed_worker_of_another_machine(pool, join, tmp_path):
    (tmp_path / 'auth').write_text('worker:secret')
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    local = workers_of(process)
    join(process, '--auth-file', str(tmp_path / 'auth'), '--beat-interval', '0.2')
    [remote] = wait_for_workers(process, count=2) - local
    hold = tmp_path / 'hold'
    hold.touch()
    with client_of(process) as client:
        with in_threads(partial(client.call, 'wait_again'), str(hold), str(hold)) as results:
            wait_for_files(tmp_path, 'hold.*', 2)
            os.kill(remote, signal.SIGKILL)
            wait_until(lambda: process.stats()['repeated'], TIMEOUT)
            hold.unlink()
        assert len(results) == 2
        assert remote not in results
    wait_for_workers(process, {remote})


def test_stopped_worker_of_another_machine(pool, tmp_path):
    """It was lost; when it goes on, it announces itself again."""
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'worker:secret')
    worker.beat_interval = 0.1
    worker.start()
    try:
        worker.wait_ready()
        wait_for_workers(process)
        os.kill(worker.pid, signal.SIGSTOP)
        wait_for_workers(process, count=1)
        os.kill(worker.pid, signal.SIGCONT)
        assert worker.pid in wait_for_workers(process)
    finally:
        worker.stop()
    assert worker.exitcode == RECYCLED


def test_large_message_for_a_worker_of_another_machine(pool):
    """It does not know the limit of the pool, and takes what the broker has let in."""
    wide = {'max_message_size': 50_000_000}
    process = pool(
        factory=type('Wide', (Pool,), wide),
        workers=1,
        worker_address='127.0.0.1',
        worker_auth='worker:secret',
    )
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'worker:secret')
    worker.start()
    try:
        worker.wait_ready()
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.connect(process.bound_address)
            for _worker in range(2):
                socket.send(b'["size","' + b'x' * 40_000_000 + b'"]')
                assert socket.poll(TIMEOUT * 1000)
                assert json.loads(socket.recv()) == [200, 40_000_000]
        assert [each['calls'] for each in process.stats()['workers']] == [1, 1]
    finally:
        worker.stop()


def test_worker_out_of_descriptors(pool, monkeypatch):
    """It goes on to say that it lives."""

    def fail():
        raise OSError(errno.EMFILE, 'Too many open files')

    monkeypatch.setattr(worker_module, 'read_memory', fail)
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'worker:secret')
    worker.beat_interval = 0.05
    worker.start()
    try:
        worker.wait_ready()
        stop = time.monotonic() + 1  # three heartbeats, and some looks of the broker
        while time.monotonic() < stop:
            assert worker.pid in workers_of(process)
    finally:
        worker.stop()


def test_worker_that_is_told_to_leave_before_it_is_connected(pool):
    class Early(PoolWorker):
        def setup(self):
            os.kill(os.getpid(), signal.SIGHUP)
            super().setup()

    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    worker = Early(process.bound_worker_address, PoolMessageHandler, 'worker:secret')
    worker.start()
    worker.join(TIMEOUT)
    assert worker.exitcode == RECYCLED


def test_worker_stays_when_its_broker_is_killed(pool, tmp_path):
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'worker:secret')
    worker.start()
    try:
        worker.wait_ready()
        path = tmp_path / 'hold'
        with client_of(process) as client:
            with in_threads(partial(client.call, 'wait_for'), str(path), str(path)) as results:
                wait_until(lambda: process.stats()['in_flight'] == 2, TIMEOUT)
                os.kill(process.stats()['pid'], signal.SIGKILL)
            assert all(isinstance(result, ConnectionError) for result in results)
            path.unlink(missing_ok=True)
            while len(results) and path.exists():
                path.unlink(missing_ok=True)
            assert worker.pid in wait_for_workers(process)
            assert client.call('echo', 1, retries=9) == 1
    finally:
        worker.stop()


def test_refused_worker(pool):
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'worker:guess')
    worker.start()
    with pytest.raises(ZMQRefusedError, match='compare its user, or keys'):
        worker.wait_ready()
    worker.join(TIMEOUT)
    assert worker.exitcode == 1


def test_curve(pool, keys):
    """Keys of clients, and other ones of workers."""
    curve = CurveServer(keys / 'broker.key_secret', [keys / 'stranger.key'])
    worker_curve = CurveServer(keys / 'broker.key_secret', keys / 'workers')
    process = pool(curve=curve, workers=1, worker_address='127.0.0.1', worker_curve=worker_curve)
    worker = PoolWorker(
        process.bound_worker_address,
        PoolMessageHandler,
        curve=CurveClient(keys / 'broker.key', keys / 'workers' / 'worker.key_secret'),
    )
    worker.start()
    try:
        worker.wait_ready()
        assert worker.pid in wait_for_workers(process)
    finally:
        worker.stop()
    client = CurveClient(keys / 'broker.key', keys / 'stranger.key_secret')
    with client_of(process, curve=client) as client:
        assert client.call('echo', 1) == 1


def test_worker_whose_access_was_withdrawn(pool, tmp_path):
    users = tmp_path / 'users'
    users.write_text('one:1')
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth=users)
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'one:1')
    worker.start()
    try:
        worker.wait_ready()
        local = wait_for_workers(process) - {worker.pid}
        users.write_text('nonsense')  # which changes nothing
        process.reload()
        assert worker.pid in wait_for_workers(process, local)
        users.write_text('two:2')
        process.reload()
        wait_for_workers(process, {worker.pid}, count=1)
    finally:
        worker.stop()


@contextmanager
def rogue_of(pool, route):
    """Somebody who knows the credentials of workers, and says what he likes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.routing_id = route
        socket.plain_username, socket.plain_password = b'worker', b'secret'
        socket.connect(pool.bound_worker_address)
        yield socket


@pytest.mark.parametrize(
    'frames',
    [
        [b''],
        [b'', b'nonsense'],
        [b'', b'stats'],
        [b'', b'READY', b'nonsense'],
        [b'', b'READY', b'{}'],
        [b'', b'HEARTBEAT', b'nonsense'],
        [b'', b'REJECT', b'12345678'],
        [b'12345678'],
        [b'12345678', b'[200,1]'],
        [b'12345678', b'[200,1]', b'more'],
        [b'x' * 100_000] * 3,
    ],
)
def test_nonsense_of_a_worker(pool, ask, frames):
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    with rogue_of(process, b'rogue') as rogue:
        rogue.send_multipart(frames)
        rogue.send_multipart([b'', b'HEARTBEAT', b'1'])  # its answer shows that all was read
        assert rogue.poll(TIMEOUT * 1000)
        assert rogue.recv_multipart() == [b'', b'UNKNOWN']
    assert ask(process, ['echo', 1]) == [200, 1]
    assert len(workers_of(process)) == 1


def test_worker_that_takes_the_name_of_another(pool, ask, monkeypatch):
    """It would have to know it, and is not heard."""
    monkeypatch.setattr(worker_module.os, 'urandom', lambda size: b'n' * size)
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    info = {'pid': 1, 'host': 'x', 'slots': 9, 'interval': 60, 'methods': [], 'repeatable': []}
    with rogue_of(process, b'n' * 16) as rogue:
        rogue.send_multipart([b'', b'READY', json.dumps({**info, 'calls': []}).encode()])
        assert ask(process, ['echo', 1]) == [200, 1]
        [worker] = process.stats()['workers']
        assert worker['slots'] == 1


def test_worker_that_is_not_watched(pool, monkeypatch):
    """Where the system has no pidfd, its heartbeats tell."""
    monkeypatch.setattr(broker_module, 'open_pidfd', lambda pid: nullcontext(None))
    process = pool()
    [first, *_] = workers_of(process)
    with client_of(process) as client:
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: first not in workers_of(process), TIMEOUT)
        wait_for_workers(process)
        assert client.call('echo', 1) == 1


def test_gate(monkeypatch):
    """An error which is none of the peer is told."""

    def send(socket, data, flags):
        raise zmq.ZMQError(zmq.ENOTSUP)

    monkeypatch.setattr(broker_module, 'send_frame', send)
    gate = broker_module._Gate.__new__(broker_module._Gate)
    gate.socket = None
    with pytest.raises(zmq.ZMQError):
        gate.send_frames([b'1', b'2'])
    gate._handle_events(None, 0)


def test_turns_of_a_busy_broker(monkeypatch):
    """However many sockets wake it, it looks after all of them once in a turn of the loop."""
    callbacks = []
    broker = broker_module.PoolBroker('127.0.0.1', 'ipc://@nowhere')
    broker.loop = SimpleNamespace(add_callback=callbacks.append)
    gate = broker_module._Gate.__new__(broker_module._Gate)
    gate.socket, gate._wake = SimpleNamespace(closed=False), broker._wake
    broker._gates = {gate: SimpleNamespace(read=int)}
    monkeypatch.setattr(broker_module, '_TURN', 0.0)
    monkeypatch.setattr(broker_module.zmq, 'zmq_poll', lambda polled, wait: [(gate, zmq.POLLIN)])
    for _turn in range(3):
        due = callbacks.copy()
        callbacks.clear()
        for callback in due:
            callback()
        broker._pump()  # as a heartbeat does
        gate._handle_events(None, 0)
        assert len(callbacks) == 1
    monkeypatch.setattr(broker_module.zmq, 'zmq_poll', lambda polled, wait: [])
    callbacks.pop()()
    gate._handle_events(None, 0)
    assert callbacks == []


@pytest.mark.parametrize(
    ('address', 'here'),
    [
        ('127.0.0.1', True),
        ('::1', True),
        ('::ffff:127.0.0.1', True),
        ('localhost:0:0:1', True),
        ('192.0.2.1', False),
        ('fe80::1%lo', False),
        ('::ffff:192.0.2.1', False),
    ],
)
def test_is_here(address, here):
    assert broker_module.is_here(address) is here


class PartsMessageHandler(PoolMessageHandler):
    """Replies in two frames, one after the other."""

    def __call__(self, frames):
        self.rep_stream.send(b'first', zmq.SNDMORE)
        self.rep_stream.send(b'[200,"second"]')


class FramesMessageHandler(PoolMessageHandler):
    """Replies in two frames at once."""

    def __call__(self, frames):
        self.rep_stream.send_multipart([b'first', b'[200,"second"]'])


@pytest.mark.parametrize('handler', [PartsMessageHandler, FramesMessageHandler])
def test_reply_of_two_frames(pool, handler):
    process = pool(handler=handler, workers=1)
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(process.bound_address)
        socket.send(b'')
        assert socket.poll(TIMEOUT * 1000)
        assert socket.recv_multipart() == [b'first', b'[200,"second"]']


def test_closed_stream():
    loop = IOLoop(make_current=False)
    with zmq.Context() as context:
        stream = WorkerStream(context.socket(zmq.DEALER), loop)
        with pytest.raises(zmq.ZMQError, match='no message to reply to'):
            stream.send(b'reply')
        stream.close(0)
        stream._handle_events(None, 0)
    loop.close()


def test_forwarded_frame():
    frame = ForwardedFrame(b'data', b'al\0ice\x00127.0.0.1')
    assert (bytes(frame), len(frame)) == (b'data', 4)
    assert (frame['User-Id'], frame['Peer-Address']) == ('al\0ice', '127.0.0.1')
    with pytest.raises(KeyError):
        frame['other']


def test_folder_that_is_being_made(tmp_path):
    assert not lock_module.PrivateFolder.is_stale(str(tmp_path))
    (tmp_path / 'lock').touch()
    assert lock_module.PrivateFolder.is_stale(str(tmp_path))


def test_worker_dies_while_it_is_replaced(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Supervisor, 'min_delay', 60)  # it does not come back meanwhile
    flag = tmp_path / 'flag'

    class Waiting:
        def __init__(self):
            wait_until(lambda: not flag.exists(), TIMEOUT)

        def pid(self, args):
            return [200, os.getpid()]

    class WaitingMessageHandler(PoolMessageHandler):
        handler = Waiting

    with running(Pool, handler=WaitingMessageHandler, workers=1) as process:
        [old] = workers_of(process)
        flag.touch()
        process.reload()
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: not workers_of(process), TIMEOUT)
        flag.unlink()
        wait_for_workers(process, {old}, count=1)
        [new] = workers_of(process)
        process.reload()  # which begins when this is over
        wait_for_workers(process, {old, new}, count=1)


def test_reload_twice(folder, tmp_path):
    """A worker that is being replaced is not replaced a second time, by one worker more."""
    flag, begun = tmp_path / 'flag', tmp_path / 'begun'

    class Waiting:
        def __init__(self):
            with begun.open('a') as file:
                file.write(f'{os.getpid()}\n')
            wait_until(lambda: not flag.exists(), TIMEOUT)

    class WaitingMessageHandler(PoolMessageHandler):
        handler = Waiting

    def list_begun():
        return [int(line) for line in begun.read_text().splitlines()]

    with running(Pool, handler=WaitingMessageHandler, workers=1) as process:
        flag.touch()
        process.reload()
        wait_until(lambda: len(list_begun()) > 1, TIMEOUT)
        process.reload()
        flag.unlink()
        wait_until(lambda: len(list_begun()) > 2, TIMEOUT)
        third = list_begun()[2]
        wait_until(lambda: workers_of(process) == {third}, TIMEOUT)


def test_arguments(monkeypatch):
    """They reach the workers."""
    made = []

    def run(self):
        made.extend(child.factory() for child in self._children)
        return 0

    monkeypatch.setattr(Supervisor, 'run', run)
    monkeypatch.setattr('sys.argv', ['python'])
    args = ['--max-calls', '5', '--max-memory', '1.5', '--concurrency', '2', '--workers', '3']
    assert main(['worker', '127.0.0.1:1', 'pool_handlers.PoolMessageHandler', *args]) == 0
    assert sys.argv == ['pyams_zmq']
    assert [(each.max_calls, each.max_memory, each.concurrency) for each in made] == [
        (5, 1.5, 2)
    ] * 3


def test_handler_that_is_not_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr('sys.argv', ['python'])
    path = tmp_path / 'app.ini'
    path.write_text('[app:main]\nuse = call:pool_handlers:make_app\n', encoding='utf-8')
    depth = len(manager.stack)
    try:
        with pytest.raises(SystemExit):
            main(['worker', '127.0.0.1:1', 'no.such.Handler', str(path)])
    finally:
        del manager.stack[depth:]
    assert 'no.such.Handler' in capsys.readouterr().err


def test_broker_is_away():
    """A worker says nothing then, and announces itself once it is back."""
    worker = PoolWorker('127.0.0.1:1', PoolMessageHandler)
    worker._message_handler = None
    worker.rep_stream = SimpleNamespace(keys=set())
    said = []
    worker.say = lambda *frames: bool(said.append(frames))
    worker.announce()
    assert said
    assert worker._announced < 0


def test_late_method_is_looked_after_once():
    worker = PoolWorker('127.0.0.1:1', PoolMessageHandler)
    timers = []
    worker.loop = SimpleNamespace(call_later=lambda *args: timers.append(args) or args)
    for _ in range(2):
        worker.check_late()
    assert len(timers) == 1
    worker.loop = None


def test_worker_without_a_broker():
    worker = PoolWorker('127.0.0.1:1', PoolMessageHandler)
    worker.start()
    with pytest.raises(ZMQTimeoutError):
        worker.wait_ready(0.1)
    worker.stop()
    assert worker.exitcode == RECYCLED


@pytest.mark.parametrize(
    ('args', 'text'),
    [
        (['--workers', '0'], 'there is nothing to do for 0 workers'),
        (['--auth-file', '/nothing'], 'Credentials file'),
        (['--key', '/nothing.key_secret', '--server-key', 'x' * 40], 'CURVE key'),
        (['--max-calls', '-1'], 'max_calls is -1'),
        (['--beat-interval', '0'], 'Bad beat_interval 0.0: write 0.01 to 60.0 seconds'),
        (['--beat-interval', 'nan'], 'beat_interval'),
        (['--concurrency', '0'], 'Bad concurrency 0: write 1 or more'),
        (['nothing.ini'], 'there is no file nothing.ini'),
    ],
)
def test_bad_arguments(capsys, monkeypatch, args, text):
    monkeypatch.setattr('sys.argv', ['pyams_zmq'])
    with pytest.raises(SystemExit) as error:
        main(['worker', '127.0.0.1:1', 'pool_handlers.PoolMessageHandler', *args])
    assert error.value.code == 2
    assert text in capsys.readouterr().err


def test_bad_handler(capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['pyams_zmq'])
    with pytest.raises(SystemExit):
        main(['worker', '127.0.0.1:1', 'pool_handlers.Nothing'])
    assert 'Nothing' in capsys.readouterr().err


def test_two_mechanisms(keys):
    curve = CurveClient(keys / 'broker.key', keys / 'stranger.key_secret')
    with pytest.raises(ValueError, match='one user, or keys'):
        PoolWorker('127.0.0.1:1', PoolMessageHandler, 'a:b', curve=curve)


# Declared


def declare(**settings):
    config = Configurator(settings={f'pyams_zmq.echo.{key}': settings[key] for key in settings})
    config.include('pyams_zmq')
    return config


def test_declared(folder, tmp_path, ask):
    config = declare(
        address=f'ipc://{tmp_path}/pool',
        handler='pool_handlers.PoolMessageHandler',
        workers='3',
        queue_limit='7',
        max_calls='1000',
        drain_timeout='3',
        stats_users='alice bob',
    )
    config.commit()
    [item] = config.introspector.get_category('ZMQ processes')
    assert item['introspectable']['workers'] == 3
    assert item['introspectable']['factory'] is ZMQPool
    process = services_of(config.registry)['echo'].make_process(config.registry)
    assert isinstance(process, ZMQPool)
    assert process.stats_users == ('alice', 'bob')
    with running(process):
        stats = process.stats()
        assert len(stats['workers']) == 3
        assert stats['queue_limit'] == 7


@pytest.mark.parametrize(
    ('settings', 'text'),
    [
        ({'max_calls': '1'}, 'has max_calls, which is for a pool: say how many workers'),
        ({'worker_address': '*:1'}, 'has worker_address, which is for a pool'),
        ({'workers': 'x'}, 'bad workers'),
        ({'workers': '-1'}, 'bad workers'),
        ({'workers': '2', 'beat_interval': '0'}, 'bad beat_interval'),
        ({'workers': '2', 'factory': 'handlers.Process'}, 'is not a subclass of ZMQPool'),
        ({'workers': '2', 'worker_address': '*:1'}, 'Give worker_auth or worker_curve'),
    ],
)
def test_bad_declaration(settings, text):
    config = declare(address='*:1', handler='pool_handlers.PoolMessageHandler', **settings)
    with pytest.raises(ConfigurationError, match=text):
        config.commit()


def test_declared_pool_of_no_workers():
    config = declare(
        address='*:1', handler='pool_handlers.PoolMessageHandler', workers='0', start='never'
    )
    config.commit()
    assert services_of(config.registry)['echo'].factory is ZMQProcess
