# SPDX-License-Identifier: ZPL-2.1
"""The address of a service, and the state of a connection to it.

This module does no I/O: the client for threads and the client for asyncio connect, read events of
the monitor and send in different ways.
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

CONNECTION_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)
"""Events that :meth:`ConnectionState.handle_event` needs"""

MAX_HANGUPS = 3
"""Handshakes in a row that the server ends without an error, until it counts as a refusal"""

RECONNECT_IVL = 10
MAX_RECONNECT_IVL = 500
"""Milliseconds between two attempts to connect, at first and at most"""

HEARTBEAT_IVL = 5000
"""Milliseconds between two heartbeats, and until a peer that does not answer counts as gone"""

RETRIED = (ZMQTimeoutError, ZMQUnreachableError)
"""Errors after which a call that may run twice is repeated"""

REFUSED = _(
    'Connection refused: check user, password or keys, the mechanism, and the addresses that '
    'the server allows'
)


@contextmanager
def as_os_error() -> Iterator[None]:
    """Raise a ZMQError as the OSError with the same errno."""
    try:
        yield
    except zmq.ZMQError as error:
        raise make_os_error(error) from error


def make_os_error(error: zmq.ZMQError) -> OSError:
    """Return the OSError with the errno and the text of a ZMQError."""
    return OSError(int(error.errno or 0), error.strerror)


class ServiceAddress(NamedTuple):
    """Endpoint and credentials for connecting to a service.

    :ivar endpoint: the endpoint of the service
    :ivar users: the user and the password; empty without them
    :ivar curve: the keys, or None
    """

    endpoint: Endpoint
    users: Mapping[str, str]
    curve: CurveClient | None

    @classmethod
    def parse(
        cls, address: Any, auth: Users, curve: CurveClient | None, protocol: str = 'tcp'
    ) -> 'ServiceAddress':
        """Parse the arguments of a client.

        :param protocol: protocol of an address without one
        :raises ValueError: if the address or the credentials are not valid
        :raises TypeError: if *curve* is of another class
        """
        endpoint = Endpoint.parse(address, bind=False, protocol=protocol)
        if curve is not None and not isinstance(curve, CurveClient):
            raise TypeError(f'Bad curve, a {type(curve).__name__}: pass a CurveClient')
        users = parse_users(auth)
        if len(users) + (curve is not None) > 1:
            raise ValueError('A client connects as one user, or with CURVE keys')
        return cls(endpoint, users, curve)


class ConnectionState:
    """State of the connection of one socket to one endpoint, derived from monitor events.

    :param endpoint: endpoint that the socket connects to
    :ivar is_connected: true from a successful handshake until the connection is lost
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.is_connected = False
        self._hangups = 0
        self._has_failed = False

    def handle_event(self, event: int) -> bool:
        """Update the state; return True if the event means that the connection was lost.

        :param event: one of `CONNECTION_EVENTS`
        :raises ZMQRefusedError: if the service refuses the connection; then the socket is useless
        """
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.is_connected = True
            self._hangups = 0
        elif event == zmq.EVENT_DISCONNECTED:
            was_connected, self.is_connected = self.is_connected, False
            has_failed, self._has_failed = self._has_failed, False
            # libzmq sends no event for a server without ZMTP if the client has credentials.
            if not (was_connected or has_failed):
                raise self.describe_refusal()
            return was_connected
        else:
            # A server hangs up during a handshake for a wrong mechanism, or because it stops.
            self._hangups += 1
            self._has_failed = True
            if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL or self._hangups == MAX_HANGUPS:
                raise self.describe_refusal()
        return False

    def describe_refusal(self) -> ZMQRefusedError:
        """Return the error for a call that the service refuses."""
        return ZMQRefusedError(f'{self.endpoint}: {REFUSED}')

    def describe_loss(self) -> ZMQUnreachableError:
        """Return the error for a call whose connection was lost."""
        return ZMQUnreachableError(
            f'The connection to {self.endpoint} was lost; the call may have run or not'
        )

    def describe_silence(self, timeout: float) -> ZMQTimeoutError | ZMQUnreachableError:
        """Return the error for a call without a reply.

        :param timeout: seconds that the call has waited
        """
        if self.is_connected:
            return ZMQTimeoutError(f'{self.endpoint} has not replied within {timeout} s')
        return ZMQUnreachableError(f'No service has answered at {self.endpoint} for {timeout} s')


def keep_connected(socket: zmq.Socket[Any]) -> None:
    """Make a socket reconnect soon, and detect a peer that is gone without closing."""
    socket.reconnect_ivl = RECONNECT_IVL
    socket.reconnect_ivl_max = MAX_RECONNECT_IVL
    socket.heartbeat_ivl = HEARTBEAT_IVL
    socket.heartbeat_timeout = HEARTBEAT_IVL


def configure(
    socket: zmq.Socket[Any], endpoint: Endpoint, users: Mapping[str, str], curve: CurveClient | None
) -> None:
    """Set the options that a socket needs to connect; closed, it keeps no unsent messages.

    :param users: the user and the password; empty without them
    """
    socket.set(zmq.LINGER, 0)  # as an attribute it takes three times as long
    if endpoint.is_ipv6:
        socket.set(zmq.IPV6, 1)
    if curve is not None:
        curve.apply(socket)
    for user, password in users.items():
        socket.plain_username = user.encode()
        socket.plain_password = password.encode()
