# SPDX-License-Identifier: ZPL-2.1
"""Which worker gets a call, and the order of calls."""

import json
from functools import partial

import pytest
import zmq

from pool_checks import TIMEOUT, client_of, held_calls, in_threads, wait_for_files, workers_of
from pool_handlers import Pool


def test_calls_at_the_same_time(pool, tmp_path):
    process = pool()
    with client_of(process) as client:
        with held_calls(client, tmp_path, 2) as (pids, results):
            pass
        assert set(results) == pids == workers_of(process)


def test_no_call_for_a_busy_worker(pool, tmp_path):
    process = pool()
    with client_of(process) as client:
        with held_calls(client, tmp_path) as (busy, results):
            pids = {client.call('pid') for _ in range(50)}
        assert set(results) == busy
        assert pids == workers_of(process) - busy


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
