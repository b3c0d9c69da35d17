# SPDX-License-Identifier: ZPL-2.1
"""Bodies of messages and replies: binary frames, often none, and the JSON frame."""

from collections.abc import Sequence
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError, ZMQReplyError
from pyams_zmq.wire.message import decode_reply, encode
from pyams_zmq.wire.multipart import MAX_FRAMES, Multipart, to_frames

Reply = bytes | list[bytes]
"""An encoded reply: its JSON frame, or a list of binary frames and the JSON frame"""


def encode_reply(result: Any) -> Reply:
    """Encode the result of a method.

    :param result: any value with a JSON form, or a :class:`Multipart`
    :raises TypeError, ValueError, RecursionError: if the value has no JSON form
    """
    if isinstance(result, Multipart):
        # Checked again, its list may have been changed: a frame that is not bytes would raise when
        # half of the reply is sent.
        return [*to_frames(result.frames), encode(result.value)]
    return encode(result)


def size_of(reply: Reply) -> int:
    """Return the bytes of an encoded reply."""
    return sum(map(len, reply)) if isinstance(reply, list) else len(reply)


def decode_body(frames: Sequence[bytes]) -> Any:
    """Decode a reply; return a :class:`Multipart` if it has binary frames.

    :param frames: binary frames, and the JSON frame
    :raises ZMQReplyError: if the last frame is not JSON, or there are too many others
    """
    if len(frames) == 1:
        return decode_reply(frames[0])
    if len(frames) > MAX_FRAMES + 1:
        raise ZMQReplyError(
            f'The reply has {len(frames) - 1} binary frames; the limit is {MAX_FRAMES}'
        )
    return Multipart(decode_reply(frames[-1]), frames[:-1])


def measure_body(frames: Sequence[Any]) -> int:
    """Return the bytes of a message.

    :raises ZMQMessageError: with status 400, if it has too many frames
    """
    if len(frames) > MAX_FRAMES + 1:
        raise ZMQMessageError(
            400, f'Bad message of {len(frames)} frames; the limit is {MAX_FRAMES + 1}'
        )
    return sum(map(len, frames))
