# SPDX-License-Identifier: ZPL-2.1
"""How a supervisor finds out that a process hangs.

A hang sends no event, so the child increments a counter in shared memory, and the supervisor checks
it.
"""

import mmap
import struct
from contextlib import suppress
from math import ceil

from pyams_zmq.process.descendants import ProcessInfo

# Seconds:
HEARTBEAT_INTERVAL = 0.5  # between two beats of a process
CHECK_INTERVAL = HEARTBEAT_INTERVAL / 2  # between two checks of its supervisor
HANG_TIMEOUT = 3 * HEARTBEAT_INTERVAL  # without a beat: the process is considered to hang

_COUNT = struct.Struct('=Q')


class HeartbeatCounter:
    """A counter in a page that a parent and its child share; made before the fork."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._count = 0

    def beat(self) -> None:
        """Increase the count; only one thread of the child may do this."""
        self._count += 1
        _COUNT.pack_into(self._page, 0, self._count)

    def clear(self) -> None:
        """Reset the count, because no further beat will come: the process ends."""
        _COUNT.pack_into(self._page, 0, 0)

    @property
    def count(self) -> int:
        """Number of beats; 0 before the first one, and after `clear`."""
        count: int = _COUNT.unpack_from(self._page)[0]
        return count

    def close(self) -> None:
        """Unmap the page; for the parent."""
        self._page.close()


class LivenessCheck:
    """Finds out whether a process hangs, from its heartbeat.

    It counts checks, not seconds: if this process, or the whole machine, was stopped for a while,
    the other process does not hang. A process that uses the processor does not hang either: a
    native call may keep the GIL, and so all its threads from running, for any time.

    :param heartbeat: heartbeat of the process
    :param pid: process id
    :param timeout: seconds without a beat after which the process is considered to hang
    """

    def __init__(self, heartbeat: HeartbeatCounter, pid: int | None, timeout: float = HANG_TIMEOUT):
        self._heartbeat = heartbeat
        self._pid = pid
        self._limit = max(2, ceil(timeout / CHECK_INTERVAL) - 1)  # the first check may come late
        self._count = 0
        self._misses = 0
        self._cpu_time: int | None = None
        self.due = 0.0

    def check(self, now: float) -> bool:
        """Check the heartbeat, if a check is due.

        :param now: present time in seconds
        :return: True if the process hangs
        """
        if now < self.due:
            return False
        self.due = now + CHECK_INTERVAL
        count = self._heartbeat.count
        if count != self._count or not count:
            self._count = count
            self._misses = 0
            self._cpu_time = None
            return False
        cpu_time = _read_cpu_time(self._pid)
        self._misses = 1 if cpu_time is None or cpu_time != self._cpu_time else self._misses + 1
        self._cpu_time = cpu_time
        return self._misses >= self._limit


def _read_cpu_time(pid: int | None) -> int | None:
    """Return the processor time of a process; None if the process is runnable or traced."""
    with suppress(OSError):  # no descriptor is free, for instance
        process = ProcessInfo.read(pid)
        if process is not None and process.state not in (b'R', b't'):
            return process.cpu_time
    return None
