# SPDX-License-Identifier: ZPL-2.1
"""The stream between a worker and its broker: calls and commands in one direction, replies back."""

import logging
import sys
from contextlib import suppress
from typing import Any

import zmq

from pyams_zmq.jobs.job_replies import refuse_result
from pyams_zmq.pool import protocol
from pyams_zmq.pool.protocol import JOB_MARK, KEY_SIZE, SEPARATOR, parse_job_header
from pyams_zmq.process.connections import Envelope
from pyams_zmq.process.reply_stream import ReplyStream
from pyams_zmq.wire.body import Reply, size_of
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.frames import NOBLOCK, POLLIN, send_frames
from pyams_zmq.wire.message import encode

LOGGER = logging.getLogger('PyAMS (zmq)')

_POLL_TIMEOUT = 1  # milliseconds to wait for the next call before the loop may run


class ForwardedFrame:
    """First frame of a message, with the metadata that a :class:`zmq.Frame` of the client has."""

    __slots__ = ('_data', '_sender')

    def __init__(self, data: bytes, sender: bytes):
        self._data = data
        self._sender = sender

    def __bytes__(self) -> bytes:
        return self._data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, name: str) -> str:
        user, _separator, address = self._sender.rpartition(SEPARATOR)
        return {'User-Id': user, 'Peer-Address': address}[name].decode()


class WorkerStream(ReplyStream):
    """Stream on which a worker gets requests from the broker, and sends replies to it.

    It always receives: the broker limits the requests, and sends commands between them.

    :ivar process: the PoolWorker, which handles the commands
    :ivar pending: keys of the calls that have no reply yet
    :ivar job: the job that a message is, a :class:`~pyams_zmq.handler.job.RunningJob`; or None
    """

    process: Any = None
    job: Any = None
    max_size: int = sys.maxsize
    """Bytes of the largest reply, which the broker states"""

    def __init__(self, *args: Any, **kwargs: Any):
        self.pending: set[bytes] = set()
        super().__init__(*args, **kwargs)

    @property
    def has_overdue(self) -> bool:
        """True while a method runs whose call was answered with 504 at its deadline."""
        return self.in_hand > len(self.pending)

    def refuse_waiting(self, data: bytes) -> None:
        """Do nothing: the broker has confirmed that it sends no further calls."""

    def repeat_replies(self) -> None:
        """Send the replies to jobs that the broker has not acknowledged."""
        for key, reply in self.process.jobs.replies.items():
            send_frames(self.socket, [key, *reply])
        self._rebuild_io_state()

    def drop_waiting(self) -> None:
        """Drop the calls of a former connection that were not read."""
        with suppress(zmq.Again):
            while True:
                self.socket.recv_multipart(zmq.NOBLOCK)

    def _can_receive(self) -> bool:
        return self.envelope is None

    def _handle_events(self, fd: Any, events: int) -> None:
        # The loop does not run between two calls, unless none arrives for `_POLL_TIMEOUT`: a turn
        # of it takes longer than a short call.
        if self.closed():
            return
        deadline = monotonic() + self.time_slice
        polled = [(self.socket, POLLIN)]
        timeout = 0
        self._is_handling = True
        try:
            while self._can_receive() and zmq.zmq_poll(polled, timeout):
                self._handle_recv()
                if self.closed() or monotonic() > deadline:
                    break
                timeout = 0 if self.in_hand else _POLL_TIMEOUT
        except BaseException:  # a signal handler can raise it at any place
            self._loop.call_soon(self.process.leave_with_lost_call)
            raise
        finally:
            self._is_handling = False
            self._rebuild_io_state()

    def _receive(self) -> list[Any] | None:
        receive = self.socket.recv
        frame = receive(NOBLOCK, False)
        header = frame.bytes
        body: list[Any] = []
        while frame.more:
            frame = receive(NOBLOCK, False)
            body.append(frame.bytes)
        if not header:
            self.process.handle_command(*body)
            return None
        key = header[:KEY_SIZE]
        is_full = self.in_hand >= self.concurrency  # an overdue method has the slot of this call
        if is_full:
            self.process.check_overdue()
        is_job = key[0] == JOB_MARK
        is_late = is_job and self.process.suspension.is_late(monotonic())
        if is_full or is_late or self.process.is_leaving or self.process.draining:
            self.process.send_command(protocol.REJECT, key)
            return None
        self.pending.add(key)
        self.envelope = Envelope((key,))
        sender = header[KEY_SIZE:]
        self.job = None
        if is_job:
            info, sender = parse_job_header(header)
            self.job = self.process.jobs.begin(key, info)
        if not self._recv_copy and body:
            body[0] = ForwardedFrame(body[0], sender)
        return body

    def _route(self, frames: list[Any], *_args: Any, **_kwargs: Any) -> Any:
        self._route_reply(frames[:-1], frames[-1])

    def _route_reply(self, envelope: list[bytes], data: Reply) -> None:
        key = envelope[0]
        is_job = key[0] == JOB_MARK
        if is_job and self.process.jobs.is_stopped(key, data):
            return  # a stop is not a cancel: the next broker must not take this as its end
        self.pending.discard(key)
        self.process.count_reply()
        size = size_of(data) if isinstance(data, list) else len(data)
        if len(envelope) > 1:
            size += sum(map(len, envelope[1:]))
        if size > self.max_size:  # the broker would end the connection
            text = f'The reply is {size} bytes; the limit is {self.max_size} (max_reply_size)'
            LOGGER.error('%s: %s', self.process.name, text)
            data = refuse_result(size, self.max_size) if is_job else encode([500, text])
            envelope = envelope[:1]
        if is_job:  # it is kept until it is on disk
            reply = [*envelope[1:], *(data if isinstance(data, list) else [data])]
            self.process.jobs.end(key, reply)
        if self.process.is_connected:  # the next broker does not know this call
            super()._route_reply(envelope, data)
