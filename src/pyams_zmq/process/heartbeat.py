# SPDX-License-Identifier: ZPL-2.1
"""A process which is stopped, or hangs, told from one that works.

Death has an event, a hang has none: the child counts in a page which it shares with its
supervisor, and the supervisor looks whether it goes on counting.
"""

import mmap
import struct
from contextlib import suppress
from math import ceil

HEARTBEAT_INTERVAL = 0.5
"""Seconds between two beats of a process"""

LOOK_INTERVAL = HEARTBEAT_INTERVAL / 2
"""Seconds between two looks of its supervisor"""

HANG_TIMEOUT = 3 * HEARTBEAT_INTERVAL
"""Seconds without a beat after which a process hangs"""

_COUNT = struct.Struct('=Q')


class HeartbeatCounter:
    """A counter in a page that a parent and its child share; made before the fork."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._count = 0

    def beat(self) -> None:
        """Count one further; for one thread of the child."""
        self._count += 1
        _COUNT.pack_into(self._page, 0, self._count)

    def rest(self) -> None:
        """Say that no further beat is to be expected: the process leaves."""
        _COUNT.pack_into(self._page, 0, 0)

    @property
    def count(self) -> int:
        """Number of beats; 0 before the first one, and at rest."""
        count: int = _COUNT.unpack_from(self._page)[0]
        return count

    def close(self) -> None:
        """Give the page back; for the parent."""
        self._page.close()


class LivenessCheck:
    """Tells whether a process hangs, from how its pulse changes from look to look.

    It counts looks, not seconds: when this process itself, or the whole machine, was stopped for a
    while, nobody else is to blame. Nor is a process that computes: a native call which keeps all
    its threads from running (the GIL) takes as long as it takes.

    :param pulse: pulse of the process
    :param pid: process id
    :param timeout: seconds without a beat after which a process hangs
    """

    def __init__(self, pulse: HeartbeatCounter, pid: int | None, timeout: float = HANG_TIMEOUT):
        self._heartbeat = pulse
        self._pid = pid
        self._limit = max(2, ceil(timeout / LOOK_INTERVAL) - 1)  # the first look may come late
        self._count = 0
        self._misses = 0
        self._work: int | None = None
        self.due = 0.0

    def look(self, now: float) -> bool:
        """Look at the pulse, if it is time.

        :param now: present time in seconds
        :return: true if the process hangs
        """
        if now < self.due:
            return False
        self.due = now + LOOK_INTERVAL
        count = self._heartbeat.count
        if count != self._count or not count:
            self._count = count
            self._misses = 0
            self._work = None
            return False
        work = _work_of(self._pid)
        self._misses = 1 if work is None or work != self._work else self._misses + 1
        self._work = work
        return self._misses >= self._limit


def _work_of(pid: int | None) -> int | None:
    """Give the processor time of a process, see proc_pid_stat(5); None if that says nothing."""
    with suppress(OSError, ValueError, IndexError):
        with open(f'/proc/{pid}/stat', 'rb', buffering=0) as file:
            state, *fields = file.read(1024).rpartition(b')')[2].split()
        if state not in (b'R', b't'):  # it waits for a processor, or a debugger has it
            return int(fields[10]) + int(fields[11])
    return None
