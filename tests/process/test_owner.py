# SPDX-License-Identifier: ZPL-2.1
"""A process and its owner: how one ends the other, and what they leave behind."""

import asyncio
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
from pyramid.registry import Registry

from app.handler import Process, in_hand
from app.program import NO_PIDFD, is_running, reserved_port, wait_for_end
from checks import TIMEOUT, freeze, wait_until
from pyams_zmq.exceptions import ZMQBindError, ZMQStartError
from pyams_zmq.interfaces import IZMQProcessStartedEvent
from pyams_zmq.process import process_exit_func
from pyams_zmq.process.watchdog import has_ended
from pyams_zmq.socket import zmq_response, zmq_socket
from pyams_zmq.testing import running
from pyams_zmq.wire.message import DRAINING

OWNER = """
import json, os, signal, sys, threading
from app.handler import Process

process = Process(sys.argv[1])
process.start()
print(json.dumps([process.pid, process.wait_ready()]), flush=True)
"""

TRACED = """
import threading

def trace(frame, *args):
    if 'pyams_zmq' in frame.f_code.co_filename:
        sum(range(2000))  # as slow as a debugger
        return trace

threading.settrace(trace)
"""

FORK = """
import atexit
from pyams_zmq.process import process_exit_func

atexit.register(process_exit_func, process=process)
fork = os.fork()
if fork:
    print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)
    sys.stdin.readline()
"""

THREADS = """
import threading, time, warnings
from app.handler import Process

warnings.simplefilter('error')
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
"""

STANDBY = """
import os, signal, sys
from app.handler import Process

process = Process(sys.argv[1])
process.bind_timeout = 60
process.start()
print(process.pid, flush=True)
signal.pause()
"""

SIGNALLED = """
import os, signal
from queue import SimpleQueue
from app import handler
from pyams_zmq.process.watchdog import Watchdog

class SignalledProcess(handler.Process):
    def exit(self, *args):
        super().exit(*args)
        handled.put(None)

def terminate_after_another(self):
    os.kill(os.getpid(), signal.SIGTERM)
    handled.get(timeout=20)
    terminate(self)

handled = SimpleQueue()
terminate, Watchdog.terminate = Watchdog.terminate, terminate_after_another
handler.Process = SignalledProcess
"""

STARTER = """
import json, sys
from app.handler import Process

print('0', flush=True)
for line in sys.stdin:
    process = Process(json.loads(line))
    process.bind_timeout = 0
    process.start()
    try:
        result = process.wait_ready()
    except OSError as error:
        result = error.errno
    print(json.dumps([type(result).__name__, result]), flush=True)
    sys.stdin.readline()
    process.stop()
    print('0', flush=True)
"""

