#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

"""PyAMS_zmq.watchdog module: processes that end when they should."""

import logging
import multiprocessing
import os
import select
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from math import ceil
from threading import Thread
from time import monotonic
from typing import Any

__docformat__ = 'restructuredtext'

LOGGER = logging.getLogger('PyAMS (zmq)')

POLL_INTERVAL = 0.1
"""Seconds between two looks at a process, where the system has no pidfd (Linux before 5.3)"""


@contextmanager
def open_pidfd(pid: int | None) -> Iterator[int | None]:
    """Give a descriptor that gets readable when a process ends.

    A multiprocessing sentinel is a pipe, which every process forked meanwhile holds open too.

    :param pid: process id
    :return: the descriptor, or None if the system has none or the process is gone
    """
    try:
        fd = os.pidfd_open(pid or 0)
    except (AttributeError, OSError):
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def poll(fds: Iterable[int], timeout: float | None) -> set[int]:
    """Wait until one of some descriptors is readable.

    :param fds: descriptors; `select.select` would refuse those above 1023
    :param timeout: seconds, None waits without end
    :return: the readable ones
    """
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return {fd for fd, _ in poller.poll(None if timeout is None else ceil(timeout * 1000))}


def wait_for_exit(process: Any, timeout: float) -> bool:
    """Wait for the end of a child.

    :param process: multiprocessing process that this process has started
    :param timeout: seconds
    :return: true if the process has ended
    """
    deadline = monotonic() + timeout
    with open_pidfd(process.pid) as pidfd:
        while process.is_alive():
            left = deadline - monotonic()
            if left <= 0:
                return False
            if pidfd is None:
                poll([], min(left, POLL_INTERVAL))
            else:
                poll([pidfd], left)
    return True


def end_children(timeout: float) -> None:
    """End the children of this process: wait for them, then terminate, then kill.

    :param timeout: seconds they get to end by themselves
    """
    deadline = monotonic() + timeout
    for child in multiprocessing.active_children():
        wait_for_exit(child, max(0, deadline - monotonic()))
    for end in ('terminate', 'kill'):
        for child in multiprocessing.active_children():
            LOGGER.warning('%s still runs: %s', child.name, end)
            getattr(child, end)()
            wait_for_exit(child, 1)


class Watchdog(Thread):
    """Ends this process in time, whatever its main thread does.

    It stops the process, by a SIGTERM to itself, as soon as its owner died: nothing else ends a
    child whose owner was killed (`atexit` does not run, and PDEATHSIG follows a thread). Once
    armed, it ends the process hard if that does not end by itself.

    :param owner: process id of the owner, the parent of this process
    :param orphan_timeout: seconds that this process gets once the owner has died
    """

    def __init__(self, owner: int, orphan_timeout: float):
        super().__init__(name='pyams_zmq watchdog', daemon=True)
        self.owner = owner
        self.orphan_timeout = orphan_timeout
        self._deadline: float | None = None
        self._wake_read, self._wake_write = os.pipe()

    def arm(self, timeout: float) -> float:
        """Give the process some time to end; an earlier deadline stays.

        :param timeout: seconds
        :return: the deadline, on the monotonic clock
        """
        deadline = monotonic() + timeout
        if self._deadline is not None:
            deadline = min(deadline, self._deadline)
        self._deadline = deadline
        os.write(self._wake_write, b'\0')
        return deadline

    def run(self) -> None:
        """Wait for the owner's death or for the deadline."""
        with open_pidfd(self.owner) as pidfd:
            self._wait_for_owner(pidfd)
        while self._left() > 0:
            self._wait(None)
        self._end()

    def _wait_for_owner(self, pidfd: int | None) -> None:
        while os.getppid() == self.owner:
            if self._left() <= 0:
                return
            if self._wait(pidfd):
                break
        LOGGER.warning('The owner of this process (pid %s) died, stopping', self.owner)
        is_stopping = self._deadline is not None
        self.arm(self.orphan_timeout)
        if not is_stopping:
            os.kill(os.getpid(), signal.SIGTERM)

    def _left(self) -> float:
        """Seconds until the deadline; where only a look tells of the owner, until the next one."""
        return 1 if self._deadline is None else self._deadline - monotonic()

    def _wait(self, pidfd: int | None) -> bool:
        fds = [self._wake_read] if pidfd is None else [self._wake_read, pidfd]
        timeout = None if self._deadline is None else max(0, self._left())
        if pidfd is None:
            timeout = POLL_INTERVAL if timeout is None else min(timeout, POLL_INTERVAL)
        readable = poll(fds, timeout)
        if self._wake_read in readable:
            os.read(self._wake_read, 64)
        return pidfd in readable

    @staticmethod
    def _end() -> None:
        # Logged by another thread: the main one may be stuck with a lock of the logging.
        log = Thread(
            target=LOGGER.error,
            daemon=True,
            args=('The message in hand was not finished in time, this process ends now',),
        )
        log.start()
        log.join(0.5)
        for child in multiprocessing.active_children():
            with suppress(OSError):
                child.terminate()
        os._exit(1)
