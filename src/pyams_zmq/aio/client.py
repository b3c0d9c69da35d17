# SPDX-License-Identifier: ZPL-2.1
"""Calls a service from a coroutine; many calls share a connection."""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

import zmq

from pyams_zmq.aio.deadlines import Deadlines
from pyams_zmq.aio.loop import get_context
from pyams_zmq.aio.protocol import SocketEvent, ZmqProtocol
from pyams_zmq.aio.transport import ZmqTransport
from pyams_zmq.auth import Users
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.client.connection import (
    CONNECTION_EVENTS,
    RETRIED,
    ConnectionState,
    ServiceAddress,
    as_os_error,
    configure,
    keep_connected,
)
from pyams_zmq.exceptions import ZMQBaseError, ZMQClosedError, ZMQRefusedError
from pyams_zmq.wire.message import (
    check_retries,
    check_timeout,
    decode_reply,
    encode_request,
    payload_of,
)

SEND_HWM = 24
"""Requests that wait in a socket, at most; further ones wait where their deadline can end them.

With 10, 256 calls under way take a tenth more processor time: more often the socket is full, and
wakes the loop when it has room again.
"""

FRESH = 0.001
"""Seconds for which it is known how a connection is"""


class Connection(ZmqProtocol):
    """A DEALER socket for all calls of a client, until it is lost.

    Each request has a number in its envelope (RFC 28/REQREP), which comes back with the reply: a
    late one finds nobody. Requests wait here while there is no connection, or it takes no more.

    :param loop: event loop
    :param target: what to connect to
    :raises OSError: EMFILE, when the process has no descriptor left
    """

    def __init__(self, loop: Any, target: ServiceAddress):
        self.loop = loop
        self.pid = os.getpid()
        self.is_lost = False
        self.closes = False
        self._link = ConnectionState(target.endpoint)
        self._number = 0
        self._may_write = True
        self._looked = 0.0
        self._calls: dict[bytes, asyncio.Future[bytes]] = {}
        self._deadlines = Deadlines(loop, self._calls, self._expire)
        self._unsent: OrderedDict[bytes, bytes] = OrderedDict()
        with as_os_error():
            self._socket = get_context(loop).socket(zmq.DEALER, socket_class=zmq.Socket)
            try:
                configure(self._socket, *target)
                keep_connected(self._socket)
                self._socket.sndhwm = SEND_HWM
                self._socket.rcvhwm = 0  # as many as calls wait for: libzmq would drop the others
                self._transport = ZmqTransport(loop, self._socket, self)
                self._transport.start()
                self._transport.enable_monitor(CONNECTION_EVENTS)
                self._socket.connect(target.endpoint.uri)
            except BaseException:
                self._socket.close(0)
                raise

    async def exchange(self, data: bytes, timeout: float) -> bytes:
        """Send a request, wait for the reply; to cancel this lets the others go on.

        :param timeout: seconds, for connecting, sending and waiting together
        :raises ZMQTimeoutError: there is a service, and it has not replied in time
        :raises ZMQUnreachableError: there is none, or the connection to it was lost
        :raises ZMQRefusedError: it does not let us in
        """
        self._number += 1
        number = b'%d' % self._number
        reply: asyncio.Future[bytes] = self.loop.create_future()
        self._calls[number] = reply
        self._unsent[number] = data
        self._deadlines.add(number, timeout)
        try:
            self._send()
            return await reply
        finally:
            self._calls.pop(number, None)
            self._unsent.pop(number, None)
            self._leave()

    def _expire(self, number: bytes, timeout: float) -> None:
        reply = self._calls[number]
        if not reply.done():
            reply.set_exception(self._link.describe_silence(timeout))

    def _send(self) -> None:
        while self._unsent and self._may_write and self._link.is_connected:
            number, data = self._unsent.popitem(last=False)
            self._transport.write((number, b'', data))

    def close(self) -> None:
        """Close the connection when the last call has ended."""
        self.closes = True
        self._leave()

    def abort(self) -> None:
        """Close the connection now."""
        self._deadlines.clear()
        self._transport.abort()

    def _leave(self) -> None:
        if self.closes and (not self._calls or self.loop.is_closed()):
            self.abort()

    def look(self) -> None:
        """Learn what has happened since the loop looked; see `is_lost` then."""
        # Many calls begin in one turn of the loop: the first one learns it for the others.
        now = monotonic()
        if now > self._looked + FRESH:
            self._looked = now
            self._transport.read_monitor()

    def _fail(self, make_error: Callable[[], ZMQBaseError]) -> None:
        self.is_lost = True
        self.abort()
        for reply in self._calls.values():
            if not reply.done():
                reply.set_exception(make_error())

    # What the transport calls

    def connection_lost(self, exc: Exception | None) -> None:
        """Learn that somebody has ended the socket, or its context."""
        if not self.is_lost:
            self._fail(lambda: ZMQClosedError(f'The connection was ended: {exc}'))

    def msg_received(self, data: tuple[bytes, ...]) -> None:
        """Give a reply to the call that waits for it, if there still is one."""
        reply = self._calls.get(data[0])
        if reply is not None and not reply.done():
            reply.set_result(data[-1])

    def event_received(self, event: SocketEvent) -> None:
        """Learn how the connection is."""
        try:
            is_lost = self._link.note(event.event)
        except ZMQRefusedError:
            self._fail(self._link.describe_refusal)
            return
        if is_lost:
            # What came in before it was lost is there, and not received yet.
            with suppress(zmq.ZMQError):  # there is no more, or the socket was ended, too
                while True:
                    self.msg_received(tuple(self._socket.recv_multipart(zmq.NOBLOCK)))
            self._fail(self._link.describe_loss)
        else:
            self._send()

    def pause_writing(self) -> None:
        """Keep requests here, where a deadline can still end them."""
        self._may_write = False

    def resume_writing(self) -> None:
        """Send what has waited."""
        self._may_write = True
        self._send()


