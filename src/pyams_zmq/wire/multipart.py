# SPDX-License-Identifier: ZPL-2.1
"""Binary frames of messages and replies, which are sent before their JSON frame."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

MAX_FRAMES = 1000
"""Binary frames of a message or reply, at most"""


class Multipart:
    """A reply with binary frames.

    A method of a handler returns it, to send the frames before the JSON text of *value*; a client
    returns it for such a reply. It can be unpacked: ``value, frames = reply``.

    :param value: what the method would return without frames, by convention ``[status, payload]``
    :param frames: any iterable of bytes-like objects, which are copied unless they are bytes
    :ivar frames: list of bytes
    :raises TypeError: if a frame is not bytes-like, a string for instance
    :raises ValueError: if there are more than 1000 frames
    """

    __slots__ = ('frames', 'value')
    __match_args__ = ('value', 'frames')
    __hash__ = None  # type: ignore[assignment] # as a list

    value: Any
    frames: list[bytes]

    def __init__(self, value: Any, frames: Iterable[Any] | None = None):
        object.__setattr__(self, 'value', value)
        object.__setattr__(self, 'frames', to_frames(frames))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f'A Multipart cannot be changed: make another one ({name})')

    def __reduce__(self) -> tuple[type['Multipart'], tuple[Any, list[bytes]]]:
        return Multipart, (self.value, self.frames)  # a program of the handler may return it

    def __iter__(self) -> Iterator[Any]:
        return iter((self.value, self.frames))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Multipart):
            return (self.value, self.frames) == (other.value, other.frames)
        return NotImplemented

    def __repr__(self) -> str:
        return f'Multipart({self.value!r}, {describe(self.frames)})'


def describe(frames: Sequence[bytes]) -> str:
    """Return the sizes of some frames as text, without their content."""
    return f'[{", ".join(f"<{len(frame)} bytes>" for frame in frames)}]'


def to_frames(frames: Iterable[Any] | None) -> list[bytes]:
    """Return binary frames as bytes; the caller may change its buffers afterwards.

    :param frames: any iterable of bytes-like objects (bytes, bytearray, memoryview,
        :class:`zmq.Frame`, ...), or None
    :raises TypeError: if it is something else
    :raises ValueError: if there are more than `MAX_FRAMES`
    """
    if frames is None:
        return []
    if type(frames) is not list:
        if isinstance(frames, str) or _is_buffer(frames):
            raise TypeError(f'Bad frames ({_kind_of(frames)}): write a list of them, [frame]')
        if not isinstance(frames, Iterable):
            raise TypeError(f'Bad frames ({_kind_of(frames)}): write a list of bytes')
    result: list[bytes] = []
    for frame in islice(frames, MAX_FRAMES + 1):
        if type(frame) is not bytes:
            if isinstance(frame, str):
                raise TypeError(f'Bad frame {len(result)} (str): write bytes; encode the text')
            if not _is_buffer(frame):
                raise TypeError(f'Bad frame {len(result)} ({_kind_of(frame)}): write bytes')
            frame = memoryview(frame).tobytes()  # noqa: PLW2901 - the same bytes
        result.append(frame)
    if len(result) > MAX_FRAMES:
        raise ValueError(f'Bad frames: there are more than {MAX_FRAMES}')
    return result


def _is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


def _kind_of(value: Any) -> str:
    """Return the name of a type, for errors without the value: that may be secret."""
    return type(value).__name__
