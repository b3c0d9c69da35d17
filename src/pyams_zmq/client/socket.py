# SPDX-License-Identifier: ZPL-2.1
"""Helpers of the clients, to open a socket and to wait for its reply.

One context per process serves all sockets. A refused handshake leaves no trace on the socket
which was refused, only on its monitor, and a monitor on each socket would cost more than the
message: instead, after some milliseconds without an answer, a second connection with the same
credentials asks the server whether they are good.
"""

import errno
import os
import select
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from math import ceil
from time import monotonic
from types import BuiltinFunctionType
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from pyams_zmq import _
from pyams_zmq.auth import Users
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.client.connection import (
    HANDSHAKE_EVENTS,
    MAX_HANGUPS,
    REFUSED,
    configure,
    parse_user,
)
from pyams_zmq.exceptions import ZMQClosedError
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.frames import EVENTS, NOBLOCK, receive
from pyams_zmq.wire.message import check_size, decode_reply

PROBE_DELAY = 0.01
"""Seconds without an answer before the credentials are tried"""

LATE_PROBE_DELAY = 1.0
"""The same on a socket that has had a reply: only a server that has restarted would refuse it"""

SILENCE = 0.2
"""Seconds without an end of the handshake before the server is asked in another language"""

_LONGEST_WAIT = 2_000_000  # polls count milliseconds in 31 bits
_numbers = count()
_SIGNATURE = b'\xff'  # first byte of all versions of ZMTP
_NO_ZMTP = b'?\r\n\r\n'  # a bad request to a server which waits for lines

_PENDING = 'The last request has no reply yet; after a time-out, open a new socket'
_NO_REQUEST = 'No reply is to come: no request was sent, or its reply was taken already'

TIMEOUT = _('Connection timeout')


class ZMQSocket(zmq.Socket[bytes]):
    """Socket of a client; dropping it closes it.

    :ivar is_refused: true when a message could not even be sent, see :func:`zmq_response`
    :ivar has_replies: true when :func:`zmq_response` has returned a reply
    :ivar curve: its CURVE keys, which pyzmq does not read back
    """

    is_refused = False
    has_replies = False
    curve: CurveClient | None = None

    def send(self, data: Any, flags: int = 0, *args: Any, **kwargs: Any) -> Any:
        """Send a frame.

        :raises ZMQMessageError: with status 413, if it is larger than the server could take
        """
        check_size(data)
        # There is room for the only message of a REQ, unless the handshake was refused already:
        # that takes the room away, and to wait for it would take for ever.
        nowait = NOBLOCK if self.type == zmq.REQ else 0
        try:
            return super().send(data, flags | nowait, *args, **kwargs)
        except zmq.Again:
            if flags & zmq.NOBLOCK or not nowait:
                raise
            self.is_refused = True
        except zmq.ZMQError as error:
            if error.errno == zmq.EFSM:
                raise zmq.ZMQError(zmq.EFSM, _PENDING) from None
            raise

    def send_multipart(self, msg_parts: Any, *args: Any, **kwargs: Any) -> Any:
        """Send a message of several frames, or nothing of it.

        :raises ZMQMessageError: with status 413, if a frame is larger than the server could take
        """
        parts = list(msg_parts)
        for part in parts:
            check_size(part)
        return super().send_multipart(parts, *args, **kwargs)

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
                # By default 1023, and a dropped socket counts for some more milliseconds.
                self._context.max_sockets = self._context.get(zmq.SOCKET_LIMIT)
            return self._context


_shared_context = _SharedContext()


def zmq_socket(
    address: Any,
    socket_type: int = zmq.REQ,
    linger: int = 0,
    protocol: str = 'tcp',
    auth: Users = None,
    *,
    curve: CurveClient | None = None,
) -> ZMQSocket:
    """Open a socket and connect it.

    :param address: `'host:port'`, `(host, port)` or a URI
    :param socket_type: type of the socket
    :param linger: milliseconds that unsent messages are kept for when the socket is closed
    :param protocol: protocol of an address which is no URI, `tcp` or `ipc`
    :param auth: `'user:password'` (RFC 24/PLAIN)
    :param curve: keys of the client and of the server it trusts (RFC 26/CURVEZMQ)
    :return: a socket, to be closed or dropped after use; to be used in one thread at a time
    :raises ValueError: for an address or credentials that cannot be understood
    """
    endpoint = Endpoint.parse(address, bind=False, protocol=protocol)
    socket = open_socket(endpoint, parse_user(auth, curve), curve, socket_type)
    if linger:
        socket.linger = linger
    socket.connect(endpoint.uri)
    return socket


def open_socket(
    endpoint: Endpoint,
    users: Mapping[str, str],
    curve: CurveClient | None,
    socket_type: int = zmq.REQ,
) -> ZMQSocket:
    """Open a socket that is ready to connect to an endpoint, and keeps nothing when closed."""
    socket: ZMQSocket = _shared_context.get().socket(socket_type, socket_class=ZMQSocket)
    configure(socket, endpoint, users, curve)
    if curve is not None:
        socket.curve = curve
    return socket


def make_inproc_address() -> str:
    """Make an address that was never used: libzmq frees those of closed sockets later."""
    return f'inproc://pyams_zmq.{next(_numbers)}'


