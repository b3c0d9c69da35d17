# SPDX-License-Identifier: ZPL-2.1
"""When the methods that run have to end, at the latest."""

from math import inf
from threading import Lock

from pyams_zmq.process.heartbeat import HEARTBEAT_INTERVAL, HeartbeatCounter
from pyams_zmq.process.suspension import SUSPENDED, was_suspended
from pyams_zmq.wire.clock import monotonic


class _Limit:
    __slots__ = ('began', 'deadline', 'postponed')

    def __init__(self, began: float, deadline: float):
        self.began = began
        self.deadline = deadline
        self.postponed = 0.0


class CallDeadlines:
    """The calls of methods with a time limit, and when each of them must have ended.

    The main thread adds calls before they begin: it may be blocked from then on. The watchdog
    checks them, and the supervisor, if this whole process is blocked. Time for which this process
    was suspended does not count.

    :param grace: seconds after its time limit in which a method has to end
    :param heartbeat: shows the earliest deadline to the supervisor, or None
    """

    def __init__(self, grace: float, heartbeat: HeartbeatCounter | None = None):
        self._grace = grace
        self._heartbeat = heartbeat
        self._calls: dict[object, _Limit] = {}
        self._first = 0.0  # the earliest deadline
        self._checked_at = monotonic()
        self._lock = Lock()

    def add(self, call: object, timeout: float) -> None:
        """Add a call that begins now.

        :param call: its text is for the log
        :param timeout: seconds, the time limit of the method
        """
        now = monotonic()
        deadline = now + timeout + self._grace
        with self._lock:
            self._calls[call] = _Limit(now, deadline)
            if not self._first or deadline < self._first:
                self._show(deadline)

    def remove(self, call: object) -> None:
        """Remove a call that has ended."""
        with self._lock:
            if self._calls.pop(call).deadline == self._first:
                self._show_first()

    def check_clock(self, timeout: float, elapsed: float, switches: int) -> float:
        """Postpone the deadlines if this process was suspended; for the watchdog, after each wait.

        :param timeout: seconds that the wait had to take at most
        :param elapsed: seconds that it has taken
        :param switches: see :func:`was_suspended`
        :return: seconds by which they are postponed
        """
        late = elapsed - timeout
        is_suspended = was_suspended(late, switches)
        with self._lock:
            self._checked_at = monotonic()
            if not is_suspended:
                return 0.0
            for limit in self._calls.values():
                if limit.began <= self._checked_at - late:  # else it has lost no time
                    limit.deadline += elapsed
                    limit.postponed += elapsed
            self._show_first()
        return elapsed

    def is_current(self) -> bool:
        """Return False if this process may have been suspended since the last `check_clock`."""
        return monotonic() - self._checked_at < HEARTBEAT_INTERVAL + SUSPENDED

    def take_postponed(self, call: object) -> float:
        """Return by how many seconds a call was postponed since this was asked last."""
        with self._lock:
            limit = self._calls[call]
            seconds, limit.postponed = limit.postponed, 0.0
            return seconds

    def time_left(self) -> float:
        """Return the seconds until the earliest deadline, or infinity."""
        first = self._first
        return max(0.0, first - monotonic()) if first else inf

    def find_overdue(self, now: float) -> object | None:
        """Return the first call whose deadline has passed, or None.

        :param now: present time in seconds, on the monotonic clock
        """
        with self._lock:
            if not self._first or now < self._first:
                return None
            return min(self._calls, key=lambda call: self._calls[call].deadline)

    def _show_first(self) -> None:
        self._show(min((limit.deadline for limit in self._calls.values()), default=0.0))

    def _show(self, deadline: float) -> None:
        self._first = deadline
        if self._heartbeat is not None:
            self._heartbeat.deadline = deadline
