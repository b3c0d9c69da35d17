# SPDX-License-Identifier: ZPL-2.1
"""Detection of peers whose host is gone.

No socket of this package has ZMTP heartbeats (RFC 37/ZMTP 3.1). libzmq 4.3.5 aborts the process at
its next heartbeat when a connection that it has stopped reading is reset (`stream_engine_base.cpp`,
``!_io_error``; libzmq issues 4364 and 4841), and heartbeats wait behind large messages, so that
they cut slow connections. TCP does the same in the kernel, and counts acknowledged bytes as life.
"""

from math import ceil
from typing import Any

PROBES = 3
"""Keep-alive probes without an answer, until a connection is closed"""

MAX_INT = 2**31 - 1
"""Largest number that an option of a socket can have"""

_MAX_SECONDS = 32767  # of Linux; with a larger number libzmq closes each connection at once


def keep_alive(socket: Any, idle: float, timeout: float, *, limit_sending: bool = False) -> None:
    """Let the system close the connections of a socket whose peer does not answer, see tcp(7).

    :param socket: a `zmq.Socket` that is not bound or connected yet; for ipc this has no effect
    :param idle: seconds of silence until the system probes the peer, rounded up to a whole number
    :param timeout: seconds that the peer may take to answer the probes
    :param limit_sending: true to also close a connection whose peer takes none of the data that
        waits for it for *timeout*: its host is gone, or its process does not read; false leaves
        that to the system, which gives up after about 15 minutes without an acknowledgement
    """
    socket.tcp_keepalive = 1
    socket.tcp_keepalive_idle = _to_seconds(idle)
    socket.tcp_keepalive_intvl = _to_seconds(timeout / PROBES)
    socket.tcp_keepalive_cnt = PROBES
    if limit_sending:
        socket.tcp_maxrt = max(1, ceil(min(timeout * 1000, MAX_INT)))


def _to_seconds(duration: float) -> int:
    return max(1, ceil(min(duration, _MAX_SECONDS)))
