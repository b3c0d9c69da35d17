# SPDX-License-Identifier: ZPL-2.1
"""What a supervisor tells the service manager, by the protocol of systemd: see sd_notify(3)."""

import logging
import socket
from collections.abc import Iterable, MutableMapping
from contextlib import suppress
from math import inf
from typing import NamedTuple

from pyams_zmq.supervisor.policy import SupervisedProcess
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.environment import NOTIFY_VARIABLES

LOGGER = logging.getLogger('PyAMS (zmq)')

_SEND_TIMEOUT = 1.0  # seconds, if the service manager does not read
_MAX_STATUS = 1000  # characters


class States(NamedTuple):
    """Names of processes, by their state."""

    serving: list[str]
    starting: list[str]
    failing: list[str]
    ended: list[str]

    @classmethod
    def of(cls, children: Iterable[SupervisedProcess]) -> 'States':
        """Return the present states of processes."""
        states = cls([], [], [], [])
        for child in children:
            if child.running and child.ready:
                names = states.serving
            elif child.has_failed:
                names = states.failing
            elif child.running or child.due is not None:
                names = states.starting
            else:
                names = states.ended
            names.append(child.name)
        return states

    def __str__(self) -> str:
        parts = [f'{state}: {", ".join(names)}' for state, names in self._asdict().items() if names]
        return ' '.join('; '.join(parts).split())[:_MAX_STATUS]


class ServiceManager:
    """The service manager that has started this program, and waits for its notifications.

    - READY=1 when each process is ready, or has failed too often. One that cannot start does not
      keep the others from serving; if none can, this program ends without it.
    - STATUS= with the states of the processes, when they change.
    - WATCHDOG=1 twice in the time that the service manager gives. A process that hangs is killed by
      the supervisor, so this is about the supervisor itself.
    - RELOADING=1 at SIGHUP, STOPPING=1 at the stop.

    :param address: path of its socket; a first `@` stands for the abstract namespace
    :param watchdog: seconds within which it wants a WATCHDOG=1, or None
    """

    def __init__(self, address: str, watchdog: float | None = None):
        self._address = f'\0{address[1:]}' if address.startswith('@') else address
        self._interval = inf if watchdog is None else watchdog / 2
        self._next_watchdog = -inf if watchdog is not None else inf
        self._status = ''
        self._is_ready = False
        self._is_stopping = False
        self._has_failed = False

    @classmethod
    def take(cls, environ: MutableMapping[str, str], pid: int) -> 'ServiceManager | None':
        """Return the service manager of an environment, or None.

        Its variables are removed: what this program starts must not notify in its name.

        :param pid: id of this process
        """
        address, watchdog, watchdog_pid = (environ.pop(name, '') for name in NOTIFY_VARIABLES)
        if not address.startswith(('/', '@')):  # "vsock:" is for the init of a virtual machine
            return None
        seconds = None
        if watchdog_pid in ('', str(pid)):
            with suppress(ValueError):
                seconds = max(0, int(watchdog)) / 1e6
        return cls(address, seconds or None)

    def step(self, now: float, states: States, *, is_stopping: bool) -> float:
        """Send what is due.

        :param now: present time in seconds, on the monotonic clock
        :return: seconds after which it has to be called again
        """
        message = []
        if is_stopping and not self._is_stopping:
            self._is_stopping = True
            message.append('STOPPING=1')
        elif not (states.starting or is_stopping or self._is_ready) and (
            states.serving or states.ended
        ):
            self._is_ready = True
            message.append('READY=1')
        status = str(states)
        if status != self._status:
            self._status = status
            message.append(f'STATUS={status}')
        if now >= self._next_watchdog:
            self._next_watchdog = now + self._interval
            message.append('WATCHDOG=1')
        if message:
            self._send(*message)
        return self._next_watchdog - now

    def begin_reload(self) -> None:
        """Notify that the processes read their configuration again, if they were ready."""
        if self._is_ready:
            self._send('RELOADING=1', f'MONOTONIC_USEC={int(monotonic() * 1e6)}')

    def end_reload(self) -> None:
        """Notify that they were told to, after `begin_reload`."""
        if self._is_ready:
            self._send('READY=1')

    def _send(self, *lines: str) -> None:
        # A socket for each message: processes that are forked later do not inherit it.
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
                own.settimeout(_SEND_TIMEOUT)
                own.sendto('\n'.join(lines).encode(errors='replace'), self._address)
        except OSError as error:
            if not self._has_failed:
                LOGGER.warning('The service manager cannot be notified: %s', error)
            self._has_failed = True
        else:
            self._has_failed = False
