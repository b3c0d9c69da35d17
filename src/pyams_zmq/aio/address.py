# SPDX-License-Identifier: ZPL-2.1
"""The endpoints that a socket is bound and connected to."""

from collections.abc import Generator
from ipaddress import ip_address
from typing import Any

import zmq


class AwaitableEndpoint(str):
    """An endpoint that can also be awaited, which returns it."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, str]:
        yield from ()
        return self


class Addresses:
    """Binds and connects a socket, and keeps its endpoints in both forms, given and real.

    :param sock: `zmq.Socket`
    """

    def __init__(self, sock: Any):
        self._sock = sock
        self._listeners: dict[str, str] = {}
        self._connections: dict[str, str] = {}

    @property
    def listeners(self) -> frozenset[str]:
        """Endpoints that are bound, in their real form."""
        return frozenset(self._listeners)

    @property
    def connections(self) -> frozenset[str]:
        """Endpoints that are connected to, in their real form."""
        return frozenset(self._connections)

    def bind(self, endpoint: str) -> AwaitableEndpoint:
        """Bind an endpoint; return its real form."""
        return self._attach(self._sock.bind, endpoint, self._listeners)

    def unbind(self, endpoint: str) -> AwaitableEndpoint:
        """Unbind an endpoint, in either form; return its real form."""
        bound = _find(endpoint, self._listeners)
        self._sock.unbind(bound)
        self._listeners.pop(bound, None)
        return AwaitableEndpoint(bound)

    def connect(self, endpoint: str) -> AwaitableEndpoint:
        """Connect to an endpoint; return its real form."""
        return self._attach(self._sock.connect, endpoint, self._connections)

    def disconnect(self, endpoint: str) -> AwaitableEndpoint:
        """Disconnect from an endpoint, in either form; return its real form."""
        connected = _find(endpoint, self._connections)
        # libzmq registers a connection under the form that was given.
        self._sock.disconnect(self._connections.get(connected, connected))
        self._connections.pop(connected, None)
        return AwaitableEndpoint(connected)

    def clear(self) -> None:
        """Remove all endpoints, when the socket is closed."""
        self._listeners.clear()
        self._connections.clear()

    def _attach(self, attach: Any, endpoint: str, table: dict[str, str]) -> AwaitableEndpoint:
        if endpoint.startswith('tcp://['):
            self._sock.ipv6 = True
        attach(endpoint)
        real = self._sock.getsockopt(zmq.LAST_ENDPOINT).decode()
        table[real] = endpoint
        return AwaitableEndpoint(real)


def _find(endpoint: str, table: dict[str, str]) -> str:
    """Return the real form of an endpoint, the latest one if it was given several times."""
    if endpoint not in table:
        for real, given in reversed(table.items()):
            if given == endpoint:
                return real
    return endpoint


def check_str(endpoint: Any) -> str:
    """Return an endpoint that is a string.

    :raises TypeError: if it is not
    """
    if not isinstance(endpoint, str):
        raise TypeError(f'The endpoint {endpoint!r} is not a str')
    return endpoint


def check_numeric(endpoint: str) -> None:
    """Check that an endpoint has no host name: its look-up would block the sockets of the context.

    :raises ValueError: if the host of a tcp endpoint is not an IP address
    """
    host, colon, port = endpoint.removeprefix('tcp://').rpartition(';')[2].rpartition(':')
    if not endpoint.startswith('tcp://') or not colon:  # libzmq refuses an endpoint without a port
        return
    try:
        ip_address(host.strip('[]'))
    except ValueError:
        raise ValueError(
            f'Bad endpoint {endpoint!r}: {host!r} is not an IP address; resolve a name first, for '
            f'example by "await loop.getaddrinfo({host!r}, {port!r})"'
        ) from None
