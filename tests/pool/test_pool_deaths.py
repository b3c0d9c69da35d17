# SPDX-License-Identifier: ZPL-2.1
"""What happens to calls when a worker or the broker is killed, suspended or terminated."""

import os
import signal
import time
from contextlib import nullcontext
from functools import partial

import pytest

from app.program import is_running
from checks import freeze, wait_until
from pool_checks import (
    TIMEOUT,
    ask_who_waits,
    client_of,
    held_calls,
    in_threads,
    kill_workers,
    wait_for_file,
    wait_for_files,
    wait_for_queue,
    wait_for_workers,
    workers_of,
)
from pool_handlers import Pool
from pyams_zmq.exceptions import ZMQRemoteError
from pyams_zmq.pool import worker_messages as messages_module
from pyams_zmq.process.heartbeat import HANG_TIMEOUT


def test_killed_worker(pool, tmp_path):
    process = pool()
    with client_of(process) as client:
        with held_calls(client, tmp_path) as ([first], results):
            os.kill(first, signal.SIGKILL)
            wait_for_files(tmp_path, 'hold.*', 2)
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
            os.kill(busy['pid'], signal.SIGKILL)
        [error] = results
        assert error.status == 502
        assert 'died during this call' in error.text  # not "missed its heartbeats"
        path.unlink()
        wait_for_workers(process, {busy['pid']})


def test_message_that_kills_every_worker(pool):
    process = pool()
    with client_of(process) as client:
        with pytest.raises(ZMQRemoteError, match='502'):
            client.call('die')
        assert client.call('echo', 1) == 1
        assert process.stats()['repeated'] == 2
        wait_for_workers(process)


@pytest.mark.slow
def test_fifty_killed_workers(pool):
    kills, calls = 50, 5000
    process = pool()
    replies, times = kill_workers(process, kills, calls)
    assert sorted(replies) == [(number, number) for number in range(calls)]
    # benchmarks/pool.py measures the figure; this limit holds on a loaded machine.
    assert sorted(times)[len(times) // 2] < 5
    assert process.stats()['lost'] == 0


def test_stopped_worker(pool, tmp_path):
    process = pool()
    with client_of(process) as client:
        with held_calls(client, tmp_path) as ([stopped], results):
            freeze(stopped)
            start = time.monotonic()
            while is_running(stopped):  # meanwhile the others serve
                assert client.call('echo', 1) == 1
                assert time.monotonic() - start < TIMEOUT
            wait_for_files(tmp_path, 'hold.*', 2)
        wait_for_workers(process, {stopped})
        assert results[0] != stopped


def test_computing_worker_is_not_killed(pool):
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
    """The new broker sends UNKNOWN for each heartbeat; the worker may send READY only once.

    A second READY would not list the call that the broker has sent after the first one.
    """
    process = pool(factory=type('Quick', (Pool,), {'beat_interval': 0.2}), workers=1)
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
                    time.sleep(0.01)  # no event announces the new broker

        with in_threads(call, *range(20)) as results:
            wait_for_queue(process, 20)
            time.sleep(1)  # five heartbeats, which no event announces
            path.unlink()
    assert set(results) == set(range(20))


def test_killed_broker_of_a_worker_with_a_task(pool, tmp_path):
    """It sends READY while it is busy, and gets no call until it is free."""
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
    freeze(pid)
    with client_of(process) as client:
        assert client.call('echo', 1, retries=20) == 1
    assert not is_running(pid)
    wait_for_workers(process)


def test_terminated_worker(pool, tmp_path):
    process = pool()
    with client_of(process) as client:
        with held_calls(client, tmp_path) as ([pid], results):
            os.kill(pid, signal.SIGTERM)
        assert results == [pid]
        wait_for_workers(process, {pid})


def test_worker_that_is_not_watched(pool, monkeypatch):
    """Without pidfd_open(2), the broker notices missed heartbeats."""
    monkeypatch.setattr(messages_module, 'open_pidfd', lambda pid: nullcontext(None))
    process = pool()
    [first, *_] = workers_of(process)
    with client_of(process) as client:
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: first not in workers_of(process), TIMEOUT)
        wait_for_workers(process)
        assert client.call('echo', 1) == 1
