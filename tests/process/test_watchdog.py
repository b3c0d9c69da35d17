# SPDX-License-Identifier: ZPL-2.1
"""Processes that end when they should: what waits for them, and what ends them."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from math import inf

import pytest

from checks import TIMEOUT, open_fds, wait_until
from handlers import Handler, MessageHandler, Process
from pyams_zmq.process.channel import ChildChannel, open_channel
from pyams_zmq.process.descendants import end_descendants, open_pidfd, wait_for_descendants
from pyams_zmq.process.watchdog import Watchdog, wait_for_exit
from pyams_zmq.wire.poll import wait_readable

FORK = multiprocessing.get_context('fork')
NO_FD = 999_999
HOUR = 3600
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(params=['pidfd', 'no pidfd'])
def pidfd(request, monkeypatch):
    """Run a test with the pidfd of the system, and as before Linux 5.3."""
    if request.param == 'no pidfd':
        monkeypatch.delattr(os, 'pidfd_open')
    return request.param


@pytest.fixture
def pipe():
    """Return the ends of a pipe; the reader sees when all writers have ended."""
    reader, writer = FORK.Pipe(duplex=False)
    yield reader, writer
    reader.close()
    writer.close()


@pytest.fixture
def fork(pipe):
    """Fork children that run a function; they end with the test."""
    children = []

    def fork_child(function, *args):
        child = FORK.Process(target=function, args=args)
        child.start()
        children.append(child)
        return child

    yield fork_child
    for child in children:
        child.kill()
        child.join()


@pytest.fixture
def reaper():
    """Inherit the orphans of the children of this process."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0)


def forget(process):
    """Let multiprocessing know that a process was reaped elsewhere."""
    process._popen.returncode = 0


def sleep():
    # Not in one go: a signal between the last look of Python for signals and the system call does
    # not interrupt the call, and its handler would not run before the end of it.
    deadline = time.monotonic() + HOUR
    while time.monotonic() < deadline:
        time.sleep(0.1)


def own(function):
    """Own a child that runs a function."""
    FORK.Process(target=function).start()
    sleep()


def ignore_sigterm(writer):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    writer.send(os.getpid())
    sleep()


# Descriptors


def test_open_pidfd(fork):
    child = fork(sleep)
    fds = open_fds()
    with open_pidfd(child.pid) as fd:
        assert wait_readable([fd], 0) == set()
        child.kill()
        assert wait_readable([fd], 5) == {fd}
    assert open_fds() <= fds
    child.join()
    with open_pidfd(child.pid) as fd:
        assert fd is None  # it is gone


def test_open_pidfd_closes_after_an_error():
    fds = open_fds()

    def fail():
        with open_pidfd(os.getpid()):
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert open_fds() <= fds


@pytest.mark.parametrize('pid', [None, 0, -1, 2**30])
def test_open_pidfd_of_nothing(pid):
    with open_pidfd(pid) as fd:
        assert fd is None


def test_open_pidfd_where_there_is_none(monkeypatch):
    monkeypatch.delattr(os, 'pidfd_open')
    with open_pidfd(os.getpid()) as fd:
        assert fd is None


# wait_for_exit


@pytest.mark.usefixtures('pidfd')
class TestWaitForExit:
    """With and without pidfd."""

    @pytest.mark.parametrize('timeout', [5, inf, 1e9])
    def test_it_ends(self, fork, pipe, timeout):
        reader, writer = pipe
        child = fork(reader.recv)
        threading.Timer(0.05, writer.send, [None]).start()
        fds = open_fds()
        assert wait_for_exit(child, timeout)
        assert child.exitcode == 0
        assert open_fds() <= fds

    def test_it_has_ended(self, fork):
        child = fork(int)
        child.join()
        assert wait_for_exit(child, 0)

    def test_it_was_not_started(self):
        assert wait_for_exit(FORK.Process(target=sleep), 0)

    @pytest.mark.parametrize('timeout', [0, 0.05, 0.15])
    def test_it_does_not_end(self, fork, timeout):
        child = fork(sleep)
        fds = open_fds()
        start = time.monotonic()
        assert not wait_for_exit(child, timeout)
        assert timeout <= time.monotonic() - start < TIMEOUT
        assert open_fds() <= fds

    def test_negative_timeout(self, fork):
        assert not wait_for_exit(fork(sleep), -1)

    def test_reaped_elsewhere(self, fork):
        """Some programs collect all their children, gunicorn's arbiter for instance."""
        child = fork(int)
        os.waitpid(child.pid, 0)
        try:
            start = time.monotonic()
            assert wait_for_exit(child, TIMEOUT)
            assert time.monotonic() - start < TIMEOUT
        finally:
            forget(child)

    def test_reaped_by_the_system(self, fork, pipe):
        reader, writer = pipe
        child = fork(reader.recv)
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            threading.Timer(0.05, writer.send, [None]).start()
            start = time.monotonic()
            assert wait_for_exit(child, TIMEOUT)
            assert time.monotonic() - start < TIMEOUT
        finally:
            signal.signal(signal.SIGCHLD, before)
            forget(child)


