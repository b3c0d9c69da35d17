# SPDX-License-Identifier: ZPL-2.1
"""The channel between a process and its owner: reports, commands, the end."""

import asyncio
import multiprocessing
import os
import pickle
import signal
import threading
import time
from functools import partial
from queue import SimpleQueue

import pytest
from pyramid.registry import Registry

from app.handler import Process
from checks import TIMEOUT, freeze, started
from pyams_zmq.exceptions import ZMQMessageError, ZMQStartError, ZMQTimeoutError
from pyams_zmq.process.base import OwnedProcess
from pyams_zmq.process.channel import STOP, Command, make_portable
from pyams_zmq.process.signals import SIGNALS
from pyams_zmq.process.watchdog import Watchdog
from pyams_zmq.supervisor import SupervisorProcess

ADDRESSES = {'in': ['tcp://127.0.0.1:1', 'ipc:///tmp/x'], 'out': []}


class Worker(OwnedProcess):
    """Runs the commands of its owner in a main thread without a loop."""

    drain_timeout = 20.0
    orphan_timeout = 20.0

    def __init__(self):
        super().__init__(Registry())
        self.commands = SimpleQueue()

    def run(self):
        self._drop_inherited_state()
        self._start_watchdog(self.commands.put).forward_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._send_report(ADDRESSES, None)
        seen = []
        while (command := self.commands.get()).name != 'SIGTERM':
            if command.number is None:
                seen.append(command.name)
            else:
                function = seen.copy if command.name == 'seen' else getattr(self, command.name)
                self._control.run(command, function)
        self._control.send_outcome('result', seen, ZMQMessageError(418, 'teapot'))

    def add(self, one, other):
        return one + other

    def nap(self, seconds):
        time.sleep(seconds)
        return 'rested'

    def fail(self):
        raise ZMQMessageError(404, 'no such thing')

    def leave(self):
        os._exit(7)

    def make_function(self):
        return lambda: None

    def make_text(self, size):
        return 'x' * size


@pytest.fixture
def worker():
    with started(Worker()) as process:
        assert process._wait_report(TIMEOUT) == ADDRESSES
        yield process


# Commands


def test_commands(worker):
    assert worker._call('add', 1, 2, timeout=TIMEOUT) == 3
    assert worker._call('add', 'a', 'b', timeout=TIMEOUT) == 'ab'
    with pytest.raises(ZMQMessageError, match='404 no such thing'):
        worker._call('fail', timeout=TIMEOUT)


@pytest.mark.parametrize(('name', 'args'), [('make_function', ()), ('make_text', (10**6,))])
def test_result_that_cannot_be_sent(worker, name, args):
    with pytest.raises(Exception, match='pickle|local object|Message too long'):
        worker._call(name, *args, timeout=TIMEOUT)
    assert worker._call('add', 1, 2, timeout=TIMEOUT) == 3


def test_late_answer(worker):
    with pytest.raises(ZMQTimeoutError, match=r'does not answer within 0.05 s'):
        worker._call('nap', 0.2, timeout=0.05)
    assert worker._call('add', 1, 2, timeout=TIMEOUT) == 3


def test_commands_of_threads(worker):
    """Each gets its own answer."""
    results = {}

    def run(number):
        results[number] = [worker._call('add', number, i, timeout=TIMEOUT) for i in range(20)]

    threads = [threading.Thread(target=run, args=(number * 100,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n * 100: list(range(n * 100, n * 100 + 20)) for n in range(4)}


def test_command_in_a_signal_handler(worker):
    """It comes in the middle of another command, in the same thread, and may read its answer."""
    results = []

    def handle(*args):
        results.append(worker._call('add', 1, 2, timeout=TIMEOUT))

    former = signal.signal(signal.SIGALRM, handle)
    try:
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert worker._call('nap', 0.5, timeout=TIMEOUT) == 'rested'
        assert time.monotonic() - start < TIMEOUT / 2  # it has not waited on for its answer
    finally:
        signal.signal(signal.SIGALRM, former)
    assert results == [3]


def test_child_ends_during_a_command(worker):
    with pytest.raises(ZMQStartError, match='ended with exit code 7'):
        worker._call('leave', timeout=TIMEOUT)
    with pytest.raises(ZMQStartError, match='ended with exit code 7'):
        worker._call('add', 1, 2, timeout=TIMEOUT)
    assert worker._receive_result() is None


def test_child_ends_while_another_fork_has_its_end(worker, monkeypatch):
    """Only the pidfd shows the end; without one, the exit code."""
    fork = os.fork()
    if not fork:
        signal.pause()
    control = os.dup(worker._channel.fileno())
    try:
        with pytest.raises(ZMQStartError, match='ended with exit code 7'):
            worker._call('leave', timeout=TIMEOUT)
        monkeypatch.delattr(os, 'pidfd_open')
        with pytest.raises(ZMQStartError, match='ended with exit code 7'):
            worker._call('add', 1, 2, timeout=TIMEOUT)
    finally:
        os.close(control)
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)


def test_child_is_stopped(worker):
    """The owner does not block, however many commands it sends."""
    freeze(worker.pid)
    try:
        for _time in range(2000):
            worker._ask_to_stop()
        with pytest.raises(ZMQTimeoutError):
            worker._call('add', 1, 2, timeout=0.01)
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    worker.join(TIMEOUT)
    assert worker.exitcode == 0


@pytest.mark.parametrize('factory', [Process, partial(SupervisorProcess, {}, lock=__name__)])
def test_unknown_command(factory):
    """A process that takes no commands answers with an error at once."""
    unknown = pytest.raises(ZMQStartError, match="Unknown command 'dance'")
    with started(factory()) as process, unknown:
        process._call('dance', timeout=TIMEOUT)


class Loop(OwnedProcess):
    """Runs the commands of its owner in a loop."""

    def __init__(self):
        super().__init__(Registry())

    def run(self):
        self._drop_inherited_state()
        asyncio.run(self.serve())

    async def serve(self):
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stopped.set)
        thread = threading.get_ident()

        def obey(command):
            self._control.run(command, lambda: threading.get_ident() == thread)

        self._start_watchdog(lambda command: loop.call_soon_threadsafe(obey, command))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self._send_report([], None)
        await stopped.wait()
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        loop.call_later(0.1, loop.stop)


