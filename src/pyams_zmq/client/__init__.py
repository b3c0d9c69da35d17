# SPDX-License-Identifier: ZPL-2.1
"""Calls a service, and knows what became of each call."""

import os
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any
from weakref import WeakSet

import zmq
from zmq.utils.monitor import recv_monitor_message

from pyams_zmq.auth import Users
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.client.connection import (
    CONNECTION_EVENTS,
    RETRIED,
    ConnectionState,
    ServiceAddress,
    as_os_error,
    keep_connected,
)
from pyams_zmq.client.sender import Outbox, QueuedMessage, sender_thread
from pyams_zmq.client.socket import ZMQSocket, make_inproc_address, open_socket, poll, wait_for
from pyams_zmq.exceptions import ZMQClosedError, ZMQRefusedError
from pyams_zmq.wire.frames import EVENTS, NOBLOCK, POLLIN, receive, send_frame
from pyams_zmq.wire.message import (
    check_retries,
    check_timeout,
    decode_reply,
    encode_message,
    encode_request,
    payload_of,
)

FAST = 0.01
"""Seconds without a reply before anything but the reply is looked at"""

RECENT = 0.02
"""Seconds after a reply in which a connection counts as alive, without a look at its monitor"""

MAX_IDLE = 8
"""Connections that a client keeps for the next calls; while more threads call there are more"""

SEND_HWM = 100
"""Messages of an outbox that wait in its socket, at most"""

PREPARE_TIMEOUT = 2.0
"""Seconds until a service counts as unreachable, for messages that nobody waits for"""


class Connection:
    """A REQ socket for one call at a time, and the monitor which tells how its connection is.

    After a failure it has to be closed: what may still come in is the reply to a call that nobody
    waits for any more.

    :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
    """

    socket_type = zmq.REQ

    def __init__(self, target: ServiceAddress):
        self._pid = os.getpid()
        self._used = -RECENT
        self._link = ConnectionState(target.endpoint)
        self._socket = open_socket(*target, self.socket_type)
        self._alone = [(self._socket, POLLIN)]
        self._prepare_socket()
        self._monitor: Any = self._socket.context.socket(zmq.PAIR, socket_class=ZMQSocket)
        address = make_inproc_address()
        self._socket.monitor(address, CONNECTION_EVENTS)
        self._monitor.connect(address)
        self._socket.connect(target.endpoint.uri)

    def _prepare_socket(self) -> None:
        keep_connected(self._socket)

    def exchange(self, data: bytes, timeout: float) -> bytes:
        """Send a request, wait for the reply.

        :param timeout: seconds, for connecting, sending and waiting together
        :raises ZMQTimeoutError: there is a service, and it has not replied in time
        :raises ZMQUnreachableError: there is none, or the connection to it was lost
        :raises ZMQRefusedError: it does not let us in
        """
        deadline = monotonic() + timeout
        try:
            send_frame(self._socket, data, NOBLOCK)
        except zmq.Again:  # a refused handshake has taken away the room for the only message
            raise self._link.describe_refusal() from None
        poll(self._alone, min(timeout, FAST))
        while (frames := receive(self._socket)) is None:
            left = deadline - monotonic()
            if left <= 0:
                self._read_monitor()
                raise self._link.describe_silence(timeout)
            ready = wait_for([self._socket, self._monitor], zmq.POLLIN, left)
            if self._socket not in ready and self._read_monitor():
                raise self._link.describe_loss()
        self._used = monotonic()
        return frames[-1]

    def is_alive(self) -> bool:
        """Tell if the service was there just now."""
        if monotonic() - self._used < RECENT and not self._socket.closed:
            return True
        try:
            self._read_monitor()
        except (ZMQRefusedError, zmq.ZMQError):  # the context may have been terminated, too
            return False
        return self._link.is_connected

    def _read_monitor(self) -> bool:
        """Learn what has happened to the connection; tell if it was lost.

        :raises ZMQRefusedError: if the service does not let us in
        """
        is_lost = False
        while self._monitor.get(EVENTS) & POLLIN:
            is_lost |= self._link.note(recv_monitor_message(self._monitor)['event'])
        return is_lost

    def close(self) -> None:
        """Close the connection, unless it is one of the process that forked this one."""
        if self._pid == os.getpid() and not self._socket.closed:
            with suppress(zmq.ZMQError):
                # Before the monitor is closed: an event for nobody would block the I/O thread.
                self._socket.disable_monitor()
            self._monitor.close()
            self._socket.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            self.close()


