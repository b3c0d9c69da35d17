# SPDX-License-Identifier: ZPL-2.1
"""The owner of entries: the process that sends them while it lives.

The text that identifies a process has the machine, or the container, its process id and the time
of its start, so that another process with the same id later is not taken for it.
"""

import hashlib
import os
import socket
from contextlib import suppress
from functools import cache

from pyams_zmq.process.descendants import ProcessInfo

_BOOT_ID = '/proc/sys/kernel/random/boot_id'
_PID_NAMESPACE = '/proc/self/ns/pid'


def identify_process() -> str:
    """Return the text that identifies this process as an owner."""
    pid = os.getpid()
    info = ProcessInfo.read(pid)
    return f'{_identify_machine()}:{pid}:{0 if info is None else info.started}'


def is_alive(owner: str) -> bool | None:
    """Return True if an owner is a live process; None if it belongs to another machine.

    A process that cannot be examined counts as live: its entries are sent when it has ended.

    :param owner: the result of `identify_process` of some process; empty for no owner
    """
    machine, _, process = owner.partition(':')
    if not process:
        return False
    if machine != _identify_machine():
        return None
    pid, _, started = process.partition(':')
    info = ProcessInfo.read(pid)
    if info is not None:
        return not info.has_ended and info.started == int(started)
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@cache
def _identify_machine() -> str:
    """Return a text that processes with the same process ids have in common, and others have not.

    Containers of one machine have their own process ids. Without /proc, its name must do.
    """
    parts = [socket.gethostname()]
    with suppress(OSError), open(_BOOT_ID, encoding='ascii') as file:
        parts.append(file.read().strip())
    with suppress(OSError):
        parts.append(os.readlink(_PID_NAMESPACE))
    return hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]
