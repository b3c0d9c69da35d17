# SPDX-License-Identifier: ZPL-2.1
"""When a process is started again, and when it is given up; no I/O, the caller passes the time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

from pyams_zmq.process.base import ReadyProcess, StopOrder
from pyams_zmq.process.heartbeat import LivenessCheck

Factory = Callable[[], ReadyProcess]


class RestartLimits:
    """How often a process is started again, and after which time."""

    min_delay: float = 0.1
    max_delay: float = 30.0
    min_life: float = 10.0
    max_starts: int = 5

    def delay_after(self, short_lives: int) -> float:
        """Return the seconds until the next start.

        :param short_lives: number of starts in a row that ended within `min_life`
        """
        # A float has no room for more doublings, which a large `max_starts` would allow.
        doublings = min(max(0, short_lives - 1), 100)
        return min(self.max_delay, self.min_delay * 2.0**doublings)


class SupervisedProcess:
    """What a supervisor knows of a process, over all its starts.

    :param name: name of the process
    :param factory: makes a fresh process, which is not started

    :ivar due: time of the next start, None if none is to come
    :ivar retired: True if it is not to be started again, because another one takes over
    :ivar ready: for supervisors that wait until their processes are ready
    """

    def __init__(self, name: str, factory: Factory):
        self.name = name
        self.factory = factory
        self.process: ReadyProcess | None = None
        self.running = False
        self.given_up = False
        self.retired = False
        self.ready = False
        self.due: float | None = 0.0
        self.started = 0.0
        self.short_lives = 0
        self.stop_orders: Iterator[StopOrder] | None = None
        self.stop_deadline = 0.0
        # These belong to the process that runs.
        self.liveness: LivenessCheck | None = None
        self.pidfd: int | None = None
        self.resources = ExitStack()

    def is_due(self, now: float) -> bool:
        """Return True if it is time to start it."""
        return self.due is not None and self.due <= now

    def schedule_restart(self, now: float, limits: RestartLimits) -> float | None:
        """Set the time of the next start after a failure; return the delay, None if given up."""
        is_short = now - self.started < limits.min_life
        self.short_lives = self.short_lives + 1 if is_short else 0
        if self.short_lives >= limits.max_starts:
            self.given_up = True
            return None
        delay = limits.delay_after(self.short_lives)
        self.due = now + delay
        return delay

    def release(self) -> None:
        """Give back what belongs to the process that has ended."""
        self.running = False
        self.pidfd = None
        self.liveness = None
        self.resources.close()
