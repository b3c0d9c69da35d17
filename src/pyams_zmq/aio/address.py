# SPDX-License-Identifier: ZPL-2.1
"""Endpoints of transports."""

from collections.abc import Generator
from ipaddress import ip_address
from typing import Any


class AwaitableEndpoint(str):
    """An endpoint that can also be awaited, which returns it."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, str]:
        yield from ()
        return self


def find_real(endpoint: str, table: dict[str, str]) -> str:
    """Return the real form of an endpoint, the latest one if it was given several times.

    :param table: the given form of each endpoint, by its real form
    """
    if endpoint not in table:
        for real, given in reversed(table.items()):
            if given == endpoint:
                return real
    return endpoint


def check_str(endpoint: Any) -> str:
    """Return an endpoint if it is a string, otherwise raise TypeError."""
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
