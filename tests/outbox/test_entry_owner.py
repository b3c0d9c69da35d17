# SPDX-License-Identifier: ZPL-2.1
"""The text that identifies the process which sends entries, and whether it is alive."""

import os
import subprocess
import sys
import threading

import pytest

from checks import in_fork, wait_until
from namespaces import mount, run_unshared
from pyams_zmq.outbox import owner as owner_module
from pyams_zmq.outbox.owner import identify_process, is_alive
from pyams_zmq.process.descendants import ProcessInfo, has_proc
from users import NOBODY


def owner_of(pid, started=None):
    """Return the text of another process of this machine."""
    if started is None:
        started = ProcessInfo.read(pid).started
    machine, _, _process = identify_process().partition(':')
    return f'{machine}:{pid}:{started}'


@pytest.fixture
def program():
    """Program that runs until it is killed."""
    with subprocess.Popen(['sleep', '60']) as program:
        yield program
        program.kill()


def test_this_process():
    owner = identify_process()
    assert owner == identify_process() == owner_of(os.getpid())
    machine, pid, started = owner.split(':')
    assert len(machine) == 16
    assert int(pid) == os.getpid()
    assert int(started) > 0
    assert is_alive(owner) is True


def test_another_process(program):
    """It is the same text that the process itself uses."""
    assert is_alive(owner_of(program.pid)) is True
    code = 'from pyams_zmq.outbox.owner import identify_process; print(identify_process())'
    done = subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.PIPE)
    owner = done.stdout.decode().strip()
    _machine, pid, started = owner.split(':')
    assert owner == owner_of(pid, started)
    assert is_alive(owner) is False


def test_fork():
    """It is another owner, and its parent is alive."""

    def check():
        assert identify_process() != owner
        assert is_alive(identify_process()) is True
        assert is_alive(owner) is True

    owner = identify_process()
    assert in_fork(check) == 0


def test_zombie(program):
    """It has ended, although its parent has not collected the exit code."""
    owner = owner_of(program.pid)
    os.kill(program.pid, 9)
    wait_until(lambda: ProcessInfo.read(program.pid).has_ended)
    assert is_alive(owner) is False
    program.wait()
    assert is_alive(owner) is False


def test_main_thread_that_has_ended():
    """The process goes on while another thread runs."""
    code = """
import ctypes, threading
threading.Thread(target=input).start()
print(flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, '-c', code], stdin=pipe, stdout=pipe) as program:
        program.stdout.readline()
        wait_until(lambda: ProcessInfo.read(program.pid).state == b'Z')
        owner = owner_of(program.pid)
        assert is_alive(owner) is True
        program.kill()
    assert is_alive(owner) is False


def test_pid_that_was_reused(program):
    """The start of the process is another one."""
    started = ProcessInfo.read(program.pid).started
    assert is_alive(owner_of(program.pid, started - 1)) is False
    assert is_alive(owner_of(program.pid, started)) is True


def test_no_owner():
    assert is_alive('') is False


def test_another_machine():
    """Nothing is known about its processes, also if one of this machine has the same id."""
    _machine, _, process = identify_process().partition(':')
    assert is_alive(f'0123456789abcdef:{process}') is None
    assert is_alive('0123456789abcdef:1:1') is None


def use_other_machine(monkeypatch, name, value):
    """Return the text of the machine when one of its parts is another one."""
    owner_module._identify_machine.cache_clear()
    monkeypatch.setattr(name, value)
    try:
        return owner_module._identify_machine()
    finally:
        monkeypatch.undo()
        owner_module._identify_machine.cache_clear()


def test_what_identifies_a_machine(tmp_path, monkeypatch):
    """Its name, its boot and its process ids: containers may have the first two in common."""
    path = tmp_path / 'boot_id'
    path.write_text('another\n')
    found = {
        owner_module._identify_machine(),
        use_other_machine(monkeypatch, 'socket.gethostname', lambda: 'another'),
        use_other_machine(monkeypatch, 'pyams_zmq.outbox.owner._BOOT_ID', str(path)),
        use_other_machine(
            monkeypatch, 'pyams_zmq.outbox.owner._PID_NAMESPACE', '/proc/self/ns/net'
        ),
        use_other_machine(monkeypatch, 'pyams_zmq.outbox.owner._BOOT_ID', '/none'),
        use_other_machine(monkeypatch, 'pyams_zmq.outbox.owner._PID_NAMESPACE', '/none'),
    }
    assert len(found) == 6
    assert is_alive(identify_process()) is True


def check_without_proc():
    mount('-t', 'tmpfs', 'none', '/proc')
    assert not has_proc()
    owner_module._identify_machine.cache_clear()
    owner = identify_process()
    assert owner.endswith(f':{os.getpid()}:0')
    assert is_alive(owner) is True
    with subprocess.Popen(['sleep', '60']) as program:
        assert is_alive(owner_of(program.pid, 0)) is True
        program.kill()
        os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
        assert is_alive(owner_of(program.pid, 0)) is False
    assert is_alive(owner_of(program.pid, 0)) is False
    with subprocess.Popen(
        ['sh', '-c', 'sleep 60 & echo $!; read line; kill $!; wait; exit 0'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as program:
        other = owner_of(int(program.stdout.readline()), 0)  # not a child of this process
        assert is_alive(other) is True
    wait_until(lambda: is_alive(other) is False)


def test_without_proc():
    """The start of a process is not known; one that exists counts as alive."""
    run_unshared(check_without_proc)


def check_process_of_another_user(owner):
    mount('-t', 'proc', '-o', 'hidepid=2', 'none', '/proc')
    groups = os.getgroups()
    os.setgroups([])  # that of root sees all processes
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        assert ProcessInfo.read(owner.split(':')[1]) is None
        assert is_alive(owner) is True
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


def test_process_of_another_user(program):
    """If /proc hides it, it counts as alive: it cannot be examined."""
    run_unshared(check_process_of_another_user, owner_of(program.pid))


def test_threads_get_the_same_text():
    texts = set()
    threads = [
        threading.Thread(target=lambda: texts.add(identify_process())) for _number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {identify_process()}
