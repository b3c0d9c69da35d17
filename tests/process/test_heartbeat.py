# SPDX-License-Identifier: ZPL-2.1
"""A process that hangs is told apart from one that works."""

import ctypes
import itertools
import os
import signal
import time
from contextlib import suppress
from functools import partial

import pytest

from app.program import is_running
from checks import TIMEOUT, freeze, wait_until
from handlers import Handler, Process
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQTimeoutError
from pyams_zmq.process import heartbeat as heartbeat_module
from pyams_zmq.process.heartbeat import (
    CHECK_INTERVAL,
    HANG_TIMEOUT,
    HEARTBEAT_INTERVAL,
    WAITING_TICKS,
    HeartbeatCounter,
    LivenessCheck,
)
from pyams_zmq.supervisor import Supervisor, SupervisorProcess


class Sleeper(Handler):
    """Sleeps in a native call that keeps the interpreter lock."""

    def sleep_with_the_lock(self, seconds):
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))


class Checked:
    """Checks the heartbeat of a process that does not exist."""

    def __init__(self, timeout=HANG_TIMEOUT):
        self.heartbeat = HeartbeatCounter()
        self.liveness = LivenessCheck(self.heartbeat, 1, timeout)
        self.now = 1000.0

    def check(self, seconds=CHECK_INTERVAL):
        self.now += seconds
        return self.liveness.check(self.now)

    def time_to_hang(self):
        checks = 1
        while not self.check():
            checks += 1
            assert checks < 100
        return checks * CHECK_INTERVAL


@pytest.fixture
def cpu_time(monkeypatch):
    """Processor time of the process; None if it proves nothing."""
    cpu_time = [7]
    monkeypatch.setattr(heartbeat_module, '_read_state', lambda pid: (b'S', cpu_time[0]))
    return cpu_time


@pytest.fixture
def checked(cpu_time):
    return Checked()


def test_beats(checked):
    for _ in range(100):
        checked.heartbeat.beat()
        assert not any(checked.check() for _ in range(round(HEARTBEAT_INTERVAL / CHECK_INTERVAL)))


def test_hang(checked):
    checked.heartbeat.beat()
    assert checked.time_to_hang() <= HANG_TIMEOUT


def test_beats_again(checked):
    checked.heartbeat.beat()
    for _ in range(4):
        assert not checked.check()
    checked.heartbeat.beat()
    assert checked.time_to_hang() > HANG_TIMEOUT - HEARTBEAT_INTERVAL


def test_before_the_first_beat_and_after_the_last(checked):
    assert not any(checked.check() for _ in range(100))
    checked.heartbeat.beat()
    checked.check()
    checked.heartbeat.clear()
    assert not any(checked.check() for _ in range(100))
    checked.heartbeat.close()


def test_computes(checked, cpu_time):
    checked.heartbeat.beat()
    for _ in range(100):
        cpu_time[0] += WAITING_TICKS + 1
        assert not checked.check()
    cpu_time[0] = None
    assert not any(checked.check() for _ in range(100))
    cpu_time[0] = 8
    assert checked.time_to_hang() <= HANG_TIMEOUT


def test_threads_that_wait_for_the_interpreter(checked, monkeypatch):
    """They use the processor a little, which is not the work of a method."""
    ticks = itertools.count(7, WAITING_TICKS)
    monkeypatch.setattr(heartbeat_module, '_read_state', lambda _pid: (b'S', next(ticks)))
    checked.heartbeat.beat()
    assert checked.time_to_hang() <= HANG_TIMEOUT


def test_native_call_that_sleeps_with_the_interpreter_lock(tmp_path):
    address = f'ipc://{tmp_path}/s'
    supervisor = SupervisorProcess({'sleeper': lambda: Process(address, Sleeper)})
    supervisor.start()
    try:
        with ZMQClient(address, timeout=TIMEOUT) as client:
            pid = client.call('pid', None)
            with suppress(ZMQTimeoutError):
                client.call('sleep_with_the_lock', TIMEOUT * 2, timeout=0.1)
        wait_until(lambda: not is_running(pid), TIMEOUT)
    finally:
        supervisor.stop()


