# SPDX-License-Identifier: ZPL-2.1
"""A pool as an application starts it: below its supervisor, with standbys and repeated starts."""

import multiprocessing
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from pyramid.config import Configurator
from pyramid.registry import Registry

from app.program import wait_for_end
from checks import wait_until
from locks import locks_of
from pool_checks import TIMEOUT, wait_for_file, workers_of
from pool_handlers import Pool, PoolMessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.config.startup import start_services
from pyams_zmq.exceptions import ZMQBaseError
from pyams_zmq.interfaces import IZMQProcessGivenUpEvent
from pyams_zmq.supervisor import Supervisor, SupervisorProcess


@pytest.fixture
def address(tmp_path):
    return f'ipc://{tmp_path}/pool'


@pytest.fixture
def start(address):
    """Start pools that start their processes again, as the supervisor of an application does."""
    started = []

    def start_pool(**options):
        process = Pool(address, **options)
        process.retries_start = True
        process.start()
        started.append(process)
        return process

    yield start_pool
    for process in started:
        process.stop()


@pytest.fixture
def supervise(address, lock_folder):
    """Start supervisors of a pool that have the same lock."""
    started = []

    def start_supervisor(**options):
        factories = {'digest': partial(Pool, address, **options)}
        process = SupervisorProcess(factories, registry=options.get('registry'), lock='a lock')
        process.start()
        started.append(process)
        return process

    yield start_supervisor
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
    except (LookupError, OSError, ZMQBaseError):
        return False
    return True


def processes_below(process):
    return psutil.Process(process.pid).children()


def ask_for_stats(address, **options):
    """Return the statistics of the pool at an address, when it serves."""
    with ZMQClient(address, timeout=TIMEOUT, retries=5, **options) as client:
        return wait_until(lambda: (stats := client.call('pyams_zmq.stats'))['workers'] and stats)


@pytest.mark.usefixtures('lock_folder')
def test_one_supervisor(address, monkeypatch):
    """The supervisor of the application has the pool below it, with its broker and workers."""
    monkeypatch.setattr(sys, 'argv', ['server'])
    config = Configurator()
    config.include('pyams_zmq')
    config.add_zmq_process('digest', address=address, handler=PoolMessageHandler, workers=2)
    config.commit()
    start_services(SimpleNamespace(app=SimpleNamespace(registry=config.registry)))
    [supervisor] = multiprocessing.active_children()
    try:
        with config.registry.zmq_clients.get('digest') as client:
            wait_until(lambda: len(client.call('pyams_zmq.stats')['workers']) == 2, TIMEOUT)
            stats = client.call('pyams_zmq.stats')
        pids = {stats['pid'], *[worker['pid'] for worker in stats['workers']]}
        [pool] = processes_below(supervisor)
        assert {child.pid for child in processes_below(pool)} == pids
        assert len(pids) == 3
    finally:
        supervisor.stop()


def test_standby(supervise, address, tmp_path):
    """It has no process of the pool; it takes over when the first supervisor ends."""
    users = tmp_path / 'users'
    users.write_text('alice:a')
    first = supervise(auth=users)
    assert ask_for_stats(address, auth='alice:a')
    second = supervise(auth=users)
    users.write_text('bob:b')
    with ZMQClient(address, timeout=TIMEOUT, auth='alice:a') as client:
        assert client.call('echo', 1) == 1
    assert processes_below(second) == []
    pids = [each.pid for each in psutil.Process(first.pid).children(recursive=True)]
    os.kill(first.pid, signal.SIGKILL)
    for pid in pids:
        wait_for_end(pid, TIMEOUT)
    wait_until(lambda: processes_below(second), TIMEOUT)
    wait_until(lambda: can_call(address, auth='bob:b'), TIMEOUT)  # it reads the users anew


def can_call(address, **options):
    with ZMQClient(address, timeout=1, **options) as client:
        try:
            return client.call('echo', 1) == 1
        except ZMQBaseError:
            return False


@pytest.mark.usefixtures('lock_folder')
@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name)
def test_pool_that_somebody_stops(supervise, address, num):
    """It ends in order, and its supervisor, which has not asked for that, starts it again."""
    supervisor = supervise()
    stats = ask_for_stats(address)
    [pool] = processes_below(supervisor)
    os.kill(pool.pid, num)
    wait_for_end(stats['pid'], TIMEOUT)
    wait_until(lambda: can_call(address), TIMEOUT)
    assert pool.pid not in [each.pid for each in processes_below(supervisor)]


def test_clients_read_why_it_is_not_ready(supervise, address, tmp_path, monkeypatch):
    """While the pool starts its processes again, and until one of them is ready."""
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)
    monkeypatch.setattr(Supervisor, 'give_up_delay', 0.2)
    flag = tmp_path / 'flag'
    flag.touch()

    def set_up():
        if flag.exists():
            raise LookupError('secret')

    own, client = locks_of(address, *'αα')
    process = SupervisorProcess({'digest': partial(make_retrying, address, handler_with(set_up))})
    process.lock = 'a lock'
    process.address_locks = {'digest': own}
    process.start()
    try:
        wait_until(lambda: client.find_problem() == 'LookupError, see the log of the service')
        flag.unlink()
        wait_until(lambda: not client.find_problem(), TIMEOUT)
        assert ask_for_stats(address)
    finally:
        process.stop()


def make_retrying(address, handler):
    pool = Pool(address, handler=handler)
    pool.retries_start = True
    return pool


def test_failure_of_a_start(start, tmp_path):
    """The process is started again."""
    begun = tmp_path / 'begun'

    def set_up():
        if not begun.exists():
            begun.touch()
            raise LookupError('no such tool: ffmpeg')

    process = start(handler=handler_with(set_up))
    wait_until(lambda: is_ready(process), TIMEOUT)
    assert len(workers_of(process)) == 2


def test_failure_of_all_starts_of_one_worker(start, tmp_path, monkeypatch):
    """The pool is ready with the other worker."""
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)

    def set_up():
        (tmp_path / 'seat').touch(exist_ok=False)

    process = start(handler=handler_with(set_up))
    wait_until(lambda: is_ready(process), TIMEOUT)
    assert len(workers_of(process)) == 1


def test_failure_of_all_starts(start, tmp_path, monkeypatch):
    """The pool serves after one of its further starts."""
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
    process = start(handler=handler_with(set_up), registry=registry, workers=1)
    wait_for_file(tmp_path / process.name)
    wait_until(lambda: (tmp_path / process.name).read_text() == '1', TIMEOUT)  # it is written
    assert (tmp_path / f'{process.name} worker 1').exists()
    flag.unlink()
    wait_until(lambda: is_ready(process), TIMEOUT)
    assert len(workers_of(process)) == 1
    for child in processes_below(process):
        os.kill(child.pid, signal.SIGKILL)
        wait_for_end(child.pid, TIMEOUT)
    process.stop()
    assert process.exitcode == 0
