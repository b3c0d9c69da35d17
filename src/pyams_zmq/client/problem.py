# SPDX-License-Identifier: ZPL-2.1
"""What the log says about messages whose caller does not wait for the reply."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pyams_zmq.exceptions import ZMQRemoteError, ZMQReplyError
from pyams_zmq.wire.log_fields import extra
from pyams_zmq.wire.message import decode_reply, payload_of
from pyams_zmq.wire.multipart import to_frames

LOGGER = logging.getLogger('PyAMS (zmq)')

EncodedMessage = (
    tuple[str, bytes]
    | tuple[str, bytes, Iterable[Any] | None]
    | tuple[str, bytes, Iterable[Any] | None, bool]
)
"""Type, JSON frame, and binary frames of a message; true if it submits a job"""


@dataclass(slots=True, eq=False, init=False)
class QueuedMessage:
    """A message that is not sent, or has no reply yet.

    :ivar frames: its binary frames
    :ivar size: bytes of all frames
    :ivar number: number of the message in this process, in the order in which they were added
    :ivar serial: number of the attempt to send it, among all of its client
    :ivar sent_at: time of that attempt, in the seconds of `time.monotonic`
    :ivar is_dropped: true if the data was dropped, so that it cannot be sent again
    :ivar is_job: true if it submits a job: the service does the same with two of it as with one
    :ivar on_reply: called once with the reply, or with None if the queue gives the message up, for
        one that is stored elsewhere. It must neither wait nor raise: the thread that sends calls it
    :ivar losses: how often the connection was lost while it was the first to be answered
    :ivar is_repeatable: true if it is sent again when the connection was lost
    """

    type: str
    data: bytes = field(repr=False)
    frames: Sequence[bytes] = field(repr=False)
    size: int
    number: int
    serial: int
    sent_at: float
    is_dropped: bool
    is_job: bool
    on_reply: 'Callable[[CheckedReply | None], None] | None' = field(repr=False)
    is_repeatable: bool
    losses: int

    # Not generated: a `__post_init__` for the size takes as long as all the rest.
    def __init__(
        self,
        type: str,  # noqa: A002 - the name of the field
        data: bytes,
        frames: Iterable[Any] | None = None,
        is_job: bool = False,
        on_reply: 'Callable[[CheckedReply | None], None] | None' = None,
    ):
        self.type = type
        self.data = data
        self.is_job = is_job
        self.on_reply = on_reply
        self.is_repeatable = is_job or on_reply is not None
        self.size = len(data)
        self.frames = ()
        if frames:  # checked: one that is not bytes would raise when half of the message is sent
            self.frames = to_frames(frames)
            self.size += sum(map(len, self.frames))
        self.number = self.serial = self.losses = 0
        self.sent_at = 0.0
        self.is_dropped = False

    @property
    def is_withdrawn(self) -> bool:
        """True if it is stored elsewhere, and is not sent again."""
        return self.on_reply is not None and not self.is_repeatable

    def drop_data(self) -> None:
        """Drop the frames, so that the message cannot be sent again."""
        self.data, self.frames, self.size = b'', (), 0
        self.is_dropped = True


class Problem(NamedTuple):
    """What is wrong with a message, for the log.

    :ivar level: level of the record
    :ivar reply: text of the reply, for a record at the level DEBUG
    :ivar service_name: name of the service, if it is declared
    """

    address: str
    message: QueuedMessage  # its repr does not show the data
    text: str
    level: int = logging.ERROR
    reply: str | None = None
    service_name: str | None = None


class Delay(NamedTuple):
    """Why the messages of a client wait, for the log."""

    waiting: int
    address: str
    text: str
    service_name: str | None = None


class CheckedReply(NamedTuple):
    """What a reply says about its message.

    :ivar status: the status, 0 if the reply is not JSON
    :ivar problem: what is wrong, without the text of the handler; None if it is a good reply
    :ivar text: the text of the handler
    """

    status: int
    problem: str | None = None
    text: str | None = None


def check_reply(data: bytes, is_job: bool = False) -> CheckedReply:
    """Return what a reply says about its message.

    :param is_job: true if the message submits a job
    """
    try:
        payload = payload_of(decode_reply(data))
    except ZMQRemoteError as error:
        return CheckedReply(error.status, f'the reply has status {error.status}', str(error))
    except ZMQReplyError:
        return CheckedReply(0, 'the reply is not JSON')
    if is_job and not (isinstance(payload, dict) and isinstance(payload.get('id'), str)):
        return CheckedReply(200, 'the service keeps no jobs, or the method is not one: it has run')
    return CheckedReply(200)


def log(records: Iterable[Problem | Delay]) -> None:
    """Log problems and delays. Hold no lock: a handler of the log may send messages itself."""
    problems = []
    for record in records:
        if isinstance(record, Problem):
            problems.append(record)
        else:
            *args, service = record
            write_log(logging.WARNING, '%d messages wait for %s: %s', *args, service=service)
    for problem in problems:
        if problem.reply is not None:
            fields = {'service': problem.service_name, 'method': problem.message.type}
            write_log(logging.DEBUG, 'Reply of a service: %s', problem.reply, **fields)
    for level, text, fields in describe(problems):
        write_log(level, '%s', text, **fields)


def write_log(level: int, text: str, *args: object, **fields: str | None) -> None:
    """Write a record, in a thread that an error of the log must not end.

    :param fields: its `service` and `method`
    """
    with suppress(Exception):  # of a logging handler
        if LOGGER.isEnabledFor(level):
            LOGGER.log(level, text, *args, extra=extra(**fields))


def describe(problems: Iterable[Problem]) -> list[tuple[int, str, dict[str, str | None]]]:
    """Return levels, texts and fields for the log, one for all messages with the same problem."""
    numbers: dict[tuple[int, str, str, str, str | None], list[int]] = {}
    for address, message, text, level, _reply, service in problems:
        key = (level, message.type, address, text, service)
        numbers.setdefault(key, []).append(message.number)
    found: list[tuple[int, str, dict[str, str | None]]] = []
    for (level, name, address, text, service), group in numbers.items():
        ids = _join(group)
        line = f'Message {name!r} (id {ids}) to {address}: {text}'
        if len(group) > 1:
            line = f'{len(group)} messages {name!r} (ids {ids}) to {address}: {text}'
        found.append((level, line, {'service': service, 'method': name}))
    return found


def _join(numbers: list[int]) -> str:
    """Return numbers as text, with ranges, each after the id of this process."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    pid = os.getpid()
    return ', '.join('-'.join(f'{pid}.{number}' for number in each) for each in ranges)
