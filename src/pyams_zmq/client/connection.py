# SPDX-License-Identifier: ZPL-2.1
"""What a client connects to, and how its connection is.

No I/O: the clients of threads and of asyncio connect, read the events of the monitor and send, each
in its own way.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import zmq

from pyams_zmq import _
from pyams_zmq.auth import Users, parse_users
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.exceptions import ZMQRefusedError, ZMQTimeoutError, ZMQUnreachableError
from pyams_zmq.wire.endpoint import Endpoint

HANDSHAKE_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)

CONNECTION_EVENTS = HANDSHAKE_EVENTS | zmq.EVENT_DISCONNECTED
"""Events that a :class:`ConnectionState` has to see"""

MAX_HANGUPS = 3
"""Handshakes in a row without an end, after which they are no accident"""

RECONNECT_IVL = 10
MAX_RECONNECT_IVL = 500
"""Milliseconds between two attempts to connect, at first and at most"""

HEARTBEAT_IVL = 5000
"""Milliseconds between two heartbeats, and until a peer without an answer counts as gone"""

RETRIED = (ZMQTimeoutError, ZMQUnreachableError)
"""Errors after which a call that may run twice is tried again"""

REFUSED = _(
    'Connection refused: check user, password or keys, the mechanism, and the addresses that '
    'the server allows'
)


@contextmanager
def as_os_error() -> Iterator[None]:
    """Raise a ZMQError as the OSError with its errno."""
    try:
        yield
    except zmq.ZMQError as error:
        raise make_os_error(error) from error


def make_os_error(error: zmq.ZMQError) -> OSError:
    """Make the OSError that says the same as a ZMQError."""
    return OSError(int(error.errno or 0), error.strerror)


class ServiceAddress(NamedTuple):
    """What a client connects to, and as whom.

    :ivar endpoint: the service
    :ivar users: the user with the password, or nobody
    :ivar curve: the keys, if any
    """

    endpoint: Endpoint
    users: Mapping[str, str]
    curve: CurveClient | None

    @classmethod
    def parse(cls, address: Any, auth: Users, curve: CurveClient | None) -> 'ServiceAddress':
        """Read the arguments of a client.

        :raises ValueError: for an address or credentials that cannot be understood
        """
        return cls(Endpoint.parse(address, bind=False), parse_user(auth, curve), curve)


class ConnectionState:
    """The connection of one socket to one endpoint.

    :param endpoint: what the socket connects to
    :ivar is_connected: true from the end of a handshake until the connection is lost
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.is_connected = False
        self._hangups = 0

    def note(self, event: int) -> bool:
        """Note an event of the monitor; tell if the connection was lost by it.

        :param event: one of `CONNECTION_EVENTS`
        :raises ZMQRefusedError: if the service does not let us in; the socket is of no more use
        """
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.is_connected = True
            self._hangups = 0
        elif event == zmq.EVENT_DISCONNECTED:
            was_connected, self.is_connected = self.is_connected, False
            return was_connected
        else:
            # Who hangs up in a handshake does so for a wrong mechanism, or when going down.
            self._hangups += 1
            if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL or self._hangups == MAX_HANGUPS:
                raise self.describe_refusal()
        return False

    def describe_refusal(self) -> ZMQRefusedError:
        """Make the error of a call that the service does not let in."""
        return ZMQRefusedError(f'{self.endpoint}: {REFUSED}')

    def describe_loss(self) -> ZMQUnreachableError:
        """Make the error of a call whose connection was lost."""
        return ZMQUnreachableError(
            f'The connection to {self.endpoint} was lost; the call may have run or not'
        )

    def describe_silence(self, timeout: float) -> ZMQTimeoutError | ZMQUnreachableError:
        """Make the error of a call without a reply.

        :param timeout: seconds that it has waited
        """
        if self.is_connected:
            return ZMQTimeoutError(f'{self.endpoint} has not replied within {timeout} s')
        return ZMQUnreachableError(f'No service has answered at {self.endpoint} for {timeout} s')


def keep_connected(socket: zmq.Socket[Any]) -> None:
    """Let a socket find its peer again soon, and notice one that has gone without a word."""
    socket.reconnect_ivl = RECONNECT_IVL
    socket.reconnect_ivl_max = MAX_RECONNECT_IVL
    socket.heartbeat_ivl = HEARTBEAT_IVL
    socket.heartbeat_timeout = HEARTBEAT_IVL


def parse_user(auth: Users, curve: CurveClient | None) -> dict[str, str]:
    """Read the credentials of a client, who is one user at most.

    :raises ValueError: for credentials that cannot be understood
    """
    users = parse_users(auth)
    if len(users) + (curve is not None) > 1:
        raise ValueError('A client connects as one user, or with CURVE keys')
    return users


def configure(
    socket: zmq.Socket[Any], endpoint: Endpoint, users: Mapping[str, str], curve: CurveClient | None
) -> None:
    """Make a socket ready to connect to an endpoint; closed, it keeps nothing.

    :param users: the user with the password, or nobody
    """
    socket.set(zmq.LINGER, 0)  # as an attribute it takes three times as long
    if endpoint.is_ipv6:
        socket.set(zmq.IPV6, 1)
    if curve is not None:
        curve.apply(socket)
    for user, password in users.items():
        socket.plain_username = user.encode()
        socket.plain_password = password.encode()
