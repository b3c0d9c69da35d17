# SPDX-License-Identifier: ZPL-2.1
"""Sockets of clients: opening one, and waiting for its reply.

All sockets of a process share one context. A refused handshake appears only on the monitor of the
socket, and opening a monitor takes a tenth of the time of a message. So a socket has no monitor if
the same service has just replied to the same credentials; it gets one at the first silence.
"""

import errno
import os
import threading
from math import inf
from typing import Any

import zmq

from pyams_zmq import _
from pyams_zmq.auth import Users
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.client.connection import (
    CONNECTION_EVENTS,
    HANDSHAKE_IVL,
    HEARTBEATS,
    RECONNECT_IVL,
    REFUSED,
    ConnectionState,
    ServiceAddress,
    configure,
    keep_connected,
)
from pyams_zmq.exceptions import ZMQClosedError, ZMQRefusedError
from pyams_zmq.wire.body import decode_body
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.context import check_descriptors
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.fork import ForkLocal
from pyams_zmq.wire.frames import EVENTS, NOBLOCK, POLLIN, POLLOUT, receive
from pyams_zmq.wire.linger import lengthen
from pyams_zmq.wire.message import MAX_MESSAGE_SIZE, check_size
from pyams_zmq.wire.monitor import close_monitor, open_monitor, parse_event
from pyams_zmq.wire.names import LOOKUP_TIMEOUT
from pyams_zmq.wire.poll import poll

SILENCE = 0.01
"""Seconds without a reply until the monitor is read"""

RECENT = 0.1
"""Seconds after a reply in which sockets for the same service are opened without a monitor"""

MAX_FIRST_IVL = 100
"""Milliseconds between two attempts to connect, at most; libzmq's default without a maximum"""

_MAX_SERVICES = 1000
"""Services whose last reply is remembered"""

_PENDING = 'The last request has no reply yet; after a time-out, open a new socket'
_NO_REQUEST = 'No reply is expected: no request was sent, or its reply was received already'

TIMEOUT = _('Connection timeout')

_replies: dict[int, float] = {}
"""Time of the last reply of each service, by the hash of its URI and credentials"""


class ConnectionMonitor:
    """Monitor of a client's socket, and the state of its connection.

    :param socket: the socket, not connected yet
    :param endpoint: endpoint that it connects to
    :ivar socket: the socket that receives the events
    :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
    """

    def __init__(self, socket: zmq.Socket[bytes], endpoint: Endpoint):
        self.pid = os.getpid()
        self.state = ConnectionState(endpoint)
        self.socket = open_monitor(socket, CONNECTION_EVENTS, ZMQSocket)

    def read_events(self) -> bool:
        """Update the state; return True if the connection was lost.

        :raises ZMQRefusedError: if the service refuses the connection
        """
        is_lost = False
        while self.socket.get(EVENTS) & POLLIN:
            is_lost |= self.state.handle_event(*parse_event(self.socket.recv_multipart()))
        return is_lost


class ZMQSocket(zmq.Socket[bytes]):
    """Socket of a client; dropping it closes it.

    :ivar is_refused: true when the server has refused the connection, see :func:`zmq_response`
    """

    is_refused = False
    _refusal: str = REFUSED

    max_message_size: int = MAX_MESSAGE_SIZE  #: Bytes of the largest message that is sent

    _has_many_frames = False
    _service: int | None = None
    _monitor: ConnectionMonitor | None = None

    def _open_monitor(self, endpoint: Endpoint) -> ConnectionMonitor:
        """Open a monitor, which is closed together with the socket."""
        self._monitor = ConnectionMonitor(self, endpoint)
        return self._monitor

    def send(self, data: Any, flags: int = 0, *args: Any, **kwargs: Any) -> Any:
        """Send a frame; on a socket that was refused, do nothing: `zmq_response` returns 401.

        :param data: bytes, or another buffer
        :param flags: flags of libzmq, see `zmq_send(3)`
        :raises zmq.ZMQError: EFSM, if the last request has no reply yet; EAGAIN, with NOBLOCK
        :raises ZMQMessageError: with status 413, if it is larger than a server can accept
        """
        check_size(data, self.max_message_size)
        if flags & zmq.SNDMORE:
            self.linger_after_many_frames()
        # A REQ socket always has room for its only message, except after a refused handshake:
        # then libzmq has removed the pipe, and waiting for it would never end.
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

    def linger_after_many_frames(self) -> None:
        """Keep unsent messages for a moment when the socket is closed, see `CLOSE_LINGER`."""
        if not self._has_many_frames:
            self._has_many_frames = True
            self.set(zmq.LINGER, lengthen(int(self.get(zmq.LINGER))))

    def send_multipart(self, msg_parts: Any, *args: Any, **kwargs: Any) -> Any:
        """Send a message of several frames, or nothing of it.

        :raises ZMQMessageError: with status 413, if it is larger than a server can accept
        """
        parts = list(msg_parts)
        check_size(b'', self.max_message_size, parts)
        return super().send_multipart(parts, *args, **kwargs)

    def close(self, linger: int | None = None) -> None:
        """Close the socket and its monitor.

        :param linger: milliseconds that unsent messages are kept for, by default the option; after
            messages of several frames at least a second, see `CLOSE_LINGER`
        """
        if linger is not None and self._has_many_frames:
            linger = lengthen(linger)
        monitor = self._monitor
        if monitor is not None:
            monitor.state.close()
            if monitor.pid == os.getpid():
                close_monitor(self, monitor.socket)
        super().close(linger)

    def __del__(self) -> None:
        # The base class warns about a socket that was not closed; here that is the usual way.
        if not self._shadow and not self.closed:
            self.close()


