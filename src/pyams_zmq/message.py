# SPDX-License-Identifier: ZPL-2.1
"""Messages and replies; public names of `pyams_zmq.wire.message`."""

from pyams_zmq.wire.message import (
    MAX_MESSAGE_SIZE,
    decode_reply,
    decode_request,
    encode,
    payload_of,
)
from pyams_zmq.wire.multipart import MAX_FRAMES, Multipart

__all__ = [
    'MAX_FRAMES',
    'MAX_MESSAGE_SIZE',
    'Multipart',
    'decode_reply',
    'decode_request',
    'encode',
    'payload_of',
]
