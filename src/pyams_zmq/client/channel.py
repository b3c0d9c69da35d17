# SPDX-License-Identifier: ZPL-2.1
"""Connections of a ZMQClient: a socket and its monitor."""

from time import monotonic
from typing import Any

import zmq

from pyams_zmq.client.connection import ServiceAddress, keep_connected
from pyams_zmq.client.socket import open_socket
from pyams_zmq.exceptions import ZMQRefusedError
from pyams_zmq.wire.frames import NOBLOCK, POLLIN, receive, send_frame
from pyams_zmq.wire.poll import poll, wait_for

FAST = 0.01
"""Seconds without a reply until the monitor is read, too"""

RECENT = 0.02
"""Seconds after a reply in which a connection counts as alive without reading its monitor"""

SEND_HWM = 100
"""Messages of a SendChannel that wait in its socket, at most"""


class Channel:
    """Connection to a service.

    :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
    """

    socket_type: int

    def __init__(self, service: ServiceAddress):
        self._socket = open_socket(service, self.socket_type)
        keep_connected(self._socket)
        self._prepare_socket()
        self._monitor = self._socket._open_monitor(service.endpoint)
        self._state = self._monitor.state
        self.sockets: list[Any] = [self._socket, self._monitor.socket]
        """Sockets to wait for"""
        self._socket.connect(service.endpoint.uri)

    def _prepare_socket(self) -> None:
        """Set the options of this kind of channel."""

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


class CallChannel(Channel):
    """A REQ socket for one call at a time.

    After an exception it must be closed: it may still receive the reply to the failed call.
    """

    socket_type = zmq.REQ

    def __init__(self, service: ServiceAddress):
        super().__init__(service)
        self._used = -RECENT
        self._polled = [(self._socket, POLLIN)]

    def exchange(self, data: bytes, timeout: float) -> bytes:
        """Send a request, and wait for the reply.

        :param timeout: seconds for connecting, sending and waiting together
        :raises ZMQTimeoutError: if the service is connected and has not replied in time
        :raises ZMQUnreachableError: if no service answers, or the connection was lost
        :raises ZMQRefusedError: if the service refuses the connection
        """
        deadline = monotonic() + timeout
        try:
            send_frame(self._socket, data, NOBLOCK)
        except zmq.Again:  # a REQ socket has no room for its only message after a refusal
            raise self._state.describe_refusal() from None
        poll(self._polled, min(timeout, FAST))
        while (frames := receive(self._socket)) is None:
            left = deadline - monotonic()
            if left <= 0:
                self._monitor.read_events()
                raise self._state.describe_silence(timeout)
            ready = wait_for(self.sockets, left)
            if self._socket not in ready and self._monitor.read_events():
                raise self._state.describe_loss()
        self._used = monotonic()
        return frames[-1]

    def is_alive(self) -> bool:
        """Return True if the service was connected a moment ago."""
        if monotonic() - self._used < RECENT and not self._socket.closed:
            return True
        try:
            self._monitor.read_events()
        except (ZMQRefusedError, zmq.ZMQError):  # the context may be terminated, too
            return False
        return self._state.is_connected


class SendChannel(Channel):
    """A DEALER socket for the messages of a SendQueue; no method waits."""

    socket_type = zmq.DEALER

    def _prepare_socket(self) -> None:
        self._socket.immediate = 1  # messages wait in the queue, not in a connection that is lost
        self._socket.sndhwm = SEND_HWM
        self._socket.rcvhwm = 0

    @property
    def is_connected(self) -> bool:
        """True if the service was connected at the last `read_events`."""
        return self._state.is_connected

    def read_events(self) -> bool:
        """Update the state of the connection; return True if it was lost.

        :raises ZMQRefusedError: if the service refuses the connection
        """
        return self._monitor.read_events()

    def send(self, frames: list[bytes]) -> bool:
        """Send a message; return False if the connection has no room for it."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[bytes] | None:
        """Receive a reply; return None if none has come in."""
        return receive(self._socket)