class Channel(Connection):
    """A DEALER socket for the messages of an outbox; for one thread, which never waits for it."""

    socket_type = zmq.DEALER

    def _prepare_socket(self) -> None:
        super()._prepare_socket()
        self._socket.immediate = 1  # no message without a connection, nor for the next one
        self._socket.sndhwm = SEND_HWM
        self._socket.rcvhwm = 0

    @property
    def sockets(self) -> list[Any]:
        """What to wait for."""
        return [self._socket, self._monitor]

    @property
    def is_connected(self) -> bool:
        """Tell if the service was there at the last `look`."""
        return self._link.is_connected

    def look(self) -> bool:
        """Learn what has happened to the connection; tell if it was lost.

        :raises ZMQRefusedError: if the service does not let us in
        """
        return self._read_monitor()

    def send(self, frames: list[bytes]) -> bool:
        """Send a message; tell if the connection takes it."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes] | None:
        """Receive a reply if there is one."""
        return receive(self._socket)


class ZMQClient:
    """Client of a service, for many calls from many threads.

    It keeps its connections. A fork of this process opens its own. Use it as a context manager,
    or close it.

    :param address: `'host:port'`, `(host, port)` or a URI
    :param auth: `'user:password'` (RFC 24/PLAIN)
    :param curve: keys of the client and of the server it trusts (RFC 26/CURVEZMQ)
    :param timeout: seconds that each attempt of a call may take: connecting, sending, waiting
    :param retries: further attempts after a time-out, or when the service could not be reached;
        only for calls that may run twice
    :param send_deadline: tell the service until when somebody waits, so that it does not start
        what nobody waits for; pyams_zmq 2 does not understand that, and the clocks have to agree
    :raises ValueError: for an address or credentials that cannot be understood
    """

    def __init__(
        self,
        address: Any,
        *,
        auth: Users = None,
        curve: CurveClient | None = None,
        timeout: float = 10,
        retries: int = 0,
        send_deadline: bool = False,
    ):
        self._target = ServiceAddress.parse(address, auth, curve)
        self.timeout = check_timeout(timeout)
        self.retries = check_retries(retries)
        self.send_deadline = send_deadline
        self._is_closed = False
        self._inherited: list[Connection] = []
        self._renew()
        _clients.add(self)

    def _renew(self) -> None:
        self._idle: list[Connection] = []
        self._outbox = Outbox(self.address, partial(Channel, self._target))

    def _inherit(self) -> None:
        self._inherited.extend(self._idle)  # kept: nobody may touch them here
        self._renew()

    @property
    def address(self) -> str:
        """URI of the service."""
        return self._target.endpoint.uri

    def call(
        self,
        type: str,  # noqa: A002 - the name of the field
        args: Any = None,
        *,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Any:
        """Call a method of the service, and wait for its result.

        :param type: type of the message, the name of the method
        :param args: its arguments, anything that JSON can say
        :param timeout: seconds of each attempt, by default those of the client
        :param retries: further attempts, by default those of the client
        :return: the payload of a reply whose status is 2xx
        :raises ZMQRemoteError: for another status; it has `status` and `payload`
        :raises ZMQTimeoutError: if the service has not replied in time
        :raises ZMQUnreachableError: if there is no service, or the connection to it was lost
        :raises ZMQRefusedError: if the service does not let us in
        :raises ZMQReplyError: for a reply which is no JSON, or not ``[status, payload]``
        :raises ZMQMessageError: with status 413, for more than 32 MiB
        :raises ZMQClosedError: if the client was closed
        :raises OSError: EMFILE, when the process has no descriptor left
        :raises TypeError, ValueError: for arguments that JSON cannot say
        """
        return payload_of(self.request([type, args], timeout=timeout, retries=retries))

    def request(
        self, message: Any, *, timeout: float | None = None, retries: int | None = None
    ) -> Any:
        """Send a message, and wait for the reply of whatever form.

        :param message: anything that JSON can say, ``[type, args]`` for our services
        :return: the decoded reply
        :raises: what `call` does, except ZMQRemoteError
        """
        timeout = check_timeout(self.timeout if timeout is None else timeout)
        retries = check_retries(self.retries if retries is None else retries)
        deadline = timeout if self.send_deadline else None
        data = encode_request(message, deadline)
        while True:
            connection = self._acquire()
            try:
                reply = connection.exchange(data, timeout)
            except BaseException as error:
                connection.close()
                if not (retries and isinstance(error, RETRIED)):
                    raise
            else:
                self._release(connection)
                return decode_reply(reply)
            retries -= 1
            if deadline is not None:
                data = encode_request(message, deadline)

    def send(self, type: str, args: Any = None) -> None:  # noqa: A002 - as above
        """Send a message now; see :func:`~pyams_zmq.transaction.send_on_commit` for later.

        The reply is not waited for: one whose status is not 2xx, or none within the time-out of
        the client, is logged as an error. Messages of a client arrive in their order.

        :raises: what `prepare` does, and `encode_message`
        """
        data = encode_message(type, args)
        self.prepare(timeout=min(self.timeout, PREPARE_TIMEOUT))
        self.post(type, data)

    def prepare(self, *, timeout: float = PREPARE_TIMEOUT) -> None:
        """Wait until a message can be posted.

        :param timeout: seconds
        :raises ZMQUnreachableError: if there is no service
        :raises ZMQRefusedError: if the service does not let us in
        :raises ZMQClosedError: if the client was closed
        """
        sender_thread.prepare(self._get_outbox(), timeout)

    def post(self, type: str, data: bytes) -> None:  # noqa: A002 - as above
        """Hand a message over to the thread that sends it, and return.

        :param data: what `encode_message` has made
        :raises ZMQClosedError: if the client was closed
        """
        sender_thread.post(self._get_outbox(), QueuedMessage(type, data, self.timeout))

    def _get_outbox(self) -> Outbox:
        self._check_open()
        return self._outbox

    def _check_open(self) -> None:
        if self._is_closed:
            raise ZMQClosedError(f'The client of {self.address} was closed')

    def _acquire(self) -> Connection:
        self._check_open()
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if connection.is_alive():
                return connection
            connection.close()  # a new one is there sooner than this one has reconnected
        with as_os_error():
            return Connection(self._target)

    def _release(self, connection: Connection) -> None:
        # Without a lock: each operation of a list is one step for other threads.
        self._idle.append(connection)
        if self._is_closed or len(self._idle) > MAX_IDLE:
            self._drop_idle(0 if self._is_closed else MAX_IDLE)

    def _drop_idle(self, most: int) -> None:
        with suppress(IndexError):
            while len(self._idle) > most:
                self._idle.pop(0).close()

    def close(self) -> None:
        """Close all connections; what is under way, calls and messages, ends as it would have."""
        self._is_closed = True
        self._drop_idle(0)
        sender_thread.close(self._outbox)

    def __enter__(self) -> 'ZMQClient':  # noqa: PYI034 - Python 3.10 has no Self
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f'<{type(self).__name__} of {self.address}>'


_clients: WeakSet[ZMQClient] = WeakSet()


def _leave_parent() -> None:
    # Its locks may have been held at the moment of the fork.
    for client in list(_clients):
        client._inherit()


os.register_at_fork(after_in_child=_leave_parent)
