#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

"""PyAMS_zmq.socket module: helpers of the clients, to open a socket and to wait for its reply.

One context per process serves all sockets. A refused handshake leaves no trace on the socket
which was refused, only on its monitor, and a monitor on each socket would cost more than the
message: instead, after some milliseconds without an answer, a second connection with the same
credentials asks the server whether they are good.
"""

import errno
import os
import select
import threading
from collections.abc import Sequence
from math import ceil
from time import monotonic
from types import BuiltinFunctionType
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from pyams_zmq import _
from pyams_zmq.auth import parse_users
from pyams_zmq.endpoint import Endpoint
from pyams_zmq.exceptions import ZMQClosedError, ZMQMessageError
from pyams_zmq.message import decode_reply

__docformat__ = 'restructuredtext'

MAX_MESSAGE_SIZE = 32 * 1024 * 1024
"""Bytes of the largest request; the server would drop the connection without a word"""

PROBE_DELAY = 0.01
"""Seconds without an answer before the credentials are tried"""

_PROBE_FAILURES = 3
_HANDSHAKE_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_CURVE_OPTIONS = (zmq.CURVE_SERVERKEY, zmq.CURVE_PUBLICKEY, zmq.CURVE_SECRETKEY)

TIMEOUT = _('Connection timeout')
REFUSED = _(
    'Connection refused: check user, password and mechanism, and the addresses that the '
    'server allows'
)


class ZMQSocket(zmq.Socket[bytes]):
    """Socket of a client; dropping it closes it."""

    def send(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Send a frame.

        :raises ZMQMessageError: with status 413, if it is larger than the server could take
        """
        if len(data) > MAX_MESSAGE_SIZE:
            raise ZMQMessageError(
                413, f'Message of {len(data)} bytes, {MAX_MESSAGE_SIZE} can be sent'
            )
        return super().send(data, *args, **kwargs)

    def __del__(self) -> None:
        # The base class warns of a socket which was not closed; here that is the usual way.
        if not self._shadow and not self.closed:
            self.close()


class _SharedContext:
    """The context of this process, made when it is asked for."""

    def __init__(self) -> None:
        self._inherited: list[zmq.Context[Any] | None] = []
        self._renew()
        # A context does not survive a fork, and the lock may be held at that moment.
        os.register_at_fork(after_in_child=self._inherit)

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._context: zmq.Context[Any] | None = None

    def _inherit(self) -> None:
        self._inherited.append(self._context)  # kept: to delete it would terminate it
        self._renew()

    def get(self) -> zmq.Context[Any]:
        with self._lock:
            if self._context is None or self._context.closed:
                self._context = zmq.Context()
            return self._context


_shared_context = _SharedContext()


def zmq_socket(
    address: Any,
    socket_type: int = zmq.REQ,
    linger: int = 0,
    protocol: str = 'tcp',
    auth: str | None = None,
) -> ZMQSocket:
    """Open a socket and connect it.

    :param address: `'host:port'`, `(host, port)` or a URI
    :param socket_type: type of the socket
    :param linger: milliseconds that unsent messages are kept for when the socket is closed
    :param protocol: protocol of an address which is no URI, `tcp` or `ipc`
    :param auth: `'user:password'` (RFC 24/PLAIN)
    :return: a socket, to be closed or dropped after use; to be used in one thread at a time
    :raises ValueError: for an address or credentials that cannot be understood
    """
    endpoint = Endpoint.parse(address, bind=False, protocol=protocol)
    users = parse_users(auth)
    socket: ZMQSocket = _shared_context.get().socket(socket_type, socket_class=ZMQSocket)
    socket.linger = linger
    socket.ipv6 = endpoint.is_ipv6
    for user, password in users.items():
        socket.plain_username = user.encode()
        socket.plain_password = password.encode()
    socket.connect(endpoint.uri)
    return socket


def zmq_response(socket: zmq.Socket[bytes], flags: int = zmq.POLLIN, timeout: float = 10) -> Any:
    """Wait for the reply to the message that was sent on a socket.

    A socket whose answer was a time-out has to be dropped, it cannot send any more. Under gevent,
    other greenlets run while this one waits.

    :param socket: socket of :func:`zmq_socket`, or any other
    :param flags: events to wait for
    :param timeout: seconds
    :return: the decoded reply; `[503, "Connection timeout"]` when nobody answers in time, and
        `[401, text]` when the server does not let us in
    :raises ZMQReplyError: for a reply which is no JSON
    :raises ZMQClosedError: if the socket or its context was closed
    """
    try:
        deadline = monotonic() + timeout
        if not _wait([socket], flags, min(timeout, PROBE_DELAY)):
            if timeout <= PROBE_DELAY:
                return [503, TIMEOUT]
            if _is_refused(socket, flags, deadline):
                return [401, REFUSED]
            if not _wait([socket], flags, deadline - monotonic()):
                return [503, TIMEOUT]
        frames = socket.recv_multipart(zmq.NOBLOCK)
    except zmq.ZMQError as error:
        if error.errno in (zmq.ETERM, zmq.ENOTSOCK, errno.EBADF):
            raise ZMQClosedError('The socket or its context was closed, open a new one') from None
        raise
    return decode_reply(frames[-1])


def _wait(sockets: Sequence[Any], flags: int, timeout: float) -> list[Any]:
    """Wait until a socket has one of the events; return those which have."""
    if isinstance(select.poll, BuiltinFunctionType):
        ready = zmq.zmq_poll([(socket, flags) for socket in sockets], max(0, ceil(timeout * 1000)))
        return [socket for socket, _events in ready]
    # This program is patched by gevent: its own poll lets other greenlets run, libzmq's would
    # not. The FD of a socket is edge-triggered, so look at EVENTS before each wait.
    deadline = monotonic() + timeout
    poller = select.poll()
    for socket in sockets:
        poller.register(socket.fd, select.POLLIN)
    while True:
        ready = [socket for socket in sockets if socket.get(zmq.EVENTS) & flags]
        left = deadline - monotonic()
        if ready or left <= 0:
            return ready
        poller.poll(ceil(left * 1000))


def _is_refused(socket: zmq.Socket[Any], flags: int, deadline: float) -> bool:
    """Tell if the server refuses the credentials of a socket; false also when a reply comes in."""
    probe = socket.context.socket(zmq.DEALER, socket_class=zmq.Socket)
    monitor = probe.get_monitor_socket(_HANDSHAKE_EVENTS)
    try:
        probe.linger = 0
        probe.reconnect_ivl = 1
        probe.ipv6 = socket.ipv6
        _copy_credentials(socket, probe)
        probe.connect(socket.last_endpoint)
        failures = 0
        while failures < _PROBE_FAILURES:
            ready = _wait([socket, monitor], flags | zmq.POLLIN, deadline - monotonic())
            if monitor not in ready:
                return False
            event = recv_monitor_message(monitor)['event']
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return False
            if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                return True
            # The server hung up: it does so for a wrong mechanism or key, or when it goes down.
            failures += 1
        return True
    finally:
        probe.disable_monitor()
        monitor.close()
        probe.close()


def _copy_credentials(source: zmq.Socket[Any], target: zmq.Socket[Any]) -> None:
    if source.mechanism == zmq.PLAIN:
        target.plain_username = source.plain_username
        target.plain_password = source.plain_password
    elif source.mechanism == zmq.CURVE:
        for option in _CURVE_OPTIONS:
            target.set(option, source.get(option))
