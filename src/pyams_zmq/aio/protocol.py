# SPDX-License-Identifier: ZPL-2.1
"""The protocol of a ØMQ socket: the methods that its transport calls."""

import asyncio
from typing import NamedTuple

import zmq


class SocketEvent(NamedTuple):
    """An event of a connection, see `zmq_socket_monitor(3)`.

    :ivar event: a flag of `zmq.Event`
    :ivar value: a descriptor, an errno or an interval in milliseconds, depending on the event
    :ivar endpoint: the endpoint of the connection
    """

    event: zmq.Event
    value: int
    endpoint: str


class ZmqProtocol(asyncio.BaseProtocol):
    """Protocol of a ØMQ socket; override the methods that you need.

    No method is called before `connection_made` or after `connection_lost`. An exception in one of
    them goes to the exception handler of the loop; the transport goes on.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Handle the start of the transport; called first.

        :param transport: the :class:`~pyams_zmq.aio.transport.ZmqTransport`
        """

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of the transport; called last.

        :param exc: None if it was closed or aborted, otherwise the OSError that ended it
        """

    def pause_writing(self) -> None:
        """Handle a write buffer above the high-water limit.

        Called once, within the `write` that passes the limit.
        """

    def resume_writing(self) -> None:
        """Handle a write buffer down to the low-water limit; called once for each pause."""

    def msg_received(self, data: tuple[bytes, ...]) -> None:
        """Handle a message.

        :param data: its frames, at least one
        """

    def event_received(self, event: SocketEvent) -> None:
        """Handle an event of the monitor, see :meth:`.ZmqTransport.enable_monitor`.

        :param event: the event of a connection
        """
