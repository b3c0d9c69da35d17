# SPDX-License-Identifier: ZPL-2.1
"""A supervisor that starts its processes when it gets a lock."""

import logging
from collections.abc import Mapping
from math import inf
from typing import Any

from pyams_zmq.process.address_lock import AddressLock
from pyams_zmq.process.name_lock import NameLock
from pyams_zmq.process.socket_lock import SocketLock
from pyams_zmq.supervisor.driver import LOCK_INTERVAL, LOCK_REFRESH
from pyams_zmq.supervisor.owned import OwnedSupervisor
from pyams_zmq.supervisor.policy import Factory, SupervisedProcess
from pyams_zmq.wire.log_fields import service_fields

LOGGER = logging.getLogger('PyAMS (zmq)')


class StandbySupervisor(OwnedSupervisor):
    """Supervisor that stands by while another one has its lock.

    :param process: the SupervisorProcess that it runs in
    :param factories: see :class:`Supervisor`
    """

    _is_standby = False

    def __init__(self, process: Any, factories: Mapping[str, Factory]):
        super().__init__(process, factories)
        self.address_locks = process.address_locks
        self._lock: NameLock | SocketLock | None = process.name_lock
        self._locked_out: set[str] = set()  # children whose address another application has

    def _step(self, now: float) -> float | None:
        if self._lock is None:
            return super()._step(now)
        if not (self._acquire(self._lock) or self._stopping):
            return LOCK_INTERVAL
        timeout = super()._step(now)
        return min(LOCK_REFRESH, inf if timeout is None else timeout)

    def _acquire(self, lock: NameLock | SocketLock) -> bool:
        is_held = lock.acquire()
        if not is_held and not self._is_standby:
            names = ', '.join(child.name for child in self._children)
            LOGGER.info('Stands by for %s, which another process runs', names)
        self._is_standby = not is_held
        return is_held

    def _step_start(self, now: float) -> float:
        for child in self._children:
            if child.due is not None and child.due <= now and not self._may_start(child):
                child.due = now + LOCK_INTERVAL
        return super()._step_start(now)

    def _may_start(self, child: SupervisedProcess) -> bool:
        """Return True if this application, and no other process of it, has the child's address."""
        lock = self.address_locks.get(child.name)
        is_held = lock is None or lock.acquire()
        if is_held:
            self._locked_out.discard(child.name)
        elif (
            child.name not in self._locked_out
            and isinstance(lock, AddressLock)
            and (owner := lock.find_other_owner()) is not None
        ):
            self._locked_out.add(child.name)
            LOGGER.error(
                '%s cannot start at %s: another application of this user serves it (%s): stop that '
                'one, or choose another address',
                child.name,
                lock.address,
                owner,
                extra=service_fields(child.name),
            )
        return is_held

    def _can_leave(self) -> bool:
        # It keeps the lock: a standby would start what has failed, or has stopped itself.
        return self.is_finished and (self._lock is None or self._is_asked_to_stop)
