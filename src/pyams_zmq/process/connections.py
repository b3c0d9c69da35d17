# SPDX-License-Identifier: ZPL-2.1
"""The connections of a bound socket, and the bytes that wait in libzmq for each of them.

The kernel counts the bytes of a TCP connection (``TCP_INFO``, see tcp(7)). The difference to the
bytes of the messages that the server has read from it (``ZMQ_SRCFD``) is what waits in libzmq. The
kernel does not count the bytes of ipc connections.
"""

import os
import socket as network
from collections.abc import Callable, Iterable
from contextlib import suppress
from math import inf
from typing import Any

import zmq

from pyams_zmq.auth import AccessPolicy
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.endpoint import port_of
from pyams_zmq.wire.frames import SRCFD
from pyams_zmq.wire.traffic import Traffic

_GREETING = 64  # bytes; the handshake begins with it, see RFC 37/ZMTP
_WELCOME = {b'PLAIN': 10, b'CURVE': 170}  # bytes that a server sends before it admits a peer
_CURVE_OVERHEAD = 33  # bytes of a frame, see RFC 26/CURVEZMQ
SHORT_FRAME = 255  # bytes of the longest frame with a header of 2 bytes, not 9
# Bytes that a peer without a name sends in its handshake: the metadata of a REQ, and of a DEALER or
# ROUTER, is 32 and 35 bytes long.
_HANDSHAKES: dict[bytes, Callable[[AccessPolicy], set[int]]] = {
    b'NULL': lambda _policy: {104, 107},
    b'PLAIN': lambda policy: {
        size + len(user.encode()) + len(password.encode())
        for user, password in list(policy.users.items())  # another thread may change them
        for size in (117, 120)
    },
    b'CURVE': lambda _policy: {564, 567},
}
_PING = 9  # bytes of a heartbeat of libzmq, see RFC 37/ZMTP
_MAX_HEARTBEATS = 1024  # bytes of those that came since the last message
_MAX_HANDSHAKE = 1024 * 1024  # bytes, with all heartbeats
_REFUSAL = 11  # bytes of the ERROR by which a server refuses a peer
_MAX_ANSWER = 320  # bytes that a server sends in a handshake
_MAX_NAME = 255  # bytes of the name that a peer may give itself
_TRIALS = 3  # disconnections until a size is accepted as that of another implementation
_MAX_SIZES = 64  # such sizes that are remembered

_DELIVERY = 1.0  # seconds in which libzmq delivers a message that has come in

QUIET = 1.0
"""Seconds without data after which a connection may be closed to make room for another one"""

STRANGER, UNUSED, USED, NEW = range(4)  # in this order connections are closed to make room


def local_name(socket: network.socket) -> int | str:
    """Return the port of a TCP socket, or the path (or `@name`) of a unix socket."""
    name = socket.getsockname()
    if isinstance(name, tuple):
        return int(name[1])
    return '@' + os.fsdecode(name[1:]) if isinstance(name, bytes) else str(name)


def _name_of(uri: str) -> int | str:
    """Return what `local_name` returns for the connections of a bound address."""
    return port_of(uri) or uri.removeprefix('ipc://')


class Connection:
    """A connection that a bound socket has accepted; times are those of `time.monotonic`.

    :ivar accepted: when it was accepted
    :ivar used: when a message was sent to it
    :ivar received: bytes on the wire of the messages that were read from it
    :ivar counted: the same, before the kernel was asked about the connection
    :ivar unread: bytes that waited to be read when it was checked
    :ivar owed: number of these messages that have no reply yet
    :ivar sent: bytes of the messages that were sent to it
    :ivar last_sent: bytes of the last one
    :ivar handshake: bytes that the peer has sent in addition to messages, at most: its handshake
        and heartbeats; None until that is known
    :ivar waits_since: since when it has further bytes, and the value of `received` then; or None
    :ivar stalls_since: since when an acknowledgement is due, and the acknowledged bytes; or None
    :ivar is_ended: true when it has ended, or when this side ends it
    """

    __slots__ = (
        'accepted',
        'counted',
        'handshake',
        'is_ended',
        'last_sent',
        'owed',
        'received',
        'sent',
        'stalls_since',
        'unread',
        'used',
        'waits_since',
    )

    def __init__(self, accepted: float):
        self.accepted = self.used = accepted
        self.received = self.counted = self.owed = self.sent = self.last_sent = self.unread = 0
        self.handshake: int | None = None
        self.waits_since: tuple[float, int] | None = None
        self.stalls_since: tuple[float, int] | None = None
        self.is_ended = False

    def count_sent(self, size: int) -> None:
        """Count a message that is sent to the peer, the reply to one of its messages."""
        self.sent += size
        self.last_sent = size
        self.owed -= 1
        self.used = monotonic()

    def measure_stall(self, traffic: Traffic, now: float) -> float:
        """Return the seconds for which the peer has acknowledged nothing of what it should."""
        if not traffic.is_awaited:
            self.stalls_since = None
            return 0.0
        if self.stalls_since is None or self.stalls_since[1] != traffic.acknowledged:
            self.stalls_since = now, traffic.acknowledged
        return now - self.stalls_since[0]


