# SPDX-License-Identifier: ZPL-2.1
"""Messages whose caller does not wait for the reply.

One thread of the process sends the messages of all clients and receives the replies. It runs while
a client has messages, or has had some in the last 30 seconds. No other thread uses its sockets, and
the messages of a client keep their order.
"""

import atexit
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from multiprocessing.util import Finalize, register_after_fork

import zmq

from pyams_zmq.client.problem import Delay, Problem, QueuedMessage, log
from pyams_zmq.client.send_queue import SendQueue
from pyams_zmq.client.socket import ZMQSocket, get_context
from pyams_zmq.exceptions import ZMQBacklogError
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.environment import check_server_threads
from pyams_zmq.wire.fork import ForkLocal
from pyams_zmq.wire.frames import receive
from pyams_zmq.wire.hard_end import at_hard_end
from pyams_zmq.wire.monitor import make_inproc_address
from pyams_zmq.wire.poll import wait_for

MAX_BACKLOG = 10_000
"""Messages of a client that wait for a reply or to be sent, by default"""

MAX_BACKLOG_SIZE = 64 * 1024 * 1024
"""Bytes of these messages, by default"""

LOCK_TIMEOUT = 0.2
"""Seconds to wait for the lock when the process ends hard; then the messages are read without it"""


class SenderThread:
    """Sends the messages and receives the replies of all clients of a process, in one thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queues: list[SendQueue] = []
        self._thread: threading.Thread | None = None
        self._wakeup: ZMQSocket | None = None
        self._is_woken = False
        self._is_flushed = False
        self._flush_time = 0.0
        self._reported = 0
        self._is_alone = False  # true when Python starts no thread any more

    def prepare(
        self,
        queue: SendQueue,
        timeout: float,
        limits: tuple[float, float] = (MAX_BACKLOG, MAX_BACKLOG_SIZE),
        messages: Sequence[QueuedMessage] | None = None,
        held: int = 0,
    ) -> None:
        """Wait until the service of a queue is connected and the queue has room for messages.

        :param timeout: seconds
        :param limits: number and bytes of the messages of the queue, at most
        :param messages: messages to keep the room for, all or none; by default room for one more
            is waited for, and not kept
        :param held: number of messages of the same transaction that have room already
        :raises ZMQUnreachableError: if no service has answered in time
        :raises ZMQBacklogError: if the queue has no room
        :raises ZMQRefusedError: if the service refuses the connection
        :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
        """
        number, size = 1, 1
        if messages is not None:
            number, size = len(messages), sum(message.size for message in messages)

        def has_room() -> bool:
            return queue.has_room(number, size, limits, held)

        records: list[Problem | Delay] = []
        try:
            with self._changed:
                is_bounded = messages is not None
                self._wait_for_service(queue, timeout, has_room, records, is_bounded)
                if not has_room():
                    raise ZMQBacklogError(
                        f'The client of {queue.address} takes no message now: '
                        f'{len(queue) + queue.reserved} messages of {queue.size} bytes wait in it; '
                        f'the limits are {limits[0]} and {limits[1]}'
                    )
                for message in messages or ():
                    queue.reserve(message)
        finally:
            log(records)

    def _wait_for_service(
        self,
        queue: SendQueue,
        timeout: float,
        has_room: Callable[[], bool],
        records: list[Problem | Delay],
        is_bounded: bool,
    ) -> None:
        """Wait until the service is connected and there is room; raise an error if it is not.

        :param records: gets what is to be logged, without a lock
        :param is_bounded: true to wait no longer than until the service has been missing for so
            many seconds: this thread goes on trying, so that messages need not hold theirs
        """
        self._serve(queue)
        if timeout > 0:
            queue.retry()
        queue.used = monotonic() + timeout  # it stays open at least so long
        # A handler of the log may send from this thread, which nothing else can connect.
        is_own = threading.current_thread() is self._thread
        end = monotonic() + timeout
        if self._is_alone:
            records += self._wait(0)
        while not (is_own or (queue.is_connected and has_room()) or queue.error is not None):
            bound = queue.missing_since + timeout if is_bounded else inf
            left = min(end, bound) - monotonic()
            if left <= 0:
                break
            records += self._wait(left)
        queue.used = monotonic()
        if queue.error is not None:
            # The same error each time: its traceback must not grow.
            raise queue.error.with_traceback(None)
        if not (queue.is_connected or is_own):
            raise queue.state.describe_silence(timeout)

    def check(self, queue: SendQueue) -> None:
        """Raise an error if the service of a queue is not connected.

        :raises ZMQUnreachableError: if it does not answer now
        :raises ZMQRefusedError: if it refuses the connection
        """
        self.prepare(queue, 0, (inf, inf))

    def post(self, queue: SendQueue, message: QueuedMessage, *, is_reserved: bool = False) -> None:
        """Add a message to a queue, and return; when the program ends, wait for the reply.

        :param is_reserved: true if `prepare` has kept room for it
        """
        with self._changed:
            self._serve(queue)
            if is_reserved:
                queue.release(message)
            queue.add(message)
            # A function of atexit that was registered before that of this thread runs after it.
            is_late = self._is_flushed and threading.current_thread() is not self._thread
            problems = self._finish() if is_late else []
        log(problems)

    def offer(self, queue: SendQueue, message: QueuedMessage, limits: tuple[float, float]) -> bool:
        """Add a message to a queue if it has room, whether the service is connected or not.

        :param limits: number and bytes of the messages of the queue, at most
        :return: False if it has none, or the program ends
        """
        with self._changed:
            if self._is_flushed or not queue.has_room(1, message.size, limits):
                return False
            self._serve(queue)
            queue.add(message)
        return True

    def withdraw(self, queue: SendQueue, start: float | None = None) -> None:
        """Give back the messages with `on_reply`: the program ends, or the client is closed.

        It waits for the replies to those on their way, as `flush` does.

        :param start: when the program began to end, in the seconds of `time.monotonic`; None is now
        """
        start = monotonic() if start is None else start
        records: list[Problem | Delay] = []
        with self._changed:
            queue.withdraw()
            self._wake()  # others may wait for the room
            while queue.withdraw() and queue in self._queues:
                left = queue.waits_until(start) - monotonic()
                if left <= 0 or sys.is_finalizing():
                    break
                records += self._wait(left)
        log(records)

    def release(self, queue: SendQueue, message: QueuedMessage) -> None:
        """Give up the room that `prepare` has kept for a message."""
        with self._changed:
            queue.release(message)
            self._wake()

    def close(self, queue: SendQueue) -> None:
        """Close the connection of a queue after the last reply."""
        with self._changed:
            queue.is_closed = True
            self._wake()

    def flush(self) -> None:
        """Wait for the missing replies, because the program ends; log the messages without one."""
        with self._changed:
            self._is_flushed = True
            problems = self._finish()
        log(problems)

    def _finish(self) -> list[Problem | Delay]:
        """Wait for replies; return the messages that have none and were not returned before."""
        start = monotonic() - self._flush_time  # the time is for all calls together
        records: list[Problem | Delay] = []
        while True:
            waiting = (queue.waits_until(start) for queue in self._queues if self._has_new(queue))
            left = max(waiting, default=-inf) - monotonic()
            if left <= 0 or sys.is_finalizing():  # then the thread does not run any more
                break
            records += self._wait(left)
        self._flush_time = monotonic() - start
        return [*records, *self._take_lost()]

    def _wait(self, timeout: float) -> list[Problem | Delay]:
        """Wait until the thread has worked; where Python starts none, do a part of its work.

        :param timeout: seconds, at most
        :return: what is to be logged, without a lock
        """
        if self._thread is not None:
            self._changed.wait(timeout)
            return []
        failure: Exception | None = None
        wake = min((queue.wakes_at() for queue in self._queues), default=inf)
        seconds = max(0, min(timeout, wake - monotonic()))
        if sockets := self._list_sockets():
            try:
                wait_for(sockets, seconds)
            except zmq.ZMQError as error:  # the context was terminated
                failure = error
        else:
            self._changed.wait(seconds)
        return self._step(monotonic(), failure)

    def report_lost(self) -> None:
        """Log the messages without a reply: this process ends hard, and other threads may hang."""
        has_lock = self._changed.acquire(timeout=LOCK_TIMEOUT)
        try:
            problems = self._take_lost()
        finally:
            if has_lock:
                self._changed.release()
        log(problems)

    def _take_lost(self) -> list[Problem]:
        """Return the messages without a reply that were not returned before."""
        problems = [
            problem
            for queue in self._queues
            for problem in queue.remaining(
                'no reply before the program ended, it may have run or not',
                'not sent before the program ended',
            )
            if problem.message.number > self._reported
        ]
        numbers = [problem.message.number for problem in problems]
        self._reported = max(numbers, default=self._reported)
        return problems

    def _has_new(self, queue: SendQueue) -> bool:
        """Return True if a queue has messages to wait for; `withdraw` waits for stored ones."""
        return any(each.on_reply is None and each.number > self._reported for each in queue)

    def _serve(self, queue: SendQueue) -> None:
        if self._thread is None:
            self._start_thread()
        if queue not in self._queues:
            queue.retry()
            queue.missing_since = inf
            self._queues.append(queue)
        self._wake()

    def _start_thread(self) -> None:
        if self._is_alone:
            return
        check_server_threads('Sending messages in the background')
        wakeup, sleeper = open_wakeup_pair()
        thread = threading.Thread(
            target=self._run, args=(wakeup, sleeper), name='PyAMS (zmq) sender', daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            wakeup.close()
            sleeper.close()
            if threading.main_thread().is_alive():  # the limit of threads
                raise
            self._is_alone = True  # Python 3.12 starts no thread in a function of atexit
        else:
            self._wakeup, self._thread = wakeup, thread

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
                sockets = self._list_sockets()
                wake = min((queue.wakes_at() for queue in self._queues), default=None)
                if wake is None:
                    wakeup.close()
                    sleeper.close()
                    self._wakeup = self._thread = None
                self._changed.notify_all()
            log(problems)
            if wake is None:
                return
            try:
                wait_for([sleeper, *sockets], wake - monotonic())
                receive(sleeper)
            except zmq.ZMQError as error:  # the context was terminated
                failure = error

    def _list_sockets(self) -> list[ZMQSocket]:
        return [socket for queue in self._queues for socket in queue.sockets]

    def _step(self, now: float, failure: Exception | None) -> list[Problem | Delay]:
        problems: list[Problem | Delay] = []
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
            elif queue.is_done(now):
                queue.close()
                self._queues.remove(queue)
        return problems


sender_thread = ForkLocal(SenderThread)
"""The thread of this process"""


def _flush() -> None:
    sender_thread.get().flush()


def _flush_at_exit(_object: object = None) -> None:
    Finalize(None, _flush, exitpriority=10)


# Now: at the first message it may be too late. atexit: before the services are stopped. Finalize: a
# child of multiprocessing does not run the functions of atexit, and forgets the other finalizers.
atexit.register(_flush)
_flush_at_exit()
register_after_fork(sender_thread, _flush_at_exit)


def _report_lost() -> None:
    sender_thread.get().report_lost()


at_hard_end(_report_lost)


def open_wakeup_pair() -> tuple[ZMQSocket, ZMQSocket]:
    """Open two sockets: a message to the first one wakes the thread that polls the second one."""
    context = get_context()
    wakeup: ZMQSocket = context.socket(zmq.PAIR, socket_class=ZMQSocket)
    sleeper: ZMQSocket = context.socket(zmq.PAIR, socket_class=ZMQSocket)
    address = make_inproc_address()
    wakeup.bind(address)
    sleeper.connect(address)
    return wakeup, sleeper
