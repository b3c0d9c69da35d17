# SPDX-License-Identifier: ZPL-2.1
"""What the kernel knows about a TCP connection (``TCP_INFO``, see tcp(7))."""

import socket as network
import struct
import termios
from fcntl import ioctl
from typing import NamedTuple

_TIMES = struct.Struct('=3I')  # of tcp_info, see linux/tcp.h: milliseconds since ...
_TIMES_OFFSET = 44
_UNACKNOWLEDGED = struct.Struct('=I')
_UNACKNOWLEDGED_OFFSET = 24
_BYTES = struct.Struct('=2Q')
_BYTES_OFFSET = 120
_INFO_SIZE = _BYTES_OFFSET + _BYTES.size
_INT = struct.Struct('=i')


def _ioctl(socket: network.socket, request: int) -> int:
    value: int = _INT.unpack(ioctl(socket, request, bytes(_INT.size)))[0]
    return value


class Traffic(NamedTuple):
    """What the kernel knows about a TCP connection; durations are in seconds.

    :ivar received: bytes that libzmq has read from it
    :ivar written: bytes that libzmq has written to it
    :ivar since_received: time since data came in
    :ivar since_sent: time since data went out
    :ivar acknowledged: bytes that the peer has acknowledged
    :ivar is_awaited: true while an acknowledgement is due
    """

    received: int
    written: int
    since_received: float
    since_sent: float
    acknowledged: int
    is_awaited: bool

    @classmethod
    def read(cls, socket: network.socket) -> 'Traffic | None':
        """Read the state of a connection; return None for ipc, and where the kernel lacks it."""
        try:
            # First: what comes in between the calls then counts as read, not as less than nothing.
            waiting, unsent = _ioctl(socket, termios.FIONREAD), _ioctl(socket, termios.TIOCOUTQ)
            info = socket.getsockopt(network.IPPROTO_TCP, network.TCP_INFO, _INFO_SIZE)
            acknowledged, received = _BYTES.unpack_from(info, _BYTES_OFFSET)
        except (OSError, struct.error):
            return None
        sent_ago, _, received_ago = _TIMES.unpack_from(info, _TIMES_OFFSET)
        [unacknowledged] = _UNACKNOWLEDGED.unpack_from(info, _UNACKNOWLEDGED_OFFSET)
        return cls(
            received - waiting,
            acknowledged + unsent,
            received_ago / 1000,
            sent_ago / 1000,
            acknowledged,
            unacknowledged > 0,
        )
