# SPDX-License-Identifier: ZPL-2.1
"""The endpoints of a socket, as they were given and as they are."""

from collections.abc import Generator
from ipaddress import ip_address
from typing import Any

import zmq


class AwaitableEndpoint(str):
    """An endpoint; to await it gives it, too."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, str]:
        yield from ()
        return self


def check_numeric(endpoint: str) -> None:
    """Check that libzmq need not look up a name, while other sockets of the context would wait.

    :raises ValueError: if a tcp endpoint has no IP address
    """
    host, colon, port = endpoint.removeprefix('tcp://').rpartition(';')[2].rpartition(':')
    if not endpoint.startswith('tcp://') or not colon:  # without a port it is refused as it is
        return
    try:
        ip_address(host.strip('[]'))
    except ValueError:
        raise ValueError(
            f'Bad endpoint {endpoint!r}: {host!r} is no IP address; resolve a name first, for '
            f'example by "await loop.getaddrinfo({host!r}, {port!r})"'
        ) from None


class Addresses:
    """Binds and connects a socket, and knows what it is bound and connected to.

    :param sock: `zmq.Socket`
    """

    def __init__(self, sock: Any):
        self._sock = sock
        self._listeners: dict[str, str] = {}
        self._connections: dict[str, str] = {}

    @property
    def listeners(self) -> frozenset[str]:
        """Endpoints that are bound."""
        return frozenset(self._listeners)

    @property
    def connections(self) -> frozenset[str]:
        """Endpoints that are connected to."""
        return frozenset(self._connections)

    def bind(self, endpoint: str) -> AwaitableEndpoint:
        """Bind an endpoint; return the real one."""
        return self._attach(self._sock.bind, endpoint, self._listeners)

    def unbind(self, endpoint: str) -> AwaitableEndpoint:
        """Unbind an endpoint, in either form; return the real one."""
        bound = _find(endpoint, self._listeners)
        self._sock.unbind(bound)
        self._listeners.pop(bound, None)
        return AwaitableEndpoint(bound)

    def connect(self, endpoint: str) -> AwaitableEndpoint:
        """Connect to an endpoint; return the real one."""
        return self._attach(self._sock.connect, endpoint, self._connections)

    def disconnect(self, endpoint: str) -> AwaitableEndpoint:
        """Disconnect from an endpoint, in either form; return the real one."""
        connected = _find(endpoint, self._connections)
        self._sock.disconnect(self._connections.get(connected, connected))
        self._connections.pop(connected, None)
        return AwaitableEndpoint(connected)

    def clear(self) -> None:
        """Forget all, when the socket is closed."""
        self._listeners.clear()
        self._connections.clear()

    def _attach(self, attach: Any, endpoint: str, table: dict[str, str]) -> AwaitableEndpoint:
        if endpoint.startswith('tcp://['):
            self._sock.ipv6 = True
        attach(endpoint)
        real = self._sock.getsockopt(zmq.LAST_ENDPOINT).decode()
        table[real] = endpoint
        return AwaitableEndpoint(real)


def check_str(endpoint: Any) -> str:
    """Check that an endpoint is text.

    :raises TypeError: if it is not
    """
    if not isinstance(endpoint, str):
        raise TypeError(f'The endpoint {endpoint!r} is no str')
    return endpoint


def _find(endpoint: str, table: dict[str, str]) -> str:
    """Find the real form of an endpoint, of the last one that was given so."""
    if endpoint not in table:
        for real, given in reversed(table.items()):
            if given == endpoint:
                return real
    return endpoint
