# SPDX-License-Identifier: ZPL-2.1
"""The address of a service, and the state of a connection to it.

This module does not send, receive or wait; of the system it asks why an attempt to connect has
failed. The client for threads and the client for asyncio connect, read events of the monitor and
send in different ways.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import zmq

from pyams_zmq import _
from pyams_zmq.auth import FirstUser, Users, parse_users
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.client.handshake import HandshakeWatch
from pyams_zmq.client.permission import describe_missing_permission
from pyams_zmq.exceptions import ZMQRefusedError, ZMQTimeoutError, ZMQUnreachableError
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.keepalive import keep_alive
from pyams_zmq.wire.names import LOOKUP_TIMEOUT, needs_ipv6

CONNECTION_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
)
"""Events that :meth:`ConnectionState.handle_event` needs"""

RECONNECT_IVL = 10
MAX_RECONNECT_IVL = 200
"""Milliseconds between two attempts to connect, at first and at most: a call waits for 2 s only"""

HANDSHAKE_IVL = 5000
"""Milliseconds until a connection without a handshake is closed, and the next attempt is made"""

HEARTBEATS = (5.0, 10.0)
"""Seconds of silence until the system probes the host of a service; seconds until it closes a
connection whose host does not answer, or takes no data"""

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

    def __repr__(self) -> str:  # without the password
        return f'<{type(self).__name__} {self.endpoint}>'

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
        users = auth if type(auth) is FirstUser else parse_users(auth)
        if len(users) + (curve is not None) > 1:
            raise ValueError('A client connects as one user, or with CURVE keys')
        return cls(endpoint, users, curve)


class ConnectionState:
    """State of the connection of one socket to one endpoint, derived from monitor events.

    :param endpoint: endpoint that the socket connects to
    :ivar is_connected: true from a successful handshake until the connection is lost
    :ivar is_down: true if the last attempt to connect has failed: nobody listens
    :ivar has_failed: true between two attempts to connect
    :ivar missing: seconds of the pauses between failed attempts in a row, without the last pause
    :ivar refusal: why the service refuses the connection, if it does
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.is_connected = False
        self.is_down = False
        self.has_failed = False
        self.missing = 0.0
        self._pause = 0.0
        self.refusal: str = REFUSED
        self._is_accepted = False
        self._has_error = False
        self._watch = HandshakeWatch(endpoint)

    def handle_event(self, event: int, value: int = 0) -> bool:
        """Update the state; return True if the event means that the connection was lost.

        :param event: one of `CONNECTION_EVENTS`
        :param value: value of the event, of `EVENT_CONNECTED` a descriptor
        :raises ZMQRefusedError: if the service refuses the connection; then the socket is useless
        """
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.is_connected = True
            self.missing = self._pause = 0.0
            self._is_accepted = False
            self._watch.reset()
        elif event == zmq.EVENT_CONNECTED:
            self.is_down = self.has_failed = False
            self._is_accepted = True
            self._watch.begin(value)
        elif event == zmq.EVENT_CLOSED:
            self.is_down = True
            self._is_accepted = False
            self._watch.reset()
            self.refusal = describe_missing_permission(self.endpoint) or REFUSED
            if self.refusal is not REFUSED:
                raise self.describe_refusal()
        elif event == zmq.EVENT_CONNECT_RETRIED:
            self.has_failed = True
            self.missing += self._pause
            self._pause = value / 1000  # libzmq tries again after so many milliseconds
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            # A port that is forwarded hangs up until the service behind it is there, and so does a
            # service that stops. One that expects another mechanism does too, within its greeting;
            # libzmq says so only if it has read all of that before.
            self._has_error = True
            if self._watch.fail():
                raise self.describe_refusal()
        elif event == zmq.EVENT_DISCONNECTED:
            was_connected, self.is_connected = self.is_connected, False
            has_error, self._has_error = self._has_error, False
            # No event came before: the server has sent something else than ZMTP. Without an
            # attempt, the monitor was opened later, and a connection has ended that was up.
            if self._is_accepted and not (was_connected or has_error):
                raise self.describe_refusal()
            return was_connected
        else:
            raise self.describe_refusal()
        return False

    def follow(self, previous: 'ConnectionState') -> None:
        """Go on from the last socket: count the failed handshakes of both, and know its attempt.

        :param previous: state of its connection to the same service
        """
        self._watch = previous._watch
        self._is_accepted = previous._is_accepted  # until this socket has made an attempt

    def close(self) -> None:
        """Close the duplicate of the connection, if a handshake is under way."""
        self._watch.close()

    def describe_refusal(self) -> ZMQRefusedError:
        """Return the error for a call that the service refuses."""
        return ZMQRefusedError(f'{self.endpoint}: {self.refusal}')

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
        text = f'No service has answered at {self.endpoint} for {timeout:.3g} s'
        if self._is_accepted:
            text += (
                '; connections are accepted, but get no further: the service hangs, or a forwarder '
                'whose service is down listens there, or a server without ØMQ'
            )
        error = ZMQUnreachableError(text)
        error.is_accepted = self._is_accepted
        return error


def keep_connected(socket: zmq.Socket[Any], heartbeats: tuple[float, float] = HEARTBEATS) -> None:
    """Make a socket reconnect soon, and detect a peer that is gone without closing.

    :param heartbeats: see `HEARTBEATS`
    """
    socket.reconnect_ivl = RECONNECT_IVL
    socket.reconnect_ivl_max = MAX_RECONNECT_IVL
    socket.handshake_ivl = HANDSHAKE_IVL
    keep_alive(socket, *heartbeats, limit_sending=True)


def configure(
    socket: zmq.Socket[Any],
    endpoint: Endpoint,
    users: Mapping[str, str],
    curve: CurveClient | None,
    *,
    lookup_timeout: float = LOOKUP_TIMEOUT,
) -> None:
    """Set the options that a socket needs to connect; closed, it keeps no unsent messages.

    :param users: the user and the password; empty without them
    :param lookup_timeout: seconds to wait until it is known if a host name needs IPv6
    """
    socket.set(zmq.LINGER, 0)  # as an attribute it takes three times as long
    # libzmq aborts the process when it goes on with a connection that it had stopped to read, and
    # that has ended meanwhile; and a full queue would make a ROUTER drop replies.
    socket.set(zmq.RCVHWM, 0)
    if needs_ipv6(endpoint, lookup_timeout):
        socket.set(zmq.IPV6, 1)
    if curve is not None:
        curve.apply(socket)
    for user, password in users.items():
        socket.plain_username = user.encode()
        socket.plain_password = password.encode()
