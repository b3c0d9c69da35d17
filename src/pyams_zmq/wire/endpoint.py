# SPDX-License-Identifier: ZPL-2.1
"""Addresses, and one parser for all their forms."""

import os
import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import zmq

ANY_HOST = '0.0.0.0'  # noqa: S104 - to compare addresses; nothing is bound to it
"""Host of an address on all IPv4 interfaces"""

_FORMS = (
    "'host:port', ('host', port), 'host' or '*:port' (to bind), '[::1]:port', "
    "'tcp://host:port', 'ipc:///path' or 'ipc://@name'"
)

# A host is `*`, a name (of a host, or of an interface), or an IPv6 address in brackets.
_HOST_PORT = re.compile(
    r'(?P<host>\*|[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\])'
    r'(?::(?P<port>[0-9]{1,5}|\*))?',
    re.ASCII,
)
_IPV4 = re.compile(r'[0-9.]+', re.ASCII)
_MAX_PORT = 65535


@dataclass(frozen=True)
class Endpoint:
    """Address that a socket is bound or connected to; see `zmq_tcp(7)` and `zmq_ipc(7)`.

    :ivar protocol: `'tcp'` or `'ipc'`
    :ivar host: host, interface or `*` of tcp, path or `@name` of ipc
    :ivar port: port of tcp, 0 for any free one; None for ipc
    """

    protocol: str
    host: str
    port: int | None = None

    @classmethod
    def parse(cls, address: Any, *, bind: bool, protocol: str = 'tcp') -> 'Endpoint':
        """Parse an address.

        :param address: a URI, `'host:port'`, `(host, port)`, or `'host'` for any free port
        :param bind: true for an address to bind: its host may be `*` or an interface, its port may
            be missing, 0 or `*`; an address to connect to needs a host and a port
        :param protocol: protocol of an address without one, `'tcp'` or `'ipc'`
        :raises ValueError: if the address is not valid; the text quotes it
        """
        try:
            return cls._parse(address, bind, protocol)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'Bad ØMQ address {_quote(address)}: {error}; write {_FORMS}'
            ) from None

    @classmethod
    def _parse(cls, address: Any, bind: bool, protocol: str) -> 'Endpoint':
        if isinstance(address, str):
            return cls._parse_text(address, bind, protocol)
        if isinstance(address, (tuple, list)):
            host, port = address
            return cls._parse_tcp(_join(host, port), bind)
        raise TypeError('not a string, nor a host and a port')

    @classmethod
    @lru_cache(256)  # a client that opens a socket for each message parses the same one again
    def _parse_text(cls, address: str, bind: bool, protocol: str) -> 'Endpoint':
        scheme, separator, rest = address.partition('://')
        if not separator:
            scheme, rest = protocol, address
        if scheme == 'ipc':
            return cls('ipc', _check_path(rest))
        if scheme != 'tcp':
            raise ValueError(f'unknown protocol {scheme!r}')
        return cls._parse_tcp(rest, bind)

    @classmethod
    def _parse_tcp(cls, text: str, bind: bool) -> 'Endpoint':
        match = _HOST_PORT.fullmatch(text)
        if match is None:
            raise ValueError('not a host and a port')
        host, port_text = match['host'], match['port']
        if host.startswith('['):
            IPv6Address(host[1:-1])
        port = 0 if port_text in (None, '*') else int(port_text)
        if port > _MAX_PORT:
            raise ValueError(f'port {port} is not in 1..{_MAX_PORT}')
        if not bind and host == '*':
            raise ValueError("a host to connect to needs a name, '*' is only for binding")
        if not bind and port == 0:
            raise ValueError('an address to connect to needs a port')
        if bind and host == 'localhost':
            host = '127.0.0.1'  # libzmq binds numeric addresses and interfaces only
        return cls('tcp', host, port)

    @property
    def is_ipv6(self) -> bool:
        """True when the socket needs `zmq.IPV6`."""
        return self.protocol == 'tcp' and self.host.startswith('[')

    @cached_property
    def name(self) -> str | None:
        """The host name of a tcp endpoint to connect to, None for an IP address and for ipc."""
        is_name = self.protocol == 'tcp' and not (self.is_ipv6 or _IPV4.fullmatch(self.host))
        return self.host if is_name else None

    @property
    def path(self) -> str | None:
        """Path of the file of an ipc endpoint, None for tcp and for abstract names."""
        return self.host if self.protocol == 'ipc' and not self.host.startswith('@') else None

    @property
    def unix_name(self) -> bytes:
        """What the system calls an ipc endpoint: its path, or the name of an abstract one."""
        name = os.fsencode(self.host)
        return b'\0' + name[1:] if self.path is None else name

    @property
    def uri(self) -> str:
        """The endpoint in the form of libzmq."""
        return f'{self.protocol}://{self.host}' + ('' if self.port is None else f':{self.port}')

    @cached_property
    def encoded(self) -> Any:
        """The URI as bytes, for libzmq: those that the system uses for a path."""
        return os.fsencode(self.uri)

    @property
    def bound(self) -> 'Endpoint':
        """What a socket that binds this binds, in one form.

        An ipc path is absolute and without symbolic links; `*` and an IPv4 address that is mapped
        to IPv6 are IPv4; an IPv6 address is in its shortest form.
        """
        host = self.host
        if self.path is not None:
            host = os.path.realpath(self.path)
        elif self.protocol == 'tcp' and host == '*':
            host = ANY_HOST
        elif self.is_ipv6:
            host = host.strip('[]')
            # A link-local address needs its zone; `parse_ip` drops that.
            ip = ip_address(host) if '%' in host else parse_ip(host)
            host = str(ip) if ip.version == 4 else f'[{ip}]'  # noqa: PLR2004 - IPv4
        return replace(self, host=host)

    def overlaps(self, other: 'Endpoint') -> bool:
        """Return True if two sockets cannot bind these at the same time."""
        one, two = self.bound, other.bound
        if one.protocol != 'tcp' or two.protocol != 'tcp' or one.port != two.port:
            return one == two
        if one.host == two.host or '[::]' in (one.host, two.host):
            return bool(one.port)  # port 0 is any free one
        return ANY_HOST in (one.host, two.host) and not (one.is_ipv6 or two.is_ipv6)

    def __str__(self) -> str:
        return self.uri


