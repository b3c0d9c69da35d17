# SPDX-License-Identifier: ZPL-2.1
"""A supervisor beside a web server, which is its owner."""

import os
import signal
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest

from app.program import NO_PIDFD, is_running
from checks import TIMEOUT, wait_until
from handlers import ExitingSetup, Process
from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.supervisor import Supervisor, SupervisorProcess
from supervisors import BESIDE, BESIDE_FORKS, read


def test_beside(run, ask, address):
    program = run(BESIDE, '')
    [pid] = read(program, 'supervisor')
    _, child = read(program, 'started')
    assert os.listdir(f'/proc/{pid}/task') == [str(pid)]
    os.kill(child, signal.SIGKILL)
    _, child = read(program, 'started')
    _, grandchild = ask(address, ['spawn', 60], timeout=TIMEOUT)
    program.write(None)
    assert read(program, 'stopped') == [0]
    assert program.running() == [program.pid]
    assert not is_running(grandchild)


@pytest.mark.parametrize('pidfd', ['', NO_PIDFD], ids=['pidfd', 'no pidfd'])
@pytest.mark.parametrize('code', [BESIDE, BESIDE_FORKS], ids=['alone', 'forks'])
def test_owner_is_killed(run, ask, address, code, pidfd):
    program = run(pidfd + code, '')
    [pid] = read(program, 'supervisor')
    _, child = read(program, 'started')
    _, grandchild = ask(address, ['spawn', 60])
    program.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, (pid, child, grandchild))), TIMEOUT)
    assert f'The owner of this process (pid {program.pid}) died' in program.log.read_text()


def test_owner_becomes_another_program(run):
    program = run(
        BESIDE.replace('supervisor.stop()', "os.execv('/bin/sleep', ['sleep', '60'])"), ''
    )
    [pid] = read(program, 'supervisor')
    _, child = read(program, 'started')
    program.write(None)
    wait_until(lambda: not any(map(is_running, (pid, child))), TIMEOUT)
    assert is_running(program.pid)


def test_owner_ends(run):
    program = run(BESIDE, '')
    read(program, 'supervisor')
    read(program, 'started')
    program.process.stdin.close()
    assert program.wait(TIMEOUT) == 0
    assert program.running() == []
    program.process.stdin = None


def test_beside_gives_up_without_a_lock(monkeypatch):
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)
    process = SupervisorProcess({'broken': ExitingSetup})
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == 1


def test_beside_fails(monkeypatch):
    def fail(self, now):
        raise LookupError('this loop is broken')

    monkeypatch.setattr(Supervisor, 'step', fail)
    process = SupervisorProcess({})
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == 1


def test_started_by_a_thread(ask, address):
    process = SupervisorProcess({'echo': partial(Process, address)})
    thread = threading.Thread(target=process.start)
    thread.start()
    thread.join()
    try:
        assert ask(address, ['registry', None], timeout=TIMEOUT) == [200, True]
    finally:
        process.stop()
    assert process.exitcode == 0


def test_stop_without_a_child():
    process = SupervisorProcess({})
    process.stop()
    assert process.pid is None


def test_start_under_gevent(monkeypatch):
    patched = SimpleNamespace(is_module_patched=lambda name: True)
    monkeypatch.setitem(sys.modules, 'gevent.monkey', patched)
    with pytest.raises(ZMQStartError, match='gevent'):
        SupervisorProcess({}).start()
