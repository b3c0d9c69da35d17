# SPDX-License-Identifier: ZPL-2.1
"""What a process has started, and what that has started, ends with it."""

import ctypes
import gc
import logging
import multiprocessing
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from math import ceil
from multiprocessing import forkserver, resource_tracker
from time import monotonic
from typing import Any

from pyams_zmq.exceptions import ZMQStartError

LOGGER = logging.getLogger('PyAMS (zmq)')

POLL_INTERVAL = 0.1
"""Seconds between two looks at a process, where the system has no pidfd (Linux before 5.3)"""

LOOK_INTERVAL = 1.0
"""Seconds after which a tree is looked at again, whether or not something in it has ended"""

CLEANUP_INTERVAL = 0.05
"""Seconds between two looks at what is swept"""

CLEANUP_GRACE = 1.0
"""Seconds that what is swept gets for a SIGTERM, and then for a SIGKILL"""

REAP_INTERVAL = 60.0
"""Seconds between two looks for adopted processes that have ended"""

_STARTS = {'subprocess.Popen', 'os.system', 'os.posix_spawn', 'os.fork', 'os.forkpty'}
_LONGEST_POLL = 2_000_000  # it counts milliseconds in 31 bits
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


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
    milliseconds = None if timeout is None else ceil(min(timeout, _LONGEST_POLL) * 1000)
    return {fd for fd, _ in poller.poll(milliseconds)}


@contextmanager
def subreaper() -> Iterator[bool]:
    """Adopt the descendants whose parent ends, see PR_SET_CHILD_SUBREAPER in prctl(2).

    :return: false if the system does not know how: then they are lost to us
    """
    before = ctypes.c_int()
    _prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    try:
        yield become_subreaper()
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(before.value))


def become_subreaper() -> bool:
    """Adopt the descendants whose parent ends, from now on; see :func:`subreaper`."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1))


def _prctl(option: int, argument: Any) -> bool:
    try:
        return bool(ctypes.CDLL(None).prctl(option, argument) == 0)
    except (AttributeError, OSError):
        return False


@dataclass(frozen=True)
class ProcessInfo:
    """A process as it was when we looked; its start time tells it from a later one of that pid."""

    pid: int
    started: int
    parent: int = field(compare=False)
    name: str = field(compare=False)
    has_ended: bool = field(compare=False)

    @classmethod
    def look(cls, pid: int | str) -> 'ProcessInfo | None':
        """Read about a process in /proc, see proc_pid_stat(5); None if it is gone."""
        try:
            with open(f'/proc/{pid}/stat', 'rb', buffering=0) as file:
                head, _, tail = file.read(1024).rpartition(b')')
        except (FileNotFoundError, ProcessLookupError):
            return None
        number, _, name = head.partition(b' (')
        state, parent, *fields = tail.split()
        # The main thread may have ended, and others still run.
        has_ended = state in {b'Z', b'X'} and int(fields[15]) <= 1
        return cls(
            int(number), int(fields[17]), int(parent), name.decode(errors='replace'), has_ended
        )

    def send(self, num: int) -> None:
        """Send a signal, if it is still this process; it may be another user's: sudo."""
        with open_pidfd(self.pid) as pidfd, suppress(ProcessLookupError, PermissionError):
            if ProcessInfo.look(self.pid) != self:
                return
            if pidfd is None:
                os.kill(self.pid, num)
            else:
                signal.pidfd_send_signal(pidfd, num)


Families = dict[int, list[ProcessInfo]]


def _families() -> Families:
    """List all processes by their parent."""
    families: Families = {}
    # The /proc of another PID namespace (unshare --pid) has other processes by our numbers.
    if os.readlink('/proc/self') == str(os.getpid()):
        for relative in map(ProcessInfo.look, filter(str.isdecimal, os.listdir('/proc'))):
            if relative is not None:
                families.setdefault(relative.parent, []).append(relative)
    return families


def _below(families: Families, pids: Iterable[int]) -> Iterator[ProcessInfo]:
    waiting = list(pids)
    while waiting:
        children = families.pop(waiting.pop(), [])
        waiting.extend(child.pid for child in children)
        yield from children


def _helpers() -> set[Any]:
    """Pids of what multiprocessing runs for itself, and ends with this process."""
    return {
        getattr(resource_tracker._resource_tracker, '_pid', None),
        getattr(forkserver._forkserver, '_forkserver_pid', None),
    }


def children() -> set[ProcessInfo]:
    """List the children of this process, also those that have ended and nobody waited for."""
    return set(_families().get(os.getpid(), []))


def descendants() -> set[ProcessInfo]:
    """List the descendants of this process that run."""
    return _look_twice(lambda: _running(_below(_families(), [os.getpid()])))


def _running(relatives: Iterable[ProcessInfo]) -> set[ProcessInfo]:
    helpers = _helpers()
    return {each for each in relatives if not each.has_ended and each.pid not in helpers}


def _look_twice(look: Callable[[], set[ProcessInfo]]) -> set[ProcessInfo]:
    # Who is looked at just before its parent ends, and that one just after, is in no family.
    return look() or look()


