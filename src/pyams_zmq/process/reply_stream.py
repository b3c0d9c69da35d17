# SPDX-License-Identifier: ZPL-2.1
"""A stream of a REP socket that replies to every message."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import zmq

from pyams_zmq.process.connections import SHORT_FRAME, Envelope, Listener
from pyams_zmq.process.stream import ZMQStream
from pyams_zmq.process.waiting import WaitingMessages
from pyams_zmq.wire.body import Reply, size_of
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.frames import EVENTS, NOBLOCK, send_frames
from pyams_zmq.wire.message import encode, overloaded, peek_type
from pyams_zmq.wire.poll import wait_readable

REFUSAL_TIME = 0.2
"""Seconds for the replies to messages that wait when their process ends"""

QUESTION = b'pyams_zmq.'
"""Beginning of the types of messages about the service; a method name cannot contain a dot"""

SHORT_QUESTION = 128
"""Bytes of the longest message in which these types are looked for"""


class ReplyStream(ZMQStream):
    """Stream of a REP socket that replies to every message, made of a ROUTER socket.

    The REP socket of libzmq silently drops a message without delimiter, and if the peer of such a
    message has disconnected, it loses the reply to another one. Here each message gets its reply,
    and the next one is received after that; meanwhile messages wait in the socket. If a callback
    fails, the peer gets `failure_reply`.

    A callback that calls `detach` replies later. Until then other messages are received, if fewer
    than `concurrency` messages are detached and have not ended. If these are all overdue, nobody
    knows when one of them ends: then other messages get status 503.

    Messages that have to wait are read all the same, up to a limit: so their number and their age
    are known, and questions about the service get their answer, see `answer`. While a method runs
    in the loop, an :class:`~pyams_zmq.process.attendant.Attendant` does that.

    :param concurrency: messages that are handled at a time
    :param listener: counts what each connection receives and sends, or None
    :ivar envelope: envelope of the message that needs a reply (RFC 28/REQREP), or None
    :ivar waiting: messages that were read, and wait
    :ivar answer: returns the reply to a question about the service, from the type of a short
        message and its last frame; None for any other message
    :ivar turn: which thread may use the socket, a :class:`~pyams_zmq.handler.turn.Turn`; None
        without an attendant
    """

    failure_reply = b'[500,"Internal error"]'
    in_hand = 0
    """Number of messages that are detached and have not ended"""

    overdue = 0
    """Number of those whose deadline has passed"""

    refused = 0
    """Number of messages that were not handled, and got an error instead"""

    _read_envelope: Envelope | None = None  # of the last message
    _extra = 0  # messages that can be read although many wait
    answer: Callable[[bytes, Any], bytes | None] | None = None
    turn: Any = None

    no_delimiter_reply = b'[400,"Bad message: no delimiter, an empty frame, before the request"]'

    def __init__(
        self,
        socket: Any,
        *args: Any,
        concurrency: int = 1,
        listener: Listener | None = None,
        **kwargs: Any,
    ):
        if socket.type == zmq.ROUTER:
            # A message that is sent on the socket itself, without an envelope, raises an error.
            socket.router_mandatory = True
        self.concurrency = concurrency
        self.waiting = WaitingMessages()
        self._peers = self.waiting.peers
        super().__init__(socket, *args, **kwargs)
        if listener is not None:
            self.listener = listener
            listener.counts = True
            listener.refresh = partial(self._loop.call_soon_threadsafe, self._refresh)

    def _can_receive(self) -> bool:
        return (self.envelope is None and self.in_hand < self.concurrency) or not (
            self.waiting.is_overfull and self._has_to_wait()
        )

    def _can_drain(self) -> bool:
        return super()._can_drain() and not self.waiting.is_full

    def _has_to_wait(self) -> bool:
        """Return True if no further message can be handled now."""
        return self.envelope is not None or (
            self.in_hand >= self.concurrency and self.overdue < self.concurrency
        )

    def _has_ready(self) -> bool:
        return bool(self._peers) and not self._has_to_wait()

    def readable(self) -> bool:
        """Return True if a message waits; this does not lose its wake-up."""
        with self._taken_back():
            return bool(self._peers) or super().readable()

    def read_ahead(self, deadline: float) -> bool:
        """Read messages that wait, while a method runs; for the attendant, which has the turn.

        :param deadline: when to stop, in seconds
        :return: True if a message was read
        """
        has_read = False
        try:
            while self.socket is not None and monotonic() < deadline and self._may_read():
                self._read_waiting()
                has_read = True
        except zmq.Again:
            if self.listener is not None:
                self.listener.drained = monotonic()
        self._rebuild_io_state()  # if the method is that of another stream
        return has_read

    def detach(self) -> tuple[Callable[[Reply], None], Callable[[], None]]:
        """Return functions that reply to the current message later.

        :return: a function that sends the reply, to be called once, and one to be called when the
            message no longer counts for the `concurrency`
        :raises zmq.ZMQError: EFSM, if no message is owed a reply
        """
        envelope, self.envelope = self.envelope, None
        if envelope is None:
            raise zmq.ZMQError(zmq.EFSM, 'There is no message to reply to')
        self.in_hand += 1
        return partial(self._reply_to, envelope), self._end_reply

    def count_overdue(self, change: int) -> None:
        """Count a detached message whose deadline has passed, or that has ended after that.

        :param change: 1 or -1
        """
        self.overdue += change
        if not self.closed():
            self._rebuild_io_state()

    def refuse(self) -> None:
        """Receive messages although late methods use up the concurrency: they will be refused."""
        self.concurrency = sys.maxsize
        self._rebuild_io_state()

    def refuse_waiting(self, data: bytes) -> None:
        """Reply to the messages that wait, without handling them; the loop has ended.

        :param data: the reply
        """
        end = monotonic() + REFUSAL_TIME
        self.concurrency = sys.maxsize
        if self.envelope is not None and not self.closed():  # its callback meant to reply later
            self._route_reply(self.envelope, self.failure_reply)
        self.envelope = None
        with suppress(zmq.Again):
            while not self.closed() and monotonic() < end:
                if self._receive() is not None and self.envelope is not None:
                    envelope, self.envelope = self.envelope, None
                    self._route_reply(envelope, data)

    def _reply_to(self, envelope: list[Any], data: Reply) -> None:
        if not self.closed():
            self._route_reply(envelope, data)
            if self._send_callback is not None:
                frames = data if isinstance(data, list) else [data]
                self.io_loop.add_callback(self._run_callback, self._send_callback, frames, None)
            self._rebuild_io_state()

    def _end_reply(self) -> None:
        self.in_hand -= 1
        if not self.closed():
            self._rebuild_io_state()

    def _receive(self) -> list[Any] | None:
        if self._peers or self.envelope is not None or self.in_hand >= self.concurrency:
            return self._receive_in_turn()
        body = self._read()
        if body is None or self.overdue or self._recv_callback is None:
            return None if self._read_envelope is None else self._begin(self._read_envelope, body)
        self.envelope = self._read_envelope
        return body

    def _receive_in_turn(self) -> list[Any] | None:
        """Read one more message, and return that whose turn it is, if one can be handled."""
        if self._may_read():
            try:
                self._read_waiting()
            except zmq.Again:
                if not self._has_ready():
                    raise
        elif not self._has_ready():
            raise zmq.Again
        if not self._has_ready():
            return None
        message = self.waiting.take()
        return self._begin(message.envelope, message.body)

    def _begin(self, envelope: Envelope, body: list[Any] | None) -> list[Any] | None:
        """Make a message the one that needs a reply, or refuse it."""
        if body is None:
            if envelope.connection is not None:
                envelope.connection.count_sent(len(self.no_delimiter_reply))
            self._route([envelope[0], self.no_delimiter_reply])
            self.refused += 1
            return None
        if self.overdue >= self.concurrency:
            self._route_reply(envelope, encode(overloaded(self.overdue)))
            self.refused += 1
            return None
        self.envelope = envelope
        if self._recv_callback is None:  # `flush` drops the message
            self._reply_to_failure(self.envelope)
        return body

    def _may_read(self) -> bool:
        """Return True if a further message can wait here.

        If there are many, then only when a peer has sent one whose former ones were all read: then
        as many as there are peers, since libzmq takes one message of each in turn.
        """
        if not self.waiting.is_full:
            return True
        if self.waiting.is_overfull:
            return False
        self._note_wake()
        self._extra -= 1
        return self._extra >= 0

    def _note_wake(self) -> None:
        if wait_readable([self._fd], 0):
            self.socket.get(EVENTS)  # this finds the new peer, which a `recv` does much later
            self._extra = len(self._peers) + 1

    def _read_events(self) -> int:
        if self.waiting.is_full:  # this takes the wake-up
            self._note_wake()
        return super()._read_events()

    def _has_more(self) -> bool:
        return self.waiting.is_full or super()._has_more()

    def _read_waiting(self) -> None:
        """Read a message, and let it wait.

        :raises zmq.Again: if the socket has no message
        """
        body = self._read()
        if self._read_envelope is not None:
            self.waiting.add(self._read_envelope, body, monotonic())

    def _read(self) -> list[Any] | None:
        """Read a message, its envelope into `_read_envelope`; answer a question at once.

        :return: the body; None without a delimiter. Without an envelope it was a question
        :raises zmq.Again: if the socket has no message
        """
        receive, copy, listener = self.socket.recv, self._recv_copy, self.listener
        overhead = 0 if listener is None else listener.overhead
        envelope = Envelope((receive(NOBLOCK),))
        body: list[Any] | None = None
        size = 0
        more = True
        while more:
            frame = receive(NOBLOCK, False)
            more = frame.more
            length = len(frame) + overhead  # `Listener.measure`, without its calls
            size += length + (2 if length <= SHORT_FRAME else 9)
            if body is not None:
                body.append(frame.bytes if copy else frame)
            else:
                envelope.append(frame.bytes)
                if not envelope[-1]:
                    body = []
        if listener is not None:
            envelope.connection = listener.count_received(frame, size)
        self._read_envelope = envelope
        if length <= SHORT_QUESTION and QUESTION in frame.bytes and self.answer is not None:
            is_alone = body is not None and len(body) == 1
            reply = self.answer(peek_type(frame.bytes), frame) if is_alone else None
            if reply is not None:
                self._route_reply(envelope, reply)
                self._read_envelope = None
                return None
        return body

    def send(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """Send the reply, or a part of it; see :meth:`send_multipart`."""
        with self._taken_back():
            if type(msg) is bytes and not (args or kwargs):
                self.reply(msg)
            else:
                super().send(msg, *args, **kwargs)

    def reply(self, data: Reply) -> None:
        """Send an encoded reply, at the lowest cost.

        :raises zmq.ZMQError: EFSM, if no message needs a reply
        """
        envelope = self.envelope
        if envelope is None or self.socket is None or self._send_callback is not None:
            self.send_multipart(data if isinstance(data, list) else [data])
            return
        self.envelope = None
        self._route_reply(envelope, data)
        if not self._is_handling:
            self._read_events()

    def send_multipart(self, msg: Any, flags: int = 0, *args: Any, **kwargs: Any) -> None:
        """Send the reply, or with `zmq.SNDMORE` a part of it.

        :raises zmq.ZMQError: EFSM, if no message needs a reply
        """
        if self.envelope is None and not self.closed():
            raise zmq.ZMQError(zmq.EFSM, 'There is no message to reply to')
        with self._taken_back():
            if flags & zmq.SNDMORE and self.envelope is not None:
                # A part that is not bytes raises here; later it would leave half a message.
                self.envelope.extend([bytes(memoryview(part)) for part in msg])
            else:
                super().send_multipart(msg, flags, *args, **kwargs)

    def flush(self, *args: Any, **kwargs: Any) -> int:
        """Handle waiting messages now; see :meth:`.ZMQStream.flush`."""
        with self._taken_back():
            return super().flush(*args, **kwargs)

    def close(self, linger: int | None = None) -> None:
        """Close the stream and its socket; see :meth:`.ZMQStream.close`."""
        with self._taken_back():
            super().close(linger)

    def recover(self) -> None:
        """Also reply to a message whose callback was not called."""
        if self.turn is not None:  # a signal may have interrupted its handler
            self.turn.is_free = False
            self.turn.wait()
        if self.envelope is not None and self.envelope is not self._delivered:
            self._reply_to_failure(self.envelope)
        super().recover()

    def _taken_back(self) -> AbstractContextManager[Any]:
        """Return a context in which only this thread uses the socket; a method may use it, too."""
        return nullcontext() if self.turn is None else self.turn.taken_back()

    def _transmit(self, msg: Any, **kwargs: Any) -> Any:
        envelope = self.envelope
        status = self._route([*envelope, *msg], **kwargs)
        envelope.count_reply(sum(map(len, msg)))
        self.envelope = None
        return status

    def _route(self, frames: list[Any], flags: int = zmq.NOBLOCK, **kwargs: Any) -> Any:
        try:
            return self.socket.send_multipart(frames, flags, **kwargs)
        except zmq.ZMQError as error:
            self._check_lost(error)
        return None

    def _route_reply(self, envelope: list[bytes], data: Reply) -> None:
        size: int | None
        if isinstance(data, list):
            frames, size = [*envelope, *data], size_of(data)
        else:
            frames, size = [*envelope, data], len(data)
        try:
            send_frames(self.socket, frames)
        except zmq.ZMQError as error:
            self._check_lost(error)
            size = None
        if type(envelope) is Envelope:
            envelope.count_reply(size)

    @staticmethod
    def _check_lost(error: zmq.ZMQError) -> None:
        # The peer has disconnected, or does not read its replies: this one is dropped.
        if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            raise error

    def _reply_to_failure(self, envelope: list[Any] | None) -> None:
        # Unless the callback has replied: then `envelope` is that of another message.
        if envelope is self.envelope and not self.closed():
            self.send(self.failure_reply)
