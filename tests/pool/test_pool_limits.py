# SPDX-License-Identifier: ZPL-2.1
"""Limits of a pool: queue, memory, calls, deadlines."""

import json
import resource
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import zmq
from tornado.ioloop import IOLoop

from app.program import wait_for_end, wait_until
from checks import suspend
from pool_checks import (
    TIMEOUT,
    client_of,
    in_threads,
    ports_of,
    wait_for_file,
    wait_for_workers,
    workers_of,
)
from pool_handlers import Pool, PoolMessageHandler
from pyams_zmq.exceptions import (
    ZMQRemoteError,
)
from pyams_zmq.pool import broker as broker_module
from pyams_zmq.pool.protocol import KEY_SIZE
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.pool.worker_stream import WorkerStream
from pyams_zmq.process.connections import Envelope
from pyams_zmq.socket import zmq_response, zmq_socket
from pyams_zmq.testing import running
from pyams_zmq.wire.memory import read_memory
from raw_peer import RawPeer, request


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


def test_read_memory():
    assert read_memory() == pytest.approx(psutil.Process().memory_info().rss / 2**20, rel=0.01)


@pytest.mark.parametrize('error', [FileNotFoundError, PermissionError])
def test_memory_that_cannot_be_read(monkeypatch, error):
    """The peak is a substitute."""

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr('pyams_zmq.wire.memory.open', fail, raising=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert read_memory() >= peak > 1


@pytest.mark.parametrize('type_', ['overdue', 'overdue_thread', 'async_overdue'])
def test_overdue_method(pool, tmp_path, type_):
    process = pool(workers=1)
    path = tmp_path / 'hold'
    pids = workers_of(process)
    with client_of(process) as client:
        with pytest.raises(ZMQRemoteError, match='504'):
            client.call(type_, str(path))
        assert client.call('echo', 1) == 1
    if type_ != 'async_overdue':
        wait_for_workers(process, pids, count=1)
        for pid in pids:
            wait_for_end(pid, TIMEOUT)
    else:
        assert workers_of(process) == pids


def test_method_that_blocks_its_worker(pool):
    process = pool(workers=1)
    pids = workers_of(process)
    with client_of(process) as client:
        with pytest.raises(ZMQRemoteError, match='502'):
            client.call('async_blocks', timeout=TIMEOUT)
        assert client.call('pid', timeout=TIMEOUT) not in pids


def test_overdue_coroutine_ends_in_time():
    """A worker does not leave for a coroutine that ends within the grace period."""
    worker = PoolWorker('127.0.0.1:1', PoolMessageHandler)
    worker.rep_stream = SimpleNamespace(has_overdue=False)
    worker._leave_if_overdue()
    assert not worker.is_leaving


def test_overdue_method_without_a_further_call(pool, tmp_path):
    process = pool(workers=1)
    pids = workers_of(process)
    with client_of(process) as client, pytest.raises(ZMQRemoteError, match='504'):
        client.call('overdue', str(tmp_path / 'hold'))
    wait_for_workers(process, pids, count=1)


def test_thread_of_an_overdue_method(pool, tmp_path):
    """Python joins it at the end of a worker; this one does not wait for that."""
    process = pool(factory=type('Patient', (Pool,), {'drain_timeout': 3600.0}), workers=1)
    pids = workers_of(process)
    with client_of(process) as client, pytest.raises(ZMQRemoteError, match='504'):
        client.call('overdue_executor', str(tmp_path / 'hold'))
    wait_for_workers(process, pids, count=1)


def test_method_of_a_suspended_pool(pool, tmp_path):
    """Supervisor, broker and worker are stopped for longer than the method may run."""
    process = pool(workers=1)
    [worker] = workers_of(process)
    path = tmp_path / 'hold'
    with zmq_socket(process.bound_address) as socket:
        socket.send_json(['limited', str(path)])
        wait_for_file(path)
        suspend([process.pid, process.stats()['pid'], worker], 5)
        assert not socket.poll(700)  # neither 504 nor 502
        path.unlink()
        assert zmq_response(socket) == [200, str(path)]
    assert workers_of(process) == {worker}


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
    'frames', [[b'x' * 1_000_000, b'', b'["echo",1]'], [*[b'x'] * 20_000, b'', b'["echo",1]']]
)
def test_queue_size(pool, tmp_path, frames):
    """Envelopes count, and the memory that each frame of them uses."""
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
    """It applies to clients; the slots limit the messages between broker and workers."""
    narrow = {'send_hwm': 1, 'concurrency': 8}
    process = pool(factory=type('Narrow', (Pool,), narrow), workers=1)

    def call(size):
        with client_of(process) as client:
            return len(client.call('big', size))

    with in_threads(call, *[3_000_000] * 16) as results:
        pass
    assert results == [3_000_000] * 16


def test_overdue_method_is_checked_once():
    worker = PoolWorker('127.0.0.1:1', PoolMessageHandler)
    timers = []
    worker.loop = SimpleNamespace(call_later=lambda *args: timers.append(args) or args)
    for _ in range(2):
        worker.check_overdue()
    assert len(timers) == 1
    worker.loop = None