def test_checks_are_not_too_many(checked):
    checked.heartbeat.beat()
    assert not any(checked.check(CHECK_INTERVAL / 1000) for _ in range(100))


def test_late_check(checked):
    checked.heartbeat.beat()
    checked.check()
    assert not checked.check(3600)


def test_short_timeout(cpu_time):
    checked = Checked(0.001)
    checked.heartbeat.beat()
    assert checked.time_to_hang() <= 3 * CHECK_INTERVAL


def test_deadline(checked, monkeypatch):
    """After its deadline it hangs although it computes, but not in a debugger."""
    states = itertools.count()
    monkeypatch.setattr(heartbeat_module, '_read_state', lambda pid: (b'R', next(states)))
    checked.heartbeat.beat()
    checked.heartbeat.deadline = checked.now + 60
    while checked.now < checked.heartbeat.deadline - 1:
        assert not checked.check()
    assert checked.time_to_hang() <= HANG_TIMEOUT + 2
    assert checked.liveness.is_overdue
    monkeypatch.setattr(heartbeat_module, '_read_state', lambda pid: (b't', 7))
    assert not any(checked.check() for _ in range(100))


def test_deadline_of_a_suspended_machine(checked, cpu_time):
    """The time of the suspension does not count, also while a native call holds the GIL."""
    checked.heartbeat.beat()
    checked.heartbeat.deadline = checked.now + 60
    assert not checked.check()
    assert not checked.check(3600)
    while checked.now < checked.heartbeat.deadline + 3599:
        cpu_time[0] += WAITING_TICKS + 1
        assert not checked.check()
    assert not checked.liveness.is_overdue
    assert checked.time_to_hang() <= HANG_TIMEOUT + 2
    assert checked.liveness.is_overdue


def test_deadline_after_a_suspension(checked, cpu_time):
    """The process has postponed its deadlines itself once it beats again."""
    checked.heartbeat.beat()
    assert not checked.check()
    assert not checked.check(3600)
    for _ in range(2):
        checked.heartbeat.beat()
        assert not checked.check()
    checked.heartbeat.deadline = checked.now + 1
    assert checked.time_to_hang() <= HANG_TIMEOUT + 2
    assert checked.liveness.is_overdue


def test_state():
    state, before = heartbeat_module._read_state(os.getpid())
    assert state == b'R'
    while heartbeat_module._read_state(os.getpid())[1] == before:
        sum(range(10_000))
    assert heartbeat_module._read_state(2**30) == (b'', None)


def test_state_of_a_stopped_process():
    pid = os.fork()
    if not pid:
        signal.pause()
    try:
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        state, cpu_time = heartbeat_module._read_state(pid)
        assert state == b'T'
        assert cpu_time is not None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_supervised(address, ask):
    """A stopped process is replaced."""
    supervisor = SupervisorProcess({'echo': partial(Process, address)})
    supervisor.start()
    try:
        status, pid = ask(address, ['pid', None], timeout=TIMEOUT)
        assert status == 200
        freeze(pid)
        wait_until(lambda: pid_of_service(ask, address) not in (pid, None))
    finally:
        supervisor.stop()


def pid_of_service(ask, address):
    """Return the pid of the service, None if it does not reply."""
    status, pid = ask(address, ['pid', None], timeout=1)
    return pid if status == 200 else None


def test_supervised_without_a_limit(address, ask):
    """A stopped process is not replaced if `hang_timeout` is 0."""
    supervisor = Supervisor({'echo': partial(Process, address)})
    supervisor.hang_timeout = 0
    now = time.monotonic()
    supervisor.step(now)
    try:
        process = supervisor.processes['echo']
        process.wait_ready()
        freeze(process.pid)
        for number in range(100):
            supervisor.step(now + number * CHECK_INTERVAL)
        os.kill(process.pid, signal.SIGCONT)
        assert ask(address, ['pid', None], timeout=TIMEOUT) == [200, process.pid]
    finally:
        supervisor.stop()
        wait_until(lambda: (supervisor.step(time.monotonic()), supervisor.is_finished)[1])
