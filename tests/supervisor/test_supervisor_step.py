# SPDX-License-Identifier: ZPL-2.1
"""One step of a supervisor: when it starts and stops processes, and what follows failures."""

import errno
import logging
import os
import signal
from contextlib import nullcontext
from math import inf
from types import SimpleNamespace

import pytest
from pyramid.registry import Registry
from zope.interface.verify import verifyObject

from locks import locks_of
from pyams_zmq.interfaces import IZMQProcessGivenUpEvent, ZMQProcessGivenUpEvent
from pyams_zmq.process.base import describe_exit_code
from pyams_zmq.process.descendants import POLL_INTERVAL
from pyams_zmq.process.name_lock import NameLock
from pyams_zmq.process.socket_lock import SocketLock
from pyams_zmq.process.watchdog import RECYCLED
from pyams_zmq.supervisor import Supervisor, driver
from pyams_zmq.supervisor.driver import LOCK_INTERVAL, LOCK_REFRESH
from pyams_zmq.supervisor.standby import StandbySupervisor


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


@pytest.fixture
def standby(fakes, lock):
    """Make supervisors with a lock; they step with the clock of the fakes."""
    processes = []

    def make(factories, address_locks):
        processes.append(
            SimpleNamespace(
                registry=None,
                address_locks=address_locks,
                _parent_pid=os.getppid(),
                name_lock=NameLock(lock),
                _heartbeat=None,
                _control=SimpleNamespace(receive=lambda: None),
            )
        )
        fakes.supervisor = StandbySupervisor(processes[-1], factories)

    yield make
    for process in processes:
        process.name_lock.release()
        for each in process.address_locks.values():
            each.release()


def test_supervisor_at_the_address_of_another_application(fakes, standby, address, caplog):
    """It says so once, and starts the process when the address is free; others start before."""
    own, other = locks_of(address, *'αβ')
    standby({'fake': fakes.make, 'free': fakes.make}, {'fake': own})
    assert other.acquire()
    for _ in range(3):
        assert fakes.step(LOCK_INTERVAL) <= LOCK_INTERVAL
    assert list(fakes.supervisor.processes) == ['free']
    assert caplog.text.count('fake cannot start at') == 1
    assert caplog.text.count('another application of this user serves it (application β') == 1
    other.release()
    fakes.step(LOCK_INTERVAL)
    assert list(fakes.supervisor.processes) == ['fake', 'free']


def test_service_that_another_version_runs(fakes, standby, address, caplog):
    """A new release with one more service starts that one, and the others when they are free."""
    own, former = locks_of(address, *'αα')
    standby({'fake': fakes.make, 'added': fakes.make}, {'fake': own})
    assert former.acquire()
    fakes.step()
    assert list(fakes.supervisor.processes) == ['added']
    former.release()
    fakes.step(LOCK_INTERVAL)
    assert list(fakes.supervisor.processes) == ['fake', 'added']
    assert 'cannot start' not in caplog.text


def test_service_whose_address_cannot_be_locked(fakes, standby):
    """It has the lock of its name instead."""
    own, former = SocketLock('added'), SocketLock('added')
    standby({'fake': fakes.make, 'added': fakes.make}, {'added': own})
    assert former.acquire()
    fakes.step()
    assert list(fakes.supervisor.processes) == ['fake']
    former.release()
    fakes.step(LOCK_INTERVAL)
    assert list(fakes.supervisor.processes) == ['fake', 'added']
    fakes.made[-1].error = LookupError()
    fakes.crash()


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
