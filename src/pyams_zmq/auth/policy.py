# SPDX-License-Identifier: ZPL-2.1
"""The decision who may connect, without I/O."""

import hmac
from collections.abc import Collection, Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, NamedTuple

from zmq.utils import z85

from pyams_zmq.wire.endpoint import parse_ip

_LOCALHOST = ('127.0.0.0/8', '::1')

ANONYMOUS = 'anonymous'
"""User name of a peer that connects without credentials"""

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
    :raises ValueError: for anything else, for example a host name; its text quotes it
    """
    networks: list[Network] = []
    for client in split_clients(clients):
        try:
            names = _LOCALHOST if client == 'localhost' else (client,)
            networks.extend(_parse_network(str(name)) for name in names)
        except ValueError:
            raise ValueError(
                f'Bad client address {client!r}: write IPv4 or IPv6 addresses, networks as '
                f"10.0.0.0/8, or 'localhost'"
            ) from None
    return tuple(networks)


def _parse_network(text: str) -> Network:
    if '%' in text:
        raise ValueError('a network does not have a zone: it would match on all interfaces')
    network = ip_network(text)
    mapped = getattr(network.network_address, 'ipv4_mapped', None)
    return network if mapped is None else IPv4Network((mapped, max(0, network.prefixlen - 96)))


class AccessPolicy:
    """Decides which connections are allowed; does no I/O.

    :param users: passwords by user name; if there are any, peers need PLAIN
    :param networks: networks of the peers; empty for all networks
    :param keys: public keys (Z85) of the clients; if there are any, peers need CURVE
    """

    def __init__(
        self, users: Mapping[str, str], networks: Sequence[Network], keys: Collection[str] = ()
    ):
        self.users = users
        self.networks = networks
        self.keys = keys

    def check(self, address: str, mechanism: bytes, credentials: Sequence[bytes]) -> Verdict:
        """Return the decision on one connection.

        :param address: IP address of the peer; of an ipc peer, `localhost:uid:gid:pid`, which
            counts as 127.0.0.1
        :param mechanism: NULL, PLAIN or CURVE
        :param credentials: user name and password for PLAIN, public key for CURVE
        """
        if self.networks and not self._is_allowed(address):
            return Verdict(b'400', b'Address not allowed')
        user = self._authenticate(mechanism, credentials)
        if user is None:
            return Verdict(b'400', b'Bad credentials')
        return Verdict(b'200', b'OK', user)

    def admits(self, user: str) -> bool:
        """Return True if a user that has connected would still be accepted, by name or key."""
        return user in self.users or user in self.keys or not (self.users or self.keys)

    def _authenticate(self, mechanism: bytes, credentials: Sequence[bytes]) -> str | None:
        if mechanism != (b'CURVE' if self.keys else b'PLAIN' if self.users else b'NULL'):
            return None
        if mechanism == b'NULL':
            return ANONYMOUS
        if mechanism == b'CURVE':
            [key] = credentials
            user = z85.encode(key).decode()
            return user if user in self.keys else None
        name, password = credentials
        user = name.decode()
        expected = self.users.get(user)
        # An unknown user takes as long as a wrong password.
        equal = hmac.compare_digest((expected or '').encode(), password)
        return user if equal and expected is not None else None

    def _is_allowed(self, address: str) -> bool:
        peer = parse_ip(address)
        return any(peer in network for network in self.networks)
