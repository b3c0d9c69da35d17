# SPDX-License-Identifier: ZPL-2.1
"""The connection for the calls of a ZMQClient."""

from collections.abc import Sequence

import zmq

from pyams_zmq.client.breaker import Attempt
from pyams_zmq.client.connection import HEARTBEATS, ServiceAddress
from pyams_zmq.client.socket import open_connection
from pyams_zmq.exceptions import ZMQRefusedError, ZMQTimeoutError, ZMQUnreachableError
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.frames import MORE, NOBLOCK, POLLIN, receive, send_frame
from pyams_zmq.wire.names import LOOKUP_TIMEOUT
from pyams_zmq.wire.poll import poll, wait_for

FAST = 0.01
"""Seconds without a reply until the monitor is read, too"""

ALIVE = 0.02
"""Seconds after a reply in which a connection counts as alive without reading its monitor"""


class CallConnection:
    """A REQ socket for one call at a time.

    After an exception it must be closed: it may still receive the reply to the failed call.

    :param heartbeats: see `HEARTBEATS`
    :param attempt: the attempt to connect, None to wait for the whole time-out of the first call
    :param timeout: seconds of the first call, which begins now
    :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
    """

    def __init__(
        self,
        service: ServiceAddress,
        heartbeats: tuple[float, float] = HEARTBEATS,
        attempt: Attempt | None = None,
        timeout: float = LOOKUP_TIMEOUT,
    ):
        self._start: float | None = monotonic()
        lookup_timeout = min(timeout, LOOKUP_TIMEOUT)
        self._socket, self._monitor = open_connection(
            service, zmq.REQ, heartbeats, lookup_timeout=lookup_timeout
        )
        self._attempt = attempt
        self._state = self._monitor.state
        self._sockets = [self._socket, self._monitor.socket]
        self._used = -ALIVE
        self._polled = [(self._socket, POLLIN)]

    def exchange(self, data: bytes, timeout: float, frames: Sequence[bytes] = ()) -> list[bytes]:
        """Send a request, and wait for the reply.

        :param timeout: seconds for connecting, sending and waiting together
        :param frames: binary frames in front of the request
        :return: the frames of the reply
        :raises ZMQTimeoutError: if the service is connected and has not replied in time
        :raises ZMQUnreachableError: if no service answers, or the connection was lost
        :raises ZMQRefusedError: if the service refuses the connection
        """
        start, self._start = self._start or monotonic(), None
        try:
            if frames:
                self._socket.linger_after_many_frames()
                for frame in frames:
                    send_frame(self._socket, frame, MORE)
            send_frame(self._socket, data, NOBLOCK)
        except zmq.Again:  # a REQ socket has no room for its only message after a refusal
            raise self._state.describe_refusal() from None
        poll(self._polled, min(timeout, FAST))
        while (reply := receive(self._socket)) is None:
            if self._monitor.read_events():
                reply = receive(self._socket)  # it may have arrived just before the loss
                if reply is None:
                    raise self._state.describe_loss()
                break
            left = self._find_end(start, timeout) - monotonic()
            if left <= 0:
                raise self._give_up(start, timeout)
            wait_for(self._sockets, left)
        if self._attempt is not None:
            self._attempt.succeed(monotonic())
            self._attempt = None
        self._state.close()  # further events may be read much later
        self._used = monotonic()
        return reply

    def _find_end(self, start: float, timeout: float) -> float:
        """Return until when a call may wait; -inf if it fails at once."""
        end = start + timeout
        if self._attempt is None:
            return end
        if self._state.is_connected:
            self._attempt.succeed(monotonic())
            self._attempt = None
            return end
        wait = self._attempt.refuse if self._state.is_down else self._attempt.wait
        return min(end, wait(monotonic()))

    def _give_up(self, start: float, timeout: float) -> ZMQTimeoutError | ZMQUnreachableError:
        """Return the error of a call that has waited until its end, or is not to wait."""
        attempt = self._attempt
        if attempt is None:
            return self._state.describe_silence(timeout)
        now = monotonic()
        waited = min(now - start, timeout, attempt.connect_timeout)
        error = self._state.describe_silence(waited)
        attempt.fail(now, str(error))
        return error

    def is_alive(self) -> bool:
        """Return True if the service was connected a moment ago."""
        if monotonic() - self._used < ALIVE and not self._socket.closed:
            return True
        try:
            self._monitor.read_events()
        except (ZMQRefusedError, zmq.ZMQError):  # the context may be terminated, too
            return False
        return self._state.is_connected

    @property
    def missing(self) -> float:
        """Seconds for which it has tried in vain to connect again."""
        return self._state.missing

    def close(self) -> None:
        """Close the connection."""
        if self._attempt is not None:
            self._attempt.abandon()
        self._socket.close()
