# SPDX-License-Identifier: ZPL-2.1
"""Questions about a service, which every service answers: who it is, and what it does.

Their message types begin with the name of this package. The name of a method cannot contain a dot.
"""

import os
import socket as network
from collections.abc import Collection
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import zmq

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler.description import describe
from pyams_zmq.handler.errors import error_reply
from pyams_zmq.process.reply_stream import ReplyStream
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.endpoint import parse_ip
from pyams_zmq.wire.memory import read_memory
from pyams_zmq.wire.message import DRAINING, encode

PING = b'pyams_zmq.ping'
STATS = b'pyams_zmq.stats'
METHODS = b'pyams_zmq.methods'
RELOAD = b'pyams_zmq.reload'
RESTART = b'pyams_zmq.restart'

_OPEN = frozenset({PING})  # to all peers that may call methods


def check_stats_users(names: Any) -> None:
    """Check that the names of users are not one string, which contains each part of a name.

    :raises TypeError: if they are
    """
    if isinstance(names, str):
        raise TypeError(f'Bad stats_users {names!r}: write a collection of names')


def check_stats_access(stats_users: Collection[str], user: str, address: str) -> None:
    """Check that a peer may read the statistics of a service, and manage it.

    Peers of this machine may, and users of *stats_users*.

    :param address: address of the peer, as libzmq reports it
    :raises ZMQMessageError: with status 403, if it may not
    """
    if not parse_ip(address).is_loopback and user not in stats_users:
        who, step = f'User {user!r} at {address}', 'add it to stats_users'
        if not user:
            who = f'The client at {address}, which has no user name,'
            step = 'ask on that machine, or as a user of stats_users'
        text = f'{who} may not read the statistics of the service or manage it: {step}'
        raise ZMQMessageError(403, text)


class Inspection:
    """Answers the questions about a service; a base class.

    :param process: the process that answers, a ServiceProcess
    :param name: name of the service, by default that of the process
    """

    kind = 'process'

    def __init__(self, process: Any, name: str | None = None):
        self._process = process
        self._name = process.name if name is None else name
        self._since = monotonic()
        self._questions = {
            PING: self.ping,
            STATS: self.stats,
            METHODS: self.methods,
            RELOAD: self.reload,
            RESTART: self.restart,
        }

    def answer(self, name: bytes, frame: Any) -> bytes | None:
        """Return the encoded reply to a question.

        :param name: type of a message
        :param frame: a frame of it, with the metadata of its peer
        :return: None if it is not a question about the service
        """
        question = self._questions.get(name)
        if question is None:
            return None
        try:
            self._check_access(name, frame)
            return encode([200, question()])
        except BaseException as error:  # noqa: BLE001 - the peer waits for a reply
            return error_reply(error)

    def _check_access(self, name: bytes, frame: Any) -> None:
        """Check that a peer may ask a question.

        :raises ZMQMessageError: with status 401 or 403, if it may not
        """
        try:
            user, address = frame['User-Id'], frame['Peer-Address']
        except (KeyError, zmq.ZMQError):  # the socket has connected to a peer, of any machine
            user, address = '', '0.0.0.0'  # noqa: S104 - it is not bound
        if not self._process.access.admits(user):
            raise ZMQMessageError(401, 'Your access was withdrawn')
        if name not in _OPEN:
            check_stats_access(self._process.stats_users, user, address)

    def ping(self) -> dict[str, Any]:
        """Return who answers, and whether it takes calls."""
        return {
            'name': self._name,
            'kind': self.kind,
            'version': _version(),
            'pid': os.getpid(),
            'host': network.gethostname(),
            'uptime': round(monotonic() - self._since, 3),
            'state': 'draining' if self._is_draining() else 'up',
            'workers': self._count_workers(),
        }

    def stats(self) -> dict[str, Any]:
        """Return the statistics; durations are seconds, memory is in MiB."""
        return {
            **self.ping(),
            'addresses': self._process._sockets.uris,
            'memory': round(read_memory(), 1),
            'repeated': 0,
            'lost': 0,
            'queue_limit': None,
            'jobs': None,
            **self._measure(),
        }

    def reload(self) -> None:
        """Read users and keys again, when the loop runs next."""
        self._process.loop.asyncio_loop.call_soon_threadsafe(self._process.reload)

    def restart(self) -> None:
        """Start a new process in the place of each one that runs methods.

        :raises ZMQMessageError: with status 503, if the service is stopping
        """
        if self._process.draining:
            raise ZMQMessageError(*DRAINING)
        self._replace()

    def _replace(self) -> None:
        """Start a new process in the place of each one that runs methods."""
        raise NotImplementedError

    def methods(self) -> dict[str, Any]:
        """Return what is known about each method."""
        raise NotImplementedError

    def _is_draining(self) -> bool:
        """Return True if calls are refused because the service stops."""
        return bool(self._process.draining)

    def _count_workers(self) -> int:
        """Return the number of processes that run methods."""
        return 1

    def _measure(self) -> dict[str, Any]:
        """Return the statistics of calls and workers."""
        raise NotImplementedError


class ProcessInspection(Inspection):
    """Answers the questions about a ZMQProcess; in the thread of its loop, or of its attendant."""

    @property
    def _streams(self) -> list[ReplyStream]:
        return [each for each in self._process._streams if isinstance(each, ReplyStream)]

    def methods(self) -> dict[str, Any]:
        """Return what is known about each method."""
        found: dict[str, Any] = {}
        for stream in self._streams:
            found.update(getattr(stream._recv_callback, 'methods', {}))
        return describe(found)

    def _replace(self) -> None:
        """End in order; the supervisor starts a new process.

        :raises ZMQMessageError: with status 409, if no supervisor does that
        """
        process = self._process
        if not process.is_supervised:
            raise ZMQMessageError(
                409,
                f'{process.name} cannot be started again, because no supervisor has started it: '
                'start it with "pyams_zmq serve", or let the application start it',
            )
        process.loop.asyncio_loop.call_soon_threadsafe(process.restart)

    def _measure(self) -> dict[str, Any]:
        now = monotonic()
        streams, process = self._streams, self._process
        calls = process.statistics.stats()
        calls['refused'] += sum(stream.refused for stream in streams)
        in_flight = sum(stream.in_hand + (stream.envelope is not None) for stream in streams)
        leaves = process.draining
        return {
            **calls,
            'in_flight': in_flight,
            'queue': sum(stream.waiting.count for stream in streams),
            'queue_bytes': sum(stream.waiting.size for stream in streams),
            'oldest': max((stream.waiting.age(now) for stream in streams), default=0.0),
            'workers': [
                {
                    'pid': os.getpid(),
                    'host': network.gethostname(),
                    'state': 'leaving' if leaves else 'busy' if in_flight else 'idle',
                    'age': round(now - self._since, 3),
                    'memory': round(read_memory(), 1),
                    'calls': calls['calls'],
                    'in_flight': in_flight,
                    'slots': process.concurrency,
                }
            ],
        }


@cache
def _version() -> str:
    try:
        return version('pyams_zmq')
    except PackageNotFoundError:  # it is not installed, but found in a folder
        return 'unknown'
