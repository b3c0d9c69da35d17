# SPDX-License-Identifier: ZPL-2.1
"""Limits of a pool: queue, memory, calls, deadlines."""

import json
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import zmq

from app.program import wait_for_end, wait_until
from pool_checks import TIMEOUT, client_of, in_threads, wait_for_file, wait_for_workers, workers_of
from pool_handlers import Pool, PoolMessageHandler
from pyams_zmq.exceptions import (
    ZMQRemoteError,
)
from pyams_zmq.pool.worker import PoolWorker, read_memory


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


@pytest.mark.parametrize('type_', ['overdue', 'async_overdue'])
def test_overdue_method(pool, tmp_path, type_):
    process = pool(workers=1)
    path = tmp_path / 'hold'
    pids = workers_of(process)
    with client_of(process) as client:
        with pytest.raises(ZMQRemoteError, match='504'):
            client.call(type_, str(path))
        assert client.call('echo', 1) == 1
    if type_ == 'overdue':
        wait_for_workers(process, pids, count=1)
        for pid in pids:
            wait_for_end(pid, TIMEOUT)
    else:
        assert workers_of(process) == pids


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
    """Envelopes and empty frames count, because they use memory."""
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
