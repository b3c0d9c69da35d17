# SPDX-License-Identifier: ZPL-2.1
"""Access control: who may connect to the sockets of a server.

`Access` holds the rules of one server, `AccessPolicy` decides on a connection without I/O,
`Authenticator` runs the decision in a thread.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyams_zmq.auth.credentials import FirstUser, Users, parse_users

if TYPE_CHECKING:
    from pyams_zmq.auth.access import Access, AccessAttributes
    from pyams_zmq.auth.authenticator import Authenticator
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
    'FirstUser',
    'Peer',
    'Users',
    'Verdict',
    'parse_clients',
    'parse_users',
]

_MODULES = {
    **dict.fromkeys(('Access', 'AccessAttributes'), 'access'),
    'Authenticator': 'authenticator',
    **dict.fromkeys(
        ('ANONYMOUS', 'ZAP_DOMAIN', 'AccessPolicy', 'Peer', 'Verdict', 'parse_clients'), 'policy'
    ),
}
"""What servers need, and clients do not: imported at its first use"""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
