# SPDX-License-Identifier: ZPL-2.1
"""Waiting for the end of a child, and the thread that ends this process at its deadline."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from math import inf
from threading import RLock, Thread
from time import sleep
from typing import Any

from pyams_zmq.process.channel import STOP, ChildChannel, Command
from pyams_zmq.process.deadlines import CallDeadlines
from pyams_zmq.process.descendants import (
    POLL_INTERVAL,
    Reaper,
    end_descendants,
    forbid_new_processes,
    open_pidfd,
    wait_for_any,
)
from pyams_zmq.process.heartbeat import HEARTBEAT_INTERVAL, HeartbeatCounter
from pyams_zmq.process.signals import SIGNALS, do_nothing
from pyams_zmq.process.suspension import count_switches
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.hard_end import end_hard
from pyams_zmq.wire.log_fields import fields_of
from pyams_zmq.wire.poll import wait_readable

LOGGER = logging.getLogger('PyAMS (zmq)')

RECYCLED = 75
"""Exit code by which a child asks its supervisor for a replacement (EX_TEMPFAIL of sysexits.h)"""

END_GRACE = 0.2
"""Seconds for descendants after a SIGTERM, and for threads, when their process is ended hard"""

OVERDUE_INTERVAL = 0.1  # seconds between two checks while a method is overdue

LOOP_TIMEOUT = 1.0
"""Seconds in which the main thread has to notice that a method is overdue"""


def has_ended(process: Any) -> bool:
    """Return True if a child has ended, also if its exit code was collected elsewhere.

    :param process: multiprocessing process that this process has started
    """
    if process.is_alive():
        try:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # SIGCHLD is ignored, or its handler collects all children. The pid may be that of a
            # process that is not ours by now, which must not get our signals.
            return True
        return False
    return True


def wait_for_exit(process: Any, timeout: float) -> bool:
    """Wait for the end of a child.

    :param process: multiprocessing process that this process has started
    :param timeout: seconds
    :return: True if the process has ended
    """
    deadline = monotonic() + timeout
    while not has_ended(process):
        left = deadline - monotonic()
        if left <= 0:
            return False
        wait_for_any([process], left)
    return True


class Watchdog(Thread):
    """Thread that ends this process in time, also if the main thread is stuck.

    With *calls* it checks that the methods end in time.

    It stops the process when its owner asks for that or has died: nothing else ends a child whose
    owner was killed (`atexit` does not run, and PDEATHSIG follows a thread). Once armed, it ends
    the process hard, with all descendants, at the deadline.

    :param owner: process id of the owner, the parent of this process
    :param orphan_timeout: seconds that this process gets once the owner has died
    :param control: channel on which the owner sends its commands
    :param drain_timeout: returns the seconds that this process gets once it was asked to stop
    :param enter: called first in the thread
    :param heartbeat: shows the supervisor of this process that it is not stopped
    :param on_stop: called in the thread to stop the process; by default :meth:`terminate`
    :param on_command: called in the thread for each other command, and must not block: pass the
        command to the main thread, with the `put` of a :class:`queue.SimpleQueue` or with
        `call_soon_threadsafe`; by default a command is refused
    :param calls: the calls that run
    :param on_overdue: called in the thread, again and again, with one of them that is overdue, and
        a function that the main thread has to call in :data:`LOOP_TIMEOUT` seconds; else this
        process ends hard. It must not block
    :ivar exit_code: exit code of a hard end
    """

    exit_code = 1

    def __init__(
        self,
        owner: int,
        orphan_timeout: float,
        control: ChildChannel,
        drain_timeout: Callable[[], float],
        enter: Callable[[], None],
        heartbeat: HeartbeatCounter | None = None,
        on_command: Callable[[Command], None] | None = None,
        *,
        on_stop: Callable[[], None] | None = None,
        calls: CallDeadlines | None = None,
        on_overdue: Callable[[object, Callable[[], None]], None] | None = None,
    ):
        super().__init__(name='pyams_zmq watchdog', daemon=True)
        self.owner = owner
        self.orphan_timeout = orphan_timeout
        self._control: ChildChannel | None = control
        self._drain_timeout = drain_timeout
        self._enter = enter
        self._heartbeat = heartbeat
        self._on_command = control.refuse if on_command is None else on_command
        self._on_stop = self.terminate if on_stop is None else on_stop
        self._calls = calls
        self._on_overdue: Any = on_overdue
        self._overdue: object | None = None
        self._confirm_by: float | None = None
        self._lock = RLock()
        self._deadline: float | None = None
        self._asked = False
        self._reaper = Reaper()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def arm(self, timeout: float) -> float:
        """Set the deadline for the end of this process; an earlier one stays.

        :param timeout: seconds
        :return: the deadline, on the monotonic clock
        """
        deadline = monotonic() + timeout
        # Two threads may do this at once, and a signal handler may interrupt them.
        with self._lock:
            if self._deadline is not None:
                deadline = min(deadline, self._deadline)
            self._deadline = deadline
        with suppress(BlockingIOError):  # full: the thread wakes up anyway
            os.write(self._wake_write, b'\0')
        return deadline

    def forward_signals(self) -> None:
        """Handle SIGTERM, SIGINT and SIGHUP as commands with their names; for a main thread.

        A main thread that waits for a queue would sleep on if a signal came just before that, or in
        another thread. The byte that Python writes to the wake-up pipe wakes this thread instead.
        """
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for num in SIGNALS:
            signal.signal(num, do_nothing)

    def run(self) -> None:
        """Wait for the owner or for the deadline."""
        self._enter()
        with open_pidfd(self.owner) as pidfd:
            self._watch_owner(pidfd)
        while True:
            with self._lock:
                if self._deadline is not None and monotonic() >= self._deadline:
                    self._end('This process did not end in time and is ended now')
            self._wait(None)

    def disarm(self) -> None:
        """Let this process exit; if the watchdog ends it already, wait for that."""
        with self._lock:
            self._deadline = inf
            if self._heartbeat is not None:
                self._heartbeat.clear()
                self._heartbeat = None

    def _watch_owner(self, pidfd: int | None) -> None:
        while os.getppid() == self.owner:
            if self._deadline is not None and monotonic() >= self._deadline:
                return
            if self._wait(pidfd):
                break
        # An orderly stop ends a web server that does not handle SIGTERM in the same way as a kill.
        LOGGER.info('The owner of this process (pid %s) died, stopping', self.owner)
        self._request_stop(self.orphan_timeout)

    def _request_stop(self, timeout: float) -> None:
        # The handler of another signal calls `arm`, and then `has_asked`. In one step: otherwise it
        # may do so in between, and take the signal of `terminate` for a second one.
        with self._lock:
            is_running = self._deadline is None
            if is_running:
                self._asked = True
        if is_running:  # else it is stopping: a second signal would end it at once
            self._on_stop()
        self.arm(timeout)  # a handler in a native call may not handle the signal

    def terminate(self) -> None:
        """Send a SIGTERM to this process."""
        os.kill(os.getpid(), signal.SIGTERM)
        # In CPython 3.11 this thread never returns from the next call of a traced function
        # (debugger, coverage) if the signal arrives just before the call and the main thread
        # cannot handle it. So wait until the signal has arrived.
        sleep(0.05)

    def has_asked(self) -> bool:
        """Return True, once, if this watchdog has stopped this process: it may send a signal."""
        asked, self._asked = self._asked, False
        return asked

    def _wait(self, pidfd: int | None) -> bool:
        """Wait for something to do; return True if the owner has died."""
        due = self._reaper.due if self._deadline is None else self._deadline
        timeouts = [max(0, due - monotonic())]
        if pidfd is None:
            timeouts.append(POLL_INTERVAL)
        if self._beat() or self._calls is not None:
            timeouts.append(HEARTBEAT_INTERVAL)
        if self._calls is not None:
            timeouts.append(OVERDUE_INTERVAL if self._overdue else self._calls.time_left())
        control = None if self._control is None else self._control.fileno()
        fds = [fd for fd in (self._wake_read, control, pidfd) if fd is not None]
        timeout = min(timeouts)
        start, switches = monotonic(), count_switches()
        readable = wait_readable(fds, timeout)
        now = monotonic()
        if self._calls is not None:
            switches = count_switches() - switches
            suspended = self._calls.check_clock(timeout, now - start, switches)
            if self._confirm_by is not None:
                self._confirm_by += suspended
            if self._deadline is None:  # else it is stopping
                self._check_calls(self._calls, now)
        self._reaper.step(now)
        if self._wake_read in readable:
            for num in filter(None, os.read(self._wake_read, 64)):
                self._on_command(Command(signal.Signals(num).name))
        if self._control is not None and control in readable:
            self._read_control(self._control)
        return pidfd in readable

    def _check_calls(self, calls: CallDeadlines, now: float) -> None:
        former, self._overdue = self._overdue, calls.find_overdue(now)
        # Twice: if this process was suspended for less than a second, its method can end meanwhile.
        if self._overdue is None or self._overdue is not former:
            self._confirm_by = None
        elif self._confirm_by is None:
            self._confirm_by = now + LOOP_TIMEOUT
            self.exit_code = RECYCLED
            self._on_overdue(self._overdue, self._confirm)
        elif now >= self._confirm_by:
            self._end(f'{self._overdue} has not ended and blocks this process, which is ended now')

    def _confirm(self) -> None:
        self._confirm_by = None

    def _beat(self) -> bool:
        with self._lock:  # no beat may follow `clear`
            if self._heartbeat is not None:
                self._heartbeat.beat()
            return self._heartbeat is not None

    def _read_control(self, control: ChildChannel) -> None:
        try:
            command = control.receive()
        except EOFError:  # the owner has died, or has become another program, which no pidfd shows
            self._control = None
            self._request_stop(self.orphan_timeout)
            return
        if command is None:
            return
        if command.name == STOP:
            self._request_stop(self._drain_timeout())
            return
        try:
            self._on_command(command)
        except Exception as error:  # noqa: BLE001 - the loop is closed, for instance: the owner gets it
            control.send_outcome(command.number, None, error)

    def _end(self, reason: str) -> None:
        try:
            # Logged by another thread: the main one may be stuck with a lock of the logging.
            options = {'extra': fields_of(self._overdue)}
            log = Thread(target=LOGGER.error, daemon=True, args=('%s', reason), kwargs=options)
            log.start()
            log.join(0.5)
            sys.setswitchinterval(
                1e-5
            )  # else each read of /proc takes seconds beside a busy handler
            forbid_new_processes()
            end_descendants(END_GRACE, quiet=True)
        finally:
            end_hard(self.exit_code)
