# SPDX-License-Identifier: ZPL-2.1
"""Messages whose caller does not wait for the reply.

One thread of the process sends the messages of all clients and receives the replies. It runs while
a client has messages, or has had some in the last 30 seconds. No other thread uses its sockets, and
the messages of a client keep their order.
"""

import atexit
import logging
import threading
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, islice
from multiprocessing.util import Finalize
from time import monotonic
from typing import Any

import zmq

from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.client.socket import ZMQSocket, get_context, open_connection
from pyams_zmq.exceptions import ZMQRemoteError, ZMQReplyError, ZMQUnreachableError
from pyams_zmq.wire.fork import ForkLocal
from pyams_zmq.wire.frames import receive
from pyams_zmq.wire.message import DRAINING_REPLY, decode_reply, payload_of
from pyams_zmq.wire.monitor import make_inproc_address
from pyams_zmq.wire.poll import wait_for

LOGGER = logging.getLogger('PyAMS (zmq)')

MAX_REPLIES = 10_000
"""Replies that a process waits for; beyond that it gives up the oldest one"""

IDLE = 30.0
"""Seconds after which an unused connection is closed"""

FLUSH = 1.0
"""Seconds that a program waits for replies before it ends"""

MAX_BYTES = 64 * 1024 * 1024
"""Bytes that wait for one service; beyond that its client accepts no message"""

BATCH = 100
"""Messages that a client sends or receives before the next client"""

SEND_HWM = 100
"""Messages that wait in a socket, at most"""

RETRY = 0.01
"""Seconds until the next attempt, when a connection has no room for a message"""


@dataclass(slots=True, eq=False)
class QueuedMessage:
    """A message that is not sent, or has no reply yet.

    :param type: type of the message, for the log
    :param data: the encoded message
    :param timeout: seconds that its reply may take
    """

    type: str
    data: bytes
    timeout: float
    posted: float = field(default_factory=monotonic, init=False)

    @property
    def deadline(self) -> float:
        """When the reply is given up, in the seconds of `time.monotonic`."""
        return self.posted + self.timeout


