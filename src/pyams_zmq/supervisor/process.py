# SPDX-License-Identifier: ZPL-2.1
"""A supervisor in a process of its own, which ends with its owner and can be a standby."""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from pyams_zmq.process.address_lock import AddressLock
from pyams_zmq.process.base import OwnedProcess
from pyams_zmq.process.channel import RELOAD, STOP, Command
from pyams_zmq.process.descendants import POLL_INTERVAL, OrphanCleanup, open_pidfd
from pyams_zmq.process.heartbeat import HEARTBEAT_INTERVAL
from pyams_zmq.process.lock_folder import describe_folder_error
from pyams_zmq.process.name_lock import NameLock
from pyams_zmq.process.socket_lock import SocketLock
from pyams_zmq.supervisor.driver import LOCK_INTERVAL, LOCK_REFRESH, Supervisor
from pyams_zmq.supervisor.policy import Factory, SupervisedProcess
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.hard_end import end_hard

LOGGER = logging.getLogger('PyAMS (zmq)')


class SupervisingProcess(OwnedProcess):
    """Process that runs a supervisor, and ends with its owner.

    :param registry: registry of the application
    """

    lock: str | None = None
    """Name of the lock, see :class:`SupervisorProcess`"""

    address_lock: AddressLock | None = None
    """Reserves the addresses of its children for the application; only with `lock`"""

    name_lock: NameLock | SocketLock | None = None
    """The lock itself; by default `start` makes a :class:`NameLock`"""

    _supervise: Callable[[], int]  # runs an `OwnedSupervisor`, and returns its exit code

    def start(self) -> None:
        """Fork the child and return at once.

        :raises ZMQStartError: in a program that cannot fork
        :raises OSError: the folder of the locks cannot be used
        """
        if self.lock is not None and self.name_lock is None:
            try:
                self.name_lock = NameLock(self.lock)
            except OSError as error:
                text = f'{self.name} cannot start: {describe_folder_error(error)}'
                raise OSError(error.errno, text) from None
        super().start()

    def run(self) -> None:
        """Supervise; runs in the child."""
        self._drop_inherited_state()
        try:
            code = self._supervise()
        except Exception as error:
            LOGGER.exception('%s failed', self.name)
            self._send_report(None, error)
            code = 1
        sys.exit(code)


class SupervisorProcess(SupervisingProcess):
    """Process beside a web server which runs a supervisor; it ends with its owner.

    :param factories: see :class:`Supervisor`; they are called in this process
    :param registry: registry of the application, by default the current one
    :param lock: of all processes of this user and machine with the same lock, one runs its
        children; the others are standbys, and one of them takes over when it ends. It keeps the
        lock until it is stopped, also when all its children fail or have stopped themselves.
    """

    drain_timeout: float = 30.0
    """Seconds that `stop` gives all children; more than the longest of theirs"""

    def __init__(
        self, factories: Mapping[str, Factory], *, registry: Any = None, lock: str | None = None
    ):
        super().__init__(registry)
        self.factories = factories
        self.lock = lock

    def _supervise(self) -> int:
        return OwnedSupervisor(self, self.factories).run()


class OwnedSupervisor(Supervisor):
    """Supervisor that also watches its owner, and the lock, in its loop.

    :param process: the SupervisingProcess that it runs in
    :param factories: see :class:`Supervisor`
    """

    _owner_pidfd: int | None = None
    _is_asked_to_stop = False
    _is_standby = False
    _is_locked_out = False  # another application has the address

    def __init__(self, process: Any, factories: Mapping[str, Factory]):
        super().__init__(factories, registry=process.registry)
        self._process = process
        self._owner = process._parent_pid
        self._lock: NameLock | SocketLock | None = process.name_lock

    def run(self) -> int:
        """Supervise until the owner asks to stop, and as :meth:`Supervisor.run` does."""
        with open_pidfd(self._owner) as self._owner_pidfd:
            return super().run()

    def stop(self) -> None:
        """Let `step` stop all processes, and `run` return then."""
        self._is_asked_to_stop = True
        super().stop()

    def step(self, now: float) -> float | None:
        """Do everything that is due, if this process has the lock."""
        self._check_owner()
        timeouts = [POLL_INTERVAL] if self._owner_pidfd is None else []
        if self._process._heartbeat is not None:
            self._process._heartbeat.beat()
            timeouts.append(HEARTBEAT_INTERVAL)
        timeout: float | None = LOCK_INTERVAL
        if self._lock is None or self._acquire(self._lock) or self._stopping:
            timeout = super().step(now)
            if self._lock is not None:
                timeouts.append(LOCK_REFRESH)
        if timeout is not None:
            timeouts.append(timeout)
        return min(timeouts, default=None)

    def _acquire(self, lock: NameLock | SocketLock) -> bool:
        is_held = lock.acquire()
        if not is_held and not self._is_standby:
            names = ', '.join(child.name for child in self._children)
            LOGGER.info('Stands by for %s, which another process runs', names)
        self._is_standby = not is_held
        return is_held and self._acquire_address()

    def _acquire_address(self) -> bool:
        lock = self._process.address_lock
        is_held = lock is None or lock.acquire()
        if lock is None or is_held:
            self._is_locked_out = False
        elif not self._is_locked_out and (owner := lock.find_other_owner()) is not None:
            self._is_locked_out = True
            LOGGER.error(
                '%s cannot start at %s: another application of this user serves it (%s): stop that '
                'one, or choose another address',
                ', '.join(child.name for child in self._children),
                lock.address,
                owner,
            )
        return is_held

    def _address_lock_of(self, child: SupervisedProcess) -> AddressLock | None:
        lock: AddressLock | None = self._process.address_lock
        return lock

    def _can_leave(self) -> bool:
        # It keeps the lock: a standby would start what has failed, or has stopped itself.
        return self.is_finished and (self._lock is None or self._is_asked_to_stop)

    def _descriptors(self) -> list[int]:
        own = [self._process._control.fileno(), self._owner_pidfd]
        return [fd for fd in own if fd is not None] + super()._descriptors()

    def _check_owner(self) -> None:
        if os.getppid() == self._owner:
            control = self._process._control
            with suppress(EOFError):
                command = control.receive()
                if command is not None and command.name == STOP:
                    self.stop()
                elif command == Command(RELOAD):
                    self.reload()
                elif command is not None:
                    control.refuse(command)
                return
        # It has died, or has become another program, which no pidfd shows. Exit now: the children
        # then stop within `orphan_timeout`, and the next owner can bind the addresses.
        LOGGER.warning('The owner of this process (pid %s) died, stopping', self._owner)
        now = monotonic()
        # Nothing else would end the orphans: kill them now.
        OrphanCleanup(self._former_children, now, 0.0).step(now)
        end_hard(1)
