# SPDX-License-Identifier: ZPL-2.1
"""A supervisor that runs: crashes, signals, and what it leaves behind."""

import os
import re
import signal
import subprocess
import threading
from contextlib import nullcontext
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.handler import in_hand
from app.program import NO_PIDFD, Program, is_running, wait_for_end
from checks import TIMEOUT, wait_until
from pyams_zmq.supervisor import Supervisor, driver
from supervisors import FAILS_EARLY, RUN, read


def test_run_of_nothing():
    handlers = [signal.getsignal(num) for num in signal.valid_signals()]
    assert Supervisor({}).run() == 0
    assert [signal.getsignal(num) for num in signal.valid_signals()] == handlers


@pytest.mark.parametrize('adopts', [True, False])
def test_run_fails(fakes, monkeypatch, adopts):
    if not adopts:  # as before Linux 3.4
        monkeypatch.setattr(driver, 'subreaper', lambda: nullcontext(False))

    class Broken(Supervisor):
        def step(self, now):
            super().step(now)
            raise LookupError('this loop is broken')

    with pytest.raises(LookupError, match='broken'):
        Broken({'first': fakes.make, 'second': fakes.make}).run()
    assert [process.orders for process in fakes.made] == [['start', 'ask', 'stop']] * 2


def test_run_fails_and_leaves_nothing():
    """Orphans that it has adopted are ended too."""
    orphans = []

    class Broken(Supervisor):
        def step(self, now):
            line = ['sh', '-c', 'sleep 60 >/dev/null & echo $!']
            orphans.append(subprocess.check_output(line, text=True).strip())
            raise LookupError('this loop is broken')

    with pytest.raises(LookupError, match='broken'):
        Broken({}).run()
    assert not Path('/proc', *orphans).exists()


def test_run_among_threads(caplog):
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    try:
        assert Supervisor({}).run() == 0
    finally:
        event.set()
        thread.join()
    assert re.search(r'runs [1-9]\d* threads beside the supervisor', caplog.text)


@pytest.mark.parametrize('code', [RUN, NO_PIDFD + RUN], ids=['pidfd', 'no pidfd'])
def test_killed_child_is_started_again(run, ask, address, code):
    program = run(code, 'echo')
    _, first = read(program, 'started')
    assert ask(address, ['pid', None]) == [200, first]
    os.kill(first, signal.SIGKILL)
    _, second = read(program, 'started')
    assert ask(address, ['pid', None], timeout=TIMEOUT) == [200, second]
    assert second != first
    program.send_signal(signal.SIGTERM)
    assert program.wait(TIMEOUT) == 0
    assert program.running() == []


def test_crash_loop(run, ask, address):
    program = run(RUN, 'broken', 'echo')
    lines = sorted(program.read(TIMEOUT)[:2] for _ in range(2))
    assert lines == [['given up', 'broken'], ['started', address]]
    assert 'CRITICAL:PyAMS (zmq):broken fails: each of its' in program.log.read_text()
    assert ask(address, ['stop', None]) == [200, 'stopping']
    assert program.wait(TIMEOUT) == 1


def test_crashes_of_a_process_that_has_served(run, ask, address):
    """It is started again however often."""
    program = run(FAILS_EARLY + RUN, 'echo')
    for count in range(1, 5):
        _, pid = read(program, 'started')
        assert ask(address, ['pid', None], timeout=TIMEOUT) == [200, pid]
        os.kill(pid, signal.SIGABRT)
        if count == 2:
            assert read(program, 'given up') == ['echo', -6]
    assert read(program, 'started')[1] != pid
    log = program.log.read_text()
    assert 'echo fails: each of its last 4 starts' in log
    assert 'exit code -6 (SIGABRT): probably an assertion in libzmq' in log


def test_child_stops_itself(run, ask, address):
    program = run(RUN, 'echo')
    read(program, 'started')
    assert ask(address, ['stop', None]) == [200, 'stopping']
    assert program.wait(TIMEOUT) == 0
    assert 'Traceback' not in program.log.read_text()


@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name)
@pytest.mark.parametrize('send', [Program.send_signal, Program.send_signal_to_all])
def test_stop_ends_grandchildren(run, ask, address, num, send):
    program = run(RUN, 'echo', 'other')
    read(program, 'started')
    read(program, 'started')
    _, grandchild = ask(address, ['spawn', 60])
    assert is_running(grandchild)
    send(program, num)
    assert program.wait(TIMEOUT) == 0
    assert not is_running(grandchild)
    assert program.running() == []


@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name)
def test_second_signal_ends_at_once(run, address, num):
    program = run(RUN, 'echo')
    read(program, 'started')
    with in_hand(address, 'work'):
        program.send_signal(num)
        wait_until(lambda: not handles(program.pid, num), TIMEOUT)
        program.send_signal(num)
        assert program.wait(TIMEOUT) == -num
        wait_until(lambda: program.running() == [], TIMEOUT)


def handles(pid, num):
    """Return True if a process has a handler for a signal."""
    with open(f'/proc/{pid}/status', encoding='ascii') as status:
        mask = next(line.split()[1] for line in status if line.startswith('SigCgt'))
    return bool(int(mask, 16) & 1 << num - 1)


def test_hangup(run):
    program = run(RUN, 'echo', 'other')
    started = sorted(read(program, 'started') for _ in range(2))
    program.send_signal(signal.SIGHUP)
    assert sorted(read(program, 'reloaded') for _ in range(2)) == started
    program.send_signal(signal.SIGTERM)
    assert program.wait(TIMEOUT) == 0


def test_supervisor_is_killed(run):
    program = run(RUN, 'echo', 'other')
    children = [read(program, 'started')[1] for _ in range(2)]
    program.send_signal(signal.SIGKILL)
    for child in children:
        wait_for_end(child, TIMEOUT)


# As PID 1, see tests/pyramid/test_cli_pid_1.py


def test_second_signal_of_pid_1():
    child = ForkProcess(target=driver._end, args=(signal.SIGTERM, None))
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == 143


def test_orphans_are_collected_at_intervals():
    supervisor = Supervisor({})
    supervisor._collect_orphans(SimpleNamespace(due=1.0), 0.5)
    assert supervisor._former_children == set()
    supervisor._cleanup = object()  # then what runs may belong to a process that has ended
    supervisor._former_children = None
    supervisor._collect_orphans(SimpleNamespace(due=1.0, step=lambda now: None), 1.0)
    assert supervisor._former_children is None
