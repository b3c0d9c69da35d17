# SPDX-License-Identifier: ZPL-2.1
"""The access rules of a server: read and checked once, applied to its sockets, read again."""

import logging
import os
from collections.abc import Callable, Container, Iterable
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn

import zmq

from pyams_zmq.auth.credentials import Users, parse_users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.auth.policy import (
    ONE_MECHANISM,
    AccessPolicy,
    Network,
    parse_clients,
    split_clients,
)
from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.wire.endpoint import is_local

LOGGER = logging.getLogger('PyAMS (zmq)')

UNNAMED = b' (unnamed)'
"""Behind the ZAP domain of a socket to which libzmq must not name the users

libzmq 4.3.5 puts the name in front of what a peer sends. A REQ socket takes it for a malformed
reply, and drops the peer.
"""


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
        self.clients, networks = _read_clients(clients)
        if curve is not None and not isinstance(curve, CurveServer):
            raise TypeError(f'Bad curve, a {type(curve).__name__}: pass a CurveServer')
        users = parse_users(auth)
        if users and curve is not None:
            raise ValueError(ONE_MECHANISM)
        super().__init__(users, networks, () if curve is None else curve.clients)
        self.curve = curve
        self.auth = auth
        self._read_keys: Callable[[], Container[str]] | None = None
        if curve is not None:
            self._read_keys = partial(_read_curve, curve)
        self._bound_mechanisms: set[bytes] = set()

    @property
    def has_credentials(self) -> bool:
        """True if peers need credentials."""
        return self.mechanism != b'NULL'

    def allow(self, *addresses: str) -> None:
        """Add addresses to `clients`; see `AccessPolicy.allow`."""
        super().allow(*addresses)
        self.clients = (*(self.clients or ()), *map(str, addresses))

    def set_clients(self, clients: str | Iterable[Any] | None) -> None:
        """Replace the addresses that may connect.

        :raises ValueError: they cannot be parsed
        """
        self.clients, self.networks = _read_clients(clients)

    def require_users(self, auth: Users) -> None:
        """Let these users connect, also after a `reload`; see `AccessPolicy.require_users`.

        :raises ValueError: see there; and if the sockets are bound without PLAIN: then all peers
            are refused
        """
        super().require_users(auth)
        self.auth = auth
        self._check_sockets()

    def require_keys(
        self, keys: Container[str], read: Callable[[], Container[str]] | None = None
    ) -> None:
        """Let the clients with these keys connect; see `AccessPolicy.require_keys`.

        :param read: called by `reload` for the present keys
        :raises ValueError: see there; and if the sockets are bound without CURVE: then all peers
            are refused
        """
        super().require_keys(keys)
        self._read_keys = read
        self._check_sockets()

    def _check_sockets(self) -> None:
        if self._bound_mechanisms - {self.mechanism}:
            raise ValueError(
                f'The sockets are bound without {self.mechanism.decode()}, so that all peers are '
                'refused: pass auth or curve to the constructor'
            )

    def reload(self) -> None:
        """Read users and keys again, from the file or folder that was given.

        :raises ValueError: they cannot be read; then nothing changes
        """
        # Other users than those of a file may have been changed in place: their changes stay.
        users = parse_users(self.auth) if isinstance(self.auth, os.PathLike) else self.users
        if self._read_keys is not None:
            self.keys = self._read_keys()
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
        :raises ValueError: peers need keys, but the server has no key
        """
        if self.mechanism == b'CURVE' and self.curve is None:
            raise ValueError('CURVE needs the key of the server: pass curve to the constructor')
        self._bound_mechanisms.add(self.mechanism)
        socket.zap_domain = domain + UNNAMED if socket.type == zmq.REQ else domain
        socket.zap_enforce_domain = True  # without a ZAP handler libzmq would accept all peers
        if self.curve is not None:
            self.curve.apply(socket)
        else:
            socket.plain_server = self.mechanism == b'PLAIN'

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
                'with passwords in clear text'
                if self.has_credentials
                else 'without authentication',
            )


class FixedAccess(Access):
    """Access rules without a condition, which cannot be changed.

    They are those of a process that does not decide who may connect: a change would be ignored.

    :param reason: text of the error of a change, which names the remedy
    """

    def __init__(self, reason: str):
        super().__init__()
        self._reason = reason

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise a ZMQStartError: these rules cannot be changed."""
        raise ZMQStartError(self._reason)

    allow = deny = set_clients = require_users = require_keys = _refuse


def _read_clients(
    clients: str | Iterable[Any] | None,
) -> tuple[tuple[str, ...] | None, tuple[Network, ...]]:
    """Return the addresses that may connect, as given and as networks."""
    given = split_clients(clients)
    networks = parse_clients(given)  # of the values: an error does not quote the text of others
    return tuple(map(str, given)) or None, networks


def _read_curve(curve: CurveServer) -> Container[str]:
    curve.reload()
    return curve.clients


class AccessAttributes:
    """Attributes by which the users of a server know its access rules.

    :ivar access: the rules; an assignment to `passwords` or `clients` replaces them, before the
        start, and changes them in the child of a process
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

    def check_curve(self) -> None:
        """Check that `curve` was not assigned after the rules were set.

        :raises ZMQStartError: it was; its keys would not be used
        """
        if self.curve is not None and self.curve is not self.access.curve:
            raise ZMQStartError(
                f'An assignment to {type(self).__name__}.curve comes too late, the keys would be '
                'ignored: pass curve to the constructor, or make it a class attribute'
            )

    @property
    def passwords(self) -> Any:
        """Dictionary of user names and passwords, None without `auth`.

        Changes of it take effect, except in the owner of a process that was started: there it is
        read-only.
        """
        users = self.access.users or None
        return users if users is None or not self._runs_elsewhere() else MappingProxyType(users)

    @passwords.setter
    def passwords(self, auth: Users) -> None:
        if self._is_set_up():
            self.access.require_users(auth)
        else:
            self.access = Access(auth, self.clients, self.access.curve)

    @property
    def clients(self) -> Any:
        """Addresses that may connect, as a tuple of strings; None if all may connect."""
        return self.access.clients

    @clients.setter
    def clients(self, clients: str | Iterable[Any] | None) -> None:
        self._is_set_up()
        self.access.set_clients(clients)

    def _is_set_up(self) -> bool:
        """Return True if an authenticator asks `access`.

        :raises ZMQStartError: in the owner of a process that was started: it would change nothing
        """
        if self._runs_elsewhere():
            raise ZMQStartError(
                'The process has started: change who may connect before the start, or in its child'
            )
        return getattr(self, 'auth_thread', None) is not None

    def _runs_elsewhere(self) -> bool:
        """Return True in the owner of a process that was started, whose rules are a copy."""
        return getattr(self, '_popen', None) is not None
