# SPDX-License-Identifier: ZPL-2.1
"""Client of a service for coroutines, whose calls share a connection."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from math import inf
from typing import Any

import zmq

from pyams_zmq.aio.deadlines import Deadlines
from pyams_zmq.aio.jobs import AsyncJobMethods
from pyams_zmq.aio.loop import get_context
from pyams_zmq.aio.protocol import SocketEvent, ZmqProtocol
from pyams_zmq.aio.transport import ZmqTransport
from pyams_zmq.auth import Users
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.client.breaker import CONNECT_TIMEOUT, Attempt, CircuitBreaker
from pyams_zmq.client.connection import (
    CONNECTION_EVENTS,
    HEARTBEATS,
    RETRIED,
    ConnectionState,
    ServiceAddress,
    as_os_error,
    configure,
    keep_connected,
)
from pyams_zmq.exceptions import ZMQBaseError, ZMQClosedError, ZMQRefusedError
from pyams_zmq.wire.body import decode_body
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.fork import ForkLocal
from pyams_zmq.wire.frames import receive
from pyams_zmq.wire.linger import CLOSE_LINGER
from pyams_zmq.wire.message import (
    MAX_MESSAGE_SIZE,
    check_boolean,
    check_integer,
    check_timeout,
    decode_reply,
    encode_request,
    payload_of,
)
from pyams_zmq.wire.multipart import to_frames
from pyams_zmq.wire.names import LOOKUP_TIMEOUT, look_up, needs_ipv6
from pyams_zmq.wire.tracing import Tracing

SEND_HWM = 24
"""Most requests that wait in a socket; further ones wait in the client, until their deadline.

