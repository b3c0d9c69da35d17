# SPDX-License-Identifier: ZPL-2.1
"""Messages whose sender does not wait for the reply.

One thread of the process, which runs while there is something to send or to receive, has all their
sockets for itself. Nobody else waits for a socket, and the messages of a client keep their order.
"""

import atexit
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count, islice
from multiprocessing.util import Finalize
from time import monotonic
from typing import Any

import zmq

from pyams_zmq.client.socket import ZMQSocket, open_pair, wait_for
from pyams_zmq.exceptions import (
    ZMQRemoteError,
    ZMQReplyError,
    ZMQUnreachableError,
)
from pyams_zmq.wire.frames import receive
from pyams_zmq.wire.message import DRAINING_REPLY, decode_reply, payload_of

LOGGER = logging.getLogger('PyAMS (zmq)')

MAX_REPLIES = 10_000
"""Replies that a process waits for; beyond, the oldest is given up"""

IDLE = 30.0
"""Seconds after which a connection that nobody uses is closed"""

FLUSH = 1.0
"""Seconds that the end of a program waits for the replies to come"""

MAX_BYTES = 64 * 1024 * 1024
"""Bytes that wait for one service; a client with more of them takes no further message"""

TURN = 100
"""Messages that a client may send or receive before the next one has its turn"""

RETRY = 0.01
"""Seconds until the next try, when a connection takes no message yet"""


class QueuedMessage:
    """A message on its way.

    :param type: type of the message, for the log
    :param data: the encoded message
    :param timeout: seconds that its reply may take
    """

    __slots__ = ('data', 'posted', 'timeout', 'type')

    def __init__(self, type: str, data: bytes, timeout: float):  # noqa: A002 - the field's name
        self.type = type
        self.data = data
        self.timeout = timeout
        self.posted = monotonic()

    @property
    def deadline(self) -> float:
        """When nobody waits for its reply any more, as `time.monotonic` counts."""
        return self.posted + self.timeout


