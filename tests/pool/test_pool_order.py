# SPDX-License-Identifier: ZPL-2.1
"""The order of calls, and how clients share a busy pool."""

import json
from collections import Counter
from contextlib import contextmanager
from functools import partial

import pytest
import zmq

from checks import wait_until
from pool_checks import (
    TIMEOUT,
    client_of,
    in_threads,
    wait_for_file,
    wait_for_queue,
    wait_for_workers,
    workers_of,
)
from pool_handlers import Pool


@contextmanager
def dealer_of(pool):
    """Open a socket that sends calls without waiting for the replies."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0
        socket.connect(pool.bound_address)
        yield socket


def send(socket, name, args):
    socket.send_multipart([b'', json.dumps([name, args]).encode()])


def receive(socket):
    assert socket.poll(TIMEOUT * 1000)
    return json.loads(socket.recv_multipart()[-1])


@pytest.mark.parametrize('name', ['wait_for', 'async_wait_for'])
def test_order_while_the_only_worker_finishes_a_call(pool, tmp_path, name):
    """The new worker, which is ready, waits for it."""
    process = pool(workers=1)
    [old] = workers_of(process)
    hold = tmp_path / 'hold'
    with dealer_of(process) as socket:
        send(socket, name, str(hold))
        send(socket, 'echo', 2)
        wait_for_queue(process, 1)
        wait_for_file(hold)
        process.reload()

        def is_replaced():
            states = {each['pid']: each['state'] for each in process.stats()['workers']}
            # A plain method has to end before the signal is handled.
            return len(states) == 2 and (name == 'wait_for' or states[old] == 'leaving')

        wait_until(is_replaced, TIMEOUT)
        send(socket, 'echo', 3)
        wait_for_queue(process, 2)
        hold.unlink()
        assert [receive(socket) for _ in range(3)] == [[200, str(hold)], [200, 2], [200, 3]]
    wait_for_workers(process, {old}, count=1)


def test_order_during_reloads(pool):
    """Calls that arrive at a worker that leaves are returned, and run in their order."""
    process = pool(workers=1)
    numbers = iter(range(10**9))
    received, pids = [], set()
    with dealer_of(process) as socket:
        for _ in range(50):
            send(socket, 'again', next(numbers))
        while len(pids) < 4:
            pid, number = receive(socket)[1]
            received.append(number)
            if pid not in pids:
                pids.add(pid)
                process.reload()
            send(socket, 'again', next(numbers))
    assert received == list(range(len(received)))
    assert process.stats()['lost'] == process.stats()['repeated'] == 0


@pytest.mark.parametrize(
    ('workers', 'options', 'limits', 'is_ordered'),
    [
        (1, {}, {}, True),
        (2, {}, {}, False),
        (1, {}, {'concurrency': 2}, False),
        (1, {'worker_address': '*', 'worker_auth': 'u:p'}, {}, False),
    ],
)
def test_ordered_pools(workers, options, limits, is_ordered):
    """Those that run one call at a time."""
    process = type('Limited', (Pool,), limits)(workers=workers, **options)
    assert process.make_broker(None).is_ordered == is_ordered


def test_greedy_client(pool, tmp_path):
    """The other client gets its turn, and its place in the full queue."""
    process = pool(factory=type('Short', (Pool,), {'queue_limit': 20}), workers=1)
    hold = tmp_path / 'hold'
    with dealer_of(process) as socket, client_of(process) as client:
        send(socket, 'wait_for', str(hold))
        wait_for_file(hold)
        for number in range(30):
            send(socket, 'again', number)
        assert [receive(socket)[0] for _ in range(10)] == [503] * 10
        assert process.stats()['queue'] == 20
        with in_threads(partial(client.call, 'again'), 'polite') as replies:
            assert receive(socket)[0] == 503  # it has made room
            hold.unlink()
        assert replies[0][1] == 'polite'
        statuses = Counter(receive(socket)[0] for _ in range(20))
    assert statuses == {200: 20}
    assert process.stats()['refused'] == 11


def test_client_that_sends_without_end(pool):
    """It sends again whatever is refused; the calls of the other client are all answered."""
    process = pool(factory=type('Short', (Pool,), {'queue_limit': 20}))
    with dealer_of(process) as socket, client_of(process) as client:
        for _ in range(100):
            send(socket, 'sleep', 0.01)
        replies = 0
        with in_threads(lambda count: [client.call('echo', n) for n in range(count)], 50) as done:
            while not done:
                receive(socket)
                send(socket, 'sleep', 0.01)
                replies += 1
        assert done == [list(range(50))]
    assert process.stats()['refused'] > 0
    assert replies > 0