def _adopted(relatives: set[ProcessInfo]) -> set[ProcessInfo]:
    """Those of our children which neither multiprocessing nor subprocess has started: adopted ones.

    An exit code that their objects wait for must not be taken from them.
    """
    known = {child.pid for child in multiprocessing.process._children}  # type: ignore[attr-defined] # private
    adopted = {each for each in relatives if each.pid not in known | _helpers()}
    if adopted:
        pids = _awaited_pids()
        adopted = {each for each in adopted if each.pid not in pids}
    return adopted


def _awaited_pids() -> set[Any]:
    return {
        vars(each).get('pid')
        for each in gc.get_objects()  # of which there may be many: not every day
        if issubclass(type(each), subprocess.Popen) and vars(each).get('returncode') is None
    }


def _reap(relative: ProcessInfo) -> None:
    with suppress(ChildProcessError):  # SIGCHLD is ignored: the system has done it
        os.waitpid(relative.pid, os.WNOHANG)


def wait_for_tree(timeout: float) -> bool:
    """Wait until all descendants of this process have ended by themselves.

    :param timeout: seconds
    :return: true if they have
    """
    deadline = monotonic() + timeout
    while running := descendants():
        left = deadline - monotonic()
        if left <= 0:
            return False
        _wait_for_any(running, left)
    return True


def end_tree(grace: float, *, quiet: bool = False) -> None:
    """Terminate all descendants of this process, then kill those that are left.

    Their exit codes are left to whoever waits for them.

    :param grace: seconds they get for a SIGTERM, and then for a SIGKILL
    :param quiet: do not log: a thread that is stuck may hold a lock of the logging
    """
    for num in (signal.SIGTERM, signal.SIGKILL):
        deadline = monotonic() + grace
        told: set[ProcessInfo] = set()
        while running := descendants():
            for each in running - told:  # some are started while others end
                _tell(each, num, quiet=quiet)
            told |= running
            left = deadline - monotonic()
            if left <= 0:
                break
            _wait_for_any(running, left)
        else:
            return


def start_no_more() -> None:
    """Keep the threads of this process, which is to end, from starting others meanwhile."""
    sys.addaudithook(_refuse)


def _refuse(event: str, _args: Any) -> None:
    if event in _STARTS:
        raise ZMQStartError('This process ends, it starts no others')


def _tell(relative: ProcessInfo, num: signal.Signals, *, quiet: bool = False) -> None:
    if not quiet:
        LOGGER.warning('%s (pid %s) still runs: %s', relative.name, relative.pid, num.name)
    relative.send(num)


def _wait_for_any(relatives: Iterable[ProcessInfo], timeout: float) -> None:
    with ExitStack() as stack:
        pidfds = [stack.enter_context(open_pidfd(each.pid)) for each in relatives]
        fds = [fd for fd in pidfds if fd is not None]
        interval = LOOK_INTERVAL if len(fds) == len(pidfds) else POLL_INTERVAL
        poll(fds, min(timeout, interval))


class OrphanCleanup:
    """Ends what the end of another process has left to this one, step by step.

    :param keep: children of this process that nobody has left to it
    :param now: present time in seconds
    :param grace: seconds that they get for a SIGTERM, `CLEANUP_GRACE` by default
    """

    def __init__(self, keep: set[ProcessInfo], now: float, grace: float | None = None):
        self._keep = keep
        self._kill_at = now + (CLEANUP_GRACE if grace is None else grace)
        self._told: set[tuple[ProcessInfo, int]] = set()

    def step(self, now: float) -> float | None:
        """Do whatever is due; this never waits.

        :param now: present time in seconds, on the same clock
        :return: seconds after which it has to be called again, None if nothing is left
        """
        running = _look_twice(self._look)
        if not running:
            return None
        if now >= self._kill_at + CLEANUP_GRACE:
            names = ', '.join(f'{each.name} (pid {each.pid})' for each in running)
            LOGGER.error('What a process left behind cannot be ended: %s', names)
            return None
        num = signal.SIGTERM if now < self._kill_at else signal.SIGKILL
        for each in running:
            if (each, num) not in self._told:
                self._told.add((each, num))
                _tell(each, num)
        return CLEANUP_INTERVAL

    def _look(self) -> set[ProcessInfo]:
        families = _families()
        orphans = _adopted(set(families.get(os.getpid(), [])) - self._keep)
        for orphan in orphans:
            if orphan.has_ended:
                _reap(orphan)
        return _running(orphans | set(_below(families, [each.pid for each in orphans])))


class Reaper:
    """Collects adopted processes that have ended: nobody else would, and they fill the table.

    It takes its time, for a handler which forks without multiprocessing and subprocess, and waits.
    """

    def __init__(self) -> None:
        self.due = monotonic() + REAP_INTERVAL
        self._ended: set[ProcessInfo] = set()
        self._awaited: set[ProcessInfo] = set()

    def step(self, now: float) -> None:
        """Collect those which had ended at the last step but one.

        :param now: present time in seconds, on the monotonic clock
        """
        if now < self.due:
            return
        self.due = now + REAP_INTERVAL
        with suppress(OSError):  # there are no children, or no descriptor is free
            if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return
            ended = {each for each in children() if each.has_ended}
            self._awaited &= ended
            candidates = (ended & self._ended) - self._awaited
            adopted = _adopted(candidates)
            for each in adopted:
                _reap(each)
            self._awaited |= candidates - adopted
            self._ended = ended - adopted
