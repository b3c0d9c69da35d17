# SPDX-License-Identifier: ZPL-2.1
"""Sending and receiving frames at the lowest cost.

The Python layer of pyzmq around its compiled class takes longer than the work of libzmq: `send`
checks the type of its data, `recv_multipart` asks for each frame whether more follow, and constants
are members of an enum, whose `&` and `|` are Python functions.
"""

from collections.abc import Sequence
from typing import Any

import zmq

EVENTS = zmq.EVENTS  # the enum member: pyzmq would look up a number
SRCFD = zmq.SRCFD
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
NOBLOCK, MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)

send_frame = zmq.backend.Socket.send
"""Send bytes, with flags: ``send_frame(socket, data, NOBLOCK)``"""


def send_frames(socket: Any, frames: Sequence[Any]) -> None:
    """Send a message of one or more frames without waiting.

    :param frames: bytes, or other buffers
    :raises zmq.ZMQError: EAGAIN, if it cannot be sent now
    """
    for frame in frames[:-1]:
        send_frame(socket, frame, MORE)
    send_frame(socket, frames[-1], NOBLOCK)


def receive(socket: Any) -> list[bytes] | None:
    """Receive a message without waiting; return None if there is none."""
    try:
        frame = socket.recv(NOBLOCK, False)
    except zmq.Again:
        return None
    frames = [frame.bytes]
    while frame.more:
        frame = socket.recv(NOBLOCK, False)
        frames.append(frame.bytes)
    return frames
