# SPDX-License-Identifier: ZPL-2.1
"""Access control: who may connect to the sockets of a server.

`Access` holds the rules of one server, `AccessPolicy` decides on a connection without I/O,
`Authenticator` runs the decision in a thread.
"""

from typing import Any

from pyams_zmq.auth.access import Access, AccessAttributes
from pyams_zmq.auth.credentials import Users, parse_users
from pyams_zmq.auth.policy import (
    ANONYMOUS,
    ZAP_DOMAIN,
    AccessPolicy,
    Peer,
    Verdict,
    parse_clients,
)

__all__ = [
    'ANONYMOUS',
    'ZAP_DOMAIN',
    'Access',
    'AccessAttributes',
    'AccessPolicy',
    'Authenticator',
    'Peer',
    'Users',
    'Verdict',
    'parse_clients',
    'parse_users',
]


def __getattr__(name: str) -> Any:
    """Import `Authenticator` when it is used: clients need no authenticator, and no asyncio."""
    if name == 'Authenticator':
        from pyams_zmq.auth.authenticator import Authenticator  # noqa: PLC0415 - see above

        return Authenticator
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
