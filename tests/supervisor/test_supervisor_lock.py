# SPDX-License-Identifier: ZPL-2.1
"""Supervisors with a lock, of which one has the processes."""

import os
import signal
import time
from functools import partial

import pytest

from app.program import is_running, wait_for_end
from checks import TIMEOUT, wait_until
from handlers import Process
from pyams_zmq.process.name_lock import NameLock
from pyams_zmq.supervisor import SupervisorProcess
from pyams_zmq.wire.poll import wait_readable
from supervisors import BESIDE, read


def test_one_of_two_serves(run, ask, address, lock):
    programs = [run(BESIDE, lock) for _ in range(2)]
    for program in programs:
        read(program, 'supervisor')
    leader = wait_until(lambda: next(filter(can_read, programs), None), TIMEOUT)
    _, child = read(leader, 'started')
    [standby] = [program for program in programs if program is not leader]
    assert ask(address, ['pid', None]) == [200, child]
    leader.write(None)
    assert read(leader, 'stopped') == [0]
    _, child = read(standby, 'started')  # and not before, as the address would have been in use
    assert ask(address, ['pid', None]) == [200, child]
    standby.send_signal(signal.SIGKILL)
    wait_for_end(child, TIMEOUT)


@pytest.mark.parametrize('whom', ['owner', 'supervisor'])
def test_standby_takes_over(run, ask, address, lock, whom):
    leader = run(BESIDE, lock)
    [supervisor] = read(leader, 'supervisor')
    _, first = read(leader, 'started')
    standby = run(BESIDE, lock)
    read(standby, 'supervisor')
    os.kill(leader.pid if whom == 'owner' else supervisor, signal.SIGKILL)
    _, second = read(standby, 'started')
    wait_for_end(first, TIMEOUT)
    assert ask(address, ['pid', None], timeout=TIMEOUT) == [200, second]


def test_standby_stops(run, lock):
    leader, standby = run(BESIDE, lock), run(BESIDE, lock)
    for program in (leader, standby):
        read(program, 'supervisor')
    for program in (leader, standby):
        program.write(None)
    for program in (leader, standby):
        while (line := program.read(TIMEOUT))[0] == 'started':
            pass
        assert line == ['stopped', 0]


def test_leader_without_children_keeps_the_lock(run, ask, address, lock):
    program = run(BESIDE, lock)
    [pid] = read(program, 'supervisor')
    _, child = read(program, 'started')
    assert ask(address, ['stop', None]) == [200, 'stopping']
    wait_for_end(child, TIMEOUT)
    assert not NameLock(lock).acquire()
    assert is_running(pid)
    program.write(None)
    assert read(program, 'stopped') == [0]
    own = NameLock(lock)
    assert own.acquire()
    own.release()


def can_read(program):
    """Return True if a program has printed something."""
    return bool(wait_readable([program.process.stdout.fileno()], 0))


# A race


class NotedProcess(Process):
    """Notes that it serves."""

    notes = None

    def setup(self):
        super().setup()
        (self.notes / str(os.getpid())).touch()


def race(tmp_path, starters, rounds):
    address = f'ipc://{tmp_path}/zmq.sock'
    for number in range(rounds):
        notes = tmp_path / str(number)
        notes.mkdir()
        noted = type('Noted', (NotedProcess,), {'notes': notes})
        supervisors = [
            SupervisorProcess({'echo': partial(noted, address)}, lock=address)
            for _ in range(starters)
        ]
        for supervisor in supervisors:
            supervisor.start()
        try:
            wait_until(lambda notes=notes: list(notes.iterdir()), 20)
            time.sleep(0.5)  # for a second start, which must not come
            [note] = notes.iterdir()
            assert is_running(int(note.name))
        finally:
            for supervisor in supervisors:
                supervisor._ask_to_stop()
            for supervisor in supervisors:
                supervisor.stop()
        # On their way out, others may have taken over from the first one.
        wait_until(lambda notes=notes: not any(map(is_running, map(pid, notes.iterdir()))), 20)


def pid(note):
    return int(note.name)


def test_race(tmp_path):
    race(tmp_path, 8, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_race_of_fifty(tmp_path):
    race(tmp_path, 50, 20)
