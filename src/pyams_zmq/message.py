# SPDX-License-Identifier: ZPL-2.1
"""Messages and replies, and the JSON form of their values; public names of `pyams_zmq.wire`."""

from pyams_zmq.wire.message import (
    MAX_MESSAGE_SIZE,
    decode_reply,
    decode_request,
    encode,
    payload_of,
)
from pyams_zmq.wire.multipart import MAX_FRAMES, Multipart
from pyams_zmq.wire.values import add_encoder

__all__ = [
    'MAX_FRAMES',
    'MAX_MESSAGE_SIZE',
    'Multipart',
    'add_encoder',
    'decode_reply',
    'decode_request',
    'encode',
    'payload_of',
]