def test_commands_in_a_loop():
    with started(Loop()) as process:
        process._wait_report(TIMEOUT)
        assert process._call('is_in_loop', timeout=TIMEOUT)


class Closed(OwnedProcess):
    """Cannot pass a command on."""

    def run(self):
        self._drop_inherited_state()
        loop = asyncio.new_event_loop()
        loop.close()
        self._start_watchdog(loop.call_soon_threadsafe)
        self._send_report([], None)
        signal.sigwait([signal.SIGTERM])


def test_command_that_cannot_be_passed_on():
    with started(Closed(Registry())) as process:
        process._wait_report(TIMEOUT)
        for _time in range(2):  # the watchdog survives it
            with pytest.raises(RuntimeError, match='Event loop is closed'):
                process._call('anything', timeout=TIMEOUT)


# Signals and the end


@pytest.mark.parametrize('num', [signal.SIGHUP, signal.SIGINT], ids=lambda num: num.name)
def test_signals_wake_the_main_thread(worker, num):
    os.kill(worker.pid, num)
    while (seen := worker._call('seen', timeout=TIMEOUT)) == []:
        pass
    assert seen == [num.name]


@pytest.mark.parametrize('end', ['stop', 'SIGTERM'])
def test_result(worker, end):
    os.kill(worker.pid, signal.SIGHUP)
    while not worker._call('seen', timeout=TIMEOUT):
        pass
    if end == 'stop':
        worker.stop()
    else:
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(TIMEOUT)
    assert worker.exitcode == 0
    for _time in range(2):
        value, error = worker._receive_result()
        assert value == ['SIGHUP']
        assert str(error) == '418 teapot'


def test_owner_closes_its_end(worker):
    """A program does so when it becomes another program (exec)."""
    worker._channel.close()
    worker.join(TIMEOUT)
    assert worker.exitcode == 0


def test_not_the_owner():
    worker = Worker()
    with pytest.raises(ZMQStartError, match='was not started by this process'):
        worker._call('add', 1, 2, timeout=1)
    with started(Worker()) as process:
        reader, writer = multiprocessing.Pipe(duplex=False)
        pid = os.fork()
        if not pid:
            try:
                process._wait_report(TIMEOUT)
            except ZMQStartError as error:
                writer.send(str(error))
            os._exit(0)
        os.waitpid(pid, 0)
        assert reader.recv().endswith('was not started by this process: call its start first')
        reader.close()
        writer.close()


# The ends


def test_messages(channel):
    owner, control = channel
    assert control.receive() is None
    owner.ask_to_stop()
    assert control.receive() == Command(STOP)
    control.send_outcome('report', ['address'])
    assert owner.wait('report', None, 0) == (['address'], None)
    control.close()
    assert owner.wait('result', None, 0) is None


def test_reports_come_before_a_reset(channel):
    """The child has ended without reading a command: the system reports that first."""
    owner, control = channel
    owner.ask_to_stop()
    control.send_outcome('result', 1)
    control.close()
    assert owner.wait('result', None, 0) == (1, None)
    owner.ask_to_stop()  # which does no harm
    with pytest.raises(EOFError):
        owner._receive()


def test_another_process_has_the_end_of_the_child(channel):
    """The channel does not show the end of the child, but still delivers its result."""
    owner, control = channel
    end, other_end = os.pipe()
    os.close(other_end)  # it is readable as a pidfd is
    assert owner.wait('result', end, TIMEOUT) is None
    control.send_outcome('result', 1)
    assert owner.wait('result', end, TIMEOUT) == (1, None)
    os.close(end)


def test_wake_up_without_a_command(channel):
    """The watchdog wakes up, and no command is there."""
    _owner, control = channel
    watchdog = Watchdog(os.getppid(), 1, control, int, int)
    watchdog._read_control(control)
    assert watchdog._deadline is None
    os.close(watchdog._wake_read)
    os.close(watchdog._wake_write)


def test_child_does_not_block(channel):
    """An owner that does not read loses messages; a watchdog that blocks would end nothing."""
    _owner, control = channel
    for _time in range(2000):
        control.refuse(Command('any', (), 1))


# Errors


class Stubborn(Exception):
    """Pickles, but cannot be unpickled."""

    def __init__(self, one, other):
        super().__init__(f'{one} {other}')


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (ValueError('as it is'), None),
        (Stubborn('not', 'back'), 'Stubborn: not back'),
        (ValueError(lambda: None), 'ValueError: <function'),
        (ValueError('x' * 40_000), 'ValueError: xxx'),
    ],
    ids=['portable', 'not unpickled', 'not pickled', 'large'],
)
def test_errors(error, text):
    result = make_portable(error)
    if text is None:
        assert result is error
    else:
        assert type(result) is ZMQStartError
        assert str(result).startswith(text)
        assert len(pickle.dumps(result)) < 2000
