# SPDX-License-Identifier: ZPL-2.1
"""Methods that pass their deadline and do not end: a supervised process is replaced."""

import asyncio
import itertools
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path

import pytest
import uvloop

from app.program import wait_for_end
from checks import AT_ONCE, TIMEOUT, wait_until
from handlers import Handler, MessageHandler, Process
from pyams_zmq.handler import zmq_method
from pyams_zmq.process.deadlines import CallDeadlines
from pyams_zmq.process.heartbeat import HEARTBEAT_INTERVAL, HeartbeatCounter
from pyams_zmq.process.watchdog import RECYCLED, Watchdog
from pyams_zmq.socket import zmq_response, zmq_socket
from pyams_zmq.supervisor import Supervisor, SupervisorProcess

FOREVER = threading.Event()
OVERLOADED = (
    'The service is overloaded: 1 method passed its deadline and has not ended, try again later'
)


class HangingHandler(Handler):
    """Methods that never end."""

    def __init__(self):
        super().__init__()
        self.executor = ThreadPoolExecutor(2)

    @zmq_method(timeout=0.2)
    def deadlocks(self, args):
        FOREVER.wait()

    @zmq_method(timeout=0.2)
    def spins(self, args):
        while True:
            pass

    @zmq_method(timeout=0.2)
    def computes(self, args):
        sum(itertools.repeat(0))  # a native call that keeps the GIL

    @zmq_method(timeout=0.2)
    def blocks_log(self, args):
        for handler in logging.getLogger().handlers:
            handler.acquire()
        FOREVER.wait()

    @zmq_method(timeout=0.2)
    async def async_deadlocks(self, args):
        FOREVER.wait()

    @zmq_method(timeout=0.2)
    async def async_spins(self, args):
        while True:
            pass

    @zmq_method(timeout=0.2)
    async def stubborn(self, args):
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    @zmq_method(timeout=0.2)
    def deadlocks_executor(self, args):
        self.executor.submit(FOREVER.wait).result()

    @zmq_method(timeout=0.2)
    def deadlocks_thread(self, args):
        thread = threading.Thread(target=FOREVER.wait, daemon=False)
        thread.start()
        thread.join()

    @zmq_method(timeout=0.2)
    async def stubborn_executor(self, args):
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.get_running_loop().run_in_executor(self.executor, FOREVER.wait)

    @zmq_method(timeout=0.2)
    async def leaves_thread(self, args):
        await asyncio.to_thread(FOREVER.wait)

    @zmq_method(timeout=0.2)
    def runs_child(self, path):
        _, pid = self.spawn(3600)
        Path(path).write_text(str(pid), encoding='ascii')
        FOREVER.wait()


class HangingMessageHandler(MessageHandler):
    """Serves HangingHandler."""

    handler = HangingHandler


class Hanging(Process):
    """Serves HangingHandler."""

    overdue_grace = 0.2

    def __init__(self, address):
        super().__init__(address, HangingMessageHandler)


class Concurrent(Hanging):
    """Handles several messages at a time."""

    concurrency = 3


class OnUvloop(Hanging):
    """Runs the methods in another loop."""

    loop_factory = staticmethod(uvloop.new_event_loop)


class Patient(Hanging):
    """Waits very long for its methods."""

    drain_timeout = 3600.0


@pytest.fixture
def supervise(address, ask):
    """Start a supervisor of one process; return the process id of that."""
    supervisors = []

    def start(factory=Hanging):
        supervisor = SupervisorProcess({'hanging': partial(factory, address)})
        supervisor.start()
        supervisors.append(supervisor)
        status, pid = ask(address, ['pid', None], timeout=TIMEOUT)
        assert status == 200
        return pid

    yield start
    for supervisor in supervisors:
        supervisor.stop()


@pytest.fixture
def wait_for_next(address, ask):
    """Wait until another process serves."""

    def other(pid):
        status, found = ask(address, ['pid', None], timeout=1)
        return status == 200 and found != pid

    return lambda pid: wait_until(partial(other, pid))


@pytest.mark.parametrize(
    'method',
    [
        'deadlocks',
        'spins',
        'computes',
        'blocks_log',
        'async_deadlocks',
        'async_spins',
        'stubborn',
    ],
)
@pytest.mark.parametrize('factory', [Hanging, Concurrent])
def test_replaced(supervise, wait_for_next, address, factory, method):
    pid = supervise(factory)
    with zmq_socket(address) as socket:
        socket.send_json([method, None])
        wait_for_next(pid)
    wait_for_end(pid, TIMEOUT)


@pytest.mark.parametrize(
    'method', ['deadlocks_executor', 'deadlocks_thread', 'stubborn_executor', 'leaves_thread']
)
def test_threads_of_the_method(supervise, wait_for_next, address, method):
    """Python joins them at the end of a process; this one does not wait for that."""
    pid = supervise(Patient)
    with zmq_socket(address) as socket:
        socket.send_json([method, None])
        assert zmq_response(socket)[0] == 504
        wait_for_next(pid)
    wait_for_end(pid, TIMEOUT)


@pytest.mark.parametrize('factory', [Hanging, OnUvloop])
def test_thread_that_a_coroutine_leaves(supervise, wait_for_next, address, factory):
    """The coroutine is cancelled; its thread in the executor of the loop is not, and hangs."""
    pid = supervise(factory)
    with zmq_socket(address) as socket:
        socket.send_json(['leaves_thread', None])
        assert zmq_response(socket)[0] == 504
        wait_for_next(pid)
    wait_for_end(pid, TIMEOUT)


