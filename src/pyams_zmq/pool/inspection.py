# SPDX-License-Identifier: ZPL-2.1
"""The answers of a broker to questions about its pool."""

import os
import signal
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.pool.scheduler import Scheduler
from pyams_zmq.process.inspection import Inspection
from pyams_zmq.wire.clock import monotonic


class PoolInspection(Inspection):
    """Answers the questions about a pool.

    :param broker: its PoolBroker
    :param name: its name
    :param scheduler: the scheduler of the broker
    """

    kind = 'pool'

    def __init__(self, broker: Any, name: str, scheduler: Scheduler):
        super().__init__(broker, name)
        self._scheduler = scheduler

    def methods(self) -> dict[str, Any]:
        """Return what is known about each method."""
        return self._scheduler.descriptions

    def _replace(self) -> None:
        """Let the pool replace its workers one by one.

        :raises ZMQMessageError: with status 503, if the pool has ended
        """
        pool = self._process._parent_pid
        if os.getppid() != pool:
            raise ZMQMessageError(503, 'The service is stopping')
        os.kill(pool, signal.SIGHUP)

    def _is_draining(self) -> bool:
        return self._scheduler.is_draining

    def _count_workers(self) -> int:
        return len(self._scheduler.workers)

    def _measure(self) -> dict[str, Any]:
        return {**self._scheduler.stats(monotonic()), 'jobs': self._process.job_stats()}
