# SPDX-License-Identifier: ZPL-2.1
"""Replacement of the workers one by one."""

import os
import signal
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from checks import freeze, wait_until
from pool_checks import TIMEOUT, client_of, in_threads, wait_for_file, wait_for_workers, workers_of
from pool_handlers import Pool, PoolMessageHandler
from pyams_zmq.exceptions import ZMQTimeoutError
from pyams_zmq.pool.broker import PoolBroker
from pyams_zmq.pool.local_port import LocalPort, LocalSecret
from pyams_zmq.pool.supervisor import PoolSupervisor
from pyams_zmq.supervisor import Supervisor
from pyams_zmq.testing import running


def test_reload_without_a_broker(tmp_path):
    """The next one may find the users file unreadable, so the supervisor reads it, too."""
    users = tmp_path / 'users'
    users.write_text('first:secret')
    process = Pool(auth=users)
    with closing(LocalPort(LocalSecret(), 1)) as port:
        supervisor = PoolSupervisor(process, port)
        users.write_text('second:secret')
        supervisor.reload()
        users.unlink()
        broker = process.make_broker(port)
    assert list(broker.access.users) == ['second']
    names = [child.name for child in supervisor._to_replace]
    assert names == [f'{process.name} worker {number}' for number in (1, 2)]


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


def test_rolling_restart_again_before_it_is_over(tmp_path):
    """The second restart does not replace a worker twice: their number stays."""
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


def test_worker_hangs_before_it_is_ready(pool):
    """It is replaced, and the rolling restart goes on."""
    process = pool()
    before = workers_of(process)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    known = set(children.read_text().split())
    process.reload()
    [new] = wait_until(lambda: set(children.read_text().split()) - known, TIMEOUT)
    freeze(int(new))
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
            os.kill(busy['pid'], signal.SIGHUP)  # a second signal has no effect
            stop = time.monotonic() + 0.5  # longer than `drain_timeout`
            while time.monotonic() < stop:
                assert client.call('echo', 1) == 1
            os.kill(busy['pid'], signal.SIGHUP)
            assert client.call('echo', 1) == 1
            path.unlink()
        assert results == [str(path)]
    wait_for_workers(process, before)


def test_worker_dies_while_it_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(Supervisor, 'min_delay', 60)  # no new worker during the test
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
        process.reload()  # starts after the first one has ended
        wait_for_workers(process, {old, new}, count=1)


def test_reload_twice(tmp_path):
    """A second restart during a replacement does not add a worker."""
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


def test_sighup_before_the_broker_has_its_sockets(pool, ask, monkeypatch):
    setup = PoolBroker.setup

    def setup_after_sighup(self):
        os.kill(os.getpid(), signal.SIGHUP)
        setup(self)

    monkeypatch.setattr(PoolBroker, 'setup', setup_after_sighup)
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    assert ask(process, ['echo', 1]) == [200, 1]


def kill_broker(process):
    pid = process.stats()['pid']
    os.kill(pid, signal.SIGKILL)

    def is_replaced():
        try:
            return process.stats()['pid'] != pid
        except ZMQTimeoutError:
            return False

    wait_until(is_replaced, TIMEOUT)


def remove_bob(pool, users):
    """Return a pool that has read the users again after bob was removed; alice is left."""
    users.write_text('alice:a\nbob:b\n')
    process = pool(auth=users, workers=1)
    before = workers_of(process)
    users.write_text('alice:a\n')
    process.reload()
    wait_for_workers(process, before, count=1)
    return process


def test_new_broker_without_the_users_file(pool, ask, tmp_path):
    """It has the last users that could be read: a user who was removed stays removed."""
    users = tmp_path / 'users'
    process = remove_bob(pool, users)
    users.unlink()
    kill_broker(process)
    assert ask(process, ['echo', 1], auth='alice:a') == [200, 1]
    assert ask(process, ['echo', 1], auth='bob:b')[0] == 401


def test_new_broker_without_the_file_of_the_workers(pool, tmp_path):
    users = tmp_path / 'workers'
    users.write_text('worker:secret')
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth=users)
    users.unlink()
    kill_broker(process)
    wait_for_workers(process, count=1)


def test_new_broker_after_a_reload(pool, ask, tmp_path):
    """A broker that replaces a dead one reads the users."""
    users = tmp_path / 'users'
    process = remove_bob(pool, users)
    users.write_text('nonsense')
    process.reload()  # the present broker keeps the users
    assert ask(process, ['echo', 1], auth='alice:a') == [200, 1]
    os.kill(process.stats()['pid'], signal.SIGKILL)
    users.write_text('alice:a\n')
    wait_until(lambda: ask(process, ['echo', 1], auth='alice:a') == [200, 1], TIMEOUT)
    assert ask(process, ['echo', 1], auth='bob:b')[0] == 401