def open_pair() -> tuple[ZMQSocket, ZMQSocket]:
    """Open two sockets by which one thread wakes another."""
    context = _shared_context.get()
    bell: ZMQSocket = context.socket(zmq.PAIR, socket_class=ZMQSocket)
    heard: ZMQSocket = context.socket(zmq.PAIR, socket_class=ZMQSocket)
    address = make_inproc_address()
    bell.bind(address)
    heard.connect(address)
    return bell, heard


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
    :raises zmq.ZMQError: EFSM, if there is no request to wait for
    """
    if getattr(socket, 'is_refused', False):
        return [401, REFUSED]
    try:
        deadline = monotonic() + timeout
        is_known = getattr(socket, 'has_replies', False)
        delay = LATE_PROBE_DELAY if is_known else PROBE_DELAY
        poll([(socket, flags)], min(timeout, delay))
        frames = receive(socket)
        if frames is None and timeout > delay:
            if _is_refused(socket, flags, deadline):
                return [401, REFUSED]
            poll([(socket, flags)], deadline - monotonic())
            frames = receive(socket)
        if frames is not None and not is_known and isinstance(socket, ZMQSocket):
            socket.has_replies = True
    except zmq.ZMQError as error:
        if error.errno in (zmq.ETERM, zmq.ENOTSOCK, errno.EBADF):
            raise ZMQClosedError('The socket or its context was closed, open a new one') from None
        if error.errno == zmq.EFSM:
            raise zmq.ZMQError(zmq.EFSM, _NO_REQUEST) from None
        raise
    return [503, TIMEOUT] if frames is None else decode_reply(frames[-1])


def wait_for(sockets: Sequence[Any], flags: int, timeout: float) -> list[Any]:
    """Wait until a socket has one of the events; return those which have."""
    return [socket for socket, _events in poll([(socket, flags) for socket in sockets], timeout)]


def poll(items: list[tuple[Any, int]], timeout: float) -> list[tuple[Any, int]]:
    """Do what `zmq.zmq_poll` does, and let other greenlets of gevent run.

    :param items: sockets, each with the events to wait for
    :param timeout: seconds
    :return: the sockets that have events, with them
    """
    timeout = max(0, min(timeout, _LONGEST_WAIT))
    if isinstance(select.poll, BuiltinFunctionType):
        return zmq.zmq_poll(items, ceil(timeout * 1000))
    # This program is patched by gevent: its own poll lets other greenlets run, libzmq's would
    # not. The FD of a socket is edge-triggered, so look at EVENTS before each wait.
    deadline = monotonic() + timeout
    poller = select.poll()
    for socket, _flags in items:
        poller.register(socket.fd, select.POLLIN)
    while True:
        ready = [
            (socket, events) for socket, flags in items if (events := socket.get(EVENTS) & flags)
        ]
        left = deadline - monotonic()
        if ready or left <= 0:
            return ready
        poller.poll(ceil(left * 1000))


def _is_refused(socket: zmq.Socket[Any], flags: int, deadline: float) -> bool:
    """Tell if the server refuses the credentials of a socket; false also when a reply comes in."""
    endpoint = socket.last_endpoint
    curve = getattr(socket, 'curve', None)
    if not endpoint or (socket.mechanism == zmq.CURVE and curve is None):
        return False  # somebody else's socket: pyzmq does not read its keys back
    try:
        # REQ, whatever the socket is: a server might send to a DEALER what is for the socket.
        with socket.context.socket(zmq.REQ, socket_class=zmq.Socket) as probe:
            probe.linger = 0
            probe.reconnect_ivl = 1
            probe.reconnect_ivl_max = 100
            probe.ipv6 = socket.ipv6
            if socket.mechanism == zmq.PLAIN:
                probe.plain_username = socket.plain_username
                probe.plain_password = socket.plain_password
            elif curve is not None:
                curve.apply(probe)
            with _monitoring(probe) as monitor:
                probe.connect(endpoint)
                return _handshake_fails(socket, flags, monitor, deadline)
    except zmq.ZMQError as error:
        if error.errno == errno.EMFILE:  # the reply comes without it, or not
            return False
        raise


@contextmanager
def _monitoring(socket: zmq.Socket[Any]) -> Iterator[zmq.Socket[Any]]:
    with socket.get_monitor_socket(HANDSHAKE_EVENTS) as monitor:
        try:
            yield monitor
        finally:
            # Now, before the monitor is closed: an event for nobody would block the I/O thread.
            with suppress(zmq.ContextTerminated):
                socket.disable_monitor()


def _handshake_fails(
    socket: zmq.Socket[Any], flags: int, monitor: zmq.Socket[Any], deadline: float
) -> bool:
    failures = 0
    until = min(deadline, monotonic() + SILENCE)
    while failures < MAX_HANGUPS:
        ready = wait_for([socket, monitor], flags | zmq.POLLIN, until - monotonic())
        if not ready and until < deadline:
            if _speaks_otherwise(socket, flags, min(deadline, monotonic() + SILENCE)):
                return True
            until = deadline
        elif ready != [monitor]:
            return False
        else:
            event = recv_monitor_message(monitor)['event']
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return True
            # A server for sockets of other types turns the probe down for its type.
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED or socket.type != zmq.REQ:
                return False
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                return True
            # The server hung up: it does so for a wrong mechanism, or when it goes down.
            failures += 1
    return True


def _speaks_otherwise(socket: Any, flags: int, deadline: float) -> bool:
    """Tell if the server is none of ØMQ's, but one of HTTP that waits for the end of our line."""
    if not socket.last_endpoint.startswith(b'tcp:'):
        return False
    with socket.context.socket(zmq.STREAM, socket_class=zmq.Socket) as raw:
        raw.linger = 0
        raw.ipv6 = socket.ipv6
        raw.connect(socket.last_endpoint)
        is_connected = False
        while wait_for([socket, raw], flags | zmq.POLLIN, deadline - monotonic()) == [raw]:
            peer, data = raw.recv_multipart()
            if data or is_connected:  # a busy server of ØMQ may hang up before it says anything
                return bool(data) and not data.startswith(_SIGNATURE)
            is_connected = True  # an empty frame says so, a second one that it is no more
            raw.send_multipart([peer, _NO_ZMTP])
    return False
