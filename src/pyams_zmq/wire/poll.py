# SPDX-License-Identifier: ZPL-2.1
"""Waiting for ØMQ sockets, also in programs that gevent has patched, and for descriptors."""

import select
from collections.abc import Iterable, Sequence
from math import ceil
from types import BuiltinFunctionType
from typing import Any

import zmq

from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.frames import EVENTS, POLLIN

_MAX_WAIT = 2_000_000
"""Seconds; polls count milliseconds in 31 bits"""


def wait_for(sockets: Sequence[Any], timeout: float) -> list[Any]:
    """Wait until a socket can receive.

    :param timeout: seconds
    :return: the sockets that can
    """
    return [socket for socket, _events in poll([(socket, POLLIN) for socket in sockets], timeout)]


def poll(items: list[tuple[Any, int]], timeout: float) -> list[tuple[Any, int]]:
    """Do what `zmq.zmq_poll` does, and let other greenlets of gevent run.

    :param items: sockets, each of them once, with the events to wait for
    :param timeout: seconds
    :return: the sockets that have events, with them
    """
    timeout = max(0, min(timeout, _MAX_WAIT))
    if isinstance(select.poll, BuiltinFunctionType):
        return zmq.zmq_poll(items, ceil(timeout * 1000))
    # gevent has patched this program: its own poll lets other greenlets run, libzmq's does not.
    # The FD of a socket is edge-triggered, so EVENTS must be read before each wait.
    deadline = monotonic() + timeout
    poller = select.poll()
    for socket, _flags in items:
        poller.register(socket.fd, select.POLLIN)
    while True:
        ready = [
            (socket, events) for socket, flags in items if (events := socket.get(EVENTS) & flags)
        ]
        left = deadline - monotonic()
        if ready or left <= 0:
            return ready
        poller.poll(ceil(left * 1000))


def wait_readable(fds: Iterable[int], timeout: float | None) -> set[int]:
    """Wait until one of some descriptors is readable.

    :param fds: descriptors of the system; `select.select` would refuse those above 1023
    :param timeout: seconds, None waits without end
    :return: the readable ones
    """
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    milliseconds = None if timeout is None else ceil(min(timeout, _MAX_WAIT) * 1000)
    return {fd for fd, _ in poller.poll(milliseconds)}