OTHER_PROGRAM = """
import sys, zmq

with zmq.Context() as context, context.socket(zmq.REP) as socket:
    socket.bind(sys.argv[1])
    print('0', flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def run(run_program):
    """Start programs with their code as the first argument."""
    return partial(run_program, '-c')


@pytest.fixture
def path(tmp_path):
    """Return the path of an ipc socket, which a clean end removes."""
    return tmp_path / 'zmq.sock'


@pytest.fixture
def address(path):
    """Return the address of that path."""
    return f'ipc://{path}'


def left_at(path):
    """List the files of an ipc socket."""
    return sorted(found.name for found in path.parent.glob(f'{path.name}*'))


def ends_on(pid, num):
    """Return True if a process neither handles nor blocks a signal."""
    with open(f'/proc/{pid}/status', encoding='ascii') as status:
        masks = [line.split()[1] for line in status if line.startswith(('SigCgt', 'SigBlk'))]
    return not any(int(mask, 16) & 1 << num - 1 for mask in masks)


def collect_all(*args):
    """Collect any child that has ended; a handler of SIGCHLD."""
    with suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def kill(process):
    """Kill a process; `join` with a time-out would wait for its children, too."""
    process.kill()
    wait_for_end(process.pid, TIMEOUT)


def spawn(ask, address):
    """Let a process start a child; return its pid when it has reset what it inherited."""
    status, pid = ask(address, ['spawn', 60])
    assert status == 200
    wait_until(lambda: ends_on(pid, signal.SIGTERM), TIMEOUT)
    assert is_running(pid)
    return pid


def timed(function, *args):
    """Return the seconds that a call takes."""
    start = time.monotonic()
    function(*args)
    return time.monotonic() - start


@pytest.fixture(autouse=True)
def _long_drain(monkeypatch):
    """A stop that waits for the end of `drain_timeout` is seen to be late."""
    monkeypatch.setattr(Process, 'drain_timeout', 60.0)


# The owner dies


@pytest.mark.parametrize('code', [OWNER, NO_PIDFD + OWNER], ids=['pidfd', 'no pidfd'])
def test_owner_is_killed(run, address, path, code):
    owner = run(code + 'signal.pause()', address)
    child, _ = owner.read()
    owner.send_signal(signal.SIGKILL)
    wait_for_end(child, TIMEOUT)
    assert left_at(path) == []


def test_owner_of_a_suspended_child_is_killed(run, address, path):
    """The child continues, notices the death, and ends."""
    owner = run(OWNER + 'signal.pause()', address)
    child, _ = owner.read()
    freeze(child)
    owner.send_signal(signal.SIGKILL)
    wait_for_end(child, TIMEOUT)
    assert left_at(path) == []


@pytest.mark.parametrize('work', ['work', 'async_work', 'native_work', 'deaf_work'])
def test_owner_is_killed_while_the_child_works(run, address, work):
    owner = run(OWNER + 'signal.pause()', address)
    child, _ = owner.read()
    with in_hand(address, work):
        owner.send_signal(signal.SIGKILL)
        wait_for_end(child, TIMEOUT)


def test_owner_is_killed_and_the_child_has_children(run, ask, address):
    owner = run(OWNER + 'signal.pause()', address)
    child, _ = owner.read()
    grandchildren = [spawn(ask, address) for _ in range(2)]
    owner.send_signal(signal.SIGKILL)
    for pid in (child, *grandchildren):
        wait_for_end(pid, TIMEOUT)


def test_owner_is_killed_before_the_child_is_ready(run, address):
    first = run(OWNER + 'signal.pause()', address)
    first.read()
    standby = run(STANDBY, address)
    child = standby.read()
    standby.send_signal(signal.SIGKILL)
    wait_for_end(child, TIMEOUT)


# The owner ends


@pytest.mark.parametrize(
    ('code', 'exit_code'),
    [
        ('', 0),
        ('sys.exit(3)', 3),
        ('raise SystemError', 1),
        ('threading.Thread(target=print).start()', 0),
        ('process.stop()', 0),
        ('os.kill(os.getpid(), signal.SIGINT)', -signal.SIGINT),
        ('os.kill(os.getpid(), signal.SIGTERM)', -signal.SIGTERM),
        ('os.kill(process.pid, signal.SIGKILL)', 0),
    ],
    ids=['end', 'exit', 'exception', 'thread', 'stop', 'SIGINT', 'SIGTERM', 'killed child'],
)
def test_owner_ends(run, address, path, code, exit_code):
    owner = run(OWNER + code, address)
    child, _ = owner.read()
    assert owner.wait(20) == exit_code
    wait_for_end(child, TIMEOUT)
    assert 'Exception ignored' not in owner.log.read_text()
    assert left_at(path) == [] or 'SIGKILL' in code


@pytest.mark.parametrize('num', [signal.SIGINT, signal.SIGTERM], ids=lambda num: num.name)
def test_all_get_the_signal(run, address, path, num):
    """Ctrl-C in a terminal does this, and the end of a systemd service."""
    owner = run(
        OWNER + 'signal.signal(signal.SIGTERM, lambda *args: sys.exit())\nsignal.pause()', address
    )
    child, _ = owner.read()
    with in_hand(address, 'work', 0.5) as socket:
        owner.send_signal_to_all(num)
        assert zmq_response(socket) == [200, 0.5]
    owner.wait(20)
    wait_for_end(child, TIMEOUT)
    assert left_at(path) == []


def test_signal_while_the_owner_asks(run, address, path):
    """A second SIGTERM ends a process at once; that of its own watchdog does not count."""
    owner = run(SIGNALLED + OWNER + 'sys.stdin.readline()', address)
    child, _ = owner.read()
    with in_hand(address, 'work', 0.5) as socket:
        owner.write(None)
        assert zmq_response(socket) == [200, 0.5]
    assert owner.wait(20) == 0
    wait_for_end(child, TIMEOUT)
    assert left_at(path) == []


def test_fork_of_the_owner_ends(run, ask, address):
    """Workers of a preforking server run atexit hooks that they have inherited."""
    owner = run(OWNER + FORK, address)
    child, _ = owner.read()
    assert owner.read() == 0
    assert ask(address, ['pid', None]) == [200, child]
    owner.write(None)
    assert owner.wait(20) == 0
    assert 'Traceback' not in owner.log.read_text()


@pytest.mark.parametrize('handler', [signal.SIG_IGN, collect_all], ids=['ignored', 'collected'])
def test_owner_does_not_see_the_end_of_its_children(handler):
    """Some versions of gunicorn collect every child in a signal handler."""
    process = Process()
    former = signal.signal(signal.SIGCHLD, handler)
    try:
        process.start()
        process.wait_ready()
        assert timed(process.stop) < TIMEOUT
        # Its exit code is collected, and the system is about to remove it.
        wait_until(lambda: not psutil.pid_exists(process.pid), TIMEOUT)
        assert timed(process.stop) < TIMEOUT
        with pytest.raises(ZMQStartError, match='ended'):
            process.wait_ready()
    finally:
        signal.signal(signal.SIGCHLD, former)
        multiprocessing.process._children.discard(process)


def test_owner_becomes_another_program(run, address, path):
    owner = run(OWNER + "os.execv(sys.executable, [sys.executable, '-c', 'input()'])", address)
    child, _ = owner.read()
    wait_for_end(child, TIMEOUT)
    assert is_running(owner.pid)
    assert left_at(path) == []


def test_traced_child_works_when_its_owner_becomes_another_program(run, address):
    """As in a debugger: in CPython 3.11 a signal can block the calls of other threads."""
    owner = run(
        TRACED + OWNER + "input(); os.execv(sys.executable, [sys.executable, '-c', 'input()'])",
        address,
    )
    child, _ = owner.read()
    with in_hand(address, 'native_work'):
        owner.write(None)
        wait_for_end(child, TIMEOUT)


def test_pid_that_is_reused():
    """The pid of a child whose exit code was collected elsewhere may be reused."""
    assert has_ended(SimpleNamespace(pid=os.getppid(), is_alive=lambda: True))


# The child has children


def test_stop_ends_grandchildren(ask, monkeypatch):
    monkeypatch.setattr('pyams_zmq.process.service.TERM_GRACE', 14.0)  # for a loaded machine
    process = Process()
    process.drain_timeout = 15.0
    with running(process):
        grandchild = spawn(ask, process.bound_address)
        process.stop()
        assert process.exitcode == 0
        assert not is_running(grandchild)


@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name)
def test_grandchild_ends_on_a_signal(start, ask, num):
    process = start(factory=Process)
    grandchild = spawn(ask, process)
    os.kill(grandchild, num)
    wait_for_end(grandchild, TIMEOUT)
    assert ask(process, ['pid', None]) == [200, process.pid]


@pytest.mark.parametrize('kind', ['tcp', 'path', 'abstract'])
def test_grandchild_does_not_keep_the_address(ask, kind, path):
    with reserved_port() as port:
        address = {
            'tcp': f'tcp://127.0.0.1:{port}',
            'path': f'ipc://{path}',
            'abstract': f'ipc://@{path}',
        }[kind]
        first = Process(address)
        with running(first):
            grandchild = spawn(ask, address)
            kill(first)
            try:
                with running(Process(address)):
                    assert is_running(grandchild)
                    assert ask(address, ['echo', 1]) == [200, 1]
            finally:
                os.kill(grandchild, signal.SIGKILL)


# Where it is started


def test_started_among_threads(ask):
    event = threading.Event()
    threads = [threading.Thread(target=event.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            with running(Process()) as process:
                grandchild = ask(process, ['spawn', 0])
                assert ask(process, ['echo', 1]) == [200, 1]
        assert grandchild[0] == 200
        assert [str(warning.message) for warning in caught] == []
    finally:
        event.set()
        for thread in threads:
            thread.join()


@pytest.mark.skipif(sys.version_info < (3, 12), reason='these Pythons do not warn')
def test_warnings_are_errors(run, ask, address):
    owner = run(THREADS + OWNER + 'sys.stdin.readline()', address)
    owner.read()
    assert ask(address, ['spawn', 0])[0] == 200  # it has threads too
    owner.write(None)
    assert owner.wait(20) == 0
    assert 'Traceback' not in owner.log.read_text()


def test_started_in_a_loop(ask):
    heard = []

    async def main():
        loop = asyncio.get_running_loop()
        usr1 = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, usr1.set)
        for num in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(num, heard.append, num)
        process = Process()
        process.start()
        address = await asyncio.to_thread(process.wait_ready)
        assert await asyncio.to_thread(ask, address, ['async_echo', 1]) == [200, 1]
        os.kill(os.getpid(), signal.SIGUSR1)
        await usr1.wait()
        assert await asyncio.to_thread(ask, address, ['async_echo', 2]) == [200, 2]
        os.kill(process.pid, signal.SIGINT)
        await asyncio.to_thread(process.join, TIMEOUT)
        assert process.exitcode == 0
        await asyncio.to_thread(process.stop)

    asyncio.run(asyncio.wait_for(main(), 20))
    assert heard == []


def test_stopped_at_once_in_a_loop():
    """The child inherits the handlers of the loop, and the descriptor that wakes it."""
    heard = []

    async def main():
        loop = asyncio.get_running_loop()
        for num in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(num, heard.append, num)
        for _ in range(10):
            process = Process()
            process.start()
            assert timed(process.stop) < TIMEOUT
            assert process.exitcode == 0
            await asyncio.sleep(0)  # the loop would call the signal handlers

    asyncio.run(main())
    assert heard == []


def test_started_by_a_thread(ask, tmp_path):
    registry = Registry('theirs')
    notes = tmp_path / 'notes'
    registry.registerHandler(
        lambda event: notes.write_text(event.object.registry.__name__), [IZMQProcessStartedEvent]
    )
    process = Process(registry=registry)

    def start():
        process.start()
        process.wait_ready()

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    try:
        # The thread has ended, its child has not.
        assert ask(process, ['registry', None]) == [200, True]
        assert notes.read_text() == 'theirs'
    finally:
        stopper = threading.Thread(target=process.stop)
        stopper.start()
        stopper.join()
    assert process.exitcode == 0


@pytest.mark.parametrize('method', ['spawn', 'forkserver', 'fork'])
def test_start_method_of_the_program(ask, method):
    multiprocessing.set_start_method(method, force=True)
    try:
        process = Process()
        assert isinstance(process, multiprocessing.Process)
        with running(process):
            assert not process.daemon
            assert psutil.Process(process.pid).ppid() == os.getpid()
            assert ask(process, ['start_method', None]) == [200, 'fork']
        assert multiprocessing.get_start_method() == method
    finally:
        multiprocessing.set_start_method(None, force=True)


def test_started_twice():
    process = Process()
    with running(process):
        with pytest.raises(AssertionError, match='twice'):
            process.start()
        process.wait_ready()
        assert timed(process.stop) < TIMEOUT
    assert process.exitcode == 0


# Several processes for one address


@pytest.fixture
def starters(run):
    """Five programs which start a process on each address that they read."""
    programs = [run(STARTER) for _ in range(5)]
    for program in programs:
        program.read()
    return programs


def test_race_for_an_address(starters, path):
    with reserved_port() as port:
        for address in (f'127.0.0.1:{port}', f'ipc://{path}', f'ipc://@{path}'):
            for _ in range(10):
                check_race(starters, address)
                assert left_at(path) == []


def check_race(starters, address):
    for starter in starters:
        starter.write(address)
    results = sorted(starter.read() for starter in starters)
    assert [result[0] for result in results] == ['int'] * 4 + ['str']
    assert {result[1] for result in results[:4]} == {errno.EADDRINUSE}
    for starter in starters:
        starter.write(None)
    for starter in starters:
        starter.read()


def test_path_of_a_killed_process(ask, address, path):
    first = Process(address)
    with running(first):
        kill(first)
        assert left_at(path) == ['zmq.sock', 'zmq.sock.lock']
        with running(Process(address)):
            assert ask(address, ['echo', 1]) == [200, 1]
        assert left_at(path) == []


def test_path_of_another_program(run, address, path):
    other = run(OTHER_PROGRAM, address)
    other.read()
    process = Process(address)
    process.start()
    with pytest.raises(ZMQBindError) as error:
        process.wait_ready()
    assert error.value.errno == errno.EADDRINUSE
    process.stop()
    assert left_at(path) == ['zmq.sock']
    other.send_signal(signal.SIGKILL)
    other.wait(20)
    with running(Process(address)):
        assert left_at(path) == ['zmq.sock', 'zmq.sock.lock']
    assert left_at(path) == []


def test_lock_was_cleaned_up(address, path):
    process = Process(address)
    with running(process):
        path.with_name('zmq.sock.lock').unlink()
    assert process.exitcode == 0
    with running(Process(address)):
        assert left_at(path) == ['zmq.sock', 'zmq.sock.lock']
    assert left_at(path) == []


@pytest.mark.parametrize('kind', ['path', 'abstract'])
def test_standby_takes_over(ask, path, kind):
    address = {'path': f'ipc://{path}', 'abstract': f'ipc://@{path}'}[kind]
    first, standby = Process(address), Process(address)
    standby.bind_timeout = 30
    with running(first):
        standby.start()
        assert ask(address, ['pid', None]) == [200, first.pid]
    try:
        assert standby.wait_ready() == address
        assert ask(address, ['pid', None]) == [200, standby.pid]
    finally:
        standby.stop()
    assert standby.exitcode == 0


def test_standby_stops(start, address):
    start(address, factory=Process)
    standby = Process(address)
    standby.bind_timeout = 2 * TIMEOUT
    standby.start()
    assert timed(standby.stop) < TIMEOUT
    assert standby.exitcode == 0


# Stop


def test_stop_without_a_child():
    process = Process()
    process.stop()
    process_exit_func(process=process)
    process_exit_func()
    process.start()
    process.stop()
    process.stop()
    assert process.exitcode == 0


def test_stop_after_death(start):
    process = start(factory=Process)
    kill(process)
    assert timed(process.stop) < TIMEOUT
    assert process.exitcode == -signal.SIGKILL


def test_stop_in_a_fork(start, ask):
    process = start(factory=Process)
    fork = os.fork()
    if not fork:
        process.stop()
        process_exit_func(process=process)
        os._exit(0)
    os.waitpid(fork, 0)
    assert ask(process, ['pid', None]) == [200, process.pid]


def test_stop_by_several_threads(start):
    process = start(factory=Process)
    with in_hand(process.bound_address, 'work', 0.5) as socket:
        threads = [threading.Thread(target=process.stop) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert zmq_response(socket) == [200, 0.5]
        for thread in threads:
            thread.join()
    assert process.exitcode == 0


@pytest.mark.parametrize('work', ['work', 'async_work'])
def test_stop_of_a_child_that_works_too_long(work):
    process = Process()
    process.drain_timeout = 0.3
    with running(process), in_hand(process.bound_address, work):
        assert timed(process.stop) < process.drain_timeout + TIMEOUT
        assert process.exitcode == 1  # its watchdog ended it


def test_stop_of_a_child_that_does_not_react():
    deaf, native, stopped = processes = [Process() for _ in range(3)]
    with ExitStack() as stack:
        for process in processes:
            process.drain_timeout = 0.3
            stack.enter_context(running(process))
        stack.enter_context(in_hand(deaf.bound_address, 'deaf_work'))
        stack.enter_context(in_hand(native.bound_address, 'native_work'))
        freeze(stopped.pid)
        start = time.monotonic()
        with ThreadPoolExecutor() as pool:
            list(pool.map(Process.stop, processes))
        assert time.monotonic() - start < 0.3 + 2 + 1 + TIMEOUT
    # Watchdogs ended the first two; the third could not run its own.
    assert [process.exitcode for process in processes] == [1, 1, -signal.SIGKILL]


@pytest.mark.parametrize('work', ['work', 'async_work'])
@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name)
def test_drain(start, work, num):
    process = start(factory=Process)
    with (
        in_hand(process.bound_address, work, 0.5) as socket,
        zmq_socket(process.bound_address) as late,
    ):
        late.send_json(['echo', 1])
        os.kill(process.pid, num)
        assert zmq_response(socket) == [200, 0.5]
        assert zmq_response(late) == list(DRAINING)
    process.join(TIMEOUT)
    assert process.exitcode == 0


def test_drain_while_clients_go_on(start, monkeypatch):
    monkeypatch.setattr('pyams_zmq.process.REFUSAL_TURN', 0.2)  # for machines that are busy
    process = start(factory=Process)
    with zmq_socket(process.bound_address) as socket:
        os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: ask_on(socket) == list(DRAINING))
        end = time.monotonic() + 12 * 0.2
        while time.monotonic() < end:
            assert ask_on(socket) == list(DRAINING)
    process.join(TIMEOUT)
    assert process.exitcode == 0


def ask_on(socket):
    socket.send_json(['echo', 1])
    return zmq_response(socket)


def test_signal_does_not_interrupt_the_loop(start, ask):
    """As a signal that comes right before the loop waits."""
    process = start(factory=Process)
    assert ask(process, ['signal_elsewhere', 0.2]) == [200, 0.2]
    wait_for_end(process.pid, 0.2 + TIMEOUT)
    assert process.exitcode == 0


def test_signal_while_its_owner_stops_it(start, tmp_path):
    """The first signal from outside does not count as the second: systemd sends one to all."""
    process = start(factory=Process)
    asked = tmp_path / 'asked'
    with (
        ThreadPoolExecutor() as pool,
        in_hand(process.bound_address, 'work_on', str(asked)) as socket,
    ):
        stopping = pool.submit(process.stop)
        wait_until(asked.exists)
        os.kill(process.pid, signal.SIGTERM)
        asked.unlink()
        assert zmq_response(socket, timeout=TIMEOUT) == [200, str(asked)]
        stopping.result()
    assert process.exitcode == 0


class LeavingProcess(Process):
    """Makes a file when it is about to wait for its children."""

    leaving = None

    def _leave_child(self):
        self.leaving.touch()
        super()._leave_child()


@pytest.mark.parametrize(
    'num', [signal.SIGHUP, signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name
)
def test_signal_while_its_children_end(start, ask, tmp_path, num):
    leaving = tmp_path / 'leaving'
    process = start(factory=type('P', (LeavingProcess,), {'leaving': leaving}))
    child = spawn(ask, process)
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(process.stop)
        wait_until(leaving.exists)
        os.kill(process.pid, num)
        os.kill(child, signal.SIGKILL)
        stopping.result()
    assert process.exitcode == 0
    assert not is_running(child)


@pytest.mark.parametrize('kind', ['path', 'abstract', 'tcp', 'all interfaces'])
def test_kept_socket_after_a_kill_with_children(start, ask, path, kind):
    """The children of a killed process do not keep its connections open."""
    with reserved_port() as port:
        address = {
            'path': f'ipc://{path}',
            'abstract': f'ipc://@{path}',
            'tcp': f'127.0.0.1:{port}',
            'all interfaces': f'*:{port}',
        }[kind]
        target = address.replace('*', '127.0.0.1')
        process = start(address, factory=Process)
        with zmq_socket(target) as socket:
            socket.send_json(['spawn', 60])
            _status, child = zmq_response(socket)
            try:
                kill(process)
                start(address, factory=Process)
                socket.send_json(['echo', 1])
                assert zmq_response(socket, timeout=20) == [200, 1]
            finally:
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name)
def test_second_signal_ends_at_once(start, num):
    process = start(factory=Process)
    with in_hand(process.bound_address, 'work'):
        os.kill(process.pid, num)
        wait_until(lambda: ends_on(process.pid, num), TIMEOUT)
        os.kill(process.pid, num)
        process.join(TIMEOUT)
        assert process.exitcode == -num
