# SPDX-License-Identifier: ZPL-2.1
"""What a socket needs before others may connect to it.

Processes and devices bind with it. Each gives itself as *owner*: its attributes are the limits,
and its `str` or name stands in the log.
"""

import errno
import logging
from collections.abc import Callable, MutableMapping
from math import ceil
from time import monotonic, sleep
from typing import Any

import zmq

from pyams_zmq.auth import ZAP_DOMAIN
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.exceptions import ZMQBindError
from pyams_zmq.process.lock import IPCLock
from pyams_zmq.wire.endpoint import is_local

LOGGER = logging.getLogger('PyAMS (zmq)')

LINGER = 1000
"""Milliseconds that a socket gets to send its last message"""

_RETRY_INTERVAL = 0.05

_ADVICE = {
    errno.EADDRINUSE: 'another process serves it, stop that one or choose another address',
    errno.EADDRNOTAVAIL: 'no interface of this machine has it',
    errno.ENODEV: 'it is neither an address nor an interface of this machine',
    errno.EEXIST: 'a file which is no socket is there, remove it or choose another path',
    errno.EACCES: 'this user may not bind it',
    errno.ENOENT: 'its folder does not exist',
}


def limit(socket: Any, owner: Any, max_size: int) -> None:
    """Set the limits of a socket.

    :param owner: has them as attributes
    :param max_size: bytes of the largest message; libzmq drops the peer of a larger one
    """
    socket.linger = LINGER
    socket.maxmsgsize = max_size
    socket.rcvhwm = owner.receive_hwm
    socket.sndhwm = owner.send_hwm
    socket.backlog = owner.backlog
    socket.handshake_ivl = ceil(owner.handshake_timeout * 1000)
    socket.heartbeat_ivl = ceil(owner.heartbeat_interval * 1000)
    socket.heartbeat_timeout = ceil(owner.heartbeat_timeout * 1000)


def protect(
    socket: Any, curve: CurveServer | None, has_users: bool, domain: bytes = ZAP_DOMAIN
) -> None:
    """Have the ZAP handler of the context asked about each peer of a socket.

    :param curve: keys, or None
    :param has_users: true when there are users of PLAIN
    :param domain: ZAP domain; the handler may have a policy for it
    """
    socket.zap_domain = domain
    socket.zap_enforce_domain = True  # else libzmq lets everybody in who finds no ZAP handler
    if curve is not None:
        curve.apply(socket)
    else:
        socket.plain_server = has_users


def bind(
    socket: Any,
    uri: str,
    path: str | None,
    locks: MutableMapping[str, IPCLock],
    timeout: float,
    before_wait: Callable[[], None] = lambda: None,
) -> None:
    """Bind a socket, when the address gets free at the latest.

    :param uri: the address, as libzmq wants it
    :param path: the file of an ipc address, or None
    :param locks: of the paths that the owner has bound; a new one is added
    :param timeout: seconds to wait for an address that is in use
    :param before_wait: called between two tries
    :raises ZMQBindError: it cannot be bound
    """
    deadline = monotonic() + timeout
    while True:
        try:
            return _bind_once(socket, uri, path, locks)
        except ZMQBindError as error:
            if error.errno != errno.EADDRINUSE or monotonic() > deadline:
                raise
        before_wait()
        sleep(_RETRY_INTERVAL)  # nothing tells when an address gets free


def _bind_once(
    socket: Any, uri: str, path: str | None, locks: MutableMapping[str, IPCLock]
) -> None:
    lock = None if path is None else locks.get(path) or IPCLock(path)
    try:
        if lock is not None:
            lock.acquire()
        socket.bind(uri)
    except (OSError, zmq.ZMQError) as error:
        if lock is not None and lock not in locks.values():
            lock.release()
        number = error.errno or 0
        text, advice = zmq.strerror(number), _ADVICE.get(number)
        raise ZMQBindError(number, f'{text} ({advice})' if advice else text, uri) from None
    if path is not None and lock is not None:
        locks[path] = lock


def warn_of_exposure(name: Any, uri: str, curve: CurveServer | None, has_users: bool) -> None:
    """Log that others can read the messages, if they can.

    :param name: who serves
    :param uri: where, as libzmq says it
    """
    if curve is None and not is_local(uri):
        LOGGER.warning(
            '%s serves the network at %s, %s: whoever is on the way can read and change the '
            'messages; use CURVE',
            name,
            uri,
            'with passwords in clear' if has_users else 'without authentication',
        )
