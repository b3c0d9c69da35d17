# SPDX-License-Identifier: ZPL-2.1
"""List, end and reap the descendants of a process."""

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from multiprocessing import forkserver, resource_tracker
from typing import Any

from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.poll import wait_readable

LOGGER = logging.getLogger('PyAMS (zmq)')

POLL_INTERVAL = 0.1
"""Seconds between two checks of a process where the system has no pidfd (Linux before 5.3)"""

# Seconds:
LIST_INTERVAL = 1.0  # after which descendants are listed again, also if none of them has ended
CLEANUP_INTERVAL = 0.05  # between two steps of a cleanup
CLEANUP_GRACE = 1.0  # that orphans get to end after a SIGTERM, and then after a SIGKILL
REAP_INTERVAL = 60.0  # between two searches for adopted processes that have ended

SCAN = 5000
"""Process ids after that of this process in which children are searched without /proc, in 5 ms"""

_CPUCLOCK_SCHED = 2  # see clock_getcpuclockid(3)
_STARTS = {'subprocess.Popen', 'os.system', 'os.posix_spawn', 'os.fork', 'os.forkpty'}
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37


@contextmanager
def open_pidfd(pid: int | None) -> Iterator[int | None]:
    """Open a descriptor that is readable when a process has ended.

    A multiprocessing sentinel is a pipe, which each process that is forked meanwhile holds open.

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


@contextmanager
def subreaper() -> Iterator[bool]:
    """Adopt the descendants whose parent ends, see PR_SET_CHILD_SUBREAPER in prctl(2).

    :return: False if the system cannot do that: orphans are left to the init process
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


def continue_without_parent() -> None:
    """Let this process continue when its parent dies and it is suspended, see prctl(2).

    Only then it can notice that its owner has died; it would keep its addresses and files for ever.
    The signal has no effect on a process that runs, also if only a thread of the parent has ended.
    """
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGCONT))


_has_warned = False  # forks inherit it


def has_proc() -> bool:
    """Return True if /proc is mounted, and shows the processes of this PID namespace."""
    try:
        return os.readlink('/proc/self') == str(os.getpid())
    except OSError:
        return False


def warn_without_proc(name: object) -> None:
    """Log once what is not possible without /proc.

    :param name: name of the process, for the log
    """
    global _has_warned  # noqa: PLW0603 - once for a process and its forks
    if not (_has_warned or has_proc()):
        _has_warned = True
        LOGGER.warning(
            '%s: /proc is not mounted, or belongs to another PID namespace: programs that handlers '
            'start may not be found when they have to end, and may outlive their service; mount it '
            'by "mount -t proc proc /proc"',
            name,
        )


def _prctl(option: int, argument: Any) -> bool:
    try:
        return bool(ctypes.CDLL(None).prctl(option, argument) == 0)
    except (AttributeError, OSError):
        return False


@dataclass(frozen=True)
class ProcessInfo:
    """A process as it was when it was read; the start time identifies it if its pid is reused."""

    pid: int
    started: int
    parent: int = field(compare=False)
    name: str = field(compare=False)
    state: bytes = field(compare=False)
    has_ended: bool = field(compare=False)
    cpu_time: int = field(compare=False)  # clock ticks

    @classmethod
    def read(cls, pid: int | str | None) -> 'ProcessInfo | None':
        """Read a process from /proc, see proc_pid_stat(5); None if it is gone.

        Without /proc, or if the option hidepid hides the process there, only children are known.
        """
        with suppress(FileNotFoundError, PermissionError, ProcessLookupError):
            if has_proc():
                return cls._read_stat(pid)
        return next(iter(cls.find_children([int(pid or 0)])), None)

    @classmethod
    def _read_stat(cls, pid: int | str | None) -> 'ProcessInfo':
        with open(f'/proc/{pid}/stat', 'rb', buffering=0) as file:
            head, _, tail = file.read(1024).rpartition(b')')
        number, _, name = head.partition(b' (')
        state, parent, *fields = tail.split()
        # The main thread may have ended, and others still run.
        has_ended = state in {b'Z', b'X'} and int(fields[15]) <= 1
        return cls(
            int(number),
            int(fields[17]),
            int(parent),
            name.decode(errors='replace'),
            state,
            has_ended,
            int(fields[9]) + int(fields[10]),
        )

    @classmethod
    def find_children(cls, pids: Iterable[int]) -> 'list[ProcessInfo]':
        """Return those processes that are children of this one; it works without /proc."""
        found = []
        for pid in pids:
            try:
                end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                cpu_time = time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
            except OSError:  # not a child, or another thread has collected its exit code just now
                continue
            ticks = int(cpu_time * 100)
            found.append(cls(pid, 0, os.getpid(), 'process', b'', end is not None, ticks))
        return found

    def send(self, num: int) -> None:
        """Send a signal, if the pid was not reused; ignore a process of another user (sudo)."""
        with open_pidfd(self.pid) as pidfd, suppress(ProcessLookupError, PermissionError):
            if ProcessInfo.read(self.pid) != self:
                return
            if pidfd is None:
                os.kill(self.pid, num)
            else:
                signal.pidfd_send_signal(pidfd, num)