class SendQueue:
    """The messages of one client, in their order, and its connection.

    :ivar sent: messages without a reply, by their number
    :ivar size: bytes of all messages
    :ivar used: when the queue was used, in the seconds of `time.monotonic`
    """

    def __init__(self, service: ServiceAddress):
        self.address = service.endpoint.uri
        self.sent: dict[bytes, QueuedMessage] = {}
        self.size = 0
        self.error: Exception | None = None
        self.is_connected = False
        self.is_closed = False
        self.used = monotonic()
        self._service = service
        self._is_blocked = False
        self._socket: Any = None
        self._monitor: Any = None
        self._numbers = count(1)
        self._unsent: deque[QueuedMessage] = deque()
        self._returned: deque[QueuedMessage] = deque()

    def __len__(self) -> int:
        return len(self._unsent) + len(self.sent) + len(self._returned)

    def add(self, message: QueuedMessage) -> None:
        """Add a message; it is sent as soon as the service is connected."""
        self._unsent.append(message)
        self.size += len(message.data)
        self.used = monotonic()

    @property
    def sockets(self) -> list[ZMQSocket]:
        """The sockets to wait for."""
        return [self._socket, self._monitor.socket]

    @property
    def oldest(self) -> QueuedMessage:
        """The message that was posted first; the queue must not be empty."""
        firsts = [*islice(self.sent.values(), 1), *islice(self._returned, 1)]
        return min(firsts, key=lambda message: message.posted) if firsts else self._unsent[0]

    def wakes_at(self) -> float:
        """Return when the next step is due, if no socket is ready before."""
        if self._unsent and self.is_connected and not self._returned:
            return monotonic() + (RETRY if self._is_blocked else 0)
        return self.oldest.deadline if len(self) else self.used + IDLE

    def is_done(self, now: float) -> bool:
        """Return True if the connection can be closed."""
        return not len(self) and (self.is_closed or now >= self.used + IDLE)

    def step(self, now: float) -> list[str]:
        """Receive replies, send messages, give up those whose time-out has passed.

        :return: the problems, to be logged
        :raises ZMQRefusedError: if the service refuses the connection
        :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
        """
        if self._socket is None:
            # Messages wait here, not in a connection that is lost: `immediate`.
            self._socket, self._monitor = open_connection(
                self._service, zmq.DEALER, immediate=1, sndhwm=SEND_HWM, rcvhwm=0
            )
        is_lost = self._monitor.read_events()
        self.is_connected = self._monitor.state.is_connected
        problems = self._receive(None if is_lost else BATCH)
        if is_lost:
            problems += [
                self._drop(message, 'the connection was lost, it may have run or not')
                for message in self.sent.values()
            ]
            self.sent.clear()
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
            frames = receive(self._socket)
            if frames is None:
                break
            message = self.sent.pop(frames[0], None)
            if message is None:
                continue
            if frames[-1] == DRAINING_REPLY:  # the next service at this address gets it
                self._returned.append(message)
            elif (problem := describe_reply(frames[-1])) is None:
                self.size -= len(message.data)
            else:
                problems.append(self._drop(message, problem))
        return problems

    def _send(self) -> None:
        self._is_blocked = False
        for _turn in range(min(BATCH, len(self._unsent))):
            # Part of the envelope (RFC 28/REQREP), which the reply repeats.
            number = b'%d' % next(self._numbers)
            try:
                self._socket.send_multipart([number, b'', self._unsent[0].data], zmq.NOBLOCK)
            except zmq.Again:
                self._is_blocked = True
                break
            self.sent[number] = self._unsent.popleft()

    def give_up(self, reason: str) -> str:
        """Drop the oldest message; return the problem, to be logged."""
        oldest = self.oldest
        number = next(iter(self.sent), None)
        if number is not None and self.sent[number] is oldest:
            return self._drop(self.sent.pop(number), f'no reply {reason}, it may have run or not')
        (self._returned or self._unsent).popleft()
        return self._drop(oldest, f'not sent, no service {reason}')

    def fail(self, error: Exception) -> list[str]:
        """Drop all messages and close the connection; return the problems, to be logged."""
        self.error = error
        messages = [*self.sent.values(), *self._returned, *self._unsent]
        for waiting in (self.sent, self._returned, self._unsent):
            waiting.clear()
        self.close()
        return [self._drop(message, str(error)) for message in messages]

    def close(self) -> None:
        """Close the connection; the next step opens another one."""
        self.is_connected = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _drop(self, message: QueuedMessage, problem: str) -> str:
        self.size -= len(message.data)
        return f'Message {message.type!r} to {self.address}: {problem}'