class _SharedContext:
    """The context of a process, created when it is first needed, and again when it was closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: zmq.Context[Any] | None = None

    def get(self) -> zmq.Context[Any]:
        with self._lock:
            if self._context is None or self._context.closed:
                check_descriptors()
                self._context = zmq.Context()
                # The default is 1023, and a dropped socket counts for some more milliseconds.
                self._context.max_sockets = self._context.get(zmq.SOCKET_LIMIT)
            return self._context


_shared_context = ForkLocal(_SharedContext)


def get_context() -> zmq.Context[Any]:
    """Return the context that all client sockets of this process share.

    :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
    """
    return _shared_context.get().get()


def open_socket(
    service: ServiceAddress, socket_type: int, lookup_timeout: float = LOOKUP_TIMEOUT
) -> ZMQSocket:
    """Open a socket that is ready to connect to a service; closed, it keeps no unsent messages.

    :param lookup_timeout: see `configure`
    """
    socket: ZMQSocket = get_context().socket(socket_type, socket_class=ZMQSocket)
    configure(socket, *service, lookup_timeout=lookup_timeout)
    return socket


def open_connection(
    service: ServiceAddress,
    socket_type: int,
    heartbeats: tuple[float, float] = HEARTBEATS,
    previous: ConnectionState | None = None,
    lookup_timeout: float = LOOKUP_TIMEOUT,
    **options: int,
) -> tuple[ZMQSocket, ConnectionMonitor]:
    """Open a socket with a monitor, and connect it; it connects again after a loss.

    :param heartbeats: see `HEARTBEATS`
    :param previous: state of the last connection, if each attempt to connect has its own socket
    :param lookup_timeout: see `configure`
    :param options: names of socket options, with their values
    :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
    """
    socket = open_socket(service, socket_type, lookup_timeout)
    keep_connected(socket, heartbeats)
    for name, value in options.items():
        setattr(socket, name, value)
    monitor = socket._open_monitor(service.endpoint)
    if previous is not None:
        monitor.state.follow(previous)
    socket.connect(service.endpoint.encoded)
    return socket, monitor


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
    :param linger: milliseconds for which unsent messages are kept when the socket is closed; after
        messages of several frames at least a second, see :meth:`.ZMQSocket.close`
    :param protocol: protocol of an address without one, `'tcp'` or `'ipc'`
    :param auth: `'user:password'` (RFC 24/PLAIN)
    :param curve: keys of the client and of the server it trusts (RFC 26/CURVEZMQ)
    :return: a socket, to be closed or dropped after use; use it in one thread at a time
    :raises ValueError: if the address or the credentials are not valid
    :raises TypeError: if *curve* is of another class
    :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
    """
    service = ServiceAddress.parse(address, auth, curve, protocol)
    uri = service.endpoint.uri
    socket = open_socket(service, socket_type)
    if linger:
        socket.linger = linger
    # The values of the keys: another object may get the identity of one that was deleted.
    keys = () if curve is None else (curve.server, curve.public)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_IVL)
    socket._service = key = hash((uri, keys, *service.users.items()))
    if socket_type != zmq.REQ or monotonic() - _replies.get(key, -inf) > RECENT:
        socket._open_monitor(service.endpoint)
        # Soon, because a server may end several handshakes until one of them fails with an error.
        socket.set(zmq.RECONNECT_IVL, RECONNECT_IVL)
        socket.set(zmq.RECONNECT_IVL_MAX, MAX_FIRST_IVL)
    socket.connect(service.endpoint.encoded)
    return socket


