# SPDX-License-Identifier: ZPL-2.1
"""Processes under a supervisor: when they are started and stopped, and what follows failures."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from math import inf
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyramid.registry import Registry
from zope.interface.verify import verifyObject

from app.handler import in_hand
from app.program import Program, is_running, wait_for_end
from checks import TIMEOUT, wait_until
from handlers import ExitingSetup, Process
from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.interfaces import IZMQProcessGivenUpEvent, ZMQProcessGivenUpEvent
from pyams_zmq.process.address_lock import AddressLock
from pyams_zmq.process.base import describe_exit_code
from pyams_zmq.process.descendants import POLL_INTERVAL
from pyams_zmq.process.name_lock import NameLock
from pyams_zmq.process.watchdog import RECYCLED
from pyams_zmq.supervisor import Supervisor, SupervisorProcess, driver
from pyams_zmq.supervisor.driver import LOCK_INTERVAL, LOCK_REFRESH
from pyams_zmq.supervisor.process import OwnedSupervisor
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.poll import wait_readable

NO_PIDFD = """
import os
del os.pidfd_open
"""

PROCESS = """
import json, logging, os, sys
from functools import partial
from pyramid.registry import Registry
from app.handler import Process
from handlers import ExitingSetup
from pyams_zmq.interfaces import IZMQProcessStartedEvent, IZMQProcessGivenUpEvent
from pyams_zmq.supervisor import Supervisor, SupervisorProcess

logging.basicConfig(level='INFO')
folder = sys.argv[1]
Supervisor.min_delay = 0.01

class Reloading(Process):
    def reload(self):
        super().reload()
        if self._watchdog is not None:
            say('reloaded', self.bound_address, os.getpid())

def say(*words):
    os.write(1, (json.dumps(words) + '\\n').encode())

def factory(name, factory=Reloading):
    return partial(factory, f'ipc://{folder}/{name}', registry=registry)

registry = Registry()
registry.registerHandler(
    lambda event: say('started', event.object.bound_address, os.getpid()),
    [IZMQProcessStartedEvent],
)
registry.registerHandler(
    lambda event: say('given up', event.name, event.exit_code), [IZMQProcessGivenUpEvent]
)
"""

RUN = (
    PROCESS
    + """
names = sys.argv[2:]
sys.exit(Supervisor({
    name: factory(name, ExitingSetup if name == 'broken' else Reloading) for name in names
}).run())
"""
)

FAILS_EARLY = """
from pyams_zmq.supervisor import Supervisor
Supervisor.max_starts = 2
Supervisor.give_up_delay = 0.2
"""

BESIDE = (
    PROCESS
    + """
supervisor = SupervisorProcess(
    {'echo': factory('echo')}, registry=registry, lock=sys.argv[2] or None
)
supervisor.start()
say('supervisor', supervisor.pid)
for line in sys.stdin:
    supervisor.stop()
    supervisor.stop()
    say('stopped', supervisor.exitcode)
"""
)

# The master of a preforking server: its workers keep the pipe to the supervisor open.
BESIDE_FORKS = BESIDE.replace(
    'for line in',
    """
if not os.fork():
    import signal
    signal.pause()
