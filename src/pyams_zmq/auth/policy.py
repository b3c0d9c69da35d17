# SPDX-License-Identifier: ZPL-2.1
"""The decision who may connect, without I/O."""

import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, NamedTuple

from zmq.utils import z85

from pyams_zmq.auth.credentials import Users, parse_users
from pyams_zmq.auth.keys import AskedKeys
from pyams_zmq.wire.endpoint import parse_ip

_LOCALHOST = ('127.0.0.0/8', '::1')

# A name, an address with a port, or the colons of IPv6: not `user:password`.
_NO_CREDENTIALS = re.compile(r'[^:]*|[\d.]*:\d*|\[?[\da-f]*:[\da-f]*:.*', re.IGNORECASE | re.DOTALL)

ZAP_DOMAIN = b'pyams_zmq'
"""ZAP domain of the sockets of a process"""

ANONYMOUS = 'anonymous'
"""User name of a peer that connects without credentials"""

ONE_MECHANISM = 'Give auth or curve: a socket has one mechanism'

Network = IPv4Network | IPv6Network


class Verdict(NamedTuple):
    """Decision on a connection: status and text (RFC 27/ZAP), and the name of the user."""

    status: bytes
    text: bytes
    user: str = ''


class Peer(NamedTuple):
    """Sender of a message.

    :ivar user: name of a PLAIN user, public key (Z85) of a CURVE client, otherwise `anonymous`
    :ivar address: IP address; for ipc `localhost`, user, group and process id, joined by colons
    """

    user: str
    address: str


def split_clients(clients: str | Iterable[Any] | None) -> list[Any]:
    """Split the addresses that may connect.

    :param clients: string of addresses separated by blanks, commas or newlines, or an iterable
    """
    if isinstance(clients, str):
        return clients.replace(',', ' ').split()
    if clients is not None and not isinstance(clients, Iterable):
        return [clients]
    return list(clients or ())


def parse_clients(clients: str | Iterable[Any] | None) -> tuple[Network, ...]:
    """Read the addresses that may connect.

    :param clients: string of IPv4 or IPv6 addresses or networks, separated by blanks, commas or
        newlines, or an iterable of them; `localhost` means all loopback addresses
    :return: networks; empty if all addresses may connect
    :raises ValueError: for anything else, for example a host name; its text quotes it, unless it
        may be a password
    """
    networks: list[Network] = []
    for client in split_clients(clients):
        try:
            names = _LOCALHOST if client == 'localhost' else (client,)
            networks.extend(_parse_network(str(name)) for name in names)
        except ValueError:
            raise ValueError(
                f'Bad client address {_quote(client)}: write IPv4 or IPv6 addresses, networks as '
                f"10.0.0.0/8, or 'localhost'"
            ) from None
    return tuple(networks)


def _quote(client: Any) -> str:
    """Quote an address in an error, unless it may be credentials that were given instead."""
    if not isinstance(client, str):
        return f'({type(client).__name__})'
    return repr(client) if _NO_CREDENTIALS.fullmatch(client) else '(it may contain a password)'


def _parse_network(text: str) -> Network:
    if '%' in text:
        raise ValueError('a network does not have a zone: it would match on all interfaces')
    network = ip_network(text)
    mapped = getattr(network.network_address, 'ipv4_mapped', None)
    return network if mapped is None else IPv4Network((mapped, max(0, network.prefixlen - 96)))


class AccessPolicy:
    """Decides which connections are allowed; does no I/O.

    Its rules can be changed while another thread asks it: each change is one assignment.

    :param users: passwords by user name; if there are any, peers need PLAIN
    :param networks: networks of the peers; empty for all networks
    :param keys: public keys (Z85) of the clients; if there are any, peers need CURVE
    :ivar denied: networks whose peers are refused
    :ivar mechanism: mechanism that peers need: CURVE, PLAIN or NULL; without its last user or key
        it still needs them
    """

    def __init__(
        self,
        users: Mapping[str, str],
        networks: Sequence[Network],
        keys: Collection[str] = (),
        denied: Sequence[Network] = (),
    ):
        self.users = users
        self.networks = tuple(networks)
        self.keys: Container[str] = keys
        self.denied = tuple(denied)
        self.mechanism = b'CURVE' if keys else b'PLAIN' if users else b'NULL'

    def allow(self, *addresses: str) -> None:
        """Add addresses that may connect; all others are refused.

        :raises ValueError: see :func:`parse_clients`
        """
        self.networks += parse_clients(addresses)

    def deny(self, *addresses: str) -> None:
        """Refuse addresses, also those that are allowed.

        :raises ValueError: see :func:`parse_clients`
        """
        self.denied += parse_clients(addresses)

    def require_users(self, auth: Users) -> None:
        """Let these users connect, and no others.

        :param auth: see :func:`parse_users`; a mapping is not copied, so that it can be changed
        :raises ValueError: if the users are empty or cannot be parsed, or if peers need keys
        """
        users = parse_users(auth)
        if not users:
            raise ValueError('No users: nobody could connect')
        if self.mechanism == b'CURVE':
            raise ValueError(ONE_MECHANISM)
        self.users = auth if isinstance(auth, Mapping) else users
        self.mechanism = b'PLAIN'

    def require_keys(self, keys: Container[str]) -> None:
        """Let the clients with these public keys connect, and no others.

        :raises ValueError: peers need passwords
        """
        if self.mechanism == b'PLAIN':
            raise ValueError(ONE_MECHANISM)
        self.keys = keys
        self.mechanism = b'CURVE'

    def check(self, address: str, mechanism: bytes, credentials: Sequence[bytes]) -> Verdict:
        """Return the decision on one connection.

        :param address: IP address of the peer; of an ipc peer, `localhost:uid:gid:pid`, which
            counts as 127.0.0.1
        :param mechanism: NULL, PLAIN or CURVE
        :param credentials: user name and password for PLAIN, public key for CURVE
        """
        if not self._is_allowed(address):
            return Verdict(b'400', b'Address not allowed')
        user = self._authenticate(mechanism, credentials)
        if user is None:
            return Verdict(b'400', b'Bad credentials')
        return Verdict(b'200', b'OK', user)

    def admits(self, user: str) -> bool:
        """Return True if a user that has connected would still be accepted, by name or key."""
        if self.mechanism == b'NULL':
            return True
        return user in (self.keys if self.mechanism == b'CURVE' else self.users)

    def _authenticate(self, mechanism: bytes, credentials: Sequence[bytes]) -> str | None:
        if mechanism != self.mechanism:
            return None
        if mechanism == b'NULL':
            return ANONYMOUS
        if mechanism == b'CURVE':
            [key] = credentials
            user, keys = z85.encode(key).decode(), self.keys
            is_known = keys.ask(user) if isinstance(keys, AskedKeys) else user in keys
            return user if is_known else None
        name, password = credentials
        user = name.decode()
        expected = self.users.get(user)
        # An unknown user takes as long as a wrong password.
        import hmac  # noqa: PLC0415 - clients import this module, and OpenSSL is large

        equal = hmac.compare_digest((expected or '').encode(), password)
        return user if equal and expected is not None else None

    def _is_allowed(self, address: str) -> bool:
        networks, denied = self.networks, self.denied
        if not (networks or denied):
            return True
        peer = parse_ip(address)
        is_listed = not networks or any(peer in network for network in networks)
        return is_listed and not any(peer in network for network in denied)
