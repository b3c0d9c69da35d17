# SPDX-License-Identifier: ZPL-2.1
"""A supervisor in a process that ends with its owner."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pyams_zmq.process.base import SIGNALLED
from pyams_zmq.process.channel import RELOAD, STOP, Command
from pyams_zmq.process.descendants import POLL_INTERVAL, OrphanCleanup, open_pidfd
from pyams_zmq.process.heartbeat import HEARTBEAT_INTERVAL
from pyams_zmq.supervisor.driver import Supervisor
from pyams_zmq.supervisor.policy import Factory
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.hard_end import end_hard

LOGGER = logging.getLogger('PyAMS (zmq)')


class OwnedSupervisor(Supervisor):
    """Supervisor that also watches its owner in its loop.

    :param process: the SupervisingProcess that it runs in
    :param factories: see :class:`Supervisor`
    """

    _owner_pidfd: int | None = None
    _is_asked_to_stop = False

    def __init__(self, process: Any, factories: Mapping[str, Factory]):
        super().__init__(factories, registry=process.registry)
        self._process = process
        self._owner = process._parent_pid

    def run(self) -> int:
        """Supervise until the owner asks to stop, and as :meth:`Supervisor.run` does."""
        with open_pidfd(self._owner) as self._owner_pidfd:
            return super().run()

    def stop(self) -> None:
        """Let `step` stop all processes, and `run` return then."""
        self._is_asked_to_stop = True
        super().stop()

    def step(self, now: float) -> float | None:
        """Do everything that is due."""
        self._check_owner()
        timeouts = [POLL_INTERVAL] if self._owner_pidfd is None else []
        if self._process._heartbeat is not None:
            self._process._heartbeat.beat()
            timeouts.append(HEARTBEAT_INTERVAL)
        timeout = self._step(now)
        if timeout is not None:
            timeouts.append(timeout)
        return min(timeouts, default=None)

    def _step(self, now: float) -> float | None:
        return super().step(now)

    def _descriptors(self) -> list[int]:
        own = [self._process._control.fileno(), self._owner_pidfd]
        return [fd for fd in own if fd is not None] + super()._descriptors()

    def _on_stop_signal(self, num: int, frame: Any) -> None:
        if self._process.is_supervised and not self._stopping:
            self._exit_code = SIGNALLED + num  # the supervisor of this one has not asked for that
        super()._on_stop_signal(num, frame)

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
        # An orderly stop ends a web server that does not handle SIGTERM in the same way as a kill.
        LOGGER.info('The owner of this process (pid %s) died, stopping', self._owner)
        now = monotonic()
        # Nothing else would end the orphans: kill them now.
        OrphanCleanup(self._former_children, now, 0.0).step(now)
        end_hard(1)
