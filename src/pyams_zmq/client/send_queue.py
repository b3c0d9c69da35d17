# SPDX-License-Identifier: ZPL-2.1
"""The messages of a client whose caller does not wait for the reply, and their connection."""

import errno
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from itertools import chain, count
from math import inf
from typing import Any

import zmq

from pyams_zmq.client.connection import (
    HEARTBEATS,
    RECONNECT_IVL,
    ConnectionState,
    ServiceAddress,
)
from pyams_zmq.client.pace import WINDOW, Pace
from pyams_zmq.client.problem import CheckedReply, Delay, Problem, QueuedMessage, check_reply
from pyams_zmq.client.socket import ZMQSocket, open_connection
from pyams_zmq.client.unanswered import PATIENCE, UnansweredMessages
from pyams_zmq.exceptions import ZMQRefusedError
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.frames import receive, send_frames
from pyams_zmq.wire.linger import CLOSE_LINGER
from pyams_zmq.wire.message import DRAINING_REPLY
from pyams_zmq.wire.poll import wait_for

FLUSH = 1.0
"""Seconds that a program waits at its end for a service that is not connected"""

MAX_FLUSH = 10.0
"""Seconds that a program waits at its end for replies, by default"""

IDLE = 30.0
"""Seconds after which an unused connection is closed"""

BATCH = 100
"""Messages that a client sends or receives before the next client"""

RETRY = 0.01
"""Seconds until the next attempt, when a connection has no room for a message"""

SETTLE = 0.01
"""Seconds in which the last replies may arrive after the event of the loss"""

SUSPENDED = 5.0
"""Seconds until the next attempt to connect after a refusal, or without a descriptor"""

NO_RECONNECT = 24 * 60 * 60 * 1000
"""Milliseconds until libzmq connects again: it would send messages that are considered lost"""

MAX_PAUSE = 0.5
"""Seconds between two attempts to connect, at most"""

GROWTH = 2.0
"""Factor between the pauses before two attempts to connect"""

HANGUP_GROWTH = 1.1
"""The same after an end before the handshake: a service that expects another mechanism says so in
one of four attempts, and this makes more than thirty in two seconds"""

LOST = 'the connection was lost, it may have run or not'

MAX_LOSSES = 5
"""Lost connections of a stored message that was the first to be answered: it may end its service"""

POISON = CheckedReply(
    HTTPStatus.BAD_GATEWAY,
    f'the connection was lost {MAX_LOSSES} times while it ran: it may end its service',
)
"""What such a message gets instead of a reply"""

_numbers = count(1)


