# SPDX-License-Identifier: ZPL-2.1
"""When a process is started again, and when it is given up; no I/O, the caller passes the time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from pyams_zmq.process.base import ReadyProcess, StopOrder
from pyams_zmq.process.heartbeat import LivenessCheck

Factory = Callable[[], ReadyProcess]


class RestartLimits:
    """How often a process is started again, and after how many seconds."""

    min_delay: float = 0.1  #: Seconds until the start after the first failure
    max_delay: float = 30.0  #: Seconds; the delay doubles with each failure, up to this
    min_life: float = 10.0  #: Seconds; a process that ends earlier has failed to start
    max_starts: int = 5  #: Failed starts in a row after which a process is given up


class SupervisedProcess:
    """State of a supervised process, across all its starts.

    :param name: name of the process
    :param factory: makes a fresh process, which is not started

    :ivar process: the ReadyProcess of the last start that succeeded
    :ivar running: True until its end was handled
    :ivar due: time of the next start, or None
    :ivar retired: True if it is not started again, because another one replaces it
    :ivar ready: True once it is ready, for a supervisor that waits for that
    """

    def __init__(self, name: str, factory: Factory):
        self.name = name
        self.factory = factory
        self.process: Any = None
        self.running = False
        self.given_up = False
        self.retired = False
        self.ready = False
        self.due: float | None = 0.0
        self.started = 0.0
        self.short_lives = 0
        self.stop_orders: Iterator[StopOrder] | None = None
        self.stop_deadline = 0.0
        # Only while it is running:
        self.liveness: LivenessCheck | None = None
        self.pidfd: int | None = None
        self.resources = ExitStack()

    def schedule_restart(self, now: float, limits: RestartLimits) -> float | None:
        """Set the time of the next start after a failure; return the delay, None if given up."""
        is_short = now - self.started < limits.min_life
        self.short_lives = self.short_lives + 1 if is_short else 0
        if self.short_lives >= limits.max_starts:
            self.given_up = True
            return None
        # More doublings, which a large `max_starts` would allow, overflow a float.
        doublings = min(max(0, self.short_lives - 1), 100)
        delay = min(limits.max_delay, limits.min_delay * 2.0**doublings)
        self.due = now + delay
        return delay

    def release(self) -> None:
        """Release the resources of the process that has ended."""
        self.running = False
        self.pidfd = None
        self.liveness = None
        self.resources.close()
