# SPDX-License-Identifier: ZPL-2.1
"""The type of a peer's socket, which it names in its handshake (RFC 37/ZMTP).

libzmq does not report that before the first message. So this connects by itself, shakes hands as a
REQ socket does, and leaves without a message.
"""

import socket as network
from collections.abc import Mapping
from contextlib import closing
from typing import Protocol

from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.names import LOOKUP_TIMEOUT, needs_ipv6

MAX_COMMAND = 4096
"""Bytes of the largest command of a peer that is read; those of libzmq have less than 400"""

_SIGNATURE = b'\xff' + bytes(8) + b'\x7f'  # its first byte and the last bit matter
_GREETING = 64  # bytes of the whole greeting
_MAJOR = 3  # version of the protocol
_COMMAND, _LONG = 4, 2  # flags of a frame
_SHORT_SIZE = 255
_SOCKET_TYPE = b'socket-type'  # names of properties are compared without case


class Stream(Protocol):
    """A connection."""

    def read(self, size: int, /) -> bytes:
        """Return as many bytes; raise OSError if they do not come."""

    def send(self, data: bytes, /) -> None:
        """Send bytes; raise OSError if that fails."""


def read_peer_type(endpoint: Endpoint, users: Mapping[str, str], timeout: float) -> str | None:
    """Return the type of the socket at an endpoint, `'REP'` or `'ROUTER'` for instance.

    :param users: the user and the password, for PLAIN (RFC 24/PLAIN); empty for NULL
    :param timeout: seconds
    :return: None if nobody listens, the peer refuses the connection, expects another mechanism, or
        does not complete a handshake of ZMTP 3 in time
    """
    deadline = monotonic() + timeout
    try:
        with closing(_Connection(endpoint, deadline)) as connection:
            return shake_hands(connection, users)
    except (OSError, UnicodeError):  # a name that is not that of a host is a UnicodeError
        return None


def shake_hands(stream: Stream, users: Mapping[str, str]) -> str | None:
    """Shake hands with a peer; return the type of its socket, None if it does not name one.

    :raises OSError: if the peer does not go on
    """
    ready = _property(b'Socket-Type', b'REQ') + _property(b'Identity', b'')
    mechanism = (b'PLAIN' if users else b'NULL').ljust(20, b'\0')
    stream.send(_SIGNATURE + bytes([_MAJOR, 0]) + mechanism + bytes(32))
    start = stream.read(len(_SIGNATURE) + 1)
    if start[0] != _SIGNATURE[0] or not start[-2] & 1 or start[-1] < _MAJOR:
        return None
    if stream.read(_GREETING - len(start))[1 : 1 + len(mechanism)] != mechanism:
        return None
    for user, password in users.items():
        stream.send(_command(b'HELLO', _text(user) + _text(password)))
        if _read_command(stream, b'WELCOME') is None:
            return None
    stream.send(_command(b'INITIATE' if users else b'READY', ready))
    metadata = _read_command(stream, b'READY')
    return None if metadata is None else find_socket_type(metadata)


def find_socket_type(metadata: bytes) -> str | None:
    """Return the type of a socket among the properties of a READY, None if it is not there.

    A property is the size of its name (1 byte), the name, the size of its value (4 bytes), and the
    value.
    """
    found = None
    while metadata:
        name, metadata = _split(metadata, 1)
        value, metadata = _split(metadata, 4)
        if name is None or value is None:
            return None
        if name.lower() == _SOCKET_TYPE:
            found = value
    return found.decode() if found and found.isalpha() else None


def _split(data: bytes, width: int) -> tuple[bytes | None, bytes]:
    """Return the string at the beginning, whose size has *width* bytes, and what follows."""
    end = width + int.from_bytes(data[:width], 'big')
    return (data[width:end], data[end:]) if width <= end <= len(data) else (None, b'')


def _read_command(stream: Stream, name: bytes) -> bytes | None:
    """Return the body of the next command, None if that is another one, ERROR for instance."""
    flags = stream.read(1)[0]
    if flags & ~_LONG != _COMMAND:
        return None
    size = int.from_bytes(stream.read(8 if flags & _LONG else 1), 'big')
    if size > MAX_COMMAND:
        return None
    found, body = _split(stream.read(size), 1)
    return body if found == name else None


def _command(name: bytes, body: bytes) -> bytes:
    data = bytes([len(name)]) + name + body
    size = len(data)
    if size <= _SHORT_SIZE:
        return bytes([_COMMAND, size]) + data
    return bytes([_COMMAND | _LONG]) + size.to_bytes(8, 'big') + data


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + len(value).to_bytes(4, 'big') + value


def _text(text: str) -> bytes:
    data = text.encode()
    return bytes([len(data)]) + data


class _Connection:
    """A connection to an endpoint, until a deadline.

    It goes to the address that libzmq would take, the first one of a host name.
    """

    def __init__(self, endpoint: Endpoint, deadline: float):
        self._deadline = deadline
        family, address = _find_address(endpoint, self._left())
        self._socket = network.socket(family, network.SOCK_STREAM)
        try:
            self._socket.settimeout(self._left())
            self._socket.connect(address)
        except BaseException:
            self.close()
            raise

    def _left(self) -> float:
        left = self._deadline - monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def read(self, size: int) -> bytes:
        data = b''
        while len(data) < size:
            self._socket.settimeout(self._left())
            received = self._socket.recv(size - len(data))
            if not received:
                raise ConnectionError
            data += received
        return data

    def send(self, data: bytes) -> None:
        self._socket.settimeout(self._left())
        self._socket.sendall(data)

    def close(self) -> None:
        self._socket.close()


def _find_address(
    endpoint: Endpoint, timeout: float
) -> tuple[network.AddressFamily, str | bytes | tuple[object, ...]]:
    """Return the family and the address of an endpoint."""
    if endpoint.protocol == 'ipc':
        return network.AF_UNIX, endpoint.unix_name
    is_ipv6 = needs_ipv6(endpoint, min(timeout, LOOKUP_TIMEOUT))
    family = network.AF_INET6 if is_ipv6 else network.AF_INET
    host = endpoint.host.strip('[]')
    [(_, _, _, _, address), *_others] = network.getaddrinfo(
        host, endpoint.port, family, network.SOCK_STREAM
    )
    return family, address