class SendQueue:
    """The messages of one client, in their order, and its connection.

    A message runs at most once: it is sent again only if its own reply has said that it was not run
    (503). When a service stops, it answers all that it has read; what else has no reply when the
    connection is lost counts as lost. Jobs are sent again in both cases, and if the disk of the
    service is full (507): it knows them by their ids. So are messages with `on_reply`, which are
    stored elsewhere: if the queue gives one up, `on_reply` gets None.

    The messages are sent in their order. After a 503 for the overload of a pool, or behind a
    device, those that were already on their way may run before the refused one.

    :param flush_timeout: seconds that a program waits at its end for replies
    :param service_name: name of a declared service, for the log
    :ivar reserved: messages that transactions have voted for and not added yet
    :ivar size: bytes of all messages, those included
    :ivar state: state of the connection
    :ivar used: when the queue was used, in the seconds of `time.monotonic`
    :ivar missing_since: since when it tries to connect in vain, in these seconds
    """

    def __init__(
        self,
        service: ServiceAddress,
        heartbeats: tuple[float, float] = HEARTBEATS,
        flush_timeout: float = MAX_FLUSH,
        service_name: str | None = None,
    ):
        self.address = service.endpoint.uri
        self.service_name = service_name
        self.reserved = 0
        self.size = 0
        self.error: Exception | None = None
        self.state = ConnectionState(service.endpoint)
        self.is_closed = False
        self.used = monotonic()
        self.missing_since = inf
        self._service = service
        self._heartbeats = heartbeats
        self._flush_timeout = flush_timeout
        self._lost_at = -inf
        self._socket: Any = None
        self._monitor: Any = None
        self._opens_at = -inf
        self._delay = RECONNECT_IVL / 1000
        self._is_blocked = False
        self._has_warned = False
        self._pace = Pace()
        self._sent = UnansweredMessages()
        self._unsent: deque[QueuedMessage] = deque()
        self._refused: list[QueuedMessage] = []

    def __len__(self) -> int:
        return len(self._unsent) + len(self._sent) + len(self._refused)

    def __iter__(self) -> Iterator[QueuedMessage]:
        return chain(self._sent, self._refused, self._unsent)

    @property
    def is_connected(self) -> bool:
        """True while the service is connected."""
        return self._socket is not None and self.state.is_connected

    def has_room(self, number: int, size: int, limits: tuple[float, float], held: int = 0) -> bool:
        """Return True if messages have room; those beyond the limits have if nothing else waits.

        :param number, size: number and bytes of the messages
        :param limits: number and bytes of all messages, at most
        :param held: number of messages of the same transaction that have room already
        """
        waiting = len(self) + self.reserved
        return waiting <= held or (waiting + number <= limits[0] and self.size + size <= limits[1])

    def reserve(self, message: QueuedMessage) -> None:
        """Keep room for a message."""
        self.reserved += 1
        self.size += message.size

    def release(self, message: QueuedMessage) -> None:
        """Give up the room that was kept for a message."""
        self.reserved -= 1
        self.size -= message.size

    def add(self, message: QueuedMessage) -> None:
        """Add a message; it is sent as soon as the service is connected."""
        message.number = next(_numbers)
        self._unsent.append(message)
        self.size += message.size
        self.used = monotonic()

    @property
    def sockets(self) -> list[ZMQSocket]:
        """The sockets to wait for."""
        return [] if self._socket is None else [self._socket, self._monitor.socket]

    def wakes_at(self) -> float:
        """Return when the next step is due, if no socket is ready before."""
        now = monotonic()
        if self._socket is None:
            return self._opens_at
        if not len(self):
            is_needed = self.reserved or self._sent.has_late_to_await
            return inf if is_needed else self.used + IDLE
        late_at = self._sent.late_at()
        if not (self.is_connected and (self._unsent or self._refused)):
            return late_at
        if self._is_blocked:
            return now + RETRY
        if not self._sent.has_room(self._first()):
            return late_at
        return min(self._pace.wakes_at(len(self._sent), now), late_at, self._probes_at())

    def _probes_at(self) -> float:
        return max(self._sent.probes_at(), self._pace.resumes_at)

    def waits_until(self, start: float) -> float:
        """Return until when a program that ends waits for replies.

        :param start: when the program began to end, in the seconds of `time.monotonic`
        """
        end = start + self._flush_timeout
        return end if self.is_connected else min(end, max(start, self._lost_at) + FLUSH)

    def is_done(self, now: float) -> bool:
        """Return True if the connection can be closed."""
        is_unused = now >= self.used + IDLE and not self._sent.has_late_to_await
        is_ended = self.is_closed or self.error is not None or is_unused
        return is_ended and not len(self) and not self.reserved

    def retry(self) -> None:
        """Connect in the next step, also after a refusal."""
        if self.error is not None:
            self.error = None
            self._opens_at = -inf

    def step(self, now: float) -> list[Problem | Delay]:
        """Connect, receive replies, and send messages.

        :return: what is to be logged, without a lock
        :raises zmq.ZMQError: if the context was terminated
        """
        records: list[Problem | Delay] = []
        try:
            self._step(now, records)
        except ZMQRefusedError as error:
            self._suspend(error, now, records)
        except zmq.ZMQError as error:
            if error.errno != errno.EMFILE:
                raise
            self._suspend(error, now, records)
        return records

    def _step(self, now: float, records: list[Problem | Delay]) -> None:
        if self._socket is None:
            if now < self._opens_at:
                return
            self._socket, self._monitor = open_connection(
                self._service,
                zmq.DEALER,
                self._heartbeats,
                previous=self.state,
                lookup_timeout=0,  # others wait for the lock; another attempt has the answer
                sndhwm=WINDOW,
                reconnect_ivl=NO_RECONNECT,
                reconnect_ivl_max=0,
                linger=CLOSE_LINGER,
            )
            self.state = self._monitor.state
            self.error = None
            self.missing_since = min(self.missing_since, now)
        is_lost = self._monitor.read_events()
        self._receive(None if is_lost else BATCH, now, records)
        if is_lost:
            if len(self._sent) and wait_for([self._socket], SETTLE):
                self._receive(None, now, records)
            records += self._lose()
            self._lost_at = now
            self._close_for_a_while(now, GROWTH)
        elif self.state.has_failed:
            self._close_for_a_while(now, GROWTH if self.state.is_down else HANGUP_GROWTH)
        elif self.state.is_connected:
            self._has_warned = False
            self.missing_since = inf
            records += self._find_late(now)
            self._send(now, records)

    def _close_for_a_while(self, now: float, growth: float) -> None:
        """Close the connection; the next one is opened later each time, until a reply comes."""
        self.close()
        self._opens_at = now + self._delay
        self._delay = min(growth * self._delay, MAX_PAUSE)

    def _find_late(self, now: float) -> list[Problem | Delay]:
        messages = self._sent.find_late(now)
        if not messages:
            return []
        text = (
            f'no reply for {PATIENCE:.3g} s while later messages have one: it takes long, or was '
            'lost behind a device'
        )
        records = self._uncount(messages, text, logging.WARNING)
        give_up(self._sent.limit_late())
        return [*records]

    def _suspend(self, error: Exception, now: float, records: list[Problem | Delay]) -> None:
        if self._unsent and not self._has_warned:
            self._has_warned = True
            records.append(Delay(len(self), self.address, str(error), self.service_name))
        self.error = error
        records += self._lose()
        self.close()
        self._opens_at = now + SUSPENDED
        self.missing_since = inf  # a service that refuses is there: the next message gets its error

    def _lose(self) -> list[Problem | Delay]:
        """Drop the messages without a reply, but those that can be sent again."""
        waiting = [message for message in self._sent if message.is_repeatable]
        first = next(iter(self._sent), None)
        if first is not None and first.on_reply is not None and first.is_repeatable:
            first.losses += 1
            if first.losses >= MAX_LOSSES:
                waiting.remove(first)
                self.size -= first.size
                first.on_reply(POISON)
        self._refused += waiting
        return self._drop([each for each in self._sent if not each.is_repeatable], LOST)

    def _receive(self, most: int | None, now: float, records: list[Problem | Delay]) -> None:
        for _number in count() if most is None else range(most):
            frames = receive(self._socket)
            if frames is None:
                break
            message, is_late = self._sent.answer(frames[0], now)
            if message is None:
                continue
            self._delay = RECONNECT_IVL / 1000
            if is_late:
                self.size += message.size
            reply = check_reply(frames[-1], message.is_job)
            problem = reply.problem
            is_refused = reply.status == HTTPStatus.SERVICE_UNAVAILABLE or (
                message.is_job and reply.status == HTTPStatus.INSUFFICIENT_STORAGE
            )
            if is_refused:
                if not (message.is_dropped or message.is_withdrawn):
                    is_draining = frames[-1] == DRAINING_REPLY
                    records += self._refuse(message, now, reply.status, is_draining=is_draining)
                    continue
                problem = 'lost: it was refused so late that its data was dropped'
            self._pace.accept(message.serial)
            self.size -= message.size
            if message.on_reply is not None:
                message.on_reply(None if is_refused else reply)
            elif problem is not None:
                records.append(
                    Problem(
                        self.address,
                        message,
                        problem,
                        reply=reply.text,
                        service_name=self.service_name,
                    )
                )

    def _refuse(
        self, message: QueuedMessage, now: float, status: int, *, is_draining: bool
    ) -> list[Delay]:
        self._refused.append(message)
        if self._pace.refuse(message.serial, self._sent.last, now, is_draining=is_draining):
            text = f'the replies have status {status}'
            return [Delay(len(self), self.address, text, self.service_name)]
        return []

    def _first(self) -> QueuedMessage:
        return self._unsent[0] if self._unsent else self._refused[0]

    def _send(self, now: float, records: list[Problem | Delay]) -> None:
        self._is_blocked = False
        is_probe = now >= self._probes_at()
        if not (is_probe or self._pace.may_send(len(self._sent), now)):
            return
        if self._refused:
            waiting = [*self._refused, *self._unsent]
            self._unsent = deque(sorted(waiting, key=lambda message: message.number))
            self._refused.clear()
        for _turn in range(min(BATCH, len(self._unsent))):
            message = self._unsent[0]
            is_extra = not self._pace.may_send(len(self._sent), now)
            if (is_extra and not is_probe) or not self._sent.has_room(message):
                break
            # Part of the envelope (RFC 28/REQREP), which the reply repeats.
            number = b'%d' % message.number
            try:
                frames = [number, b'', *message.frames, memoryview(message.data)]
                send_frames(self._socket, frames)
            except zmq.Again:
                self._is_blocked = True
                break
            except TypeError as error:  # not bytes; no frame was sent
                records += self._drop([self._unsent.popleft()], str(error))
                continue
            self._sent.add(number, self._unsent.popleft(), now, is_probe=is_extra)
            is_probe = is_probe and not is_extra

    def fail(self, error: Exception) -> list[Problem]:
        """Drop all messages and close the connection; return the problems, to be logged."""
        self.error = error
        problems = self.remaining(str(error), str(error))
        messages = list(self)
        self.size -= sum(message.size for message in messages)
        self._refused.clear()
        self._unsent.clear()
        self.close()
        give_up(messages)
        return problems

    def withdraw(self) -> bool:
        """Remove the messages with `on_reply` that are not on their way, or late; give them back.

        The others are given back if they are refused, or their connection is lost.

        :return: true if such messages are on their way
        """
        withdrawn = [each for each in chain(self._refused, self._unsent) if each.on_reply]
        self._refused = [each for each in self._refused if each.on_reply is None]
        self._unsent = deque(each for each in self._unsent if each.on_reply is None)
        self.size -= sum(message.size for message in withdrawn)
        give_up([*self._sent.take_late(), *withdrawn])
        sent = [message for message in self._sent if message.on_reply is not None]
        for message in sent:
            message.is_repeatable = False
        return bool(sent)

    def remaining(self, sent: str, unsent: str) -> list[Problem]:
        """Return all messages as problems, but those with `on_reply`, which are not lost.

        :param sent: the text for those that were sent
        :param unsent: the text for the others
        """
        return [
            Problem(self.address, message, text, service_name=self.service_name)
            for text, messages in (
                (sent, self._sent),
                (unsent, self._refused),
                (unsent, self._unsent),
            )
            for message in messages
            if message.on_reply is None
        ]

    def close(self) -> None:
        """Close the connection; the next step opens another one. Messages in it are dropped."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        give_up(self._sent.take_late())
        self._sent = UnansweredMessages()
        self._pace = Pace()

    def _drop(self, messages: Sequence[QueuedMessage], text: str) -> list[Problem | Delay]:
        """Give messages up; return what is to be logged."""
        records = self._uncount(messages, text, logging.ERROR)
        give_up(messages)
        return [record for record in records if record.message.on_reply is None]

    def _uncount(self, messages: Iterable[QueuedMessage], text: str, level: int) -> list[Problem]:
        """Do not count messages any more; return what can be logged."""
        problems = [
            Problem(self.address, message, text, level, service_name=self.service_name)
            for message in messages
        ]
        self.size -= sum(problem.message.size for problem in problems)
        return problems


def give_up(messages: Iterable[QueuedMessage]) -> None:
    """Give messages back that are stored elsewhere."""
    for message in messages:
        if message.on_reply is not None:
            message.on_reply(None)