# wait_for_descendants, end_descendants


def test_end_descendants(fork, pipe, caplog):
    reader, writer = pipe
    quick, slow, stubborn = fork(int), fork(sleep), fork(ignore_sigterm, writer)
    assert reader.recv() == stubborn.pid
    quick.join()
    assert not wait_for_descendants(0.05)
    assert slow.is_alive()
    end_descendants(3)
    assert [child.exitcode for child in (quick, slow, stubborn)] == [
        0,
        -signal.SIGTERM,
        -signal.SIGKILL,
    ]
    ends = [message.partition('(')[2] for message in caplog.messages]
    assert sorted(ends) == sorted(
        [
            f'pid {slow.pid}) still runs: SIGTERM',
            f'pid {stubborn.pid}) still runs: SIGTERM',
            f'pid {stubborn.pid}) still runs: SIGKILL',
        ]
    )


def test_wait_for_descendants(fork, pipe, caplog):
    reader, writer = pipe
    child = fork(reader.recv)
    threading.Timer(0.1, writer.send, [None]).start()
    assert wait_for_descendants(5)
    assert child.exitcode == 0
    assert caplog.messages == []


def test_wait_for_several_descendants(fork):
    children = [fork(sleep) for _ in range(5)]
    start = time.monotonic()
    assert not wait_for_descendants(0.2)
    end_descendants(TIMEOUT)
    assert 0.2 <= time.monotonic() - start < TIMEOUT
    assert {child.exitcode for child in children} == {-signal.SIGTERM}


def test_no_descendants():
    start = time.monotonic()
    assert wait_for_descendants(HOUR)
    end_descendants(HOUR)
    assert time.monotonic() - start < TIMEOUT


# Watchdog

OPEN = []  # ends of channels of owners that send nothing


def start_watchdog(owner=None, orphan_timeout=HOUR, control=None, drain_timeout=HOUR, enter=int):
    """Start the watchdog of this process."""
    if control is None:
        owner_end, control = open_channel()
        OPEN.append(owner_end)
    watchdog = Watchdog(
        owner or os.getppid(), orphan_timeout, control, lambda: drain_timeout, enter
    )
    watchdog.start()
    return watchdog


class RacingWatchdog(Watchdog):
    """Calls a hook right after its deadline was read."""

    hook = None

    @property
    def _deadline(self):
        value = self._value
        hook, self.hook = self.hook, None
        if hook is not None:
            hook()
        return value

    @_deadline.setter
    def _deadline(self, value):
        self._value = value


def watch(function, **options):
    """Return a function for a child, which passes its watchdog to another function."""
    return lambda: function(start_watchdog(**options))


def end_of(child):
    """Wait until a child has ended by itself; return the time, on the monotonic clock."""
    child.join(TIMEOUT)
    assert not child.is_alive()
    return time.monotonic()


def reap(pid):
    """Wait for an orphan; return its exit code."""
    codes = []
    wait_until(lambda: is_gone(pid, codes))
    return codes[0]


def is_gone(pid, codes=None):
    """Return True if a descendant has ended; reap it if its parent did not."""
    with suppress(ChildProcessError):  # its parent has not ended yet
        reaped, status = os.waitpid(pid, os.WNOHANG)
        if reaped and codes is not None:
            codes.append(os.waitstatus_to_exitcode(status))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.usefixtures('pidfd')
