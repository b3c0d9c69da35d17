# SPDX-License-Identifier: ZPL-2.1
"""Devices that forward messages between two sockets, in the background."""

from typing import Any

import zmq

from pyams_zmq.device.base import FORWARDER, QUEUE, STREAMER, BackgroundDevice, Device
from pyams_zmq.device.direction import CANNOT_SEND
from pyams_zmq.device.process import InProcess
from pyams_zmq.device.proxy import PythonLoop, Statistics, Traffic
from pyams_zmq.device.socket_config import PORTS, SocketConfig

__all__ = [
    'FORWARDER',
    'QUEUE',
    'STREAMER',
    'BackgroundDevice',
    'Device',
    'MonitoredQueue',
    'ProcessDevice',
    'ProcessMonitoredQueue',
    'ProcessProxy',
    'Proxy',
    'Statistics',
    'ThreadDevice',
    'ThreadMonitoredQueue',
    'ThreadProxy',
    'Traffic',
    'monitored_queue',
]


class ThreadDevice(BackgroundDevice):
    """:class:`Device` in a thread."""


class ProcessDevice(InProcess):
    """:class:`Device` in a process of its own."""


class Proxy(Device):
    """Device with a monitor: a third socket that gets a copy of each message.

    The monitor never blocks the others: a message that it cannot send at once is not copied. Access
    rules are the keyword arguments `auth`, `clients` and `curve` of :class:`Device`.

    :param in_type: type of the `in` socket
    :param out_type: type of the `out` socket
    :param mon_type: type of the `mon` socket
    :raises ValueError: the monitor cannot send, or see :class:`Device`
    """

    def __init__(self, in_type: int, out_type: int, mon_type: int = zmq.PUB, **access: Any):
        super().__init__(QUEUE, in_type, out_type, **access)
        self._mon = SocketConfig('mon', zmq.PUB)
        self.mon_type = mon_type
        self._sockets.append(self._mon)

    @property
    def mon_type(self) -> int:
        """Type of the `mon` socket; PUB for XPUB, whose subscriptions nobody would read."""
        return self._mon.type

    @mon_type.setter
    def mon_type(self, mon_type: int) -> None:
        if mon_type in (-1, *CANNOT_SEND):
            raise ValueError(f'Bad mon_type {mon_type}: use a type that can send, as PUB and PUSH')
        self._mon.type = zmq.PUB if mon_type == zmq.XPUB else mon_type

    def bind_mon(self, addr: Any) -> None:
        """Bind the `mon` socket; see :meth:`Device.bind_in`."""
        self._mon.bind(addr)

    def bind_mon_to_random_port(
        self, addr: Any, min_port: int | None = None, max_port: int = PORTS, max_tries: int = 100
    ) -> int:
        """Bind the `mon` socket to a free port; see :meth:`Device.bind_in_to_random_port`."""
        return self._mon.bind_to_random_port(addr, min_port, max_port, max_tries)

    def connect_mon(self, addr: Any) -> None:
        """Connect the `mon` socket; see :meth:`Device.bind_in`."""
        self._mon.connect(addr)

    def setsockopt_mon(self, opt: int, value: Any) -> None:
        """Set an option of the `mon` socket; see :meth:`Device.setsockopt_in`."""
        self._mon.set_option(opt, value)

    @property
    def mon_address(self) -> str | None:
        """First bound address of the `mon` socket, None if there is none."""
        return self._first_address('mon')


class ThreadProxy(Proxy, BackgroundDevice):
    """:class:`Proxy` in a thread."""


class ProcessProxy(Proxy, InProcess):
    """:class:`Proxy` in a process of its own."""


class MonitoredQueue(Proxy):
    """Proxy whose monitor shows where a message came in.

    Access rules are the keyword arguments `auth`, `clients` and `curve` of :class:`Device`.

    :param in_type: type of the `in` socket
    :param out_type: type of the `out` socket
    :param mon_type: type of the `mon` socket
    :param in_prefix: first frame of the copies of what the `in` socket received, text or bytes
    :param out_prefix: first frame of the copies of what the `out` socket received
    """

    def __init__(
        self,
        in_type: int,
        out_type: int,
        mon_type: int = zmq.PUB,
        in_prefix: bytes | str = b'in',
        out_prefix: bytes | str = b'out',
        **access: Any,
    ):
        super().__init__(in_type, out_type, mon_type, **access)
        self._prefixes = in_prefix, out_prefix


class ThreadMonitoredQueue(MonitoredQueue, BackgroundDevice):
    """:class:`MonitoredQueue` in a thread."""


class ProcessMonitoredQueue(MonitoredQueue, InProcess):
    """:class:`MonitoredQueue` in a process of its own."""


def monitored_queue(
    in_socket: Any,
    out_socket: Any,
    mon_socket: Any,
    in_prefix: bytes | str = b'in',
    out_prefix: bytes | str = b'out',
) -> None:
    """Forward between two sockets of the caller, in its thread; see :class:`MonitoredQueue`.

    :raises zmq.ContextTerminated: the context of the sockets was terminated
    """
    PythonLoop(in_socket, out_socket, mon_socket, prefixes=(in_prefix, out_prefix)).run()
