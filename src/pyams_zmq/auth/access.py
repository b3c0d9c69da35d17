# SPDX-License-Identifier: ZPL-2.1
"""The access rules of a server: read and checked once, applied to its sockets, read again."""

import logging
from collections.abc import Iterable
from typing import Any

from pyams_zmq.auth.credentials import Users, parse_users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.auth.policy import AccessPolicy, parse_clients, split_clients
from pyams_zmq.wire.endpoint import is_local

LOGGER = logging.getLogger('PyAMS (zmq)')


class Access(AccessPolicy):
    """Access rules of the sockets of one server.

    It is the policy that an :class:`~pyams_zmq.auth.Authenticator` asks: after `reload` new
    connections follow the new rules.

    :param auth: users that may connect, see :func:`parse_users`
    :param clients: addresses that may connect, see :func:`parse_clients`
    :param curve: keys of the server and its clients (RFC 26/CURVEZMQ)
    :raises ValueError: for credentials or addresses that cannot be parsed, and for *auth* together
        with *curve*
    :raises TypeError: for a *curve* of another class
    """

    def __init__(
        self,
        auth: Users = None,
        clients: str | Iterable[Any] | None = None,
        curve: CurveServer | None = None,
    ):
        self.clients = [str(client) for client in split_clients(clients)] or None
        if curve is not None and not isinstance(curve, CurveServer):
            raise TypeError(f'Bad curve, a {type(curve).__name__}: pass a CurveServer')
        users = parse_users(auth)
        if users and curve is not None:
            raise ValueError('Give auth or curve: a socket has one mechanism')
        super().__init__(users, parse_clients(self.clients), () if curve is None else curve.clients)
        self.curve = curve
        self.auth = auth

    @property
    def has_credentials(self) -> bool:
        """True if peers need credentials."""
        return bool(self.users or self.curve)

    def reload(self) -> None:
        """Read users and keys again, from the file or folder that was given.

        :raises ValueError: they cannot be read; then nothing changes
        """
        users = parse_users(self.auth)
        if self.curve is not None:
            self.curve.reload()
            self.keys = self.curve.clients
        self.users = users

    def try_reload(self, name: object) -> bool:
        """Read users and keys again; log the result.

        :param name: name of the server, for the log
        :return: true if they were read
        """
        try:
            self.reload()
        except ValueError as error:
            LOGGER.error('%s keeps its users and keys: %s', name, error)
            return False
        LOGGER.info('%s has read its users and keys again', name)
        return True

    def protect(self, socket: Any, domain: bytes) -> None:
        """Set the options by which libzmq asks the ZAP handler about each peer of a socket.

        :param domain: ZAP domain; the authenticator may have a policy for it
        """
        socket.zap_domain = domain
        socket.zap_enforce_domain = True  # without a ZAP handler libzmq would accept all peers
        if self.curve is not None:
            self.curve.apply(socket)
        else:
            socket.plain_server = bool(self.users)

    def warn_of_exposure(self, name: object, uri: str) -> None:
        """Log a warning if others on the network can read the messages.

        :param name: name of the server, for the log
        :param uri: bound address, as libzmq returned it
        """
        if self.curve is None and not is_local(uri):
            LOGGER.warning(
                '%s serves the network at %s, %s: others on the network can read and change the '
                'messages; use CURVE',
                name,
                uri,
                'with passwords in clear text' if self.users else 'without authentication',
            )


class AccessAttributes:
    """Attributes by which the users of a server know its access rules.

    :ivar access: the rules; an assignment to `passwords` or `clients` replaces them, before the
        start
    """

    access: Access
    curve: CurveServer | None = None

    def set_access(
        self, auth: Users, clients: str | Iterable[Any] | None, curve: CurveServer | None
    ) -> None:
        """Set the rules; see :class:`Access`.

        :param curve: keys, by default those of the class attribute
        :raises TypeError: if the class has its own value of `passwords` or `clients`
        """
        for name in ('passwords', 'clients'):
            value = getattr(type(self), name)
            if value and not isinstance(value, property):
                raise TypeError(
                    f'{type(self).__name__}.{name} is a class attribute, which protects nothing: '
                    'pass auth and clients to the constructor'
                )
        if curve is not None:
            self.curve = curve
        self.access = Access(auth, clients, self.curve)

    @property
    def passwords(self) -> Any:
        """Dictionary of user names and passwords, None without `auth`."""
        return self.access.users or None

    @passwords.setter
    def passwords(self, auth: Users) -> None:
        self.access = Access(auth, self.clients, self.curve)

    @property
    def clients(self) -> Any:
        """Addresses that may connect, as a list of strings; None if all may connect."""
        return self.access.clients

    @clients.setter
    def clients(self, clients: str | Iterable[Any] | None) -> None:
        self.access = Access(self.access.auth, clients, self.curve)