def zmq_response(socket: zmq.Socket[bytes], flags: int = zmq.POLLIN, timeout: float = 10) -> Any:
    """Wait for the reply to the message that was sent on a socket.

    After a time-out the socket must be dropped; it cannot send again. In a program that gevent has
    patched, other greenlets run during the wait.

    :param socket: socket of :func:`zmq_socket`, or any other
    :param flags: events to wait for
    :param timeout: seconds
    :return: the decoded reply; `[503, "Connection timeout"]` if no reply comes in time;
        `[401, text]` if the server refuses the connection of a socket of :func:`zmq_socket`. On a
        REQ socket, a reply with binary frames is a :class:`~pyams_zmq.message.Multipart`; on
        others, the frames before the last one are dropped
    :raises ZMQReplyError: if the reply is not JSON
    :raises ZMQClosedError: if the socket or its context was closed
    :raises zmq.ZMQError: EFSM, if no request was sent
    """
    if getattr(socket, 'is_refused', False):
        return [401, getattr(socket, '_refusal', REFUSED)]
    try:
        deadline = monotonic() + timeout
        service = getattr(socket, '_service', None)
        poll([(socket, flags)], min(timeout, SILENCE))
        frames = receive(socket)
        if frames is None and timeout > SILENCE:
            if service is not None and _wait_for_refusal(socket, flags, deadline):
                return [401, socket._refusal]
            poll([(socket, flags)], deadline - monotonic())
            frames = receive(socket)
    except zmq.ZMQError as error:
        if error.errno in (zmq.ETERM, zmq.ENOTSOCK, errno.EBADF):
            raise ZMQClosedError('The socket or its context was closed, open a new one') from None
        if error.errno == zmq.EFSM:
            raise zmq.ZMQError(zmq.EFSM, _NO_REQUEST) from None
        raise
    if frames is None:
        return [503, TIMEOUT]
    if service is not None:
        _remember_reply(service)
    if len(frames) > 1 and socket.type != zmq.REQ:
        frames = frames[-1:]  # behind an envelope, or a topic
    return decode_body(frames)


def _remember_reply(service: int) -> None:
    if len(_replies) >= _MAX_SERVICES:
        _replies.clear()
    _replies[service] = monotonic()


def _wait_for_refusal(socket: Any, flags: int, deadline: float) -> bool:
    """Wait until a socket is refused, a reply comes in, or the deadline; return True if refused."""
    monitor = socket._monitor
    checks_pipe = monitor is None
    if monitor is None:
        try:
            uri = os.fsdecode(socket.last_endpoint)
            monitor = socket._open_monitor(Endpoint.parse(uri, bind=False))
        except zmq.ZMQError as error:
            if error.errno == errno.EMFILE:
                return False  # the reply comes in without a monitor, too
            raise
        socket.is_refused = _has_no_pipe(socket)  # the event was before the monitor
    while not socket.is_refused:
        left = deadline - monotonic()
        timeout = min(left, SILENCE) if checks_pipe else left
        ready = poll([(socket, flags), (monitor.socket, POLLIN)], timeout)
        if not ready and timeout < left:
            checks_pipe = False  # once: libzmq may have been between the event and the pipe
            socket.is_refused = _has_no_pipe(socket)
        elif not ready or ready[0][0] is socket:
            return False
        try:
            monitor.read_events()
        except ZMQRefusedError:
            socket.is_refused, socket._refusal = True, monitor.state.refusal
    return True


def _has_no_pipe(socket: Any) -> bool:
    """Return True if libzmq has removed the pipe of a REQ socket, as it does after a refusal."""
    if socket.get(EVENTS) & POLLOUT:  # the user has set REQ_RELAXED
        return False
    socket.set(zmq.REQ_RELAXED, 1)  # without it there is no POLLOUT before the reply
    if not socket.get(EVENTS) & POLLOUT:
        return True
    socket.set(zmq.REQ_RELAXED, 0)
    return False
