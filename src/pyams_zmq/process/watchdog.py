# SPDX-License-Identifier: ZPL-2.1
"""Processes that end when they should."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from math import inf
from threading import RLock, Thread
from time import monotonic, sleep
from typing import Any

from pyams_zmq.process.descendants import (
    POLL_INTERVAL,
    Reaper,
    end_tree,
    open_pidfd,
    poll,
    start_no_more,
)
from pyams_zmq.process.heartbeat import HEARTBEAT_INTERVAL, HeartbeatCounter

LOGGER = logging.getLogger('PyAMS (zmq)')

END_GRACE = 0.2
"""Seconds that the descendants of a process which is ended hard get for a SIGTERM"""


def has_ended(process: Any) -> bool:
    """Tell if a child has ended, also when somebody else has collected its exit code.

    :param process: multiprocessing process that this process has started
    """
    if process.is_alive():
        try:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # SIGCHLD is ignored, or its handler collects all children; by now the pid may be that
            # of a stranger, which must not get our signals.
            return True
        return False
    return True


def wait_for_exit(process: Any, timeout: float) -> bool:
    """Wait for the end of a child.

    :param process: multiprocessing process that this process has started
    :param timeout: seconds
    :return: true if the process has ended
    """
    deadline = monotonic() + timeout
    with open_pidfd(process.pid) as pidfd:
        while not has_ended(process):
            left = deadline - monotonic()
            if left <= 0:
                return False
            if pidfd is None:
                poll([], min(left, POLL_INTERVAL))
            else:
                poll([pidfd], left)
    return True


class Watchdog(Thread):
    """Ends this process in time, whatever its main thread does.

    It stops the process, by a SIGTERM to itself, when its owner says so or has died: nothing else
    ends a child whose owner was killed (`atexit` does not run, and PDEATHSIG follows a thread).
    Once armed, it ends the process hard, with all descendants, if that does not end by itself.

    :param owner: process id of the owner, the parent of this process
    :param orphan_timeout: seconds that this process gets once the owner has died
    :param control: descriptor on which the owner asks this process to stop
    :param drain_timeout: gives the seconds that this process gets once it was asked
    :param enter: called first in the thread
    :param pulse: shows the supervisor of this process that it is not stopped
    """

    def __init__(
        self,
        owner: int,
        orphan_timeout: float,
        control: int,
        drain_timeout: Callable[[], float],
        enter: Callable[[], None],
        pulse: HeartbeatCounter | None = None,
    ):
        super().__init__(name='pyams_zmq watchdog', daemon=True)
        self.owner = owner
        self.orphan_timeout = orphan_timeout
        self._control: int | None = control
        self._drain_timeout = drain_timeout
        self._enter = enter
        self._heartbeat = pulse
        self._lock = RLock()
        self._deadline: float | None = None
        self._asked = False
        self._reaper = Reaper()
        self._wake_read, self._wake_write = os.pipe()

    def arm(self, timeout: float) -> float:
        """Give the process some time to end; an earlier deadline stays.

        :param timeout: seconds
        :return: the deadline, on the monotonic clock
        """
        deadline = monotonic() + timeout
        # Two threads may do this at once, and a signal handler in the middle of it.
        with self._lock:
            if self._deadline is not None:
                deadline = min(deadline, self._deadline)
            self._deadline = deadline
        os.write(self._wake_write, b'\0')
        return deadline

    def run(self) -> None:
        """Wait for the owner or for the deadline."""
        self._enter()
        with open_pidfd(self.owner) as pidfd:
            self._watch_owner(pidfd)
        while True:
            with self._lock:
                if self._deadline is not None and monotonic() >= self._deadline:
                    self._end()
            self._wait(None)

    def rest(self) -> None:
        """Let the process leave, which is about to; if we end it already, that has to be all."""
        with self._lock:
            self._deadline = inf
            if self._heartbeat is not None:
                self._heartbeat.rest()
                self._heartbeat = None

    def _watch_owner(self, pidfd: int | None) -> None:
        while os.getppid() == self.owner:
            if self._deadline is not None and monotonic() >= self._deadline:
                return
            if self._wait(pidfd):
                break
        LOGGER.warning('The owner of this process (pid %s) died, stopping', self.owner)
        self._request_stop()
        self.arm(self.orphan_timeout)

    def _request_stop(self) -> None:
        if self._deadline is None:  # else it is stopping: a second signal would end it at once
            self._asked = True
            os.kill(os.getpid(), signal.SIGTERM)
            # CPython 3.11 never gets out of the next call of a traced function (debugger, coverage)
            # if the signal comes just before, and the main thread cannot handle it: let it come.
            sleep(0.05)

    def has_asked(self) -> bool:
        """Tell, once, that the signal which came in was our own."""
        asked, self._asked = self._asked, False
        return asked

    def _wait(self, pidfd: int | None) -> bool:
        """Wait for something to do; tell if the owner has died."""
        timeouts = [self._reaper.due] if self._deadline is None else [self._deadline]
        timeouts = [max(0, due - monotonic()) for due in timeouts]
        if pidfd is None:
            timeouts.append(POLL_INTERVAL)
        if self._beat():
            timeouts.append(HEARTBEAT_INTERVAL)
        fds = [fd for fd in (self._wake_read, self._control, pidfd) if fd is not None]
        readable = poll(fds, min(timeouts))
        self._reaper.step(monotonic())
        if self._wake_read in readable:
            os.read(self._wake_read, 64)
        if self._control in readable:
            self._read_control()
        return pidfd in readable

    def _beat(self) -> bool:
        with self._lock:  # a beat after the rest would promise others
            if self._heartbeat is not None:
                self._heartbeat.beat()
            return self._heartbeat is not None

    def _read_control(self) -> None:
        try:
            said = os.read(self._control or 0, 64)
        except OSError:
            said = b''
        if said:
            self._request_stop()
            self.arm(self._drain_timeout())  # a handler in a native call may not hear the signal
        else:  # the owner has died, or has become another program, which no pidfd tells
            self._control = None
            self._request_stop()
            self.arm(self.orphan_timeout)

    @staticmethod
    def _end() -> None:
        # Logged by another thread: the main one may be stuck with a lock of the logging.
        log = Thread(
            target=LOGGER.error,
            daemon=True,
            args=('This process did not end in time, it ends now',),
        )
        log.start()
        log.join(0.5)
        sys.setswitchinterval(1e-5)  # else a busy handler makes each look at /proc last seconds
        try:
            start_no_more()
            end_tree(END_GRACE, quiet=True)
        finally:
            os._exit(1)