class Outbox:
    """What one client sends: its messages, in their order, and its connection.

    :param address: URI of the service, for the log
    :param connect: makes the connection, a :class:`pyams_zmq.client.Channel`
    """

    def __init__(self, address: str, connect: Callable[[], Any]):
        self.address = address
        self.error: Exception | None = None
        self.is_connected = False
        self.is_closed = False
        self.used = monotonic()
        self._connect = connect
        self._is_blocked = False
        self._channel: Any = None
        self._numbers = count(1)
        self._unsent: deque[QueuedMessage] = deque()
        self._sent: dict[bytes, QueuedMessage] = {}
        self._returned: deque[QueuedMessage] = deque()
        self.size = 0

    def __len__(self) -> int:
        return len(self._unsent) + len(self._sent) + len(self._returned)

    @property
    def owed_replies(self) -> int:
        """Number of messages that were sent and have no reply yet."""
        return len(self._sent)

    def add(self, letter: QueuedMessage) -> None:
        """Take a message; it is sent as soon as there is a connection."""
        self._unsent.append(letter)
        self.size += len(letter.data)
        self.used = monotonic()

    @property
    def sockets(self) -> list[ZMQSocket]:
        """What to wait for."""
        return self._channel.sockets  # type: ignore[no-any-return]

    @property
    def oldest(self) -> QueuedMessage:
        """The message that was posted first; there has to be one."""
        firsts = [*islice(self._sent.values(), 1), *islice(self._returned, 1)]
        return min(firsts, key=lambda letter: letter.posted) if firsts else self._unsent[0]

    def wakes_at(self) -> float:
        """Tell when there is something to do, whatever the sockets say."""
        if self._unsent and self.is_connected and not self._returned:
            return monotonic() + (RETRY if self._is_blocked else 0)
        return self.oldest.deadline if len(self) else self.used + IDLE

    def is_done(self, now: float) -> bool:
        """Tell if the connection can be closed."""
        return not len(self) and (self.is_closed or now >= self.used + IDLE)

    def step(self, now: float) -> list[str]:
        """Receive what has come, send what can be sent, give up what took too long.

        :return: what went wrong
        :raises ZMQRefusedError: if the service does not let us in
        :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
        """
        if self._channel is None:
            self._channel = self._connect()
        is_lost = self._channel.look()
        self.is_connected = self._channel.is_connected
        problems = self._receive(None if is_lost else TURN)
        if is_lost:
            problems += [
                self._tell(letter, 'the connection was lost, it may have run or not')
                for letter in self._sent.values()
            ]
            self._sent.clear()
            self._unsent.extendleft(reversed(self._returned))
            self._returned.clear()
        if self.is_connected and not self._returned:
            self._send()
        while len(self) and now >= self.oldest.deadline:
            problems.append(self.give_up(f'within {self.oldest.timeout} s'))
        return problems

    def _receive(self, most: int | None) -> list[str]:
        problems = []
        for _number in count() if most is None else range(most):
            frames = self._channel.receive()
            if frames is None:
                break
            letter = self._sent.pop(frames[0], None)
            if letter is None:
                continue
            if frames[-1] == DRAINING_REPLY:  # the next service at this address gets it
                self._returned.append(letter)
            elif (problem := describe_reply(frames[-1])) is None:
                self.size -= len(letter.data)
            else:
                problems.append(self._tell(letter, problem))
        return problems

    def _send(self) -> None:
        self._is_blocked = False
        for _turn in range(min(TURN, len(self._unsent))):
            # Part of the envelope (RFC 28/REQREP), which comes back with the reply.
            number = b'%d' % next(self._numbers)
            if not self._channel.send([number, b'', self._unsent[0].data]):
                self._is_blocked = True
                break
            self._sent[number] = self._unsent.popleft()

    def give_up(self, reason: str) -> str:
        """Wait no longer for the oldest message; return what to tell of it."""
        oldest = self.oldest
        number = next(iter(self._sent), None)
        if number is not None and self._sent[number] is oldest:
            return self._tell(self._sent.pop(number), f'no reply {reason}, it may have run or not')
        (self._returned or self._unsent).popleft()
        return self._tell(oldest, f'not sent, no service {reason}')

    def fail(self, error: Exception) -> list[str]:
        """Give everything up, close the connection."""
        self.error = error
        letters = [*self._sent.values(), *self._returned, *self._unsent]
        for waiting in (self._sent, self._returned, self._unsent):
            waiting.clear()
        self.close()
        return [self._tell(letter, str(error)) for letter in letters]

    def close(self) -> None:
        """Close the connection, until the next message."""
        self.is_connected = False
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _tell(self, letter: QueuedMessage, problem: str) -> str:
        """Let go of a message."""
        self.size -= len(letter.data)
        return f'Message {letter.type!r} to {self.address}: {problem}'


