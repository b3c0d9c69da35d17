# SPDX-License-Identifier: ZPL-2.1
"""What happens to the connections of a socket."""

import asyncio
import struct
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import zmq

from pyams_zmq.aio.protocol import SocketEvent

_numbers = count()


def open_monitor(sock: Any, events: int | None) -> tuple[Any, str]:
    """Let a socket tell of its connections; return the PAIR socket that gets it, and its endpoint.

    :param sock: `zmq.Socket`
    :param events: flags of `zmq.Event`, or None for all
    :raises zmq.ZMQError: if there cannot be a monitor; then none is left
    """
    endpoint = f'inproc://pyams_zmq.aio.monitor-{next(_numbers)}'
    pair: Any = sock.context.socket(zmq.PAIR, socket_class=zmq.Socket)
    try:
        pair.rcvhwm = 0  # events that wait for a reader would stop the I/O thread
        sock.monitor(endpoint, zmq.EVENT_ALL if events is None else events)
        pair.connect(endpoint)
    except BaseException:
        close_monitor(sock)
        pair.close(0)
        raise
    return pair, endpoint


def close_monitor(sock: Any) -> None:
    """Let a socket tell nobody any more."""
    if not sock.closed:  # at the end of the program, pyzmq cannot even raise its error
        with suppress(zmq.ZMQError):  # its context may have ended already
            sock.monitor(None, 0)


class MonitorProtocol(asyncio.BaseProtocol):
    """Protocol of the transport of a monitor: gives its events to the monitored one's protocol."""

    def __init__(self, tell: Callable[..., None]):
        self._tell = tell

    def msg_received(self, data: tuple[bytes, bytes]) -> None:
        """Take an event, as `zmq_socket_monitor(3)` has it."""
        event, value = struct.unpack('=Hi', data[0])
        self._tell('event_received', SocketEvent(zmq.Event(event), value, data[1].decode()))
