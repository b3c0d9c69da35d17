# SPDX-License-Identifier: ZPL-2.1
"""The client of a service: calls, and messages without waiting for the reply."""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from pyams_zmq.auth import Users
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.client.breaker import CONNECT_TIMEOUT, CircuitBreaker
from pyams_zmq.client.call import CallConnection
from pyams_zmq.client.connection import HEARTBEATS, RETRIED, ServiceAddress, as_os_error
from pyams_zmq.client.jobs import JobMethods
from pyams_zmq.client.peer_type import read_peer_type
from pyams_zmq.client.problem import EncodedMessage, QueuedMessage
from pyams_zmq.client.send_queue import MAX_FLUSH, SendQueue
from pyams_zmq.client.sender import MAX_BACKLOG, MAX_BACKLOG_SIZE, sender_thread
from pyams_zmq.exceptions import ZMQClosedError
from pyams_zmq.wire.body import decode_body
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.fork import ForkLocal
from pyams_zmq.wire.message import (
    MAX_MESSAGE_SIZE,
    check_boolean,
    check_integer,
    check_timeout,
    decode_reply,
    encode_message,
    encode_request,
    payload_of,
)
from pyams_zmq.wire.multipart import to_frames
from pyams_zmq.wire.tracing import SEND, Tracing

MAX_IDLE = 8
"""Connections that a client keeps for the next calls; while more threads call there are more"""

PREPARE_TIMEOUT = 2.0
"""Seconds until a service counts as unreachable, for messages without waiting for the reply"""