With 10 instead, 256 calls under way take a tenth more processor time: the socket is full more
often, and each time it has room again it wakes the loop.
"""

FRESH = 0.001
"""Seconds for which the state of a connection is not checked again"""

ENVELOPE = 2
"""Frames in front of a request, and of its reply: number and delimiter"""


class Connection(ZmqProtocol):
    """A DEALER socket for all calls of a client, until its connection is lost.

    Each request has a number in its envelope (RFC 28/REQREP), which comes back with the reply. A
    reply whose call has ended is dropped. Requests wait here until the service is connected and
    the socket takes them.

    :param loop: event loop
    :param service: address and credentials of the service
    :param heartbeats: see `HEARTBEATS`
    :param breaker: what the calls of the client know about the service
    :ivar is_lost: true when no further call is possible
    :raises OSError: EMFILE, when the process has no descriptor left
    """

    def __init__(
        self,
        loop: Any,
        service: ServiceAddress,
        heartbeats: tuple[float, float],
        breaker: CircuitBreaker,
    ):
        self.loop = loop
        self.is_lost = False
        self._is_closing = False
        self.endpoint = service.endpoint
        self._state = ConnectionState(service.endpoint)
        self._number = 0
        self._may_write = True
        self._checked = 0.0
        self._calls: dict[bytes, asyncio.Future[Sequence[bytes]]] = {}
        self._deadlines = Deadlines(loop, self._calls, self._expire)
        # Of the calls that wait for a connection: until when they do, and if they are refused.
        self._breaker = breaker
        self._attempts: dict[bytes, Attempt] = {}
        self._connect_deadlines = Deadlines(loop, self._attempts, self._expire)
        self._refused: set[bytes] = set()
        self._refused_deadlines = Deadlines(loop, self._refused, self._expire_if_down)
        self._unsent: OrderedDict[bytes, tuple[bytes, ...]] = OrderedDict()
        with as_os_error():
            self._socket = get_context(loop).socket(zmq.DEALER, socket_class=zmq.Socket)
            try:
                configure(self._socket, *service, lookup_timeout=0)
                self._is_ipv6 = bool(self._socket.ipv6)
                self._socket.linger = CLOSE_LINGER
                keep_connected(self._socket, heartbeats)
                self._socket.sndhwm = SEND_HWM
                self._transport = ZmqTransport(loop, self._socket, self)
                self._transport.start()
                self._transport.enable_monitor(CONNECTION_EVENTS)
                self._socket.connect(service.endpoint.encoded)
            except BaseException:
                self._socket.close(0)
                raise

    async def exchange(
        self,
        data: bytes,
        timeout: float,
        spent: float = 0.0,
        frames: Sequence[bytes] = (),
        connect_timeout: float = CONNECT_TIMEOUT,
    ) -> Sequence[bytes]:
        """Send a request and wait for the reply; cancelling it does not affect other calls.

        :param timeout: seconds for connecting, sending and waiting together
        :param spent: seconds of these that have passed
        :param frames: binary frames in front of the request
        :param connect_timeout: seconds until the call fails if no service answers
        :return: the frames of the reply, behind an envelope of `ENVELOPE` frames
        :raises ZMQTimeoutError: if the service is connected and has not replied in time
        :raises ZMQUnreachableError: if no service is connected, or the connection was lost
        :raises ZMQRefusedError: if the service refuses the connection
        """
        attempt = None
        if not self._state.is_connected:
            attempt = self._breaker.begin(monotonic(), connect_timeout)
        self._number += 1
        number = b'%d' % self._number
        reply: asyncio.Future[Sequence[bytes]] = self.loop.create_future()
        self._calls[number] = reply
        self._unsent[number] = (number, b'', *frames, data)
        self._deadlines.add(number, timeout, spent)
        if attempt is not None:
            self._attempts[number] = attempt
            self._connect_deadlines.add(number, min(timeout, connect_timeout), spent)
            if self._state.is_down:
                self._refuse(number, attempt)
        try:
            self._send()
            return await reply
        finally:
            self._calls.pop(number, None)
            self._unsent.pop(number, None)
            attempt = self._attempts.pop(number, None)
            if attempt is not None:
                self._refused.discard(number)
                attempt.abandon()
            self._close_if_unused()

    def _expire(self, number: bytes, timeout: float) -> None:
        error = self._state.describe_silence(timeout)
        attempt = self._attempts.pop(number, None)
        if attempt is not None:
            self._refused.discard(number)
            attempt.fail(monotonic(), str(error))
        reply = self._calls[number]
        if not reply.done():
            reply.set_exception(error)

    def _refuse(self, number: bytes, attempt: Attempt) -> None:
        """Let a call wait for a service that does not listen, or fail it."""
        now = monotonic()
        end = attempt.refuse(now)
        if end == -inf:
            self._expire(number, min(now - attempt.start, attempt.connect_timeout))
        elif number not in self._refused:
            self._refused.add(number)
            self._refused_deadlines.add(number, end - now)

    def _expire_if_down(self, number: bytes, timeout: float) -> None:
        self._refused.discard(number)
        if self._state.is_down:
            self._refuse(number, self._attempts[number])

    def _send(self) -> None:
        while self._unsent and self._may_write and self._state.is_connected:
            self._transport.write(self._unsent.popitem(last=False)[1])

    def close(self) -> None:
        """Close the connection when the last call has ended."""
        self._is_closing = True
        self._close_if_unused()

    def abort(self) -> None:
        """Close the connection now."""
        self._deadlines.clear()
        self._connect_deadlines.clear()
        self._refused_deadlines.clear()
        self._state.close()
        self._transport.abort()

    def _close_if_unused(self) -> None:
        if self._is_closing and (not self._calls or self.loop.is_closed()):
            self.abort()

    def update_state(self) -> None:
        """Handle the events that the loop has not handled yet; they may set `is_lost`."""
        # If many calls begin in one iteration of the loop, only the first one does this.
        now = monotonic()
        if now > self._checked + FRESH:
            self._checked = now
            self._transport.read_monitor()

    def replace_by_ipv6(self) -> bool:
        """Close this connection when the last call has ended, if its name has got IPv6 only.

        :return: True if a new connection is needed
        """
        is_vain = not (self._is_ipv6 or self._state.is_connected) and needs_ipv6(self.endpoint, 0)
        if is_vain:
            self.close()
        return is_vain

    def _fail(self, make_error: Callable[[], ZMQBaseError]) -> None:
        self.is_lost = True
        self.abort()
        for reply in self._calls.values():
            if not reply.done():
                reply.set_exception(make_error())

    # Called by the transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the calls, because other code has closed the socket or terminated its context."""
        if not self.is_lost:
            self._fail(lambda: ZMQClosedError(f'The socket or its context was closed: {exc}'))

    def msg_received(self, data: tuple[bytes, ...]) -> None:
        """Pass a reply to its call, unless that has ended."""
        reply = self._calls.get(data[0])
        if reply is not None and not reply.done():
            reply.set_result(data)

    def event_received(self, event: SocketEvent) -> None:
        """Update the state of the connection; fail the calls when it is refused or lost."""
        try:
            is_lost = self._state.handle_event(event.event, event.value)
        except ZMQRefusedError:
            self._fail(self._state.describe_refusal)
            return
        if is_lost:
            # Replies that arrived before the loss may still be in the socket.
            with suppress(zmq.ZMQError):  # the socket may be closed, too
                while (frames := receive(self._socket)) is not None:
                    self.msg_received(tuple(frames))
            self._fail(self._state.describe_loss)
            return
        if self._state.is_connected:
            # Also without a call: a breaker that stays open would fail calls at the next restart.
            self._breaker.succeed(monotonic())
            self._attempts.clear()
            self._refused.clear()
        elif self._state.is_down:
            for number, attempt in list(self._attempts.items()):
                self._refuse(number, attempt)
        self._send()

    def pause_writing(self) -> None:
        """Keep further requests here, where their deadline can end them."""
        self._may_write = False

    def resume_writing(self) -> None:
        """Send the requests that have waited."""
        self._may_write = True
        self._send()