def open_null() -> int:
    """Open a descriptor that takes the place of another one; nothing can be read from it."""
    with suppress(OSError):
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    return network.socket(network.AF_UNIX).detach()  # /dev is empty


class Envelope(list[bytes]):
    """Frames in front of a reply: routing id, envelope of the request, delimiter (RFC 28/REQREP).

    :ivar connection: the connection that the request came through, or None
    """

    connection: Connection | None = None

    def count_reply(self, size: int | None) -> None:
        """Count the reply, which repeats the envelope.

        :param size: bytes of the frames behind the envelope; None if the reply was dropped
        """
        if self.connection is not None:
            size = 0 if size is None else size + sum(map(len, self)) - len(self[0])
            self.connection.count_sent(size)


class Listener:
    """A bound socket, with its connections.

    :param uri: its first bound address, as libzmq returned it
    :param monitor: monitor of the socket
    :param policy: access policy of its peers
    :ivar connections: its connections, by descriptor; some of them may have ended
    :ivar ends: number of connections that have ended
    :ivar counts: true if the server counts the bytes of all messages in `connections`
    :ivar max_connections: limit of their number, for which descriptors are set aside; None for the
        limit of the server, and for the descriptors that are left
    :ivar drained: when the socket had no further message, in the seconds of `time.monotonic`
    :ivar refresh: called, in another thread, to update `drained`
    """

    def __init__(self, uri: str, monitor: Any, policy: AccessPolicy):
        self.uri = uri
        self.names = {_name_of(uri)}
        self.monitor = monitor
        self.policy = policy
        self.overhead = _CURVE_OVERHEAD if policy.mechanism == b'CURVE' else 0
        self.connections: dict[int, Connection] = {}
        self.ends = 0
        self.counts = False
        self.max_connections: int | None = None
        self.drained = 0.0
        self.refresh: Callable[[], object] = lambda: None
        self._unusual: dict[int, tuple[int, float]] = {}

    def add_address(self, uri: str) -> None:
        """Add another bound address."""
        self.names.add(_name_of(uri))

    def note_end(self, fd: int) -> None:
        """Remove a connection that has ended, if it is known.

        :param fd: its descriptor in libzmq
        """
        connection = self.connections.pop(fd, None)
        if connection is not None:
            connection.is_ended = True
        self.ends += 1

    def count_received(self, frame: Any, size: int) -> Connection | None:
        """Count a message; return its connection.

        :param frame: a :class:`zmq.Frame` of the message
        :param size: bytes on the wire of the frames that the peer has sent, see `measure`
        """
        try:
            fd = frame.get(SRCFD)
        except zmq.ZMQError:  # inproc
            return None
        connection = self.connections.get(fd)
        if connection is not None:
            connection.owed += 1
            connection.received += size
            if connection.handshake is None:
                traffic = self._read_traffic(fd)
                rest = traffic.received - connection.received if traffic else 0
                connection.handshake = min(rest, max(self._usual_handshakes()) + _MAX_NAME)
        return connection

    def _read_traffic(self, fd: int) -> Traffic | None:
        """Read the state of a connection by its descriptor in libzmq, if it has not ended."""
        with (
            suppress(OSError),
            network.socket(network.AF_UNIX, network.SOCK_STREAM, 0, os.dup(fd)) as probe,
        ):
            return Traffic.read(probe) if local_name(probe) in self.names else None
        return None

    def measure(self, frames: Iterable[Any]) -> int:
        """Return the bytes of some frames on the wire."""
        size = 0
        for frame in frames:
            length = len(frame) + self.overhead
            size += length + (2 if length <= SHORT_FRAME else 9)
        return size

    def is_admitted(self, traffic: Traffic) -> bool:
        """Return True if the handshake has succeeded, as far as the bytes tell."""
        refusal = _GREETING + _WELCOME.get(self.policy.mechanism, 0) + _REFUSAL
        return traffic.written > refusal and traffic.received > _GREETING

    def _usual_handshakes(self) -> set[int]:
        return _HANDSHAKES[self.policy.mechanism](self.policy) or {0}

    def track(self, connection: Connection, traffic: Traffic, now: float) -> int:
        """Note whether the peer has sent more than its handshake and the messages that were read.

        :return: the number of these bytes
        """
        unread = traffic.received - connection.counted
        if connection.handshake is None:
            if unread in self._usual_handshakes():
                connection.handshake = unread
        else:  # too large if the first message had a successor already
            connection.handshake = min(connection.handshake, unread)
        rest = unread - (connection.handshake or 0)
        if rest <= 0:
            connection.waits_since = None
        elif connection.waits_since is None or connection.waits_since[1] != connection.received:
            connection.waits_since = now, connection.received
        if connection.waits_since is not None and not self.has_part(connection):
            with suppress(RuntimeError):  # the loop is closed
                self.refresh()
        return rest

    def has_part(self, connection: Connection) -> bool:
        """Return True if what the peer has sent last is a part of a message, or a heartbeat.

        All whole messages that had come in when `track` noticed it have been read since.
        """
        since = connection.waits_since
        return since is not None and self.drained > since[0] + _DELIVERY

    def is_fault(self, connection: Connection, rest: int, now: float) -> bool:
        """Return True if the rest is a part of a message, not a heartbeat or an unusual handshake.

        :param rest: its bytes
        """
        if connection.handshake is None:
            # It has a name, or is another implementation, if it comes again with the same size.
            number, ended = self._unusual.pop(rest, (0, 0.0))
            number += connection.accepted > ended
            self._unusual[rest] = number, now
            if len(self._unusual) > _MAX_SIZES:
                self._unusual.pop(next(iter(self._unusual)))
            if number > _TRIALS:
                connection.handshake = rest
                connection.waits_since = None
            return number <= _TRIALS
        if rest > _MAX_HEARTBEATS or connection.handshake > _MAX_HANDSHAKE:
            return True
        if rest % (_PING + self.overhead):
            return True
        connection.handshake += rest
        connection.waits_since = None
        return False

    def measure_silence(self, fd: int, connection: Connection) -> float:
        """Return the seconds since data came in on a connection; infinity if it has ended.

        :param fd: its descriptor in libzmq
        """
        traffic = self._read_traffic(fd)
        is_same = self.connections.get(fd) is connection  # or another one has the descriptor now
        return traffic.since_received if traffic and is_same else inf

    def rank(self, connection: Connection, traffic: Traffic | None, now: float) -> Any:
        """Return when a connection is closed to make room: the lowest first; None for never.

        First those that are not admitted, then those that were never used, then idle ones; then
        those that came in just now.
        """
        age = now - connection.accepted
        new = NEW, connection.accepted
        if traffic is None:
            quiet = now - connection.used
        elif not self.is_admitted(traffic):
            return (STRANGER, connection.accepted) if age >= QUIET else new
        else:
            quiet = min(traffic.since_received, traffic.since_sent)
            if not self.counts:
                is_waiting = traffic.received > max(self._usual_handshakes()) and (
                    traffic.since_received < traffic.since_sent or traffic.written <= _MAX_ANSWER
                )
                idle = USED if connection.received else UNUSED
                return None if is_waiting or quiet < QUIET else (idle, -quiet)
            self.track(connection, traffic, now)
            if connection.waits_since is not None and not self.has_part(connection):
                return None
        if not connection.received:
            return (UNUSED, connection.accepted) if age >= QUIET else new
        return None if connection.owed > 0 or quiet < QUIET else (USED, -quiet)
