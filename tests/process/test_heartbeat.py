# SPDX-License-Identifier: ZPL-2.1
"""A process that hangs, told from one that works."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from app.program import wait_until
from handlers import Process
from pyams_zmq.process import heartbeat as pulse_module
from pyams_zmq.process.heartbeat import (
    HANG_TIMEOUT,
    HEARTBEAT_INTERVAL,
    LOOK_INTERVAL,
    HeartbeatCounter,
    LivenessCheck,
)
from pyams_zmq.supervisor import SupervisorProcess

TIMEOUT = 20


class Patient:
    """Looks at the pulse of a process that does not exist."""

    def __init__(self, timeout=HANG_TIMEOUT):
        self.pulse = HeartbeatCounter()
        self.detector = LivenessCheck(self.pulse, 1, timeout)
        self.now = 1000.0

    def look(self, seconds=LOOK_INTERVAL):
        self.now += seconds
        return self.detector.look(self.now)

    def time_to_hang(self):
        looks = 1
        while not self.look():
            looks += 1
            assert looks < 100
        return looks * LOOK_INTERVAL


@pytest.fixture
def work(monkeypatch):
    """Processor time of the process; None if it says nothing."""
    work = [7]
    monkeypatch.setattr(pulse_module, '_work_of', lambda pid: work[0])
    return work


@pytest.fixture
def patient(work):
    return Patient()


def test_beats(patient):
    for _ in range(100):
        patient.pulse.beat()
        assert not any(patient.look() for _ in range(round(HEARTBEAT_INTERVAL / LOOK_INTERVAL)))


def test_hang(patient):
    patient.pulse.beat()
    assert patient.time_to_hang() <= HANG_TIMEOUT


def test_goes_on(patient):
    patient.pulse.beat()
    for _ in range(4):
        assert not patient.look()
    patient.pulse.beat()
    assert patient.time_to_hang() > HANG_TIMEOUT - HEARTBEAT_INTERVAL


def test_before_the_first_beat_and_at_rest(patient):
    assert not any(patient.look() for _ in range(100))
    patient.pulse.beat()
    patient.look()
    patient.pulse.rest()
    assert not any(patient.look() for _ in range(100))
    patient.pulse.close()


def test_computes(patient, work):
    patient.pulse.beat()
    for _ in range(100):
        work[0] += 1
        assert not patient.look()
    work[0] = None
    assert not any(patient.look() for _ in range(100))
    work[0] = 8
    assert patient.time_to_hang() <= HANG_TIMEOUT


def test_looks_are_not_too_many(patient):
    patient.pulse.beat()
    assert not any(patient.look(LOOK_INTERVAL / 1000) for _ in range(100))


def test_late_look(patient):
    patient.pulse.beat()
    patient.look()
    assert not patient.look(3600)


def test_short_timeout(work):
    patient = Patient(0.001)
    patient.pulse.beat()
    assert patient.time_to_hang() <= 3 * LOOK_INTERVAL


def test_work():
    before = pulse_module._work_of(os.getpid())
    while pulse_module._work_of(os.getpid()) in (before, None):
        sum(range(10_000))
        if Path('/proc/self/stat').read_text().rpartition(')')[2].split()[0] == 'R':
            break
    assert pulse_module._work_of(2**30) is None


def test_work_of_one_that_waits():
    pid = os.fork()
    if not pid:
        signal.pause()
    try:
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, os.WUNTRACED)
        assert pulse_module._work_of(pid) is not None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize('timeout', [HANG_TIMEOUT, 0])
def test_supervised(tmp_path, ask, monkeypatch, timeout):
    monkeypatch.setattr('pyams_zmq.supervisor.Supervisor.hang_timeout', timeout)
    address = f'ipc://{tmp_path}/echo'
    supervisor = SupervisorProcess({'echo': partial(Process, address)})
    supervisor.start()
    try:
        status, pid = ask(address, ['pid', None], timeout=TIMEOUT)
        assert status == 200
        os.kill(pid, signal.SIGSTOP)
        if timeout:
            wait_until(lambda: ask(address, ['pid', None], timeout=1)[1] not in (pid, ''), TIMEOUT)
        else:
            time.sleep(2 * HANG_TIMEOUT)  # in which nothing happens
            assert Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'T'
            os.kill(pid, signal.SIGCONT)
            assert ask(address, ['pid', None], timeout=TIMEOUT) == [200, pid]
    finally:
        supervisor.stop()
