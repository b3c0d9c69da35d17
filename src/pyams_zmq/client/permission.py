# SPDX-License-Identifier: ZPL-2.1
"""Socket files to which a client has no permission: libzmq tries to connect to them for ever."""

import grp
import os
import pwd
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pyams_zmq.wire.endpoint import Endpoint


def describe_missing_permission(endpoint: Endpoint) -> str | None:
    """Return why this user may not connect to an ipc endpoint, or None.

    It does not block. If the user may connect, the service gets a connection that ends at once.
    """
    path = endpoint.path
    if path is None:
        return None
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except PermissionError:
        pass
    except OSError:
        return None
    else:
        return None
    user = _name(pwd.getpwuid, os.geteuid())
    try:
        found = os.stat(path)
    except OSError:
        return f'The user {user} may not enter the folder of {path}: give it the permission (x)'
    owner, group = _name(pwd.getpwuid, found.st_uid), _name(grp.getgrgid, found.st_gid)
    return (
        f'The user {user} may not write to {path}, which is of {owner}:{group} with mode '
        f'{stat.S_IMODE(found.st_mode):04o}: set ipc_mode and ipc_group of the service, and let '
        'this user be a member of the group'
    )


def _name(find: Callable[[int], Any], number: int) -> str:
    with suppress(KeyError):
        return str(find(number)[0])
    return str(number)
