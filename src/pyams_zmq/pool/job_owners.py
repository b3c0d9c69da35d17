# SPDX-License-Identifier: ZPL-2.1
"""Who runs a job, as the journal notes it for the next broker."""

from typing import NamedTuple

from pyams_zmq.process.descendants import ProcessInfo

BROKER = 'broker'
"""Owner of a job that has no worker yet, or whose worker was not noted"""

STOPPING = 'stopping'
"""First word of an owner that was asked to stop: its end does not count as a death"""

ADOPT_TIME = 3.0
"""Seconds in which a worker of this machine registers at a new broker"""

REMOTE_TIME = 10.0
"""The same for a worker of another machine, also after a pause of its heartbeats"""

MAX_ADOPT_TIME = 60.0
"""The same for a worker of this machine that is known to live"""


class Owner(NamedTuple):
    """The owner of a job: a broker, or a worker.

    :ivar kind: `broker`, `local` or `remote`
    :ivar pid: process id of a local worker
    :ivar started: when it was started, see :class:`~pyams_zmq.process.descendants.ProcessInfo`
    :ivar route: routing id of a remote worker, in hexadecimal digits
    :ivar is_stopping: true if it was asked to stop
    """

    kind: str = BROKER
    pid: int = 0
    started: int = 0
    route: str = ''
    is_stopping: bool = False

    @classmethod
    def of_worker(cls, pid: int, route: bytes, is_local: bool) -> 'Owner':
        """Return the owner that a worker is."""
        info = ProcessInfo.read(pid) if is_local else None
        if info is None:
            return cls('remote', route=route.hex())
        return cls('local', pid, info.started)

    @classmethod
    def parse(cls, text: str | None) -> 'Owner':
        """Return the owner of a text; that of a later version is an unknown one."""
        words = (text or '').split()
        is_stopping = words[:1] == [STOPPING]
        match words[is_stopping:]:
            case ['local', pid, started] if pid.isdecimal() and started.isdecimal():
                return cls('local', int(pid), int(started), is_stopping=is_stopping)
            case ['remote', route]:
                return cls('remote', route=route, is_stopping=is_stopping)
        return cls(is_stopping=is_stopping)

    def __str__(self) -> str:
        if self.kind == 'local':
            return f'local {self.pid} {self.started}'
        return f'remote {self.route}' if self.kind == 'remote' else BROKER

    @property
    def has_died(self) -> bool:
        """True for a worker that has gone without being asked to, if `is_gone` is true."""
        if self.is_stopping or self.kind == 'broker':
            return False
        return self.kind == 'remote' or not self._is_running()

    def is_gone(self, waited: float) -> bool:
        """Return True if its jobs have to begin again.

        :param waited: seconds since the first broker that has missed it
        """
        if self.kind == 'local':
            return waited > MAX_ADOPT_TIME or not self._is_running()
        return waited > (REMOTE_TIME if self.kind == 'remote' else ADOPT_TIME)

    def _is_running(self) -> bool:
        info = ProcessInfo.read(self.pid)
        return info is not None and info.started == self.started and not info.has_ended