class SenderThread:
    """Sends the messages and receives the replies of all clients of a process, in one thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queues: list[SendQueue] = []
        self._thread: threading.Thread | None = None
        self._wakeup: ZMQSocket | None = None
        self._is_woken = False
        self._has_exit_hooks = False
        self._flush_ends = 0.0

    def prepare(self, queue: SendQueue, timeout: float) -> None:
        """Wait until the service of a queue is connected.

        :param timeout: seconds
        :raises ZMQUnreachableError: if no service has answered in time
        :raises ZMQRefusedError: if the service refuses the connection
        :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
        """
        with self._changed:
            self._serve(queue)
            if queue.size > MAX_BYTES:
                raise ZMQUnreachableError(
                    f'{queue.address} takes no messages: {queue.size} bytes wait for it'
                )
            queue.used = monotonic() + timeout  # it stays open at least so long
            self._changed.wait_for(
                lambda: queue.is_connected or queue.error is not None, max(0, timeout)
            )
            queue.used = monotonic()
            if queue.error is not None:
                # The same error each time: its traceback must not grow.
                raise queue.error.with_traceback(None)
            if not queue.is_connected:
                raise ZMQUnreachableError(
                    f'No service has answered at {queue.address} for {timeout:.3g} s'
                )

    def post(self, queue: SendQueue, message: QueuedMessage) -> None:
        """Add a message to a queue, and return."""
        with self._changed:
            self._serve(queue)
            queue.add(message)

    def close(self, queue: SendQueue) -> None:
        """Close the connection of a queue after the last reply."""
        with self._changed:
            queue.is_closed = True
            self._wake()

    def flush(self) -> None:
        """Wait a moment for the missing replies, because the program ends."""
        with self._changed:
            is_first = not self._flush_ends  # a process may run several exit hooks
            if is_first:
                self._flush_ends = monotonic() + FLUSH
            self._changed.wait_for(
                lambda: not any(map(len, self._queues)), max(0, self._flush_ends - monotonic())
            )
            left = sum(map(len, self._queues))
        if left and is_first:
            LOGGER.error('%d messages may be lost: the program ends before they have a reply', left)

    def _serve(self, queue: SendQueue) -> None:
        if self._thread is None:
            wakeup, sleeper = open_wakeup_pair()
            thread = threading.Thread(
                target=self._run, args=(wakeup, sleeper), name='PyAMS (zmq) sender', daemon=True
            )
            thread.start()
            self._wakeup, self._thread = wakeup, thread
        if queue not in self._queues:
            queue.error = None
            self._queues.append(queue)
        if not self._has_exit_hooks:
            self._has_exit_hooks = True
            # atexit: before the services are stopped. Finalize: a child of multiprocessing does
            # not run the functions of atexit.
            atexit.register(_flush)
            Finalize(None, _flush, exitpriority=10)
        self._wake()

    def _wake(self) -> None:
        if self._wakeup is not None and not self._is_woken:
            self._is_woken = True
            with suppress(zmq.ZMQError):  # of a terminated context, which wakes the thread, too
                self._wakeup.send(b'', zmq.NOBLOCK)

    def _run(self, wakeup: ZMQSocket, sleeper: ZMQSocket) -> None:
        failure: Exception | None = None
        while True:
            with self._changed:
                self._is_woken = False
                problems = self._step(monotonic(), failure)
                sockets = [socket for queue in self._queues for socket in queue.sockets]
                wake = min((queue.wakes_at() for queue in self._queues), default=None)
                if wake is None:
                    wakeup.close()
                    sleeper.close()
                    self._wakeup = self._thread = None
                self._changed.notify_all()
            for problem, times in Counter(problems).items():
                with suppress(Exception):  # of a logging handler
                    LOGGER.error('%s%s', problem, f' ({times} times)' if times > 1 else '')
            if wake is None:
                return
            try:
                wait_for([sleeper, *sockets], wake - monotonic())
                receive(sleeper)
            except zmq.ZMQError as error:  # the context was terminated
                failure = error

    def _step(self, now: float, failure: Exception | None) -> list[str]:
        problems = []
        for queue in list(self._queues):
            error = failure
            if error is None:
                try:
                    problems += queue.step(now)
                except Exception as raised:  # noqa: BLE001 - any error ends this queue only
                    error = raised
            if error is not None:
                problems += queue.fail(error)
                self._queues.remove(queue)
        while sum(len(queue.sent) for queue in self._queues) > MAX_REPLIES:
            oldest = min(
                (queue for queue in self._queues if queue.sent),
                key=lambda queue: queue.oldest.posted,
            )
            problems.append(oldest.give_up(f'before {MAX_REPLIES} others were sent'))
        for queue in list(self._queues):
            if queue.is_done(now):
                queue.close()
                self._queues.remove(queue)
        return problems


sender_thread = ForkLocal(SenderThread)
"""The thread of this process"""


def _flush() -> None:
    sender_thread.get().flush()


def open_wakeup_pair() -> tuple[ZMQSocket, ZMQSocket]:
    """Open two sockets: a message to the first one wakes the thread that polls the second one."""
    context = get_context()
    wakeup: ZMQSocket = context.socket(zmq.PAIR, socket_class=ZMQSocket)
    sleeper: ZMQSocket = context.socket(zmq.PAIR, socket_class=ZMQSocket)
    address = make_inproc_address()
    wakeup.bind(address)
    sleeper.connect(address)
    return wakeup, sleeper


def describe_reply(data: bytes) -> str | None:
    """Return what is wrong with a reply, without the text of the handler; None if it is good."""
    try:
        payload_of(decode_reply(data))
    except ZMQRemoteError as error:
        LOGGER.debug('Reply of a service: %s', error)
        return f'the reply has status {error.status}'
    except ZMQReplyError:
        return 'the reply is not [status, payload]'
    return None
