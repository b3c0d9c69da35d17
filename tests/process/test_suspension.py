# SPDX-License-Identifier: ZPL-2.1
"""Processes that are suspended, with their container or machine: methods do not lose their time."""

import asyncio
import ctypes
import select
import threading
import time
from functools import partial

import pytest

from checks import TIMEOUT, suspend
from handlers import Handler, MessageHandler, Process
from pyams_zmq.handler import zmq_method
from pyams_zmq.handler.deferred import DeferredReply
from pyams_zmq.handler.methods import Method
from pyams_zmq.process import deadlines as deadlines_module
from pyams_zmq.process.deadlines import CallDeadlines
from pyams_zmq.process.heartbeat import HeartbeatCounter
from pyams_zmq.process.suspension import count_switches, was_suspended
from pyams_zmq.socket import zmq_response, zmq_socket
from pyams_zmq.supervisor import SupervisorProcess

LIMIT = 3


class LimitedHandler(Handler):
    """Methods with a time limit."""

    @zmq_method(timeout=LIMIT)
    def limited(self, path):
        return self.wait_for(path)

    @zmq_method(timeout=LIMIT)
    async def async_limited(self, path):
        return await self.async_wait_for(path)


class LimitedMessageHandler(MessageHandler):
    """Serves LimitedHandler."""

    handler = LimitedHandler


class Limited(Process):
    """Serves LimitedHandler."""

    overdue_grace = 0.2

    def __init__(self, address):
        super().__init__(address, LimitedMessageHandler)


class Concurrent(Limited):
    """Handles several messages at a time."""

    concurrency = 3


@pytest.mark.parametrize(
    ('factory', 'method'), [(Limited, 'limited'), (Concurrent, 'async_limited')]
)
def test_method_has_its_time(address, ask, tmp_path, factory, method):
    """Supervisor and process are stopped for longer than a method may run."""
    supervisor = SupervisorProcess({'limited': partial(factory, address)})
    supervisor.start()
    path = tmp_path / 'held'
    try:
        status, pid = ask(address, ['pid', None], timeout=TIMEOUT)
        assert status == 200
        with zmq_socket(address) as socket:
            socket.send_json([method, str(path)])
            while not path.exists():
                assert not socket.poll(5)
            suspend([supervisor.pid, pid], LIMIT + 2)
            assert not socket.poll(700)  # neither 504 nor the end of the process
            path.unlink()
            assert zmq_response(socket) == [200, str(path)]
        assert ask(address, ['pid', None], timeout=TIMEOUT) == [200, pid]
    finally:
        supervisor.stop()


def test_wait_for_the_gil():
    """A thread that wakes up late because another one holds the GIL was not suspended."""
    waits = []

    def wait():
        start, switches = time.monotonic(), count_switches()
        select.poll().poll(100)
        waits.append((time.monotonic() - start - 0.1, count_switches() - switches))

    thread = threading.Thread(target=wait)
    thread.start()
    ctypes.PyDLL(None).usleep(2_000_000)
    thread.join()
    [(late, switches)] = waits
    assert late > 1.5
    assert not was_suspended(late, switches)
    assert was_suspended(late, 2)


def test_late_by_less_than_a_second():
    assert not was_suspended(0.9, 0)


@pytest.fixture
def clock(monkeypatch):
    """The time of the deadlines, in seconds, in a list."""
    clock = [1000.0]
    monkeypatch.setattr(deadlines_module, 'monotonic', lambda: clock[0])
    return clock


def test_deadlines(clock):
    """Those of calls that began before are postponed, also for the supervisor."""
    heartbeat = HeartbeatCounter()
    calls = CallDeadlines(1.0, heartbeat)
    calls.add('before', 10)
    clock[0] += 7.2
    calls.add('after', 1)
    assert calls.check_clock(0.5, 7.2, 2) == 7.2
    assert heartbeat.deadline == pytest.approx(1009.2)  # of the one after
    calls.remove('after')
    assert heartbeat.deadline == pytest.approx(1018.2)
    assert calls.find_overdue(1018.1) is None
    assert calls.find_overdue(1018.3) == 'before'
    assert calls.take_postponed('before') == 7.2
    assert calls.take_postponed('before') == 0
    heartbeat.close()


def test_deadlines_of_a_process_that_runs(clock):
    calls = CallDeadlines(1.0)
    calls.add('call', 10)
    clock[0] += 7.2
    assert not calls.is_current()
    assert calls.check_clock(0.5, 7.2, 1000) == 0
    assert calls.is_current()
    assert calls.take_postponed('call') == 0


class Stream:
    """Stores what is sent."""

    def __init__(self):
        self.sent = []
        self.send = self.sent.append


@pytest.mark.parametrize('is_suspended', [True, False])
def test_time_limit_passes_before_the_watchdog_runs(clock, is_suspended):
    """After the suspension, the reply waits until the watchdog has found out about it."""

    async def main():
        loop = asyncio.get_running_loop()
        calls = CallDeadlines(0.0)
        stream = Stream()
        owed = set()
        reply = DeferredReply(stream, Method(None, 'late', timeout=0.01), owed, calls)
        start = loop.time()
        reply.wait_for(loop.create_future())
        clock[0] += 2
        if is_suspended:
            loop.call_later(0.1, calls.check_clock, 0.5, 2.0, 0)
        await asyncio.wait(owed)
        assert stream.sent == [b'[504,"\'late\' has not ended after 0.01 s"]']
        reply._timer.cancel()
        return loop.time() - start

    assert (asyncio.run(main()) >= 2) == is_suspended