def test_check_of_a_broker_that_fails():
    """There is another one all the same."""
    timers = []
    loop = SimpleNamespace(call_later=lambda *args: timers.append(args))
    broker = SimpleNamespace(loop=loop, pump=SimpleNamespace(run=lambda: 1 / 0))
    broker._check_workers = partial(broker_module.PoolBroker._check_workers, broker)
    with pytest.raises(ZeroDivisionError):
        broker._check_workers()
    assert [function for _seconds, function in timers] == [broker._check_workers]


def test_client_queue_size(pool, tmp_path):
    """One connection cannot fill the memory of the broker."""
    process = pool(factory=type('Narrow', (Pool,), {'client_queue_size': 1_000_000}), workers=1)
    path = tmp_path / 'hold'
    text = 'x' * 400_000
    with client_of(process) as client, in_threads(partial(client.call, 'wait_for'), str(path)):
        wait_for_file(path)
        with (
            RawPeer(process.bound_address) as peer,
            in_threads(partial(client.call, 'size'), text) as results,
        ):
            for _ in range(3):
                peer.send(request('size', text))
            assert peer.read_reply()[0] == 503
            path.unlink()
            assert [peer.read_reply() for _ in range(2)] == [[200, 400_000]] * 2
        assert results == [400_000]


def test_replies_that_are_not_read(pool):
    """The broker does not keep more than `send_size` of them."""
    process = pool(factory=type('Narrow', (Pool,), {'send_size': 4_000_000}), workers=1)
    with RawPeer(process.bound_address) as peer, client_of(process) as client:
        port = peer.socket.getsockname()[1]
        assert port in ports_of(process)
        for _ in range(60):
            peer.send(request('big', 1_000_000))
        wait_until(lambda: port not in ports_of(process), TIMEOUT)
        assert client.call('echo', 1) == 1


def test_part_of_a_message(pool):
    """A peer that does not continue is disconnected; one that is silent stays."""
    limits = {'heartbeat_interval': 1.0, 'heartbeat_timeout': 1.0}
    process = pool(factory=type('Impatient', (Pool,), limits), workers=1)
    with (
        RawPeer(process.bound_address) as silent,
        RawPeer(process.bound_address) as peer,
    ):
        for each in (silent, peer):
            assert each.ask('echo', 1) == [200, 1]
        peer.send(request('echo', 1)[:-1])
        peer.wait_end()
        assert silent.ask('echo', 1) == [200, 1]


@pytest.mark.parametrize('is_remote', [False, True])
def test_max_reply_size(pool, is_remote):
    """The worker replies with an error; its connection stays."""
    process = pool(
        factory=type('Narrow', (Pool,), {'max_reply_size': 1_000_000}),
        workers=1,
        worker_address='127.0.0.1',
        worker_auth='worker:secret',
    )
    worker = PoolWorker(process.bound_worker_address, PoolMessageHandler, 'worker:secret')
    with client_of(process) as client, running(worker) if is_remote else nullcontext():
        pids = wait_for_workers(process, count=1 + is_remote)
        for _ in pids:
            with pytest.raises(ZMQRemoteError, match=r'500 The reply is 40000008 bytes; the limit'):
                client.call('big', 40_000_000)
        for _ in pids:
            assert len(client.call('big', 999_992)) == 999_992
        assert [each['calls'] for each in process.stats()['workers']] == [2] * len(pids)
        assert process.stats()['lost'] == 0


def test_reply_of_several_frames():
    """All its frames count, but not the key of the call."""
    loop = IOLoop(make_current=False)
    with zmq.Context() as context:
        back = context.socket(zmq.DEALER)
        front = context.socket(zmq.DEALER)
        back.bind('inproc://back')
        front.connect('inproc://back')
        stream = WorkerStream(front, loop)
        stream.process = SimpleNamespace(is_connected=True, name='worker', count_reply=int)
        stream.max_size = 10
        for frames in ([b'12345', b'67890'], [b'12345', b'678901']):
            stream.envelope = Envelope((b'x' * KEY_SIZE,))
            stream.send_multipart(frames)
            assert back.poll(TIMEOUT * 1000)
        stream.process.is_connected = False  # the next broker does not know the call
        stream.envelope = Envelope((b'x' * KEY_SIZE,))
        stream.send_multipart([b'dropped'])
        replies = [back.recv_multipart() for _ in range(2)]
        assert not back.poll(10)
        stream.close(0)
        back.close(0)
    loop.close()
    assert replies[0] == [b'x' * KEY_SIZE, b'12345', b'67890']
    assert replies[1][0] == b'x' * KEY_SIZE
    assert json.loads(replies[1][1])[1].startswith('The reply is 11 bytes; the limit is 10')


def test_refusal_while_the_pool_stops(pool, tmp_path, monkeypatch):
    """The client gets it before the broker ends."""
    monkeypatch.setattr(broker_module, 'REFUSAL_PAUSE', 600)
    process = pool(factory=type('Short', (Pool,), {'queue_limit': 1}), workers=1)
    path = tmp_path / 'hold'
    with client_of(process) as client, in_threads(partial(client.call, 'wait_for'), str(path)):
        wait_for_file(path)
        with in_threads(partial(client.call, 'echo'), 1, 2) as results:
            wait_until(lambda: process.stats()['refused'], TIMEOUT)
            assert results == []
            with in_threads(Pool.stop, process):
                wait_until(lambda: len(results) == 2, TIMEOUT)
                path.unlink()
        assert sorted(each.text[:22] for each in results) == [
            'The service is overloa',
            'The service is stoppin',
        ]
