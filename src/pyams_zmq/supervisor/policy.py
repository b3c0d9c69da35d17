# SPDX-License-Identifier: ZPL-2.1
"""When a process is started again; no I/O, the caller passes the time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from pyams_zmq.exceptions import ZMQBindError, ZMQHandlerError, ZMQJournalError
from pyams_zmq.process.base import ReadyProcess, StopOrder
from pyams_zmq.process.heartbeat import LivenessCheck

Factory = Callable[[], ReadyProcess]


class RestartLimits:
    """How often a process is started again, and after how many seconds."""

    min_delay: float = 0.1  #: Seconds until the start after the first failure
    max_delay: float = 30.0  #: Seconds; the delay doubles with each failure, up to this
    min_life: float = 10.0  #: Seconds; a process that ends earlier is a failure
    max_starts: int = 5  #: Failures in a row after which a process is started only now and then
    give_up_delay: float = 60.0  #: Seconds until each start after these failures


def describe_start_error(error: Exception) -> str:
    """Return the text of an error for clients, without what may be a secret of the handler."""
    if isinstance(error, ZMQHandlerError | ZMQBindError | ZMQJournalError):
        return str(error)
    return f'{type(error).__name__}, see the log of the service'


class SupervisedProcess:
    """State of a supervised process, across all its starts.

    :param name: name of the process
    :param factory: makes a fresh process, which is not started

    :ivar process: the ReadyProcess of the last start that succeeded
    :ivar running: True until its end was handled
    :ivar due: time of the next start, or None
    :ivar failures: number of lives in a row that were too short
    :ivar has_failed: True if these were too many: it is started only after long pauses
    :ivar was_overdue: True if it was killed because of a method that did not end
    :ivar has_served: True if it was ready, or lived long enough, at least once
    :ivar retired: True if it is not started again, because another one replaces it
    :ivar is_refused: True from a start that found its address in use until it is ready
    :ivar has_problem: True from a start that failed until it is ready
    :ivar ready: True once the present process is ready
    """

    def __init__(self, name: str, factory: Factory):
        self.name = name
        self.factory = factory
        self.process: Any = None
        self.running = False
        self.has_failed = False
        self.has_served = False
        self.was_overdue = False
        self.retired = False
        self.is_refused = False
        self.has_problem = False
        self.ready = False
        self.due: float | None = 0.0
        self.started = 0.0
        self.failures = 0
        self.stop_orders: Iterator[StopOrder] | None = None
        self.stop_deadline = 0.0
        # Only while it is running:
        self.liveness: LivenessCheck | None = None
        self.pidfd: int | None = None
        self.resources = ExitStack()

    @property
    def is_hopeless(self) -> bool:
        """True if it has failed, and none of its starts has ever succeeded."""
        return self.has_failed and not self.has_served

    def schedule_restart(self, now: float, limits: RestartLimits) -> float:
        """Set the time of the next start after a failure; return the delay in seconds."""
        if now - self.started < limits.min_life:
            self.failures += 1
        else:
            self.failures = 0
            self.has_served = True
        self.has_failed = self.failures >= limits.max_starts
        if self.has_failed:
            delay = limits.give_up_delay
        else:
            # More doublings, which a large `max_starts` would allow, overflow a float.
            doublings = min(max(0, self.failures - 1), 100)
            delay = min(limits.max_delay, limits.min_delay * 2.0**doublings)
        self.due = now + delay
        return delay

    def give_up(self) -> None:
        """Do not start it again: each start would fail as the last one."""
        self.has_failed = True
        self.due = None

    def release(self) -> None:
        """Release the resources of the process that has ended."""
        self.running = False
        self.pidfd = None
        self.liveness = None
        self.resources.close()
