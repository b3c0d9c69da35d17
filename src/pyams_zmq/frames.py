#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#


"""PyAMS_zmq.frames module: frames into a socket and out of it, without detours.

What pyzmq writes in Python around its compiled class takes longer than the work of libzmq: a `send`
is looked at for what it may be besides bytes, each frame is followed by the question whether there
are more, and constants are members of an enum, whose `&` and `|` are functions in Python.
"""

from typing import Any

import zmq

__docformat__ = 'restructuredtext'

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