def test_other_calls_are_answered(supervise, wait_for_next, address, ask, tmp_path):
    """A process that leaves finishes the calls in hand, and refuses others."""
    pid = supervise(Concurrent)
    path = tmp_path / 'held'
    with zmq_socket(address) as held, zmq_socket(address) as hung:
        held.send_json(['wait_for', str(path)])
        wait_until(path.exists)
        hung.send_json(['deadlocks', None])
        assert zmq_response(hung) == [504, "'deadlocks' has not ended after 0.2 s"]
        wait_until(lambda: ask(address, ['pid', None])[0] == 503)
        path.unlink()
        assert zmq_response(held) == [200, str(path)]
    wait_for_next(pid)


def test_children_of_the_method(supervise, wait_for_next, address, tmp_path):
    """They end, too: their process does not wait for them."""
    pid = supervise()
    path = tmp_path / 'pid'
    with zmq_socket(address) as socket:
        socket.send_json(['runs_child', str(path)])
        wait_for_next(pid)
    wait_for_end(int(path.read_text()), AT_ONCE)


@pytest.mark.parametrize(
    'method', ['deadlocks', 'deadlocks_executor', 'async_deadlocks', 'computes']
)
def test_not_a_failure(address, ask, caplog, method):
    """However often it happens, the next process is started at once."""
    caplog.set_level(logging.INFO)
    supervisor = Supervisor({'hanging': partial(Hanging, address)})
    supervisor.max_starts = 1

    def step():
        supervisor.step(time.monotonic())

    def replaced():
        step()
        return 'hanging is replaced' in caplog.text

    step()
    try:
        supervisor.processes['hanging'].wait_ready(TIMEOUT)
        with zmq_socket(address) as socket:
            socket.send_json([method, None])
            wait_until(replaced)
        wait_until(lambda: step() or supervisor.processes)
        assert ask(address, ['echo', 1], timeout=TIMEOUT) == [200, 1]
    finally:
        supervisor.stop()
        wait_until(lambda: step() or supervisor.is_finished)
    assert supervisor.exit_code == 0
    assert ('and a method is overdue' in caplog.text) == (method == 'computes')


def test_not_supervised(start, ask, address):
    """The process stays, and refuses other messages."""
    process = start(address, factory=Hanging)
    with zmq_socket(address) as socket:
        socket.send_json(['deadlocks', None])
        assert zmq_response(socket)[0] == 504
        start_time = time.monotonic()
        while time.monotonic() < start_time + 3 * HEARTBEAT_INTERVAL:
            assert ask(process, ['echo', 1]) == [503, OVERLOADED]
    assert process.is_alive()


def test_deadlines():
    heartbeat = HeartbeatCounter()
    calls = CallDeadlines(1.0, heartbeat)
    now = time.monotonic()
    assert calls.find_overdue(now + 3600) is None
    assert calls.time_left() == inf
    for name, timeout in (('second', 20), ('first', 10), ('third', 30)):
        calls.add(name, timeout)
    assert heartbeat.deadline == pytest.approx(now + 11, abs=5)
    assert 0 < calls.time_left() <= 11
    assert calls.find_overdue(heartbeat.deadline - 1) is None
    assert calls.find_overdue(heartbeat.deadline) == 'first'
    calls.remove('third')
    assert calls.find_overdue(heartbeat.deadline) == 'first'
    calls.remove('first')
    assert heartbeat.deadline == pytest.approx(now + 21, abs=5)
    assert calls.find_overdue(now + 3600) == 'second'
    calls.remove('second')
    assert heartbeat.deadline == 0
    assert calls.find_overdue(now + 3600) is None
    heartbeat.close()


class TestWatchdog:
    """The steps of a watchdog that does not run."""

    @pytest.fixture
    def noticed(self):
        return []

    @pytest.fixture
    def check(self, channel, noticed, monkeypatch):
        """Return a function that checks the calls at a time, and True if that ends the process."""
        calls = CallDeadlines(0.0)
        calls.add('a call', 10)
        watchdog = Watchdog(
            os.getppid(),
            1,
            channel[1],
            int,
            int,
            calls=calls,
            on_overdue=lambda *args: noticed.append(args),
        )
        ends = []
        monkeypatch.setattr(watchdog, '_end', ends.append)
        start = time.monotonic()

        def check(seconds):
            watchdog._check_calls(calls, start + seconds)
            return bool(ends) and watchdog.exit_code == RECYCLED

        return check

    def test_in_time(self, check, noticed):
        assert not check(5)
        assert not check(9)
        assert noticed == []

    def test_it_is_checked_twice(self, check, noticed):
        assert not check(100)
        assert noticed == []
        assert not check(100.5)
        assert [call for call, _confirm in noticed] == ['a call']

    def test_it_is_noticed(self, check, noticed):
        """The main thread has to notice it again and again."""
        for number in range(10):
            assert not check(100 + number)
            for _call, confirm in noticed:
                confirm()
        assert len(noticed) == 9

    def test_it_is_not_noticed(self, check, noticed):
        assert not check(100)
        assert not check(100.5)
        assert not check(101)
        assert check(101.5)
        assert len(noticed) == 1


def test_overdue_process_that_stops():
    """It is not replaced because of the method, and need not have a loop any more."""
    process = Process()
    process._notice_overdue('a call', None)
    process.draining = True
    process.leave('hangs')
    assert not process._needs_replacement