def port_of(uri: str) -> int | None:
    """Return the port of a URI that libzmq returned, None for ipc."""
    return int(uri.rpartition(':')[2]) if uri.startswith('tcp:') else None


def is_local(uri: str) -> bool:
    """Return True if only this machine can connect to *uri*, which libzmq returned."""
    if not uri.startswith('tcp:'):
        return True
    return parse_ip(uri.removeprefix('tcp://').rpartition(':')[0].strip('[]')).is_loopback


def parse_ip(address: str) -> IPv4Address | IPv6Address:
    """Parse the IP address of a peer, as libzmq reports it.

    :param address: an IPv4 or IPv6 address, or `localhost:UID:GID:PID` of an ipc peer
    :return: the address without its zone, 127.0.0.1 for an ipc peer, and IPv4 for an IPv4 address
        that is mapped to IPv6
    """
    if address.startswith('localhost:'):
        return IPv4Address('127.0.0.1')
    ip = ip_address(address.partition('%')[0])
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return ip if mapped is None else mapped


def _quote(address: Any) -> str:
    """Quote an address, without a user and a password that somebody has written into it."""
    text = repr(address)
    user, _at, host = text.rpartition('@')
    if ':' in user.replace('://', '') and not text.startswith("'ipc:"):
        text = f'{text[0]}...@{host}'
    return text


def _join(host: Any, port: Any) -> str:
    if not isinstance(host, str):
        raise TypeError('the host is not a string')
    if isinstance(port, bool) or not isinstance(port, (int, str)):
        raise TypeError('the port is not a number')
    return f'[{host}]:{port}' if ':' in host and not host.startswith('[') else f'{host}:{port}'


def _check_path(path: str) -> str:
    if path in ('', '@'):
        raise ValueError('the path is empty')
    if '\0' in path:
        raise ValueError('the path contains a NUL')
    if len(os.fsencode(path)) > zmq.IPC_PATH_MAX_LEN:
        raise ValueError(f'the path is longer than {zmq.IPC_PATH_MAX_LEN} bytes')
    return path
