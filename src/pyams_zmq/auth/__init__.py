# SPDX-License-Identifier: ZPL-2.1
"""Access control: who may connect to the sockets of a server.

`Access` holds the rules of one server, `AccessPolicy` decides on a connection without I/O,
`Authenticator` runs the decision in a thread.
"""

from pyams_zmq.auth.access import Access, AccessAttributes
from pyams_zmq.auth.authenticator import Authenticator
from pyams_zmq.auth.credentials import FirstUser, Users, parse_users
from pyams_zmq.auth.policy import ANONYMOUS, AccessPolicy, Peer, Verdict, parse_clients
from pyams_zmq.auth.rules import ZAP_DOMAIN

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
