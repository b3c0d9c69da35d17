# SPDX-License-Identifier: ZPL-2.1
"""A supervisor in a process of its own, which ends with its owner and can be a standby."""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from pyams_zmq.process.address_lock import AddressLock
from pyams_zmq.process.base import OwnedProcess
from pyams_zmq.process.lock_folder import describe_folder_error
from pyams_zmq.process.name_lock import NameLock
from pyams_zmq.process.socket_lock import SocketLock
from pyams_zmq.supervisor.policy import Factory
from pyams_zmq.supervisor.standby import StandbySupervisor

LOGGER = logging.getLogger('PyAMS (zmq)')


class SupervisingProcess(OwnedProcess):
    """Process that runs a supervisor, and ends with its owner.

    :param registry: registry of the application
    """

    retries_start: bool = False
    """True if its processes that fail before it is ready are started again, as later ones are; else
    it ends with the first one, if others wait for all of them"""

    _supervise: Callable[[], int]  # runs an `OwnedSupervisor`, and returns its exit code

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
    :ivar address_locks: what each child needs beside the lock, by the name of the child: the lock
        of its addresses, or of its name. A child waits for it, and the others start without it
    """

    drain_timeout: float = 30.0
    """Seconds that `stop` gives all children; more than the longest of theirs"""

    name_lock: Any = None
    """The lock itself, a NameLock or a SocketLock; by default `start` makes the first one"""

    def __init__(
        self, factories: Mapping[str, Factory], *, registry: Any = None, lock: str | None = None
    ):
        super().__init__(registry)
        self.factories = factories
        self.lock = lock
        self.address_locks: dict[str, AddressLock | SocketLock] = {}

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

    def _supervise(self) -> int:
        return StandbySupervisor(self, self.factories).run()
