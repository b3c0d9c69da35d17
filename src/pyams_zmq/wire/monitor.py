# SPDX-License-Identifier: ZPL-2.1
"""Monitors of sockets: the events of their connections, see `zmq_socket_monitor(3)`."""

import struct
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import zmq

_numbers = count()
_EVENT = struct.Struct('=Hi')


def make_inproc_address() -> str:
    """Return an address that was never used: libzmq frees those of closed sockets later."""
    return f'inproc://pyams_zmq.{next(_numbers)}'


def open_monitor(
    socket: Any, events: int = zmq.EVENT_ALL, socket_class: type[zmq.Socket[Any]] = zmq.Socket
) -> Any:
    """Open a monitor of a socket.

    :param socket: the `zmq.Socket`; open the monitor before it is bound or connected, because
        earlier events are lost
    :param events: flags of `zmq.Event`
    :param socket_class: class of the monitor
    :return: the PAIR socket that receives the events; its `last_endpoint` is the address
    :raises zmq.ZMQError: EMFILE, when the process has no descriptor left; then no monitor is open
    """
    monitor: Any = socket.context.socket(zmq.PAIR, socket_class=socket_class)
    address = make_inproc_address()
    try:
        monitor.set(zmq.RCVHWM, 0)  # libzmq's I/O thread would block on an event that has no room
        socket.monitor(address, events)
        monitor.connect(address)
    except BaseException:
        close_monitor(socket, monitor)
        raise
    return monitor


def close_monitor(socket: Any, monitor: Any) -> None:
    """Close a monitor.

    :param socket: the monitored socket, open or closed
    :param monitor: what `open_monitor` has returned
    """
    # First, because an event without a reader would block libzmq's I/O thread.
    if not socket.closed:
        with suppress(zmq.ZMQError):  # the context may be terminated already
            socket.monitor(None, 0)
    monitor.close(0)


def parse_event(frames: Sequence[bytes]) -> tuple[int, int]:
    """Return event and value, as numbers, of a message that a monitor has sent."""
    event, value = _EVENT.unpack(frames[0])
    return event, value
