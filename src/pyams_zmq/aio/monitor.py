# SPDX-License-Identifier: ZPL-2.1
"""Events of the connections of a socket."""

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
    """Start a monitor; return the PAIR socket that receives its events, and its endpoint.

    :param sock: `zmq.Socket` to monitor
    :param events: flags of `zmq.Event`, or None for all
    :raises zmq.ZMQError: if the monitor cannot be started
    """
    endpoint = f'inproc://pyams_zmq.aio.monitor-{next(_numbers)}'
    pair: Any = sock.context.socket(zmq.PAIR, socket_class=zmq.Socket)
    try:
        pair.rcvhwm = 0  # a full queue would block the I/O thread
        sock.monitor(endpoint, zmq.EVENT_ALL if events is None else events)
        pair.connect(endpoint)
    except BaseException:
        close_monitor(sock)
        pair.close(0)
        raise
    return pair, endpoint


def close_monitor(sock: Any) -> None:
    """Stop the monitor of a socket."""
    if not sock.closed:  # when the program ends, pyzmq can no longer raise its error
        with suppress(zmq.ZMQError):  # the context may have ended already
            sock.monitor(None, 0)


class MonitorProtocol(asyncio.BaseProtocol):
    """Protocol of the socket that receives the events of a monitor.

    :param handle_event: called with each :class:`.SocketEvent`
    """

    def __init__(self, handle_event: Callable[[SocketEvent], None]):
        self._handle_event = handle_event

    def msg_received(self, data: tuple[bytes, bytes]) -> None:
        """Decode an event in the format of `zmq_socket_monitor(3)`."""
        event, value = struct.unpack('=Hi', data[0])
        self._handle_event(SocketEvent(zmq.Event(event), value, data[1].decode()))
