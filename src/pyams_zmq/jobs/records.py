# SPDX-License-Identifier: ZPL-2.1
"""What is known about a job: what was submitted, and what has become of it."""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

WAITING = 'waiting'
RUNNING = 'running'
DONE = 'done'
FAILED = 'failed'
CANCELLED = 'cancelled'
EXPIRED = 'expired'

STATES = (WAITING, RUNNING, DONE, FAILED, CANCELLED, EXPIRED)
"""All states of a job"""

ENDED = (DONE, FAILED, CANCELLED, EXPIRED)
"""The states of a job that has ended"""

_LENGTH = struct.Struct('>I')


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Submission:
    """A job as it was submitted.

    :ivar id: text that no other job has; the client makes it
    :ivar type: type of the message
    :ivar frames: frames of the message
    :ivar user: user id of the client
    :ivar address: IP address of the client
    :ivar key: text that no other unfinished job of this type and user has, or None
    :ivar priority: jobs with a higher one begin earlier
    :ivar delay: seconds until it may begin
    :ivar expires: seconds after which it may not begin any more, or None; further attempts may
    :ivar retries: attempts after the first one, or None for those of the method
    :ivar timeout: seconds of an attempt, or None for those of the method
    """

    id: str
    type: str
    frames: Sequence[bytes]
    user: str = ''
    address: str = ''
    key: str | None = None
    priority: int = 0
    delay: float = 0.0
    expires: float | None = None
    retries: int | None = None
    timeout: float | None = None

    def __repr__(self) -> str:  # without the arguments
        return f'{type(self).__name__}({self.type!r}, id={self.id!r})'


@dataclass(slots=True, repr=False)  # frozen, it would take three times as long to make
class JobRecord:
    """A job in the journal; times are seconds since the epoch.

    :ivar number: number of the job, never used again, below 2**40
    :ivar attempt: number of the last attempt, 0 before the first one
    :ivar failures: attempts that have failed
    :ivar deaths: weight of the attempts whose worker has died
    :ivar due: time at which it may begin, or None for at once
    :ivar expires: time after which it may not begin any more, or None; None once it has begun
    :ivar revision: integer that grows with each change of the state
    :ivar cancel: time at which somebody has asked to cancel this attempt, or None
    :ivar owner: text of whoever runs the attempt
    :ivar orphaned: time at which a broker has found that the former one was gone, or None
    :ivar reply: JSON text of the reply, or None; lists do not have it
    :ivar frames: frames of the message, only of a claimed job
    """

    number: int
    id: str
    type: str
    user: str
    address: str
    key: str | None
    state: str
    attempt: int
    failures: int
    deaths: int
    priority: int
    due: float | None
    expires: float | None
    retries: int | None
    timeout: float | None
    created: float
    started: float | None
    ended: float | None
    revision: int
    cancel: float | None
    owner: str | None
    orphaned: float | None
    reply: bytes | None = None
    frames: list[bytes] = field(default_factory=list)

    def __repr__(self) -> str:  # without arguments and result
        return f'{type(self).__name__}({self.type!r}, id={self.id!r}, {self.state!r})'

    def set_back(self, seconds: float) -> 'JobRecord':
        """Make all times earlier, by which the clock of the journal is ahead; return the job."""
        if seconds:
            for name in _TIMES:
                value = getattr(self, name)
                if value is not None:
                    setattr(self, name, value - seconds)
        return self


_TIMES = ('due', 'expires', 'created', 'started', 'ended', 'cancel', 'orphaned')


COLUMNS = tuple(column.name for column in fields(JobRecord))[:-2]
"""The columns of a job that are short"""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A submitted job that is on disk.

    :ivar id: id of the job; of another one, if its key was known
    :ivar is_new: False if the id or the key was known
    :ivar wait: seconds until it may begin
    """

    id: str
    is_new: bool
    wait: float


@dataclass(frozen=True, slots=True)
class Claim:
    """Jobs that begin.

    :ivar jobs: the jobs, which are running now, with their frames
    :ivar wait: seconds until a claim may find more jobs, or None
    """

    jobs: list[JobRecord]
    wait: float | None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The answer to a request to cancel a job.

    :ivar state: `cancelled`; or `running`, if its worker has to be told
    :ivar number: number of the job
    :ivar attempt: number of the attempt
    """

    state: str
    number: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """Jobs that were removed.

    :ivar removed: their number
    :ivar has_more: True if there may be more that can be removed
    """

    removed: int
    has_more: bool


def pack_frames(frames: Iterable[bytes]) -> bytes:
    """Return frames as one text of bytes, each with its length.

    :raises TypeError: if one is not bytes, or another buffer
    """
    parts: list[bytes | memoryview] = []
    for frame in frames:
        data = memoryview(frame)
        parts += [_LENGTH.pack(data.nbytes), data]
    return b''.join(parts)


def unpack_frames(data: bytes) -> list[bytes]:
    """Return the frames that :func:`pack_frames` has packed.

    :raises TypeError, ValueError: for anything else
    """
    frames = []
    start = 0
    while start < len(data):
        try:
            (length,) = _LENGTH.unpack_from(data, start)
        except struct.error as error:
            raise ValueError(f'Bad frames: {error}') from None
        start += _LENGTH.size
        frames.append(data[start : start + length])
        start += length
    if start > len(data):
        raise ValueError('Bad frames: the last one is too short')
    return frames
