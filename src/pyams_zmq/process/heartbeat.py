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
from pyams_zmq.process.suspension import SUSPENDED

# Seconds:
HEARTBEAT_INTERVAL = 0.5  # between two beats of a process
CHECK_INTERVAL = HEARTBEAT_INTERVAL / 2  # between two checks of its supervisor
HANG_TIMEOUT = 3 * HEARTBEAT_INTERVAL  # without a beat: the process is considered to hang

WAITING_TICKS = 3
"""Clock ticks between two checks that a process may use although it hangs: each thread that waits
for the interpreter lock wakes up a thousand times in a second"""

_COUNT = struct.Struct('=Q')
_DEADLINE = struct.Struct('=d')
_DEADLINE_OFFSET = 8


class HeartbeatCounter:
    """A counter in a page that a parent and its child share; made before the fork.

    Beside it there is the time by which a method of the child must have ended.
    """

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

    @property
    def deadline(self) -> float:
        """Time on the monotonic clock by which the child has to beat, or 0: it may compute."""
        deadline: float = _DEADLINE.unpack_from(self._page, _DEADLINE_OFFSET)[0]
        return deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        _DEADLINE.pack_into(self._page, _DEADLINE_OFFSET, deadline)

    def close(self) -> None:
        """Unmap the page; for the parent."""
        self._page.close()


class LivenessCheck:
    """Finds out whether a process hangs, from its heartbeat.

    It counts checks, not seconds: if this process, or the whole machine, was stopped for a while,
    the other process does not hang. A process that uses the processor does not hang either: a
    native call may keep the GIL, and so all its threads from running, for any time. But it does if
    the `deadline` of its heartbeat has passed; time between two checks for which this process was
    stopped does not count.

    :param heartbeat: heartbeat of the process
    :param pid: process id
    :param timeout: seconds without a beat after which the process is considered to hang
    :ivar is_overdue: True if the deadline of the process had passed at the last check
    """

    is_overdue = False

    def __init__(self, heartbeat: HeartbeatCounter, pid: int | None, timeout: float = HANG_TIMEOUT):
        self._heartbeat = heartbeat
        self._pid = pid
        self._limit = max(2, ceil(timeout / CHECK_INTERVAL) - 1)  # the first check may come late
        self._count = 0
        self._misses = 0
        self._cpu_time: int | None = None
        self._suspended = 0.0  # seconds since the last beat
        self.due = 0.0

    def check(self, now: float) -> bool:
        """Check the heartbeat, if a check is due.

        :param now: present time in seconds
        :return: True if the process hangs
        """
        if now < self.due:
            return False
        late = now - self.due if self.due else 0.0
        suspended = late if late > SUSPENDED else 0.0
        self.due = now + CHECK_INTERVAL
        count = self._heartbeat.count
        if count != self._count or not count:
            self._count = count
            self._misses = 0
            self._cpu_time = None
            self._suspended = suspended  # the child may have beaten just before
            return False
        self._suspended += suspended
        self.is_overdue = 0 < self._heartbeat.deadline < now - self._suspended
        state, cpu_time = _read_state(self._pid)
        works = (
            state == b'R'
            or cpu_time is None
            or self._cpu_time is None
            or cpu_time - self._cpu_time > WAITING_TICKS
        )
        if state == b't' or (works and not self.is_overdue):
            self._misses = 1
        else:
            self._misses += 1
        self._cpu_time = cpu_time
        return self._misses >= self._limit


def _read_state(pid: int | None) -> tuple[bytes, int | None]:
    """Return the state of a process, `R` if it is runnable, `t` if traced, and its processor time.

    They are empty, and None, if they cannot be read.
    """
    with suppress(OSError):  # no descriptor is free, for instance
        process = ProcessInfo.read(pid)
        if process is not None:
            return process.state, process.cpu_time
    return b'', None