class TestWatchdog:
    """In children, with and without pidfd."""

    def test_nothing_to_do(self, fork, pipe):
        """It ends nothing while the owner lives, and does not keep the process from ending."""
        reader, writer = pipe

        def run(watchdog):
            watchdog.join(0.3)
            writer.send(watchdog.is_alive())

        child = fork(watch(run))
        assert reader.recv() is True
        end_of(child)
        assert child.exitcode == 0

    def test_deadline(self, fork, pipe):
        reader, writer = pipe
        child = fork(watch(lambda watchdog: (writer.send(watchdog.arm(0.2)), sleep())))
        assert reader.recv() <= end_of(child)
        assert child.exitcode == 1

    @pytest.mark.parametrize('timeouts', [(0.2, HOUR), (HOUR, 0.2), (0.2, inf), (inf, 0.2)])
    def test_earlier_deadline_stays(self, fork, pipe, timeouts):
        reader, writer = pipe

        def run(watchdog):
            before = time.monotonic()
            deadlines = [watchdog.arm(timeout) for timeout in timeouts]
            writer.send((before, deadlines, time.monotonic()))
            sleep()

        child = fork(watch(run))
        before, deadlines, after = reader.recv()
        for deadline, timeout in zip(deadlines, (timeouts[0], 0.2), strict=True):
            assert before + timeout <= deadline <= after + timeout
        assert deadlines[1] <= end_of(child)
        assert child.exitcode == 1

    def test_deadline_in_the_past(self, fork):
        child = fork(watch(lambda watchdog: (watchdog.arm(-1), sleep())))
        end_of(child)
        assert child.exitcode == 1

    def test_end_in_time(self, fork):
        child = fork(watch(lambda watchdog: watchdog.arm(HOUR)))
        end_of(child)
        assert child.exitcode == 0

    def test_many_deadlines(self, fork):
        """They do not block the signal handler that sets them."""
        child = fork(watch(lambda watchdog: [watchdog.arm(HOUR) for _ in range(70_000)]))
        end_of(child)
        assert child.exitcode == 0

    def test_deadlines_of_two_threads(self, channel):
        """The earlier one stays, when one thread comes in the middle of another."""
        watchdog = RacingWatchdog(os.getppid(), HOUR, channel[1], int, int)
        other = threading.Thread(target=watchdog.arm, args=(1,))

        def come_in_between():
            other.start()
            other.join(0.2)

        watchdog.hook = come_in_between
        watchdog.arm(HOUR)
        other.join()
        assert watchdog._deadline < time.monotonic() + 10
        os.close(watchdog._wake_read)
        os.close(watchdog._wake_write)

    def test_second_request_to_stop(self, channel):
        """The signal of the first one may still be on its way, and stays known."""
        stops = []
        watchdog = Watchdog(
            os.getppid(), HOUR, channel[1], int, int, on_stop=lambda: stops.append(watchdog._asked)
        )
        for _request in range(2):
            watchdog._request_stop(HOUR)
        assert stops == [True]
        assert [watchdog.has_asked(), watchdog.has_asked()] == [True, False]
        os.close(watchdog._wake_read)
        os.close(watchdog._wake_write)

    def test_it_is_logged(self, fork, tmp_path):
        def run(watchdog):
            logging.getLogger().addHandler(logging.FileHandler(tmp_path / 'log'))
            watchdog.arm(0)
            sleep()

        fork(watch(run)).join(TIMEOUT)
        assert 'did not end in time' in (tmp_path / 'log').read_text(encoding='utf-8')

    def test_stuck_log(self, fork):
        """The main thread may be stuck with the lock of a log."""

        def run(watchdog):
            handler = logging.FileHandler(os.devnull)
            logging.getLogger().addHandler(handler)
            handler.acquire()
            watchdog.arm(0.1)
            sleep()

        child = fork(watch(run))
        end_of(child)
        assert child.exitcode == 1

    def test_children_end_too(self, fork, pipe, reaper):
        reader, writer = pipe

        def run(watchdog):
            for target in (sleep, ignore_sigterm):
                child = FORK.Process(target=target, args=(writer,)[: target is ignore_sigterm])
                child.start()
                writer.send((target.__name__, child.pid))
            go_reader.recv()
            watchdog.arm(0)
            sleep()

        go_reader, go_writer = FORK.Pipe(duplex=False)
        child = fork(watch(run))
        messages = [
            reader.recv() for _ in range(3)
        ]  # the stubborn one sends its pid when it is ready
        pids = dict(message for message in messages if isinstance(message, tuple))
        assert pids['ignore_sigterm'] in messages
        go_writer.send('go')
        child.join(5)
        assert child.exitcode == 1
        for pid in pids.values():
            wait_until(lambda pid=pid: is_gone(pid))
        go_reader.close()
        go_writer.close()

    @pytest.mark.parametrize('times', [1, 2])
    def test_owner_asks(self, fork, pipe, channel, times):
        reader, writer = pipe
        owner, control = channel

        def run():
            signal.signal(signal.SIGTERM, obey)
            start_watchdog(control=control)
            writer.send('ready')
            sleep()

        def obey(*args):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            writer.send('SIGTERM')
            os._exit(3)

        child = fork(run)
        assert reader.recv() == 'ready'
        for _time in range(times):
            owner.ask_to_stop()
        assert reader.recv() == 'SIGTERM'
        end_of(child)
        assert child.exitcode == 3

    def test_owner_asks_a_busy_main_thread(self, fork, pipe, channel):
        """A handler in a native call keeps Python from handling the signal."""
        reader, writer = pipe
        owner, control = channel

        def run():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            start_watchdog(control=control, drain_timeout=0.2)
            writer.send('ready')
            sleep()

        child = fork(run)
        assert reader.recv() == 'ready'
        start = time.monotonic()
        owner.ask_to_stop()
        assert start + 0.2 <= end_of(child)
        assert child.exitcode == 1

    def test_owner_asks_a_process_that_stops_already(self, fork, pipe, channel):
        reader, writer = pipe
        owner, control = channel

        def run():
            signal.signal(signal.SIGTERM, lambda *args: writer.send('SIGTERM'))
            start_watchdog(control=control).arm(0.3)
            writer.send('ready')
            sleep()

        child = fork(run)
        assert reader.recv() == 'ready'
        owner.ask_to_stop()
        end_of(child)
        assert child.exitcode == 1
        assert not reader.poll(0)

    @pytest.mark.parametrize('is_open', [True, False])
    def test_channel_ends(self, fork, pipe, is_open):
        """The owner has become another program, or a handler has closed all descriptors."""
        reader, writer = pipe

        def run():
            signal.signal(signal.SIGTERM, lambda *args: writer.send('SIGTERM'))
            owner, control = open_channel()
            owner.close()
            writer.send(time.monotonic())
            start_watchdog(orphan_timeout=0.3, control=control if is_open else ChildChannel(NO_FD))
            sleep()

        child = fork(run)
        start = reader.recv()
        assert reader.recv() == 'SIGTERM'
        assert start + 0.3 <= end_of(child)
        assert child.exitcode == 1

    def test_enter(self, fork, pipe):
        """The function runs in the thread, before anything else."""
        reader, writer = pipe

        def run():
            watchdog = start_watchdog(enter=lambda: writer.send(threading.get_native_id()))
            writer.send(watchdog.native_id)
            sleep()

        fork(run)
        assert reader.recv() == reader.recv()

    def test_fork(self, fork):
        """A method with the name of a private one of `Thread` would fail here."""

        def run():
            start_watchdog()
            sys.unraisablehook = lambda _args: os._exit(1)
            pid = os.fork()
            if not pid:
                os._exit(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

        child = fork(run)
        child.join(TIMEOUT)
        assert child.exitcode == 0

    def test_owner_died_before(self, fork, pipe):
        """Between the fork and the first check."""
        reader, writer = pipe

        def run():
            signal.signal(signal.SIGTERM, lambda *args: writer.send('SIGTERM'))
            writer.send(time.monotonic())
            start_watchdog(os.getpid(), 0.3)  # any process that is not our parent
            sleep()

        child = fork(run)
        start = reader.recv()
        assert reader.recv() == 'SIGTERM'
        assert start + 0.3 <= end_of(child)
        assert child.exitcode == 1

    @pytest.mark.parametrize('armed', [False, True])
    def test_owner_dies(self, fork, pipe, reaper, armed):
        """A process that stops already gets no second signal, which would end it at once."""
        reader, writer = pipe

        def work():
            signal.signal(signal.SIGTERM, lambda *args: writer.send('SIGTERM'))
            watchdog = start_watchdog(orphan_timeout=0.3)
            if armed:
                watchdog.arm(HOUR)
            writer.send(os.getpid())
            sleep()

        owner = fork(own, work)
        pid = reader.recv()
        assert not reader.poll(0.15)  # it goes on while the owner lives
        start = time.monotonic()
        os.kill(owner.pid, signal.SIGKILL)
        assert reap(pid) == 1
        assert start + 0.3 <= time.monotonic()
        messages = []
        while reader.poll(0):
            messages.append(reader.recv())
        assert messages == ([] if armed else ['SIGTERM'])

    def test_owner_dies_and_the_process_obeys(self, fork, pipe, reaper):
        reader, writer = pipe

        def work():
            start_watchdog()
            writer.send(os.getpid())
            sleep()

        owner = fork(own, work)
        pid = reader.recv()
        owner.kill()
        assert reap(pid) == -signal.SIGTERM


# With a ZMQProcess


class StubbornHandler(Handler):
    """Has children that ignore SIGTERM."""

    def spawn_stubborn(self, count):
        pids = []
        for _ in range(count):
            reader, writer = FORK.Pipe(duplex=False)
            FORK.Process(target=ignore_sigterm, args=(writer,)).start()
            pids.append(reader.recv())
        return [200, pids]


class StubbornMessageHandler(MessageHandler):
    handler = StubbornHandler


class ShortProcess(Process):
    """Gives its children half a second."""

    drain_timeout = 0.5


def test_stubborn_children_of_a_process(start, ask, reaper):
    """None of them survives it."""
    process = start(factory=ShortProcess, handler=StubbornMessageHandler)
    status, pids = ask(process, ['spawn_stubborn', 3])
    assert status == 200
    process.stop()
    assert not process.is_alive()
    for pid in pids:
        wait_until(lambda pid=pid: is_gone(pid))


class SignalHandler(Handler):
    """Gets its signal in another thread, which may happen to any process."""

    def stop_in_a_thread(self, args):
        def run():
            sleeping.wait(0.05)
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        sleeping = threading.Event()
        threading.Thread(target=run).start()
        return [200, None]


class SignalMessageHandler(MessageHandler):
    handler = SignalHandler


def test_signal_in_another_thread(start, ask):
    """It does not interrupt the sleep of the main thread, and still wakes up the loop."""
    process = start(handler=SignalMessageHandler)
    assert ask(process, ['stop_in_a_thread', None]) == [200, None]
    process.join(TIMEOUT)
    assert process.exitcode == 0


def test_stop_after_a_reply(start, ask):
    """The signal comes in while the loop goes to sleep; it must not sleep through it."""
    for _ in range(20):
        process = start()
        assert ask(process, ['echo', 1]) == [200, 1]
        before = time.monotonic()
        process.stop()
        assert time.monotonic() - before < TIMEOUT
        assert process.exitcode == 0


class PatientProcess(Process):
    drain_timeout = inf


@pytest.mark.parametrize('factory', [Process, PatientProcess])
def test_stop_of_a_process_that_was_reaped(start, factory):
    """By a program that collects all its children: the stop takes no time then."""
    process = start(factory=factory)
    os.kill(process.pid, signal.SIGTERM)
    os.waitpid(process.pid, 0)
    try:
        before = time.monotonic()
        process.stop()
        assert time.monotonic() - before < 4  # its `drain_timeout` is 3, and 2 come on top
    finally:
        forget(process)


def test_stop_without_a_limit(start, ask):
    process = start(factory=PatientProcess)
    assert ask(process, ['echo', 1]) == [200, 1]
    process.stop()
    assert process.exitcode == 0