class SenderThread:
    """Sends the messages and receives the replies, in one thread for all clients."""

    def __init__(self) -> None:
        self._inherited: list[Any] = []
        self._renew()
        # A thread does not survive a fork, and the lock may be held at that moment.
        os.register_at_fork(after_in_child=self._inherit)

    def _renew(self) -> None:
        self._changed = threading.Condition()
        self._outboxes: list[Outbox] = []
        self._thread: threading.Thread | None = None
        self._bell: ZMQSocket | None = None
        self._has_rung = False
        self._flushes = False
        self._flush_ends = 0.0

    def _inherit(self) -> None:
        self._inherited.append((self._outboxes, self._bell))  # kept: nobody may touch them here
        self._renew()

    def prepare(self, outbox: Outbox, timeout: float) -> None:
        """Wait until the service is there, and lets us in.

        :param timeout: seconds
        :raises ZMQUnreachableError: if nobody has answered in time
        :raises ZMQRefusedError: if the service does not let us in
        :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
        """
        with self._changed:
            self._serve(outbox)
            if outbox.size > MAX_BYTES:
                raise ZMQUnreachableError(
                    f'{outbox.address} takes no messages: {outbox.size} bytes wait for it'
                )
            outbox.used = monotonic() + timeout  # at least that long it is kept
            self._changed.wait_for(
                lambda: outbox.is_connected or outbox.error is not None, max(0, timeout)
            )
            outbox.used = monotonic()
            if outbox.error is not None:
                raise outbox.error
            if not outbox.is_connected:
                raise ZMQUnreachableError(
                    f'No service has answered at {outbox.address} for {timeout:.3g} s'
                )

    def post(self, outbox: Outbox, letter: QueuedMessage) -> None:
        """Take a message, and return."""
        with self._changed:
            self._serve(outbox)
            outbox.add(letter)

    def close(self, outbox: Outbox) -> None:
        """Close a connection when the last reply has come."""
        with self._changed:
            outbox.is_closed = True
            self._ring()

    def flush(self) -> None:
        """Wait a moment for the replies that are to come: this program ends."""
        with self._changed:
            is_first = not self._flush_ends  # multiprocessing may call it, too
            if is_first:
                self._flush_ends = monotonic() + FLUSH
            self._changed.wait_for(
                lambda: not any(map(len, self._outboxes)), max(0, self._flush_ends - monotonic())
            )
            left = sum(map(len, self._outboxes))
        if left and is_first:
            LOGGER.error('%d messages may be lost: the program ends before they have a reply', left)

    def _serve(self, outbox: Outbox) -> None:
        if self._thread is None:
            bell, heard = open_pair()
            thread = threading.Thread(
                target=self._run, args=(bell, heard), name='PyAMS (zmq) outbox', daemon=True
            )
            thread.start()
            self._bell, self._thread = bell, thread
        if outbox not in self._outboxes:
            outbox.error = None
            self._outboxes.append(outbox)
        if not self._flushes:
            self._flushes = True
            # Before the services are stopped; and where multiprocessing ends a child.
            atexit.register(self.flush)
            Finalize(None, self.flush, exitpriority=10)
        self._ring()

    def _ring(self) -> None:
        if self._bell is not None and not self._has_rung:
            self._has_rung = True
            with suppress(zmq.ZMQError):  # of a terminated context, which wakes the thread, too
                self._bell.send(b'', zmq.NOBLOCK)

    def _run(self, bell: ZMQSocket, heard: ZMQSocket) -> None:
        failure: Exception | None = None
        while True:
            with self._changed:
                self._has_rung = False
                problems = self._step(monotonic(), failure)
                sockets = [socket for outbox in self._outboxes for socket in outbox.sockets]
                wake = min((outbox.wakes_at() for outbox in self._outboxes), default=None)
                if wake is None:
                    bell.close()
                    heard.close()
                    self._bell = self._thread = None
                self._changed.notify_all()
            for problem, times in Counter(problems).items():
                with suppress(Exception):  # of a handler of the logging
                    LOGGER.error('%s%s', problem, f' ({times} times)' if times > 1 else '')
            if wake is None:
                return
            try:
                wait_for([heard, *sockets], zmq.POLLIN, wake - monotonic())
                receive(heard)
            except zmq.ZMQError as error:  # somebody has terminated the context
                failure = error

    def _step(self, now: float, failure: Exception | None) -> list[str]:
        problems = []
        for outbox in list(self._outboxes):
            error = failure
            if error is None:
                try:
                    problems += outbox.step(now)
                except Exception as raised:  # noqa: BLE001 - whatever it is, the others go on
                    error = raised
            if error is not None:
                problems += outbox.fail(error)
                self._outboxes.remove(outbox)
        while sum(outbox.owed_replies for outbox in self._outboxes) > MAX_REPLIES:
            oldest = min(
                (outbox for outbox in self._outboxes if outbox.owed_replies),
                key=lambda outbox: outbox.oldest.posted,
            )
            problems.append(oldest.give_up(f'before {MAX_REPLIES} others were sent'))
        for outbox in list(self._outboxes):
            if outbox.is_done(now):
                outbox.close()
                self._outboxes.remove(outbox)
        return problems


def describe_reply(data: bytes) -> str | None:
    """Tell what is wrong with a reply, without what a handler may have put in it."""
    try:
        payload_of(decode_reply(data))
    except ZMQRemoteError as error:
        LOGGER.debug('Reply of a service: %s', error)
        return f'the reply has status {error.status}'
    except ZMQReplyError:
        return 'the reply is not [status, payload]'
    return None


sender_thread = SenderThread()
