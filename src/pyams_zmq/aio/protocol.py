# SPDX-License-Identifier: ZPL-2.1
"""What a transport calls."""

import asyncio
from typing import NamedTuple

import zmq


class SocketEvent(NamedTuple):
    """Something that happened to a connection; see `zmq_socket_monitor(3)`.

    :ivar event: a flag of `zmq.Event`
    :ivar value: a descriptor, an errno or an interval in milliseconds, as the event has it
    :ivar endpoint: the endpoint it happened at
    """

    event: zmq.Event
    value: int
    endpoint: str


class ZmqProtocol(asyncio.BaseProtocol):
    """Protocol of a ØMQ socket; override what you need.

    Nothing is called before `connection_made`, nor after `connection_lost`. An exception in one of
    these methods goes to the exception handler of the loop, and stops nothing.
    """

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Get the transport, before anything else is called.

        :param transport: the :class:`~pyams_zmq.aio.transport.ZmqTransport`
        """

    def connection_lost(self, exc: Exception | None) -> None:
        """Learn that the transport has ended.

        :param exc: None if it was closed or aborted, the OSError that ended it otherwise
        """

    def pause_writing(self) -> None:
        """Learn that more bytes are buffered than the high-water limit.

        It is called once, within the `write` that passes the limit.
        """

    def resume_writing(self) -> None:
        """Learn that no more bytes are buffered than the low-water limit; once for each pause."""

    def msg_received(self, data: tuple[bytes, ...]) -> None:
        """Take a message.

        :param data: its frames, at least one
        """

    def event_received(self, event: SocketEvent) -> None:
        """Take an event of the monitor, see :meth:`.ZmqTransport.enable_monitor`.

        :param event: what happened to a connection
        """
