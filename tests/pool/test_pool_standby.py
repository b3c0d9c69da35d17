# SPDX-License-Identifier: ZPL-2.1
"""A pool with a lock, as an application starts it: one supervisor, a standby, repeated starts."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from pyramid.config import Configurator
from pyramid.registry import Registry

from app.program import wait_for_end
from checks import wait_until
from pool_checks import TIMEOUT, client_of, wait_for_file, workers_of
from pool_handlers import Pool, PoolMessageHandler
from pyams_zmq.config.startup import start_services
from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.interfaces import IZMQProcessGivenUpEvent
from pyams_zmq.pool import ZMQPool
from pyams_zmq.supervisor import Supervisor


@pytest.fixture
def start_locked(tmp_path, lock_folder):
    """Start pools with the same lock; they are not ready."""
    started = []

    def start_pool(**options):
        process = Pool(f'ipc://{tmp_path}/pool', **options)
        process.lock = 'a lock'
        process.start()
        started.append(process)
        return process

    yield start_pool
    for process in started:
        process.stop()


def handler_with(set_up):
    """Return a message handler whose handler calls a function in its constructor."""

    class SetUp:
        def __init__(self):
            set_up()

    class SetUpMessageHandler(PoolMessageHandler):
        handler = SetUp

    return SetUpMessageHandler


def is_ready(process):
    """Return True once the pool has reported its address, after an error."""
    try:
        process.wait_ready(0)
    except ZMQStartError:
        return False
    return True


def processes_below(process):
    return psutil.Process(process.pid).children()


@pytest.mark.usefixtures('lock_folder')
def test_one_supervisor(tmp_path, ask, monkeypatch):
    """The application starts the pool itself, with broker and workers below it."""
    monkeypatch.setattr(sys, 'argv', ['server'])
    address = f'ipc://{tmp_path}/pool'
    config = Configurator()
    config.include('pyams_zmq')
    config.add_zmq_process('digest', address=address, handler=PoolMessageHandler, workers=2)
    config.commit()
    start_services(SimpleNamespace(app=SimpleNamespace(registry=config.registry)))
    [process] = multiprocessing.active_children()
    try:
        assert isinstance(process, ZMQPool)
        assert process.name == 'digest'
        process.wait_ready()
        stats = process.stats()
        pids = {stats['pid'], *[worker['pid'] for worker in stats['workers']]}
        assert {child.pid for child in processes_below(process)} == pids
        assert len(pids) == 3
    finally:
        process.stop()


def test_standby(start_locked, tmp_path):
    """It has neither broker nor workers; it takes over when the first pool ends."""
    users = tmp_path / 'users'
    users.write_text('alice:a')
    first = start_locked(auth=users)
    first.wait_ready()
    second = start_locked(auth=users)
    second.reload()  # it has nothing to reload
    users.write_text('bob:b')
    with client_of(first, auth='alice:a') as client:
        assert client.call('echo', 1) == 1
    assert processes_below(second) == []
    os.kill(first.pid, signal.SIGKILL)
    second.wait_ready(TIMEOUT)
    with client_of(second, auth='bob:b') as client:  # it reads the users when it takes over
        assert client.call('echo', 1) == 1


def test_failure_of_a_start(start_locked, tmp_path):
    """The process is started again."""
    begun = tmp_path / 'begun'

    def set_up():
        if not begun.exists():
            begun.touch()
            raise LookupError('no such tool: ffmpeg')

    process = start_locked(handler=handler_with(set_up))
    process.wait_ready(TIMEOUT)
    assert len(workers_of(process)) == 2


def test_failure_of_all_starts_of_one_worker(start_locked, tmp_path, monkeypatch):
    """The pool is ready with the other worker."""
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)

    def set_up():
        (tmp_path / 'seat').touch(exist_ok=False)

    process = start_locked(handler=handler_with(set_up))
    process.wait_ready(TIMEOUT)
    assert len(workers_of(process)) == 1


def test_failure_of_all_starts(start_locked, tmp_path, monkeypatch):
    """The pool keeps the lock, and serves after one of its further starts."""
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)
    monkeypatch.setattr(Supervisor, 'give_up_delay', 0.2)
    flag = tmp_path / 'flag'
    flag.touch()

    def set_up():
        if flag.exists():
            raise LookupError('no such tool: ffmpeg')

    registry = Registry()
    registry.registerHandler(
        lambda event: Path(tmp_path, event.name).write_text(str(event.exit_code)),
        [IZMQProcessGivenUpEvent],
    )
    process = start_locked(handler=handler_with(set_up), registry=registry, workers=1)
    with pytest.raises(ZMQStartError, match=f'worker 1 of {process.name} fails'):
        process.wait_ready(TIMEOUT)
    wait_for_file(tmp_path / process.name)
    wait_until(lambda: (tmp_path / process.name).read_text() == '1', TIMEOUT)  # it is written
    assert (tmp_path / 'worker 1').exists()
    second = start_locked()
    second.join(1)  # several attempts to take the lock
    assert processes_below(second) == []
    flag.unlink()
    wait_until(lambda: is_ready(process), TIMEOUT)
    assert len(workers_of(process)) == 1
    process.stop()
    assert process.exitcode == 0
    second.wait_ready(TIMEOUT)
    for child in processes_below(second):
        os.kill(child.pid, signal.SIGKILL)
        wait_for_end(child.pid, TIMEOUT)
    second.stop()
    assert second.exitcode == 0