class AsyncZMQClient:
    """Client of a service, for many calls at once from coroutines of one loop at a time.

    It keeps one connection, which it renews when it was lost, in another loop and after a fork.
    Use it as an asynchronous context manager, or close it. Its arguments, and what its calls raise,
    are those of :class:`~pyams_zmq.client.ZMQClient`. While the name of a host in the address is
    looked up, other sockets of the context wait.
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
        self._connection: Connection | None = None
        self._inherited: list[Connection] = []

    @property
    def address(self) -> str:
        """URI of the service."""
        return self._target.endpoint.uri

    async def call(
        self,
        type: str,  # noqa: A002 - the name of the field
        args: Any = None,
        *,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Any:
        """Call a method of the service, and wait for its result.

        The arguments, the result and the errors are those of :meth:`.ZMQClient.call`; these two
        are more:

        :raises ZMQClosedError: if the ØMQ context of the loop was terminated, too
        :raises RuntimeError: if it was used in another loop, which is not closed yet
        """
        return payload_of(await self.request([type, args], timeout=timeout, retries=retries))

    async def request(
        self, message: Any, *, timeout: float | None = None, retries: int | None = None
    ) -> Any:
        """Send a message, and wait for the reply of whatever form; see :meth:`.ZMQClient.request`.

        :raises: what `call` does, except ZMQRemoteError
        """
        timeout = check_timeout(self.timeout if timeout is None else timeout)
        retries = check_retries(self.retries if retries is None else retries)
        deadline = timeout if self.send_deadline else None
        data = encode_request(message, deadline)
        while True:
            try:
                return decode_reply(await self._connect().exchange(data, timeout))
            except RETRIED:
                if not retries:
                    raise
            retries -= 1
            if deadline is not None:
                data = encode_request(message, deadline)

    def _connect(self) -> Connection:
        if self._is_closed:
            raise ZMQClosedError(f'The client of {self.address} was closed')
        loop = asyncio.get_running_loop()
        connection = self._connection
        if connection is not None and connection.pid != os.getpid():
            self._inherited.append(connection)  # kept: nobody may touch it here
        elif connection is not None and connection.loop is not loop:
            if not connection.loop.is_closed():
                raise RuntimeError(f'{self!r} is used by another loop, which is not closed yet')
            connection.abort()
        elif connection is not None:
            connection.look()
            if not connection.is_lost:
                return connection
        self._connection = Connection(loop, self._target)
        return self._connection

    def close(self) -> None:
        """Close the connection; calls under way end as they would have."""
        self._is_closed = True
        connection = self._connection
        if connection is not None and connection.pid == os.getpid():
            self._connection = None
            connection.close()

    def __del__(self) -> None:
        # Nobody waits for a call, else that would hold it; perhaps this is another thread.
        connection = getattr(self, '_connection', None)
        if connection is not None and connection.pid == os.getpid():
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