def _children_by_parent() -> dict[int, list[ProcessInfo]]:
    """Return the children of all processes, by the pid of the parent."""
    if not has_proc():
        return {os.getpid(): _find_children()}
    by_parent: dict[int, list[ProcessInfo]] = {}
    for process in map(ProcessInfo.read, filter(str.isdecimal, os.listdir('/proc'))):
        if process is not None:
            by_parent.setdefault(process.parent, []).append(process)
    return by_parent


def _find_children() -> list[ProcessInfo]:
    """Return the children of this process, as far as they are found without /proc."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []
    own = os.getpid()
    likely = {*_known(), *range(own + 1, own + SCAN)} - {None}
    return ProcessInfo.find_children(likely) or ProcessInfo.find_children(_awaited() - likely)


def _below(by_parent: dict[int, list[ProcessInfo]], pids: Iterable[int]) -> Iterator[ProcessInfo]:
    waiting = list(pids)
    while waiting:
        children = by_parent.pop(waiting.pop(), [])
        waiting.extend(child.pid for child in children)
        yield from children


def _helpers() -> set[Any]:
    """Return the pids of processes that multiprocessing runs for itself, and ends itself."""
    return {
        getattr(resource_tracker._resource_tracker, '_pid', None),
        getattr(forkserver._forkserver, '_forkserver_pid', None),
    }


def children() -> set[ProcessInfo]:
    """Return the children of this process, also those that have ended and were not waited for."""
    return set(_children_by_parent().get(os.getpid(), []))


def descendants() -> set[ProcessInfo]:
    """Return the descendants of this process that run."""
    return _list_twice(lambda: _running(_below(_children_by_parent(), [os.getpid()])))


def kill_with_descendants(pid: int) -> None:
    """Kill a process, and the programs that it has started; ignore it if it is gone.

    Orphans otherwise get a SIGTERM first, and time to end.
    """
    found = list(_below(_children_by_parent(), [pid]))
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # before them, so that it notices nothing
    for process in found:
        process.send(signal.SIGKILL)


def _running(processes: Iterable[ProcessInfo]) -> set[ProcessInfo]:
    helpers = _helpers()
    return {each for each in processes if not each.has_ended and each.pid not in helpers}


def _list_twice(list_them: Callable[[], set[ProcessInfo]]) -> set[ProcessInfo]:
    # If a parent ends while the list is read, its children may be missed.
    return list_them() or list_them()


def _adopted(processes: set[ProcessInfo]) -> set[ProcessInfo]:
    """Return those of some children that were not started by multiprocessing or subprocess.

    The objects of these two need the exit codes of the others.
    """
    known = _known() | _helpers()
    adopted = {each for each in processes if each.pid not in known}
    if not adopted:
        return adopted
    awaited = _awaited()  # there may be many objects, so this runs only if needed
    return {each for each in adopted if each.pid not in awaited}


def _known() -> set[Any]:
    """Return the pids of the children that multiprocessing has started for its users."""
    return {child.pid for child in multiprocessing.process._children}  # type: ignore[attr-defined] # private


def _awaited() -> set[Any]:
    """Return the pids of the processes of subprocess whose exit code was not collected."""
    return {
        vars(each).get('pid')
        for each in gc.get_objects()
        if issubclass(type(each), subprocess.Popen) and vars(each).get('returncode') is None
    }


def _reap(process: ProcessInfo) -> None:
    with suppress(ChildProcessError):  # SIGCHLD is ignored: the system has done it
        os.waitpid(process.pid, os.WNOHANG)


def wait_for_descendants(
    timeout: float, num: signal.Signals | None = None, *, quiet: bool = False
) -> bool:
    """Wait until all descendants of this process have ended.

    :param timeout: seconds
    :param num: signal to send to each of them
    :param quiet: see :func:`end_descendants`
    :return: True if they have ended
    """
    deadline = monotonic() + timeout
    signalled: set[ProcessInfo] = set()
    while running := descendants():
        if num is not None:
            for each in running - signalled:  # some are started while others end
                _send_and_log(each, num, quiet=quiet)
            signalled |= running
        left = deadline - monotonic()
        if left <= 0:
            return False
        wait_for_any(running, left)
    return True


def end_descendants(grace: float, *, quiet: bool = False) -> None:
    """Terminate all descendants of this process, then kill those that are left.

    Their exit codes are not collected.

    :param grace: seconds that they get to end after a SIGTERM, and then after a SIGKILL
    :param quiet: do not log: a thread that is stuck may hold a lock of the logging
    """
    if not wait_for_descendants(grace, signal.SIGTERM, quiet=quiet):
        wait_for_descendants(grace, signal.SIGKILL, quiet=quiet)


def forbid_new_processes() -> None:
    """Keep the threads of this process, which ends, from starting processes meanwhile."""
    sys.addaudithook(_refuse)


def _refuse(event: str, _args: Any) -> None:
    if event in _STARTS:
        raise ZMQStartError('This process ends and cannot start others')


def _send_and_log(process: ProcessInfo, num: signal.Signals, *, quiet: bool = False) -> None:
    if not quiet:
        LOGGER.warning('%s (pid %s) still runs: %s', process.name, process.pid, num.name)
    process.send(num)


def wait_for_any(processes: Iterable[Any], timeout: float) -> None:
    """Wait until one of some processes has ended, but not longer than `LIST_INTERVAL`.

    :param processes: objects that have a `pid`
    :param timeout: seconds
    """
    with ExitStack() as stack:
        pidfds = [stack.enter_context(open_pidfd(each.pid)) for each in processes]
        fds = [fd for fd in pidfds if fd is not None]
        interval = LIST_INTERVAL if len(fds) == len(pidfds) else POLL_INTERVAL
        wait_readable(fds, min(timeout, interval))


class OrphanCleanup:
    """Ends the orphans that this process has adopted, step by step.

    :param keep: children of this process that are not orphans
    :param now: present time in seconds
    :param grace: seconds that they get to end after a SIGTERM, `CLEANUP_GRACE` by default
    """

    def __init__(self, keep: set[ProcessInfo], now: float, grace: float | None = None):
        self._keep = keep
        self._kill_at = now + (CLEANUP_GRACE if grace is None else grace)
        self._give_up_at = inf
        self._signalled: set[tuple[ProcessInfo, int]] = set()

    def step(self, now: float) -> float | None:
        """Do what is due, without waiting.

        :param now: present time in seconds, on the same clock
        :return: seconds after which it has to be called again, None if nothing is left
        """
        running = _list_twice(self._list_orphans)
        if not running:
            return None
        if now >= self._give_up_at:
            names = ', '.join(f'{each.name} (pid {each.pid})' for each in running)
            LOGGER.error(
                'Orphans of a process cannot be ended, the system waits for a device: %s', names
            )
            return None
        num = signal.SIGTERM if now < self._kill_at else signal.SIGKILL
        if num == signal.SIGKILL:  # it counts from here, because this step may be late
            self._give_up_at = min(self._give_up_at, now + CLEANUP_GRACE)
        for each in running:
            if (each, num) not in self._signalled:
                self._signalled.add((each, num))
                _send_and_log(each, num)
        return CLEANUP_INTERVAL

    def _list_orphans(self) -> set[ProcessInfo]:
        by_parent = _children_by_parent()
        orphans = _adopted(set(by_parent.get(os.getpid(), [])) - self._keep)
        for orphan in orphans:
            if orphan.has_ended:
                _reap(orphan)
        return _running(orphans | set(_below(by_parent, [each.pid for each in orphans])))


class Reaper:
    """Collects the exit codes of adopted processes, which would fill the process table.

    It leaves a process some time: a handler may have forked it without multiprocessing and
    subprocess, and wait for it.

    :param interval: seconds between two steps, by default :data:`REAP_INTERVAL`
    """

    def __init__(self, interval: float | None = None) -> None:
        self._interval = REAP_INTERVAL if interval is None else interval
        self.due = monotonic() + self._interval
        self._ended: set[ProcessInfo] = set()
        self._awaited: set[ProcessInfo] = set()

    def step(self, now: float) -> None:
        """Collect those that had already ended at the last step but one.

        :param now: present time in seconds, on the monotonic clock
        """
        if now < self.due:
            return
        self.due = now + self._interval
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
