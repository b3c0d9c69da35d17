# SPDX-License-Identifier: ZPL-2.1
"""Workers of other machines, and the command that starts them."""

import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
import socket as network
import sys
import threading
import time
from contextlib import suppress
from functools import partial

import pytest
import zmq
from pyramid.threadlocal import manager

from checks import freeze, wait_until
from pool_checks import (
    TIMEOUT,
    client_of,
    held_calls,
    in_threads,
    wait_for_files,
    wait_for_workers,
    workers_of,
)
from pool_handlers import Pool, PoolMessageHandler
from pyams_zmq.cli import main
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.exceptions import ZMQRefusedError, ZMQTimeoutError
from pyams_zmq.pool import heartbeat as heartbeat_module
from pyams_zmq.pool import worker as worker_module
from pyams_zmq.pool.protocol import MISSED_HEARTBEATS, ROUTE_SIZE
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.process.watchdog import RECYCLED
from pyams_zmq.supervisor import Supervisor
from pyams_zmq.testing import running
from raw_peer import RawPeer, message

CALLS = """
import os
from pyams_zmq.cli import main
import sys
import threading
import time
from contextlib import suppress
sys.argv[0] = 'worker.py'
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def join(run_program):
    """Start programs with workers."""

    def start(pool, *args):
        address = pool.bound_worker_address
        handler = 'pool_handlers.PoolMessageHandler'
        options = ('-W', 'ignore:pkg_resources is deprecated')
        return run_program(*options, '-c', CALLS, 'worker', address, handler, *args)

    return start


def test_worker_command_with_plain(pool, join, tmp_path):
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


def test_worker_command_with_curve(pool, join, keys):
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
def test_worker_with_wrong_credentials(pool, join, keys, tmp_path, number):
    """The credentials of a client do not admit a worker."""
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
    join(process, '--auth-file', str(tmp_path / 'auth'), '--beat-interval', '1')
    [remote] = wait_for_workers(process, count=2) - local
    with client_of(process) as client:
        with held_calls(client, tmp_path, 2) as (_pids, results):
            os.kill(remote, signal.SIGKILL)
            wait_until(lambda: process.stats()['repeated'], TIMEOUT)
        assert len(results) == 2
        assert remote not in results
    wait_for_workers(process, {remote})


def test_stopped_worker_of_another_machine(pool, tmp_path):
    """The broker removes it; when it continues, it sends READY again."""
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'worker:secret')
    with running(worker):
        wait_for_workers(process)
        freeze(worker.pid)
        wait_for_workers(process, count=1)
        os.kill(worker.pid, signal.SIGCONT)
        assert worker.pid in wait_for_workers(process)
    assert worker.exitcode == RECYCLED


def test_large_message_for_a_worker_of_another_machine(pool):
    """The worker does not know the limit of the pool; the broker enforces it."""
    wide = {'max_message_size': 50_000_000}
    process = pool(
        factory=type('Wide', (Pool,), wide),
        workers=1,
        worker_address='127.0.0.1',
        worker_auth='worker:secret',
    )
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'worker:secret')
    worker.beat_interval = 5.0  # decoding the message may delay a heartbeat on a loaded machine
    with running(worker):
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.connect(process.bound_address)
            for _worker in range(2):
                socket.send(b'["size","' + b'x' * 40_000_000 + b'"]')
                assert socket.poll(TIMEOUT * 1000)
                assert json.loads(socket.recv()) == [200, 40_000_000]
        assert [each['calls'] for each in process.stats()['workers']] == [1, 1]


def test_worker_out_of_descriptors(pool, monkeypatch):
    """It continues to send heartbeats."""

    beats = multiprocessing.get_context('fork').Value('i')

    def fail():
        beats.value += 1
        raise OSError(errno.EMFILE, 'Too many open files')

    def has_beaten():
        assert worker.pid in workers_of(process)
        return beats.value > MISSED_HEARTBEATS + 1

    monkeypatch.setattr(heartbeat_module, 'read_memory', fail)
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'worker:secret')
    with running(worker):
        wait_until(has_beaten)


class StarvedPoolWorker(PoolWorker):
    """Has no free descriptor when its thread opens its socket, the first two times."""

    failures = 0

    def make_socket(self, route):
        if len(route) == ROUTE_SIZE or self.failures == 2:
            return super().make_socket(route)
        self.failures += 1
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with open(os.devnull) as file:
            # Not less: poll(2) fails with fewer descriptors than it gets, and libzmq aborts then.
            resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 1, hard))
            try:
                return super().make_socket(route)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_worker_out_of_descriptors_at_its_start(pool, tmp_path):
    """It opens the socket of its heartbeats later."""
    log = logging.FileHandler(tmp_path / 'log')
    logger = logging.getLogger('PyAMS (zmq)')
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    worker = StarvedPoolWorker(process.bound_worker_address, PoolMessageHandler, 'worker:secret')
    logger.addHandler(log)
    try:
        with running(worker):
            wait_until(
                lambda: any(
                    each['pid'] == worker.pid and each['memory'] > 0
                    for each in process.stats()['workers']
                ),
                TIMEOUT,
            )
    finally:
        logger.removeHandler(log)
        log.close()
    text = (tmp_path / 'log').read_text()
    assert text.count('cannot send heartbeats, and tries again: Too many open files') == 1


def run_brokers(listener, number):
    """Run brokers that end while they send calls."""
    with zmq.Context() as context:
        for _number in range(number):
            with context.socket(zmq.ROUTER) as broker:
                broker.linger = broker.sndhwm = 0
                broker.use_fd = os.dup(listener.fileno())
                broker.bind('tcp://127.0.0.1:*')
                route = broker.recv()
                for _message in range(3000):
                    broker.send_multipart([route, b'key', b'x' * 1000, b''])


def lose_brokers(number):
    """Read calls while one broker after the other is lost."""
    listener = network.create_server(('127.0.0.1', 0))
    brokers = threading.Thread(target=run_brokers, args=(listener, number))
    brokers.start()
    worker = PoolWorker(listener.getsockname(), PoolMessageHandler)
    with zmq.Context() as worker.context, worker.make_socket(os.urandom(ROUTE_SIZE)) as socket:
        socket.connect(worker._broker.endpoint.uri)
        while brokers.is_alive():
            with suppress(zmq.Again):
                socket.send(b'ready', zmq.NOBLOCK)
                while True:
                    frames = socket.recv_multipart(zmq.NOBLOCK)
                    assert [len(frame) for frame in frames] == [3, 1000, 0]
            socket.poll(1)


def test_broker_is_lost_within_a_call():
    """With ZMQ_IMMEDIATE=1, libzmq would abort: Assertion failed: !_more (src/fq.cpp)."""
    child = multiprocessing.get_context('fork').Process(target=lose_brokers, args=(10,))
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == 0


def test_sighup_before_the_worker_connects(pool):
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
    with running(worker):
        paths = [tmp_path / 'hold 1', tmp_path / 'hold 2']
        with client_of(process) as client:
            with in_threads(partial(client.call, 'wait_for'), *map(str, paths)) as results:
                wait_for_files(tmp_path, 'hold *', 2)
                os.kill(process.stats()['pid'], signal.SIGKILL)
            assert all(isinstance(result, ConnectionError) for result in results)
            for path in paths:
                path.unlink()
            assert worker.pid in wait_for_workers(process)
            assert client.call('echo', 1, retries=9) == 1


@pytest.mark.parametrize(('password', 'clients'), [('guess', None), ('secret', '10.0.0.0/8')])
def test_refused_worker(pool, password, clients):
    """Because of its password, or its address, which `clients` does not contain."""
    process = pool(
        clients=clients, workers=1, worker_address='127.0.0.1', worker_auth='worker:secret'
    )
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, f'worker:{password}')
    worker.start()
    with pytest.raises(ZMQRefusedError, match='compare its user or keys'):
        worker.wait_ready()
    worker.join(TIMEOUT)
    assert worker.exitcode == 1


def test_worker_without_permission(monkeypatch, tmp_path):
    """It ends with the reason, instead of trying for ever; see also `tests/client`."""
    monkeypatch.setattr(
        worker_module, 'describe_missing_permission', lambda endpoint: 'no permission'
    )
    worker = PoolWorker(f'ipc://{tmp_path}/closed', PoolMessageHandler)
    worker.start()
    with pytest.raises(ZMQRefusedError, match='no permission'):
        worker.wait_ready()
    worker.join(10)
    assert worker.exitcode


class MovedPoolWorker(PoolWorker):
    """Notes that it has connected again."""

    def connect_by_ipv6(self):
        super().connect_by_ipv6()
        if self.rep_stream.socket.ipv6:
            self.has_moved.set()


def test_worker_whose_broker_moves_to_ipv6(pool, monkeypatch, tmp_path):
    """It connects again; see also `tests/client/test_ipv6_names.py`."""
    answers = iter([True])
    monkeypatch.setattr(heartbeat_module, 'needs_ipv6', lambda endpoint: next(answers, False))
    address = f'ipc://{tmp_path}/broker'
    worker = MovedPoolWorker(address, PoolMessageHandler, 'worker:secret')
    worker.has_moved = multiprocessing.get_context('fork').Event()
    worker.start()
    try:
        assert worker.has_moved.wait(TIMEOUT)
        process = pool(workers=1, worker_address=address, worker_auth='worker:secret')
        worker.wait_ready(TIMEOUT)
        assert worker.pid in workers_of(process)
    finally:
        worker.stop()


def test_curve(pool, keys):
    """Clients and workers have different keys."""
    curve = CurveServer(keys / 'broker.key_secret', [keys / 'stranger.key'])
    worker_curve = CurveServer(keys / 'broker.key_secret', keys / 'workers')
    process = pool(curve=curve, workers=1, worker_address='127.0.0.1', worker_curve=worker_curve)
    worker = PoolWorker(
        process.bound_worker_address,
        PoolMessageHandler,
        curve=CurveClient(keys / 'broker.key', keys / 'workers' / 'worker.key_secret'),
    )
    with running(worker):
        assert worker.pid in wait_for_workers(process)
    client = CurveClient(keys / 'broker.key', keys / 'stranger.key_secret')
    with client_of(process, curve=client) as client:
        assert client.call('echo', 1) == 1


def test_worker_whose_access_was_withdrawn(pool, tmp_path):
    users = tmp_path / 'users'
    users.write_text('one:1')
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth=users)
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'one:1')
    with running(worker):
        local = wait_for_workers(process) - {worker.pid}
        users.write_text('nonsense')  # the former users stay valid
        process.reload()
        assert worker.pid in wait_for_workers(process, local)
        users.write_text('two:2')
        process.reload()
        wait_for_workers(process, {worker.pid}, count=1)


def test_arguments(monkeypatch):
    """The options of the command apply to the workers."""
    made = []

    def run(self):
        made.extend(child.factory() for child in self._children)
        return 0

    monkeypatch.setattr(Supervisor, 'run', run)
    monkeypatch.setattr('sys.argv', ['python'])
    args = ['--max-calls', '5', '--max-memory', '1.5', '--concurrency', '2', '--workers', '3']
    args += ['--overdue-grace', '7']
    assert main(['worker', '127.0.0.1:1', 'pool_handlers.PoolMessageHandler', *args]) == 0
    assert sys.argv == ['pyams_zmq']
    assert [
        (each.max_calls, each.max_memory, each.concurrency, each.overdue_grace) for each in made
    ] == [(5, 1.5, 2, 7.0)] * 3


def test_missing_handler(capsys, monkeypatch, tmp_path):
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
        (['--workers', '0'], 'bad number of workers 0: write 1 or more'),
        (['--auth-file', '/nothing'], 'Credentials file'),
        (['--key', '/nothing.key_secret', '--server-key', 'x' * 40], 'CURVE key'),
        (['--max-calls', '-1'], "bad max_calls: '-1' is not allowed. Expected `int` >= 0"),
        (['--beat-interval', '0'], 'bad beat_interval'),
        (['--beat-interval', 'nan'], 'beat_interval'),
        (['--concurrency', '0'], 'bad concurrency'),
        (['nothing.ini'], 'file nothing.ini does not exist'),
    ],
)
def test_bad_arguments(capsys, monkeypatch, args, text):
    monkeypatch.setattr('sys.argv', ['pyams_zmq'])
    with pytest.raises(SystemExit) as error:
        main(['worker', '127.0.0.1:1', 'pool_handlers.PoolMessageHandler', *args])
    assert error.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ('handler', 'text'),
    [
        ('pool_handlers.Nothing', 'Nothing'),
        ('pool_handlers', 'is not a class of the application'),
        ('plain_handlers.Polite', 'the constructor of Polite needs arguments'),
        ('plain_handlers.AsyncRequest', 'leave concurrency at 1'),
    ],
)
def test_bad_handler(handler, text, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['pyams_zmq'])
    with pytest.raises(SystemExit):
        main(['worker', '127.0.0.1:1', handler, '--concurrency', '2'])
    assert text in capsys.readouterr().err


def test_two_mechanisms(keys):
    curve = CurveClient(keys / 'broker.key', keys / 'stranger.key_secret')
    with pytest.raises(ValueError, match='one user'):
        PoolWorker('127.0.0.1:1', PoolMessageHandler, 'a:b', curve=curve)


def test_worker_that_connects_again_and_resets_its_first_connection(pool):
    """With heartbeats of ZMTP, libzmq would abort the broker: the first connection has no pipe."""
    process = pool(
        factory=type('Restless', (Pool,), {'heartbeat_interval': 0.1}),
        workers=1,
        worker_address='127.0.0.1',
        worker_auth='worker:secret',
    )
    broker = process.stats()['pid']
    options = {'identity': b'w' * ROUTE_SIZE, 'auth': 'worker:secret'}
    heartbeat = message(b'', b'HEARTBEAT', b'1')
    with RawPeer(process.bound_worker_address, **options) as first:
        first.send(heartbeat)
        assert first.read_frames() == [b'', b'UNKNOWN']
        with RawPeer(process.bound_worker_address, **options) as second:
            second.send(heartbeat)
            assert second.read_frames() == [b'', b'UNKNOWN']
            first.send(heartbeat * 3000)
            first.reset()
            for _ in range(10):
                time.sleep(0.1)  # a time is tested: a second, with the heartbeats of ZMTP an abort
                second.send(heartbeat)
                assert second.read_frames() == [b'', b'UNKNOWN']
    assert process.stats()['pid'] == broker