class ZMQClient(JobMethods):
    """Client of a service, for many calls from many threads.

    It keeps its connections; a fork of this process opens its own. Use it as a context manager,
    or close it.

    :param address: `'host:port'`, `(host, port)` or a URI
    :param auth: `'user:password'` (RFC 24/PLAIN)
    :param curve: keys of the client and of the server it trusts (RFC 26/CURVEZMQ)
    :param timeout: seconds for each attempt of a call: connecting, sending and waiting together
    :param retries: further attempts after a time-out, or if the service is unreachable; only for
        calls that may run twice
    :param send_deadline: send the deadline of each call, so that the service does not start a call
        after it; pyams_zmq 2 does not understand that, and the clocks must agree
    :param connect_timeout: seconds of the *timeout* until a call fails if no service answers; after
        that, calls fail at once while the service is down, and one tries each second
    :raises ValueError: if the address, the credentials or a number is not valid
    :raises TypeError: if *curve* is of another class
    """

    max_message_size: int = MAX_MESSAGE_SIZE  #: Bytes of the largest message that is sent

    #: Messages of `send` and of committed transactions that wait for a reply or to be sent, at most
    max_backlog: int = MAX_BACKLOG

    #: Bytes of these messages, at most
    max_backlog_size: int = MAX_BACKLOG_SIZE

    #: Seconds of silence until the system probes the host of the service
    heartbeat_interval: float = HEARTBEATS[0]

    #: Seconds until the connection to a host that does not answer, or takes no data, is closed
    heartbeat_timeout: float = HEARTBEATS[1]

    #: Seconds that a program waits at its end for the replies to these messages, while the service
    #: is connected; set it before the first message
    flush_timeout: float = MAX_FLUSH

    #: True if all calls may wait for the first start of the service, as for a restart; otherwise
    #: one does, and others fail at once. Set it before the first call.
    is_service_expected: bool = False

    service_name: str | None = None  #: Name of the service, for the log and traces

    #: Makes spans, see :mod:`pyams_zmq.otel`; None for no spans
    tracing: Tracing | None = None

    def __init__(
        self,
        address: Any,
        *,
        auth: Users = None,
        curve: CurveClient | None = None,
        timeout: float = 10,
        retries: int = 0,
        send_deadline: bool = False,
        connect_timeout: float = CONNECT_TIMEOUT,
    ):
        self._service = ServiceAddress.parse(address, auth, curve)
        self.timeout = check_timeout(timeout)
        self.retries = check_integer('retries', retries, 0)
        self.send_deadline = check_boolean('send_deadline', send_deadline)
        self.connect_timeout = check_timeout(connect_timeout, 'connect_timeout')
        self._is_closed = False
        self._breaker = ForkLocal(
            lambda: CircuitBreaker(self.address, is_expected=self.is_service_expected)
        )
        self._idle: ForkLocal[list[CallConnection]] = ForkLocal(list)
        self._queue = ForkLocal(
            lambda: SendQueue(
                self._service, self._heartbeats, self.flush_timeout, self.service_name
            )
        )

    @property
    def _heartbeats(self) -> tuple[float, float]:
        return self.heartbeat_interval, self.heartbeat_timeout

    @property
    def address(self) -> str:
        """URI of the service."""
        return self._service.endpoint.uri

    def call(
        self,
        type: str,  # noqa: A002 - the name of the field
        args: Any = None,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        frames: Iterable[Any] | None = None,
    ) -> Any:
        """Call a method of the service, and wait for its result.

        :param type: type of the message, the name of the method
        :param args: arguments, any value with a JSON form
        :param timeout: seconds for each attempt, by default those of the client
        :param retries: further attempts, by default those of the client; while the service is known
            to be down, those before the last one wait for up to a second
        :param frames: binary frames, an iterable of bytes-like objects; the method gets them before
            the arguments, and they count for `max_message_size`
        :return: the payload of a reply ``[status, payload]`` with a status from 200 to 299, and
            any reply without a status, an integer from 100 to 599, as it is; with the frames of the
            reply, if it has some, in a :class:`~pyams_zmq.message.Multipart`
        :raises ZMQRemoteError: for another status; it has `status` and `payload`, but no frames
        :raises ZMQTimeoutError: if the service is connected and has not replied in time
        :raises ZMQUnreachableError: if no service answers, or the connection was lost
        :raises ZMQRefusedError: if the service refuses the connection
        :raises ZMQReplyError: if the reply is not JSON
        :raises ZMQMessageError: with status 413, if it is larger than `max_message_size`
        :raises ZMQClosedError: if the client was closed
        :raises OSError: EMFILE, when the process has no descriptor left
        :raises TypeError, ValueError: if the arguments have no JSON form, or a frame is not bytes
        """
        return payload_of(
            self.request([type, args], timeout=timeout, retries=retries, frames=frames)
        )

    def request(
        self,
        message: Any,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        frames: Iterable[Any] | None = None,
    ) -> Any:
        """Send a message, and wait for the reply, which may have any form.

        :param message: any value with a JSON form, ``[type, args]`` for a service of this package
        :param timeout: seconds for each attempt, by default those of the client
        :param retries: further attempts, by default those of the client
        :param frames: binary frames, see `call`
        :return: the decoded reply; with its frames, if it has some, in a
            :class:`~pyams_zmq.message.Multipart`
        :raises: the errors of `call`, except ZMQRemoteError
        """
        if self.tracing is None:
            return self._request(message, timeout, retries, frames)
        with self.tracing.request(self, message) as span:
            span.reply = self._request(span.message, timeout, retries, frames)
        return span.reply

    def _request(
        self,
        message: Any,
        timeout: float | None,
        retries: int | None,
        frames: Iterable[Any] | None,
    ) -> Any:
        timeout = check_timeout(self.timeout if timeout is None else timeout)
        retries = check_integer('retries', self.retries if retries is None else retries, 0)
        deadline = timeout if self.send_deadline else None
        binary = () if frames is None else to_frames(frames)
        data = encode_request(message, deadline, self.max_message_size, binary)
        idle = self._idle.get()
        while True:
            connection = None
            try:
                connection = self._acquire(idle, timeout)
                reply = connection.exchange(data, timeout, binary)
            except BaseException as error:
                if connection is not None:
                    connection.close()
                if not (retries and isinstance(error, RETRIED)):
                    raise
            else:
                self._release(connection, idle)
                return decode_reply(reply[0]) if len(reply) == 1 else decode_body(reply)
            retries -= 1
            if retries:  # the last one does not hold its thread for a service that is down
                time.sleep(min(timeout, self._breaker.get().pause(monotonic())))
            if deadline is not None:
                data = encode_request(message, deadline, self.max_message_size, binary)

    def send(
        self,
        type: str,  # noqa: A002 - the name of the field
        args: Any = None,
        *,
        frames: Iterable[Any] | None = None,
    ) -> None:
        """Send a message now; see :func:`~pyams_zmq.transaction.send_on_commit` for later.

        The client does not wait for the reply. It logs an error if the status is not 2xx, or if the
        connection is lost before the reply; a message with status 503 is sent again. The messages
        of a client are sent in their order, and run at most once. Frames that are not bytes are
        copied: you may change them afterwards.

        :raises: the errors of `prepare`, and those of `call` for arguments and frames
        """
        binary = () if frames is None else to_frames(frames)
        if self.tracing is None:
            self._send(type, args, binary)
        else:
            with self.tracing.request(self, [type, args], SEND) as span:
                self._send(type, args, binary, span.options)

    def _send(
        self,
        type: str,  # noqa: A002 - the name of the field
        args: Any,
        binary: Sequence[bytes],
        options: dict[str, Any] | None = None,
    ) -> None:
        data = encode_message(type, args, self.max_message_size, binary, options)
        timeout = min(self.timeout, PREPARE_TIMEOUT)
        [reservation] = self.reserve_all([(type, data, binary)], timeout=timeout)
        reservation.post()

    def prepare(self, *, timeout: float = PREPARE_TIMEOUT) -> None:
        """Wait until a message can be posted.

        :param timeout: seconds
        :raises ZMQUnreachableError: if no service answers
        :raises ZMQBacklogError: if too many messages wait, see `max_backlog`
        :raises ZMQRefusedError: if the service refuses the connection
        :raises ZMQClosedError: if the client was closed
        :raises OSError: EMFILE, when the process has no descriptor left
        """
        self._prepare(timeout, None)

    def find_socket_type(self, *, timeout: float = PREPARE_TIMEOUT) -> str | None:
        """Return the type of the service's socket, for which this connects once more.

        Services of pyams_zmq 2 have a `'REP'`, which a message of an unknown type blocks
        permanently; those of 3.0 have a `'ROUTER'`. With CURVE, which pyams_zmq 2 does not know,
        this does not connect.

        :param timeout: seconds
        :return: None if the service does not say it: it is down, or refuses the connection
        """
        endpoint, users, curve = self._service
        return 'ROUTER' if curve is not None else read_peer_type(endpoint, users, timeout)

    def reserve(
        self,
        type: str,  # noqa: A002 - the name of the field
        data: bytes,
        *,
        timeout: float = 0,
        frames: Iterable[Any] | None = None,
    ) -> 'Reservation':
        """Wait until a message can be posted, and keep room for it.

        :param type: type of the message, for the log
        :param data: the encoded message
        :param timeout: seconds
        :param frames: its binary frames, see `call`
        :return: its `post` sends the message; its `cancel` gives up the room
        :raises: the errors of `prepare`
        """
        [reservation] = self.reserve_all([(type, data, frames)], timeout=timeout)
        return reservation

    def reserve_all(
        self,
        messages: Sequence[EncodedMessage],
        *,
        timeout: float = 0,
        held: int = 0,
    ) -> 'list[Reservation]':
        """Wait until all messages of a transaction can be posted, and keep room for them.

        More than the backlog takes can be posted if nothing else waits in it.

        :param messages: for each message its type, its JSON frame, its binary frames, and true if
            it submits a job; the last two may be left out
        :param timeout: seconds
        :param held: number of messages of the same transaction that have room already
        :return: one for each message, see `reserve`
        :raises: the errors of `prepare`
        """
        queued = [QueuedMessage(*message) for message in messages]
        queue = self._prepare(timeout, queued, held)
        return [Reservation(self._queue, queue, message) for message in queued]

    def _prepare(
        self, timeout: float, messages: list[QueuedMessage] | None, held: int = 0
    ) -> SendQueue:
        self._check_open()
        queue = self._queue.get()
        limits = (self.max_backlog, self.max_backlog_size)
        with as_os_error():
            sender_thread.get().prepare(queue, timeout, limits, messages, held)
        return queue

    def post(
        self,
        type: str,  # noqa: A002 - the name of the field
        data: bytes,
        frames: Iterable[Any] | None = None,
        is_repeatable: bool = False,
    ) -> None:
        """Add a message to the queue of the thread that sends it, and return.

        This ignores the limits of the backlog, see `prepare`.

        :param type: type of the message, for the log
        :param data: the encoded message
        :param frames: its binary frames, see `call`
        :param is_repeatable: true if it may be sent again after a lost connection: a job
        :raises ZMQClosedError: if the client was closed
        :raises OSError: EMFILE, when the process has no descriptor left
        """
        self._check_open()
        message = QueuedMessage(type, data, frames, is_repeatable)
        with as_os_error():
            sender_thread.get().post(self._queue.get(), message)

    def offer(self, message: QueuedMessage) -> bool:
        """Add a message that is stored elsewhere to the queue, if it has room; do not wait.

        The service need not be connected. The message is sent again after a lost connection.

        :param message: its `on_reply` gets the reply, see :class:`QueuedMessage`
        :return: False if the backlog has no room
        :raises ZMQClosedError: if the client was closed
        :raises OSError: EMFILE, when the process has no descriptor left
        """
        self._check_open()
        limits = (self.max_backlog, self.max_backlog_size)
        with as_os_error():
            return sender_thread.get().offer(self._queue.get(), message, limits)

    def withdraw(self, *, start: float | None = None) -> None:
        """Give up the messages of `offer`; wait for the replies to those on their way.

        Those without a reply within `flush_timeout` are given up when their connection is lost.

        :param start: when that time began, in the seconds of `time.monotonic`; None is now
        """
        sender_thread.get().withdraw(self._queue.get(), start)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ZMQClosedError(f'The client of {self.address} was closed: make another one')

    def _acquire(self, idle: list[CallConnection], timeout: float) -> CallConnection:
        self._check_open()
        missing = 0.0
        while True:
            try:
                connection = idle.pop()  # without a lock: each operation of a list is atomic
            except IndexError:
                break
            if connection.is_alive():
                return connection
            missing = max(missing, connection.missing)
            connection.close()  # a new connection is ready sooner than this one has reconnected
        attempt = self._breaker.get().begin(monotonic(), self.connect_timeout, missing)
        try:
            with as_os_error():
                return CallConnection(self._service, self._heartbeats, attempt, timeout)
        except BaseException:
            attempt.abandon()
            raise

    def _release(self, connection: CallConnection, idle: list[CallConnection]) -> None:
        idle.append(connection)
        if self._is_closed or len(idle) > MAX_IDLE:
            _close_idle(idle, 0 if self._is_closed else MAX_IDLE)

    def close(self) -> None:
        """Close all connections, each after the call or the messages that it serves now."""
        self._is_closed = True
        _close_idle(self._idle.get(), 0)
        sender_thread.get().close(self._queue.get())

    def __enter__(self) -> 'ZMQClient':  # noqa: PYI034 - Python 3.10 has no Self
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f'<{type(self).__name__} of {self.address}>'


class Reservation:
    """Room for one message in the backlog of a client; use one of its methods once.

    A transaction holds it from its vote to its end. It works when the client is closed meanwhile.
    """

    def __init__(self, current: ForkLocal[SendQueue], queue: SendQueue, message: QueuedMessage):
        self._current = current  # of each process
        self._queue = queue  # keeps the room
        self._message = message

    def check(self) -> None:
        """Raise an error if the service is not connected.

        :raises: the errors of `ZMQClient.prepare`, except ZMQBacklogError and ZMQClosedError
        """
        with as_os_error():
            sender_thread.get().check(self._current.get())

    def post(self) -> None:
        """Add the message to the backlog, and return."""
        queue = self._current.get()  # a fork has another one, which keeps no room
        sender_thread.get().post(queue, self._message, is_reserved=queue is self._queue)

    def cancel(self) -> None:
        """Give up the room."""
        if self._current.get() is self._queue:
            sender_thread.get().release(self._queue, self._message)


def _close_idle(idle: list[CallConnection], kept: int) -> None:
    with suppress(IndexError):
        while len(idle) > kept:
            idle.pop(0).close()
