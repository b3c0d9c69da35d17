# SPDX-License-Identifier: ZPL-2.1
"""Which worker gets a call, and the order of calls."""

import json
from functools import partial

import pytest
import zmq

from checks import wait_until
from pool_checks import (
    TIMEOUT,
    client_of,
    held_calls,
    in_threads,
    ports_of,
    wait_for_file,
    wait_for_files,
    wait_for_queue,
    workers_of,
)
from pool_handlers import Pool
from raw_peer import RawPeer, request


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


@pytest.mark.parametrize('limit', [10, 1000])
def test_ended_connections(pool, tmp_path, limit):
    """They have one turn and one share together; what they have sent is handled, in its order."""
    process = pool(factory=type('Short', (Pool,), {'queue_limit': limit}), workers=1)
    hold = tmp_path / 'hold'
    paths = [tmp_path / f'ended{number}' for number in range(10)]
    with client_of(process) as client, in_threads(partial(client.call, 'wait_for'), str(hold)):
        wait_for_file(hold)
        peers = [RawPeer(process.bound_address) for _ in paths]
        ports = {peer.socket.getsockname()[1] for peer in peers}
        for number, (peer, path) in enumerate(zip(peers, paths, strict=True), 1):
            peer.send(request('wait_for', str(path)))
            wait_for_queue(process, number)
        for peer in peers:
            with peer:
                pass
        wait_until(lambda: ports.isdisjoint(ports_of(process)), TIMEOUT)
        # The guard notices their ends before this client connects.
        with client_of(process) as other, in_threads(partial(other.call, 'echo'), 1) as results:
            wait_until(
                lambda: (stats := process.stats())['queue'] + stats['refused'] == 11, TIMEOUT
            )
            hold.unlink()
            wait_for_file(paths[0])
            paths[0].unlink()
            wait_until(lambda: results == [1], TIMEOUT)
        handled = paths[1 : limit - 1]  # the last one made room for the other client
        for path in handled:
            wait_for_file(path)
            assert [each for each in paths if each.exists()] == [path]
            path.unlink()
    wait_until(lambda: process.stats()['calls'] == 3 + len(handled), TIMEOUT)
    stats = process.stats()
    assert (stats['queue'], stats['refused']) == (0, 10 - 1 - len(handled))