async def _wait_for_lookup(name: str, timeout: float) -> float:
    """Wait until it is known if a host name needs IPv6: `configure` would block the loop.

    :return: seconds that this has taken
    """
    lookup = look_up(name)
    if not lookup.is_awaited:
        return 0.0
    start = monotonic()
    try:
        await asyncio.wait_for(asyncio.wrap_future(lookup.answer), min(timeout, LOOKUP_TIMEOUT))
    except asyncio.TimeoutError:
        lookup.assumed = False
    return monotonic() - start


class AsyncZMQClient(AsyncJobMethods):
    """Client of a service for coroutines: many calls at once, in one event loop at a time.

    It keeps one connection, and opens a new one after a loss, after a fork, and in another loop.
    Use it as an asynchronous context manager, or close it. The arguments, and the errors of the
    calls, are those of :class:`~pyams_zmq.client.ZMQClient`. While a host name in the address is
    looked up, other sockets of the context wait.
    """

    max_message_size: int = MAX_MESSAGE_SIZE  #: Bytes of the largest message that is sent

    #: Seconds of silence until the system probes the host of the service
    heartbeat_interval: float = HEARTBEATS[0]

    #: Seconds until the connection to a host that does not answer, or takes no data, is closed
    heartbeat_timeout: float = HEARTBEATS[1]

    service_name: str | None = None  #: Name of the service, for traces

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
        # Calls that wait hold no thread here, so all of them may wait for the first start.
        uri = self.address  # not `self`: a client that is dropped must close without the collector
        self._breaker = ForkLocal(lambda: CircuitBreaker(uri, is_expected=True))
        self._connections: ForkLocal[list[Connection]] = ForkLocal(list)  # at most one

    @property
    def address(self) -> str:
        """URI of the service."""
        return self._service.endpoint.uri

    async def call(
        self,
        type: str,  # noqa: A002 - the name of the field
        args: Any = None,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        frames: Iterable[Any] | None = None,
    ) -> Any:
        """Call a method of the service and wait for its result.

        The arguments, the result and the errors are those of :meth:`.ZMQClient.call`, and in
        addition:

        :raises ZMQClosedError: also if the ØMQ context of the loop was terminated
        :raises RuntimeError: if the client was used in another loop that is not closed yet
        """
        return payload_of(
            await self.request([type, args], timeout=timeout, retries=retries, frames=frames)
        )

    async def request(
        self,
        message: Any,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        frames: Iterable[Any] | None = None,
    ) -> Any:
        """Send a message and wait for the reply, see :meth:`.ZMQClient.request`.

        :raises: the errors of `call`, except ZMQRemoteError
        """
        if self.tracing is None:
            return await self._request(message, timeout, retries, frames)
        with self.tracing.request(self, message) as span:
            span.reply = await self._request(span.message, timeout, retries, frames)
        return span.reply

    async def _request(
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
        name = self._service.endpoint.name
        while True:
            spent = 0.0 if name is None else await _wait_for_lookup(name, timeout)
            try:
                reply = await self._connect().exchange(
                    data, timeout, spent, binary, self.connect_timeout
                )
            except RETRIED:
                if not retries:
                    raise
            else:
                is_single = len(reply) <= ENVELOPE + 1
                return decode_reply(reply[-1]) if is_single else decode_body(reply[ENVELOPE:])
            retries -= 1
            if retries:
                await asyncio.sleep(min(timeout, self._breaker.get().pause(monotonic())))
            if deadline is not None:
                data = encode_request(message, deadline, self.max_message_size, binary)

    def _connect(self) -> Connection:
        if self._is_closed:
            raise ZMQClosedError(f'The client of {self.address} was closed: make another one')
        loop = asyncio.get_running_loop()
        connections = self._connections.get()
        for connection in connections:
            if connection.loop is loop:
                connection.update_state()
                if not (connection.is_lost or connection.replace_by_ipv6()):
                    return connection
            elif connection.loop.is_closed():
                connection.abort()
            else:
                raise RuntimeError(
                    f'{self!r} is used in another loop; close that first, or make a client for each'
                )
        heartbeats = (self.heartbeat_interval, self.heartbeat_timeout)
        connections[:] = [Connection(loop, self._service, heartbeats, self._breaker.get())]
        return connections[0]

    def close(self) -> None:
        """Close the client; calls under way continue."""
        self._is_closed = True
        connections = self._connections.get()
        while connections:
            connections.pop().close()

    def __del__(self) -> None:
        # No call is under way, because it would hold the client. This may be any thread.
        if not hasattr(self, '_connections'):  # the arguments were not valid
            return
        for connection in self._connections.get():
            try:
                connection.loop.call_soon_threadsafe(connection.close)
            except RuntimeError:  # the loop is closed
                connection.close()

    async def __aenter__(self) -> 'AsyncZMQClient':  # noqa: PYI034 - Python 3.10 has no Self
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f'<{type(self).__name__} of {self.address}>'
