# SPDX-License-Identifier: ZPL-2.1
"""The descendants of a process end with it."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

import psutil
import pytest

from app.handler import COMMANDS, Process, in_hand
from app.program import is_running, wait_for_end
from checks import TIMEOUT, wait_until
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQStartError, ZMQUnreachableError
from pyams_zmq.process import descendants as descendants_module
from pyams_zmq.process.base import _stop_owned
from pyams_zmq.process.descendants import (
    OrphanCleanup,
    ProcessInfo,
    Reaper,
    become_subreaper,
    children,
    descendants,
    end_descendants,
    forbid_new_processes,
    kill_with_descendants,
    subreaper,
    wait_for_descendants,
)
from pyams_zmq.supervisor import Supervisor, SupervisorProcess

FORK = multiprocessing.get_context('fork')

ALL = list(COMMANDS)

OWNER = """
import json, signal, sys
from functools import partial
from app.handler import Process
from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.supervisor import SupervisorProcess

Process.orphan_timeout = 0.1
if sys.argv[2] == 'process':
    process = Process(sys.argv[1])
else:
    process = SupervisorProcess({'process': partial(Process, sys.argv[1])})
process.start()
print(process.pid, flush=True)
signal.pause()
"""


class ShortProcess(Process):
    """Drains for a moment only."""

    drain_timeout = 0.3


class Notes(list):
    """Pids in a file, which processes that are forked later can read."""

    def __init__(self, path):
        self.path = path

    def __iter__(self):
        text = self.path.read_text(encoding='ascii') if self.path.exists() else ''
        return map(int, text.split())


@pytest.fixture
def notes(tmp_path):
    """Pids of programs, which end with the test."""
    notes = Notes(tmp_path / 'pids')
    yield notes
    for pid in notes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start_programs(ask, notes):
    """Let a process start programs."""

    def start_programs(process, names=ALL):
        status, programs = ask(process, ['start_programs', names], timeout=TIMEOUT)
        assert status == 200
        pids = [pid for name in names for pid in programs[name]]
        notes.path.write_text(' '.join(map(str, pids)), encoding='ascii')
        assert left(programs) == programs
        return programs

    return start_programs


@pytest.fixture
def address(tmp_path):
    return f'ipc://{tmp_path}/zmq.sock'


@pytest.fixture
def run(run_program):
    """Start an owner; return the program and its first line."""

    def start(*args, before=''):
        program = run_program('-c', before + OWNER, *args)
        return program, program.read()

    return start


@pytest.fixture(params=['pidfd', 'no pidfd'])
def pidfd(request, monkeypatch):
    """Run a test with the pidfd of the system, and as before Linux 5.3."""
    if request.param == 'no pidfd':
        monkeypatch.delattr(os, 'pidfd_open')


def left(programs):
    """Those programs that run, and their pids that do."""
    found = {name: list(filter(is_running, pids)) for name, pids in programs.items()}
    return {name: pids for name, pids in found.items() if pids}


# A process ends


def stop(process):
    process.stop()


def terminate(process):
    os.kill(process.pid, signal.SIGTERM)
    process.join(TIMEOUT)


def interrupt(process):
    os.kill(process.pid, signal.SIGINT)
    process.join(TIMEOUT)


@pytest.mark.parametrize('end', [stop, terminate, interrupt])
@pytest.mark.usefixtures('pidfd')
def test_end(start, start_programs, end):
    process = start(factory=ShortProcess)
    programs = start_programs(process)
    end(process)
    assert left(programs) == {}


def test_exit_code_of_a_hard_end(start, start_programs):
    """Both its threads see the end of the last program; the exit code is that of the hard end."""
    process = start(factory=ShortProcess)
    start_programs(process, ['deaf'])
    process.stop()
    assert process.exitcode == 1


def test_end_before_it_has_begun(monkeypatch):
    monkeypatch.setattr(Process, '_drop_inherited_state', {}.popitem)
    process = Process()
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == 1


def test_end_of_an_asyncio_program(start, ask):
    process = start(factory=ShortProcess)
    _status, pid = ask(process, ['start_async_program', None])
    process.stop()
    assert not is_running(pid)


@pytest.mark.usefixtures('pidfd')
def test_hard_end(start, start_programs):
    """While a handler is in a native call, which no signal ends."""
    process = start(factory=ShortProcess)
    programs = start_programs(process)
    with in_hand(process.bound_address, 'native_work'):
        process.stop()
        assert process.exitcode == 1
        assert left(programs) == {}


def test_hard_end_of_a_busy_process(start, start_programs):
    """Each file that is read takes an interval of switching then."""
    process = start(factory=ShortProcess)
    programs = start_programs(process)
    with in_hand(process.bound_address, 'compute'):
        os.kill(process.pid, signal.SIGTERM)
        assert wait_for_end(process.pid, TIMEOUT) < 10
        assert left(programs) == {}


@pytest.mark.parametrize('kind', ['process', 'supervisor'])
def test_owner_is_killed(run, start_programs, address, kind):
    owner, pid = run(address, kind)
    programs = start_programs(address)
    os.kill(owner.pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid) and not left(programs), TIMEOUT)


def test_supervisor_is_killed(run, start_programs, address):
    _owner, supervisor = run(address, 'supervisor')
    programs = start_programs(address)
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: not left(programs), TIMEOUT)


def test_owner_is_killed_before_the_end_of_a_cleanup(run, start_programs, ask, address):
    owner, _supervisor = run(
        address,
        'supervisor',
        before='from pyams_zmq.process import descendants; descendants.CLEANUP_GRACE = 60',
    )
    programs = start_programs(address)
    _status, pid = ask(address, ['pid', None])
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: set(left(programs)) == {'deaf', 'deaf and detached'}, TIMEOUT)
    os.kill(owner.pid, signal.SIGKILL)
    wait_until(lambda: not left(programs), TIMEOUT)


@pytest.mark.parametrize('end', [stop, terminate])
def test_program_gets_its_time(start, ask, tmp_path, end):
    process = start(factory=Process)
    result = tmp_path / 'result'
    ask(process, ['start_command', f'sleep 0.4; echo converted > {result}'])
    end(process)
    assert process.exitcode == 0
    assert result.read_text(encoding='ascii') == 'converted\n'


def test_thread_gets_its_time(start, ask, tmp_path):
    """It can read the exit code, and start the next program."""
    process = start(factory=Process)
    ask(process, ['run_in_a_thread', [str(tmp_path / 'code'), 'sleep 0.4; exit 3']])
    process.stop()
    assert process.exitcode == 0
    assert (tmp_path / 'code').read_text(encoding='ascii') == '3'


def test_thread_starts_a_program_later(start, ask, notes):
    """When all others have ended, and the process waits for its threads only."""
    process = start(factory=Process)
    ask(process, ['start_later', [str(notes.path), 0.4]])
    process.stop()
    assert process.exitcode == 0
    assert list(filter(is_running, notes)) == []


def test_thread_gets_the_exit_code(start, ask, tmp_path, monkeypatch):
    """Of a program that is terminated, too."""
    monkeypatch.setattr('pyams_zmq.process.service.TERM_GRACE', 14.0)  # for a loaded machine
    monkeypatch.setattr(ShortProcess, 'drain_timeout', 15.0)
    process = start(factory=ShortProcess)
    _status, pid = ask(process, ['run_in_a_thread', [str(tmp_path / 'code'), 'exec sleep 60']])
    process.stop()
    assert process.exitcode == 0
    assert (tmp_path / 'code').read_text(encoding='ascii') == str(-signal.SIGTERM)
    assert not is_running(pid)


def test_thread_starts_the_next_program(start, ask, tmp_path, notes):
    process = start(factory=ShortProcess)
    assert ask(process, ['run_one_after_the_other', str(notes.path)])[0] == 200
    wait_until(notes.path.exists, TIMEOUT)
    process.stop()
    assert list(filter(is_running, notes)) == []


def test_exit_codes(start, ask, monkeypatch):
    """Adopted processes are reaped; children that other code waits for are not."""
    monkeypatch.setattr(descendants_module, 'REAP_INTERVAL', 0.03)
    process = start(factory=Process)
    assert ask(process, ['exit_codes', None]) == [200, [7, 5, 9]]


def test_siblings(start, start_programs):
    siblings = [subprocess.Popen(['sleep', '60']), FORK.Process(target=time.sleep, args=(60,))]
    siblings[1].start()
    process = start(factory=ShortProcess)
    siblings.append(subprocess.Popen(['sleep', '60']))
    try:
        assert left(start_programs(process)) != {}
        process.stop()
        assert [is_running(sibling.pid) for sibling in siblings] == [True] * 3
    finally:
        for sibling in siblings:
            sibling.kill()
        for sibling in siblings[::2]:
            sibling.wait()
        siblings[1].join()


def test_owner_ends_with_several_processes():
    """All are asked before the first one is waited for: one after the other takes 9 s."""
    processes = [Process() for _ in range(3)]
    with ExitStack() as stack:
        for process in processes:
            process.drain_timeout = 3.0
            process.start()
            stack.enter_context(in_hand(process.wait_ready(), 'work'))
        started = time.monotonic()
        _stop_owned()
        assert time.monotonic() - started < 7
    assert [process.exitcode for process in processes] == [1] * 3


def test_fork_of_the_owner_does_not_stop_its_processes(start, ask):
    process = start(factory=Process)
    fork = os.fork()
    if not fork:
        _stop_owned()
        os._exit(0)
    os.waitpid(fork, 0)
    assert ask(process, ['pid', None]) == [200, process.pid]


# Under a supervisor


@pytest.fixture
def supervise(notes, address, monkeypatch):
    """Run processes under a supervisor with short delays."""
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)
    monkeypatch.setattr(descendants_module, 'CLEANUP_GRACE', 0.2)
    monkeypatch.setattr(Process, 'before', notes)
    supervisors = []

    def start():
        supervisors.append(SupervisorProcess({'process': partial(Process, address)}))
        supervisors[-1].start()
        return supervisors[-1]

    yield start
    for supervisor in supervisors:
        supervisor.stop()


def test_killed_process(supervise, start_programs, ask, address):
    """Its descendants have ended before the next process serves."""
    supervisor = supervise()
    _status, pid = ask(address, ['pid', None], timeout=TIMEOUT)
    programs = start_programs(address)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), TIMEOUT)
    assert ask(address, ['left', None], timeout=TIMEOUT) == [200, []]
    assert left(programs) == {}
    [child] = psutil.Process(supervisor.pid).children()  # no zombie, either
    assert ask(address, ['pid', None]) == [200, child.pid]


@pytest.mark.parametrize('code', [0, 3])
def test_process_that_exits_in_the_middle(supervise, start_programs, ask, address, code):
    supervise()
    programs = start_programs(address)
    with ZMQClient(address, timeout=TIMEOUT) as client, pytest.raises(ZMQUnreachableError):
        client.call('exit', code)
    wait_until(lambda: not left(programs), TIMEOUT)


def test_process_is_killed_while_the_supervisor_stops(supervise, start_programs, ask, address):
    supervisor = supervise()
    programs = start_programs(address)
    _status, pid = ask(address, ['pid', None])
    with in_hand(address, 'work'):
        supervisor._ask_to_stop()
        os.kill(pid, signal.SIGKILL)
        supervisor.stop()
    assert supervisor.exitcode == 0
    assert left(programs) == {}


def test_supervisor_fails(supervise, start_programs, address, ask, monkeypatch):
    """It leaves no processes behind, either."""

    class FailingCleanup(OrphanCleanup):
        first = True

        def step(self, now):
            if FailingCleanup.first:
                FailingCleanup.first = False
                raise LookupError('this loop is broken')
            return super().step(now)

    monkeypatch.setattr('pyams_zmq.supervisor.driver.OrphanCleanup', FailingCleanup)
    supervisor = supervise()
    programs = start_programs(address)
    _status, pid = ask(address, ['pid', None])
    os.kill(pid, signal.SIGKILL)
    supervisor.join(TIMEOUT)
    assert supervisor.exitcode == 1
    assert left(programs) == {}


def test_siblings_of_a_supervisor(supervise, start_programs, address, ask):
    with subprocess.Popen(['sleep', '60']) as sibling:
        supervise()
        programs = start_programs(address)
        _status, pid = ask(address, ['pid', None])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not left(programs), TIMEOUT)
        assert is_running(sibling.pid)
        sibling.kill()


# Its parts, in a fork that adopts


def in_a_fork(function):
    """Run a test in a child, whose process tree is its own."""

    def run(writer):
        try:
            become_subreaper()
            function()
            writer.send(None)
        except BaseException as error:  # to see it in the test
            writer.send(repr(error))
            raise
        finally:
            for relative in descendants():
                relative.send(signal.SIGKILL)

    def test():
        reader, writer = FORK.Pipe(duplex=False)
        child = FORK.Process(target=run, args=(writer,))
        child.start()
        assert reader.poll(TIMEOUT)
        assert reader.recv() is None
        child.join()
        assert child.exitcode == 0
        reader.close()
        writer.close()

    test.__name__ = function.__name__
    return test


def adopt(command='sleep 60'):
    """Start a program whose parent ends; return its ProcessInfo."""
    pid = subprocess.check_output(['sh', '-c', f'{command} >&- & echo $!'])
    relative = ProcessInfo.read(int(pid))
    assert relative.parent == os.getpid()
    return relative


@in_a_fork
def test_cleanup():
    own = FORK.Process(target=time.sleep, args=(60,))
    own.start()
    kept = adopt()
    cleanup = OrphanCleanup({kept}, 1000.0)
    assert cleanup.step(1000.0) is None
    meek, deaf = adopt(), adopt('trap "" TERM; sh -c "sleep 60 & wait"')
    with subprocess.Popen(['sleep', '60']) as program:
        assert cleanup.step(1000.0) == descendants_module.CLEANUP_INTERVAL
        wait_for_end(meek.pid, TIMEOUT)
        assert cleanup.step(1000.9) == descendants_module.CLEANUP_INTERVAL
        assert not psutil.pid_exists(meek.pid)  # no zombie
        assert is_running(deaf.pid)
        assert cleanup.step(1001.0) == descendants_module.CLEANUP_INTERVAL
        wait_until(lambda: cleanup.step(1001.1) is None, TIMEOUT)
        assert set(children()) == {
            ProcessInfo.read(pid) for pid in (own.pid, kept.pid, program.pid)
        }
        assert all(is_running(each.pid) for each in children())
        program.kill()
    own.kill()
    own.join()


@in_a_fork
def test_cleanup_in_vain():
    """A process that cannot be killed does not delay the others without limit."""
    orphan = adopt()
    cleanup = OrphanCleanup(set(), 1000.0)
    assert cleanup.step(1000.0) == descendants_module.CLEANUP_INTERVAL
    wait_for_end(orphan.pid, TIMEOUT)
    # On a busy machine the next step may be late: what ignores a SIGTERM is killed all the same.
    late = 1000.0 + 2 * descendants_module.CLEANUP_GRACE
    deaf = adopt('trap "" TERM; sh -c "sleep 60 & wait"')
    assert cleanup.step(late) == descendants_module.CLEANUP_INTERVAL
    wait_for_end(deaf.pid, TIMEOUT)
    adopt()
    assert cleanup.step(late + descendants_module.CLEANUP_GRACE) is None


@in_a_fork
def test_reaper():
    orphan = adopt()
    reaper = Reaper()
    now = reaper.due
    reaper.step(now - 0.1)
    assert reaper.due == now
    reaper.step(now)
    os.kill(orphan.pid, signal.SIGKILL)
    wait_for_end(orphan.pid, TIMEOUT)
    program = subprocess.Popen(['true'])
    wait_for_end(program.pid, TIMEOUT)
    for turn in range(1, 4):
        assert psutil.pid_exists(orphan.pid) == (turn < 3)
        reaper.step(now + turn * descendants_module.REAP_INTERVAL)
    assert reaper._awaited == {ProcessInfo.read(program.pid)}
    assert program.wait() == 0
    for turn in range(4, 6):
        reaper.step(now + turn * descendants_module.REAP_INTERVAL)
    adopt()
    reaper.step(now + 6 * descendants_module.REAP_INTERVAL)


@in_a_fork
def test_reap_what_the_system_has_reaped():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    orphan = adopt()
    os.kill(orphan.pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(orphan.pid))
    descendants_module._reap(orphan)
    assert children() == set()


@in_a_fork
def test_children_start_others_while_they_end():
    code = "trap 'setsid sleep 60 & exit' TERM; echo; while :; do sleep 0.01; done"
    with subprocess.Popen(['sh', '-c', code], stdout=subprocess.PIPE) as program:
        program.stdout.readline()
        end_descendants(0.3)
        assert descendants() == set()


@in_a_fork
def test_end_without_waiting():
    command = 'trap "" TERM; echo; exec sleep 60'
    with subprocess.Popen(['sh', '-c', command], stdout=subprocess.PIPE) as program:
        program.stdout.readline()
        end_descendants(0)
        assert program.wait() == -signal.SIGKILL


def test_kill_with_descendants():
    """The programs get no other signal."""
    code = 'sh -c \'trap "echo terminated" TERM; echo; while :; do sleep 0.05; done\' & wait'
    with subprocess.Popen(['sh', '-c', code], stdout=subprocess.PIPE) as program:
        assert program.stdout.readline() == b'\n'
        kill_with_descendants(program.pid)
        assert program.stdout.read() == b''  # all have ended
    assert program.returncode == -signal.SIGKILL


@in_a_fork
def test_forbid_new_processes():
    forbid_new_processes()
    for start in (os.fork, partial(subprocess.run, ['true']), partial(os.system, 'true')):
        with pytest.raises(ZMQStartError, match='ends'):
            start()
    assert os.listdir('/proc/self/fd')


def test_what_starts_another():
    descendants_module._refuse('open', ())
    with pytest.raises(ZMQStartError):
        descendants_module._refuse('os.fork', ())


@in_a_fork
def test_helpers_of_multiprocessing():
    """They end with this process, and ignore SIGTERM."""
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()
    assert len(children()) == 2
    started = time.monotonic()
    assert wait_for_descendants(10)
    end_descendants(10)
    assert time.monotonic() - started < 5
    assert len([each for each in children() if not each.has_ended]) == 2
    assert descendants_module._adopted(children()) == set()


@in_a_fork
def test_look_of_a_strange_name():
    code = 'import ctypes; ctypes.CDLL(None).prctl(15, b") S 1 (\\xff"); print(flush=True); input()'
    with subprocess.Popen(
        [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as program:
        program.stdout.readline()
        relative = ProcessInfo.read(program.pid)
        assert (relative.name, relative.parent) == (') S 1 (\ufffd', os.getpid())
        program.kill()


@in_a_fork
def test_main_thread_has_ended():
    """The process has not ended: its other threads run."""
    code = (
        'import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start();'
        'ctypes.CDLL(None).pthread_exit(None)'
    )
    with subprocess.Popen([sys.executable, '-c', code]) as program:
        wait_until(lambda: psutil.Process(program.pid).status() == 'zombie', TIMEOUT)
        assert not ProcessInfo.read(program.pid).has_ended
        end_descendants(1)
        assert ProcessInfo.read(program.pid).has_ended


def test_look_at_nothing():
    assert ProcessInfo.read(2**30) is None


@pytest.mark.usefixtures('pidfd')
def test_signal_to_a_later_process_of_that_pid():
    with subprocess.Popen(['sleep', '60']) as program:
        relative = ProcessInfo.read(program.pid)
        replace(relative, started=relative.started - 1).send(signal.SIGKILL)
        assert program.poll() is None
        relative.send(signal.SIGKILL)
        assert program.wait() == -signal.SIGKILL
        relative.send(signal.SIGKILL)


def test_proc_of_another_namespace(monkeypatch):
    """In the /proc of another PID namespace, processes have other pids."""
    monkeypatch.setattr(os, 'readlink', lambda path: '1')
    with subprocess.Popen(['sleep', '60']) as program:
        assert {each.pid for each in children()} == {program.pid}
        assert {each.pid for each in descendants()} == {program.pid}
        program.kill()
    assert children() == descendants() == set()


def test_subreaper():
    is_subreaper = ctypes.c_int()
    libc = ctypes.CDLL(None)
    with subreaper() as adopts:
        assert adopts is True
        with subreaper():
            pass
        libc.prctl(37, ctypes.byref(is_subreaper))
        assert is_subreaper.value == 1
    libc.prctl(37, ctypes.byref(is_subreaper))
    assert is_subreaper.value == 0


def test_no_subreaper(monkeypatch):
    """On another system, or with an old kernel."""
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
    with subreaper() as adopts:
        assert adopts is False


def test_end_without_a_subreaper(start, start_programs, monkeypatch):
    """Programs that are not detached end, too."""
    monkeypatch.setattr(descendants_module, '_prctl', lambda *args: False)
    process = start(factory=ShortProcess)
    programs = start_programs(process, ['plain', 'shell', 'deaf'])
    process.stop()
    assert left(programs) == {}


def test_supervisor_without_a_subreaper(supervise, ask, address, monkeypatch):
    monkeypatch.setattr(descendants_module, '_prctl', lambda *args: False)
    supervise()
    _status, pid = ask(address, ['pid', None], timeout=TIMEOUT)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), TIMEOUT)
    assert ask(address, ['left', None], timeout=TIMEOUT) == [200, []]