for line in""",
)


class Fake:
    """A process that runs until the test ends it; records the orders that it gets."""

    drain_timeout = 3

    def __init__(self, registry=None):
        self.registry = registry
        self.pid = 1
        self.exitcode = None
        self.ended = False
        self.ready = False
        self.error = None
        self.orders = []

    def start(self):
        self.orders.append('start')

    def end(self, exit_code):
        self.ended, self.exitcode = True, exit_code

    def reload(self):
        self.orders.append('reload')

    def _was_ready(self):
        return self.ready

    def _start_error(self):
        return self.error

    def _ask_to_stop(self):
        self.orders.append('ask')

    def stop(self):
        self.orders.append('stop')
        self.end(0)

    def _stop_orders(self):
        yield self._ask_to_stop, self.drain_timeout + 2
        yield partial(self.orders.append, 'terminate'), 1
        yield partial(self.orders.append, 'kill'), 5


def locks_of(address, *keys):
    """Return locks of an address; a key is that of an application."""
    endpoint = Endpoint.parse(address, bind=True)
    return [AddressLock([endpoint], key, f'application {key}') for key in keys]


class Fakes:
    """Makes fake processes, and a supervisor of one of them; has the clock."""

    def __init__(self, registry=None):
        self.made = []
        self.registry = registry
        self.supervisor = Supervisor({'fake': self.make})
        self.now = 1000.0

    def make(self):
        self.made.append(Fake(self.registry))
        return self.made[-1]

    def step(self, seconds=0.0):
        self.now += seconds
        return self.supervisor.step(self.now)

    def crash(self, life=0.0, exit_code=1):
        """Let the process crash after some seconds; return the delay of the next start."""
        self.made[-1].end(exit_code)
        return self.step(life)


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(driver, 'has_ended', lambda process: process.ended)
    monkeypatch.setattr(driver, 'open_pidfd', lambda pid: nullcontext(0))
    monkeypatch.setattr(Supervisor, 'hang_timeout', 0)
    return Fakes()


@pytest.fixture
def run(run_program, tmp_path):
    """Start programs; their first argument is the folder of the test."""
    return lambda code, *args: run_program('-c', code, str(tmp_path), *args)


@pytest.fixture
def address(tmp_path):
    return f'ipc://{tmp_path}/echo'


def read(program, expected):
    """Read the next line of a program, and check its first word."""
    word, *rest = program.read(TIMEOUT)
    assert word == expected, (word, rest)
    return rest


# One step


def test_start(fakes):
    assert fakes.supervisor.processes == {}
    assert not fakes.supervisor.is_finished
    assert fakes.step() is None
    [process] = fakes.made
    assert process.orders == ['start']
    assert fakes.supervisor.processes == {'fake': process}
    assert fakes.step(3600) is None
    assert len(fakes.made) == 1


def test_poll_without_pidfd(fakes, monkeypatch):
    monkeypatch.setattr(driver, 'open_pidfd', lambda pid: nullcontext(None))
    assert fakes.step() == POLL_INTERVAL


@pytest.mark.parametrize('exit_code', [1, -signal.SIGKILL, None])
def test_start_again(fakes, exit_code):
    fakes.step()
    delay = fakes.crash(exit_code=exit_code)
    assert delay == pytest.approx(0.1)
    assert fakes.supervisor.processes == {}
    assert fakes.step(delay / 2) == pytest.approx(delay / 2)
    assert len(fakes.made) == 1
    assert fakes.step(delay) is None
    assert len(fakes.made) == 2
    assert not fakes.supervisor.is_finished


def test_delays_double(fakes):
    fakes.supervisor.max_starts = 12
    fakes.step()
    delays = []
    for _ in range(11):
        delays.append(fakes.crash())
        fakes.step(delays[-1] + 0.001)
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30])


def test_delay_of_very_many_starts(fakes):
    fakes.supervisor.max_starts = inf
    fakes.step()
    for _ in range(1100):
        fakes.step(fakes.crash() + 0.001)
    assert fakes.crash() == 30


def test_long_life_resets(fakes):
    fakes.step()
    for _ in range(4):
        delay = fakes.crash(9.9)
        fakes.step(delay + 0.001)
    assert fakes.crash(10) == pytest.approx(0.1)
    for _ in range(4):
        fakes.step(delay + 0.001)
        delay = fakes.crash()
    assert delay == pytest.approx(0.8)
    assert not fakes.supervisor.is_finished


def test_failures(fakes, caplog):
    """A process that never was ready is left if no other one runs."""
    events = []
    fakes.registry = Registry()
    fakes.registry.registerHandler(events.append, [IZMQProcessGivenUpEvent])
    fakes.step()
    for _ in range(4):
        fakes.step(fakes.crash(9.9) + 0.001)
    assert events == []
    assert fakes.crash(exit_code=7) == 60
    [event] = events
    assert event.object is fakes.made[-1]
    assert (event.name, event.exit_code) == ('fake', 7)
    [record] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert record.message.startswith('fake fails: each of its last 5 starts ended within')
    assert 'exit code 7; see its log; the next start is in 60.0 s' in record.message
    assert len(fakes.made) == 5
    assert fakes.supervisor.is_finished
    assert fakes.supervisor.exit_code == 1


def test_failures_of_a_process_that_has_served(fakes, caplog):
    """It is started again and again; one event for each time that it begins to fail."""
    events = []
    fakes.registry = Registry()
    fakes.registry.registerHandler(events.append, [IZMQProcessGivenUpEvent])
    fakes.step()
    fakes.made[-1].ready = True
    for _ in range(4):
        fakes.step(fakes.crash() + 0.001)
    for count in range(5, 9):
        assert fakes.crash() == 60
        assert f'each of its last {count} starts' in caplog.records[-1].message
        assert not fakes.supervisor.is_finished
        assert fakes.supervisor.exit_code == 0
        fakes.step(60)
        assert len(fakes.made) == count + 1
    assert len(events) == 1
    assert fakes.crash(10) == pytest.approx(0.1)
    fakes.step(0.2)
    for _ in range(4):
        fakes.step(fakes.crash() + 0.001)
    assert fakes.crash() == 60
    assert len(events) == 2


def test_failures_beside_another_process(fakes):
    """One that never was ready is started again, too."""
    supervisor = fakes.supervisor = Supervisor({'first': fakes.make, 'second': fakes.make})
    fakes.step()
    for _ in range(4):
        fakes.step(fakes.crash() + 0.001)
    assert fakes.crash() == 60
    fakes.step(60)
    assert sorted(supervisor.processes) == ['first', 'second']


@pytest.mark.parametrize(
    ('code', 'text'),
    [
        (7, 'exit code 7'),
        (-9, 'exit code -9 (SIGKILL)'),
        (-40, 'exit code -40'),
        (None, 'an unknown exit code'),
    ],
)
def test_exit_code(code, text):
    assert describe_exit_code(code) == text


def test_exit_code_of_an_abort():
    text = describe_exit_code(-signal.SIGABRT)
    assert text.startswith('exit code -6 (SIGABRT): ')
    assert 'libzmq' in text


def test_given_up_event():
    assert verifyObject(IZMQProcessGivenUpEvent, ZMQProcessGivenUpEvent(None, 'echo', None))


def test_given_up_event_with_a_registry(fakes, caplog):
    def fail(event):
        events.append(event)
        raise LookupError('this subscriber is broken')

    events = []
    fakes.supervisor.registry = Registry()
    fakes.supervisor.registry.registerHandler(fail, [IZMQProcessGivenUpEvent])
    fakes.supervisor.max_starts = 1
    fakes.step()
    assert fakes.crash() == 60
    assert len(events) == 1
    assert 'A subscriber to the ZMQProcessGivenUpEvent of fake failed' in caplog.text


def test_address_of_another_application(fakes, address, caplog):
    own, client, other = locks_of(address, *'ααβ')
    fakes.supervisor.address_locks = {'fake': own}
    assert other.acquire()
    delay = fakes.step()
    assert not fakes.made
    assert 'Another application of this user serves' in caplog.text
    other.release()
    fakes.step(delay)
    assert fakes.made[0].orders == ['start']
    assert client.find_other_owner() is None
    own.release()


def test_address_that_another_program_has_bound(fakes, address):
    """Clients are told so, until the process could bind it."""
    own, client = locks_of(address, *'αα')
    fakes.supervisor.address_locks = {'fake': own}
    fakes.step()
    fakes.made[-1].error = OSError(errno.EADDRINUSE, 'in use', address)
    delay = fakes.crash()
    assert client.find_other_owner() is not None
    assert fakes.step(delay) == LOCK_INTERVAL
    assert client.find_other_owner() is not None
    fakes.made[-1].ready = True
    assert fakes.step() == LOCK_REFRESH
    assert client.find_other_owner() is None
    own.release()


def test_supervisor_at_the_address_of_another_application(fakes, address, lock, caplog):
    """It says so once, and starts the process when the address is free."""
    own, other = locks_of(address, *'αβ')
    process = SimpleNamespace(
        registry=None,
        address_lock=own,
        _parent_pid=os.getppid(),
        name_lock=NameLock(lock),
        _heartbeat=None,
        _control=SimpleNamespace(receive=lambda: None),
    )
    supervisor = OwnedSupervisor(process, {'fake': fakes.make})
    assert other.acquire()
    for _ in range(2):
        supervisor.step(fakes.now)
    assert not fakes.made
    assert caplog.text.count('another application of this user serves it (application β') == 1
    other.release()
    supervisor.step(fakes.now)
    assert fakes.made[0].orders == ['start']
    own.release()
    process.name_lock.release()


def test_factory_fails(fakes, caplog):
    def fail():
        raise LookupError('no such tool: ffmpeg')

    supervisor = Supervisor({'fake': fakes.make, 'broken': fail})
    now = 0.0
    for _ in range(5):
        now += supervisor.step(now) or 0.0
    assert not supervisor.is_finished
    assert list(supervisor.processes) == ['fake']
    assert 'no such tool: ffmpeg' in caplog.text
    assert 'broken fails: each of its last 5 starts' in caplog.text
    assert supervisor.exit_code == 0
    fakes.made[0].end(0)
    supervisor.step(now)
    assert supervisor.is_finished
    assert supervisor.exit_code == 1


def test_stopped_itself(fakes):
    fakes.step()
    assert fakes.crash(exit_code=0) is None
    assert fakes.supervisor.is_finished
    assert fakes.supervisor.exit_code == 0
    assert fakes.step(3600) is None
    assert len(fakes.made) == 1


def test_recycled(fakes):
    """The next one is started at once, however often."""
    fakes.step()
    for count in range(2, 20):
        assert fakes.crash(exit_code=RECYCLED) is None
        assert len(fakes.made) == count
    assert not fakes.supervisor.is_finished


def test_reload(fakes):
    fakes.supervisor.reload()
    fakes.step()
    fakes.supervisor.reload()
    assert fakes.made[0].orders == ['start', 'reload']


def test_stop(fakes):
    supervisor = fakes.supervisor = Supervisor({'first': fakes.make, 'second': fakes.make})
    fakes.step()
    fakes.step()
    first, second = fakes.made
    second.drain_timeout = 10
    supervisor.stop()
    supervisor.stop()
    assert fakes.step() == 5
    assert first.orders == second.orders == ['start', 'ask']
    first.end(1)
    assert fakes.step(1) == 11
    assert list(supervisor.processes) == ['second']
    second.end(0)
    assert fakes.step() is None
    assert supervisor.is_finished
    assert supervisor.exit_code == 0
    assert len(fakes.made) == 2


def test_stop_of_a_process_that_does_not_react(fakes, caplog):
    fakes.step()
    fakes.supervisor.stop()
    assert [fakes.step(), fakes.step(1), fakes.step(4), fakes.step(1)] == [5, 4, 1, 5]
    assert fakes.made[0].orders == ['start', 'ask', 'terminate', 'kill']
    assert not fakes.supervisor.is_finished
    assert fakes.step(5) is None
    assert fakes.supervisor.is_finished
    assert caplog.text.count('fake did not stop in time') == 3


def test_stop_before_the_next_start(fakes):
    fakes.step()
    fakes.crash()
    fakes.supervisor.stop()
    assert fakes.step(3600) is None
    assert fakes.supervisor.is_finished
    assert fakes.supervisor.exit_code == 0
    assert len(fakes.made) == 1


def test_stop_with_one_that_has_failed(fakes):
    fakes.supervisor = Supervisor({'first': fakes.make, 'second': fakes.make})
    fakes.supervisor.max_starts = 1
    fakes.step()
    fakes.crash()
    fakes.supervisor.stop()
    fakes.step()
    fakes.made[0].end(0)
    fakes.step()
    assert fakes.supervisor.is_finished
    assert fakes.supervisor.exit_code == 0


def test_stop_by_a_subscriber(fakes):
    supervisor = fakes.supervisor = Supervisor({'fake': fakes.make, 'broken': {}.popitem})
    supervisor.registry = Registry()
    supervisor.registry.registerHandler(lambda event: supervisor.stop(), [IZMQProcessGivenUpEvent])
    supervisor.max_starts = 1
    assert fakes.step() == 0
    assert fakes.step() == 5
    assert fakes.made[0].orders == ['start', 'ask']


# Run


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


# Beside a web server


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


# With a lock


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
