# SPDX-License-Identifier: ZPL-2.1
"""Frames into a socket and out of it, without detours.

What pyzmq writes in Python around its compiled class takes longer than the work of libzmq: a `send`
is looked at for what it may be besides bytes, each frame is followed by the question whether there
are more, and constants are members of an enum, whose `&` and `|` are functions in Python.
"""

from typing import Any

import zmq

EVENTS = zmq.EVENTS  # as it is: pyzmq would look up the number
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
NOBLOCK, MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

send_frame = zmq.backend.Socket.send
"""Send bytes, with flags: ``send_frame(socket, data, NOBLOCK)``"""


def receive(socket: Any) -> list[bytes] | None:
    """Receive a message, if there is one."""
    try:
        frame = socket.recv(NOBLOCK, False)
    except zmq.Again:
        return None
    frames = [frame.bytes]
    while frame.more:
        frame = socket.recv(NOBLOCK, False)
        frames.append(frame.bytes)
    return frames
