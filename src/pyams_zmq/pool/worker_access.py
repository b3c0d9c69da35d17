# SPDX-License-Identifier: ZPL-2.1
"""Access rules for the workers of other machines."""

from typing import Any

from pyams_zmq.auth import Access, Users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.wire.endpoint import Endpoint


def make_worker_access(address: Any, auth: Users, curve: CurveServer | None) -> Access:
    """Return the access rules for workers of other machines, which must authenticate.

    :param address: address to bind for them, or None
    :param auth: users that may connect as workers
    :param curve: keys of the server and the workers
    :raises ValueError: an *address* without credentials, credentials without *address*, or both
        kinds of credentials
    """
    access = Access(auth, curve=curve)
    if address is None:
        if access.has_credentials:
            raise ValueError('worker_auth and worker_curve need a worker_address')
    else:
        Endpoint.parse(address, bind=True)
        if not access.has_credentials:
            raise ValueError(
                f'worker_address {address!r} needs worker_auth or worker_curve: without them, any '
                'program that reaches it would get the messages of all clients'
            )
    return access
