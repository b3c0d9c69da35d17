# SPDX-License-Identifier: ZPL-2.1
"""Which worker gets which call, and what becomes of it.

It decides, and does neither input nor output: whoever drives it, the broker or a test, says what
happens and when, and gives it two functions: one hands a call to a worker, one replies.
"""

import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import count
from os import urandom
from typing import Any

from pyams_zmq.pool.histogram import Histogram
from pyams_zmq.wire.message import DRAINING_REPLY, encode

MAX_ATTEMPTS = 3
"""Workers that may die on a call before it is given up"""

MISSED_BEATS = 3
"""Heartbeats after which a worker that nobody else watches is lost"""

AWAY = 1.0
"""Seconds between two looks for lost workers after which the machine was away, and not they"""

MAX_METHODS = 1000
"""Methods that are counted by name, at most"""

MAX_WORKERS = 1000
"""Workers that may join, at most"""

MAX_SLOTS = 1000
"""Calls that a worker may have in hand, at most"""

MIN_INTERVAL = 0.01
MAX_INTERVAL = 60.0
"""Seconds between the heartbeats of a worker, at least and at most"""

_PEEK = re.compile(rb'\s*\[\s*"([\w.]{1,100})"', re.ASCII).match
_ERROR = re.compile(rb'\s*\[\s*[45]\d\d\s*[],]').match
_OTHERS = '(others)'


def peek_type(data: Any) -> bytes:
    """Read the type of a message without reading the message.

    :param data: the frame that holds ``[type, args]``
    :return: the type, empty if this is no message, or if it is written in an unusual way
    """
    match = _PEEK(data)
    return match[1] if match is not None else b''


class Method:
    """What is known of the calls of a method.

    :ivar repeatable: a call may be made once more, when the worker died on it
    """

    __slots__ = ('calls', 'errors', 'latency', 'repeatable')

    def __init__(self, *, repeatable: bool = False) -> None:
        self.repeatable = repeatable
        self.calls = 0
        self.errors = 0
        self.latency = Histogram()

    def stats(self) -> dict[str, Any]:
        """Describe the calls, with seconds from their arrival until their reply."""
        latency = self.latency
        return {
            'calls': self.calls,
            'errors': self.errors,
            'mean': latency.total / latency.count if latency.count else 0.0,
            'p50': latency.percentile(50),
            'p90': latency.percentile(90),
            'p99': latency.percentile(99),
            'max': latency.longest,
        }


class Call:
    """A message that is owed a reply.

    :ivar key: number of the call, in the 8 bytes that begin its header
    :ivar header: first frame for the worker: key, user and address of the peer
    :ivar size: bytes that it takes, with its envelope
    """

    __slots__ = (
        'attempts',
        'body',
        'envelope',
        'header',
        'key',
        'method',
        'name',
        'received',
        'size',
    )

    def __init__(
        self,
        key: bytes,
        envelope: list[Any],
        header: bytes,
        body: list[Any],
        size: int,
        name: bytes,
        method: Method,
        received: float,
    ):
        self.key = key
        self.envelope = envelope
        self.header = header
        self.body = body
        self.size = size
        self.name = name
        self.method = method
        self.received = received
        self.attempts = 0


class Worker:
    """A worker that has announced itself.

    :ivar route: what the socket of the broker calls it
    :ivar is_open: it takes further calls
    :ivar needs_ready: it could not be reached, and has to announce itself again
    :ivar is_watched: somebody else notices its end, so that its heartbeats do not matter
    :ivar calls: what it has in hand, by key
    :ivar foreign: keys of what it has in hand of a former broker, or of a former time with this one
    """

    def __init__(
        self,
        route: bytes,
        info: Mapping[str, Any],
        now: float,
        *,
        where: Any = None,
        user: str = '',
    ):
        self.route = route
        self.where = where
        self.user = user
        self.since = now
        self.heard = now
        self.memory = 0
        self.replies = 0
        self.is_watched = False
        self.calls: dict[bytes, Call] = {}
        self.foreign: set[bytes] = set()
        self.update(info)

    def update(self, info: Mapping[str, Any]) -> None:
        """Take over what the worker says of itself.

        :raises KeyError, TypeError, ValueError: it says too little, or nonsense
        """
        self.pid = int(info['pid'])
        self.host = str(info['host'])[:255]
        self.slots = min(max(0, int(info['slots'])), MAX_SLOTS)
        self.interval = min(max(MIN_INTERVAL, float(info['interval'])), MAX_INTERVAL)
        self.is_open = self.slots > 0
        self.needs_ready = False

    @property
    def in_flight(self) -> int:
        """Number of calls that it has in hand."""
        return len(self.calls) + len(self.foreign)

    def stats(self, now: float) -> dict[str, Any]:
        """Describe the worker; its age is that of its announcement, its memory is in MiB."""
        state = 'leaving' if not self.is_open else 'busy' if self.in_flight else 'idle'
        return {
            'pid': self.pid,
            'host': self.host,
            'state': state,
            'age': round(now - self.since, 3),
            'memory': self.memory,
            'calls': self.replies,
            'in_flight': self.in_flight,
            'slots': self.slots,
        }


class Scheduler:
    """Hands each call to a free worker, the one that has been free for the longest time.

    :param deliver: hands a call to a worker; tells if that could be reached
    :param reply: sends the frames of a reply along an envelope
    :param queue_limit: calls that wait for a worker, at most
    :param queue_size: bytes of the calls that wait, at most
    """

    def __init__(
        self,
        deliver: Callable[[Worker, Call], bool],
        reply: Callable[[list[Any], list[Any]], None],
        *,
        queue_limit: int,
        queue_size: int,
    ):
        self._deliver = deliver
        self._reply = reply
        self.queue_limit = queue_limit
        self.queue_size = queue_size
        self.workers: dict[bytes, Worker] = {}
        self.is_draining = False
        self.methods: dict[bytes, Method] = {}
        self.others = Method()
        self._queue: deque[Call] = deque()
        self._queued_size = 0
        self._free: deque[Worker] = deque()  # one entry for each free slot
        self._refused = self._repeated = self._lost = 0
        # A worker may still reply to a call of the broker before this one.
        self._numbers = count(int.from_bytes(urandom(7), 'big'))
        self._expired = 0.0

    @property
    def in_flight(self) -> int:
        """Number of calls that workers have in hand."""
        return sum(len(worker.calls) for worker in self.workers.values())

    @property
    def queue_length(self) -> int:
        """Number of calls that wait for a worker."""
        return len(self._queue)

    def request(
        self,
        envelope: list[Any],
        sender: bytes,
        body: list[Any],
        size: int,
        name: bytes,
        now: float,
    ) -> None:
        """Take a message.

        :param envelope: way of the reply
        :param sender: what the worker is told of the sender
        :param body: frames of the message
        :param size: bytes that it takes, with its envelope
        :param name: its type, as far as `peek_type` could read it
        :param now: present time in seconds
        """
        if self.is_draining:
            self._refused += 1
            self._reply(envelope, [DRAINING_REPLY])
            return
        key = next(self._numbers).to_bytes(8, 'big')
        method = self.methods.get(name, self.others)
        call = Call(key, envelope, key + sender, body, size, name, method, now)
        if (self._queue or not self._hand_over(call)) and not self._enqueue(call):
            self._refuse(call)

    def _enqueue(self, call: Call) -> bool:
        if len(self._queue) >= self.queue_limit or self._queued_size + call.size > self.queue_size:
            return False
        self._queue.append(call)
        self._queued_size += call.size
        return True

    def _refuse(self, call: Call) -> None:
        self._refused += 1
        text = f'The service is overloaded: {len(self._queue)} calls wait, try again later'
        self._reply(call.envelope, [encode([503, text])])

    def answer(self, route: bytes, key: bytes, reply: list[Any], now: float) -> None:
        """Take a reply; that to a call which was given up is dropped."""
        worker = self.workers.get(route)
        if worker is None:
            return
        call = worker.calls.pop(key, None)
        if call is None:
            if key in worker.foreign:
                worker.foreign.discard(key)
                self._release(worker)
            return
        worker.replies += 1
        self._release(worker)  # first: it has to be busy, the client may well wait
        self._finish(call, reply, now)

    def _release(self, worker: Worker) -> None:
        if worker.is_open and worker.in_flight < worker.slots:
            self._free.append(worker)
            if self._queue:
                self._feed()

    def _finish(self, call: Call, reply: list[Any], now: float) -> None:
        method = call.method
        method.calls += 1
        if _ERROR(reply[-1]) is not None:
            method.errors += 1
        method.latency.add(now - call.received)
        self._reply(call.envelope, reply)

    def _feed(self) -> None:
        while self._queue and self._free:
            call = self._queue.popleft()
            self._queued_size -= call.size
            if call.method is self.others:  # maybe nobody had announced it when it came in
                call.method = self.methods.get(call.name, self.others)
            if not self._hand_over(call):
                self._put_back(call)

    def _put_back(self, call: Call) -> None:
        self._queue.appendleft(call)
        self._queued_size += call.size

    def _hand_over(self, call: Call) -> bool:
        while self._free:
            worker = self._free.popleft()
            if worker.is_open:
                if self._deliver(worker, call):
                    worker.calls[call.key] = call
                    return True
                worker.is_open = False  # its connection is gone
                worker.needs_ready = True
        return False

    def ready(
        self,
        route: bytes,
        info: Mapping[str, Any],
        now: float,
        *,
        where: Any = None,
        user: str = '',
    ) -> Worker:
        """Take the announcement of a worker, maybe the second one of a worker that we know.

        Then what was on its way when its connection broke is lost: it says what it has in hand.

        :param info: what it says of itself
        :param where: whatever the function which delivers wants to know
        :param user: who the worker is
        :raises KeyError, TypeError, ValueError: it says too little, or nonsense
        """
        in_hand = {bytes.fromhex(key) for key in info['calls']}
        worker = self.workers.get(route)
        if worker is None:
            if len(self.workers) >= MAX_WORKERS:
                raise ValueError(f'there are {MAX_WORKERS} workers already')
            worker = Worker(route, info, now, where=where, user=user)
        else:
            worker.update(info)
        self._announce_methods(info['methods'], info['repeatable'])
        worker.heard = now
        self.workers[route] = worker
        lost = [call for key, call in worker.calls.items() if key not in in_hand]
        for call in lost:
            del worker.calls[call.key]
        self._free = deque(each for each in self._free if each is not worker)
        worker.foreign = in_hand - worker.calls.keys()
        if worker.is_open:
            self._free.extend([worker] * (worker.slots - worker.in_flight))
        self._repeat(lost, 'was cut off', now)
        return worker

    def _announce_methods(self, names: Iterable[str], repeatable: Collection[str]) -> None:
        for name in names:
            key = str(name).encode()
            if key not in self.methods and len(self.methods) < MAX_METHODS:
                self.methods[key] = Method()
            if key in self.methods:
                self.methods[key].repeatable = name in repeatable

    def heard(self, route: bytes, memory: int, now: float) -> bool:
        """Take a heartbeat.

        :param memory: MiB that the worker takes
        :return: false if that worker is unknown, or has to announce itself again
        """
        worker = self.workers.get(route)
        if worker is None:
            return False
        worker.heard = now
        worker.memory = memory
        return not worker.needs_ready

    def leave(self, route: bytes) -> None:
        """Give a worker no more calls: it ends when it has finished those that it has."""
        worker = self.workers.get(route)
        if worker is not None:
            worker.is_open = False

    def give_back(self, route: bytes, key: bytes) -> None:
        """Take a call back that a worker has not begun; it is the next one."""
        worker = self.workers.get(route)
        call = None if worker is None else worker.calls.pop(key, None)
        if worker is not None and call is not None:
            self._put_back(call)
            if self.is_draining:
                self._refuse_queue()
            self._release(worker)  # unless it leaves, it takes a call as soon as it can
            self._feed()

    def lose(self, route: bytes, now: float, reason: str = 'died') -> None:
        """Note that a worker is dead, or might as well be.

        :param reason: what became of it, for its callers
        """
        worker = self.workers.pop(route, None)
        if worker is not None:
            worker.is_open = False
            calls, worker.calls = list(worker.calls.values()), {}
            self._repeat(calls, reason, now)

    def _repeat(self, calls: list[Call], reason: str, now: float) -> None:
        for call in reversed(calls):
            call.attempts += 1
            if call.method.repeatable and call.attempts < MAX_ATTEMPTS and not self.is_draining:
                self._repeated += 1
                self._put_back(call)
            else:
                self._lost += 1
                text = f'The worker {reason} while it had this call in hand'
                self._finish(call, [encode([502, text])], now)
        self._feed()

    def expire(self, now: float) -> list[Worker]:
        """Lose those workers that have missed their heartbeats.

        :return: them
        """
        late, self._expired = now - self._expired, now
        lost = []
        for worker in list(self.workers.values()):
            if late > max(AWAY, worker.interval):
                worker.heard = now  # who was away for so long is us
            elif now - worker.heard > worker.interval * MISSED_BEATS and not worker.is_watched:
                self.lose(worker.route, now, 'was not heard of any more')
                lost.append(worker)
        return lost

    def drain(self) -> None:
        """Refuse what waits, and everything from now on."""
        self.is_draining = True
        self._refuse_queue()

    def _refuse_queue(self) -> None:
        while self._queue:
            self._refused += 1
            self._reply(self._queue.popleft().envelope, [DRAINING_REPLY])
        self._queued_size = 0

    def abandon(self, now: float) -> None:
        """Answer the calls that workers have in hand: nobody waits for them any longer."""
        for route in list(self.workers):
            self.lose(route, now, 'was ended')

    def stats(self, now: float) -> dict[str, Any]:
        """Describe everything, as JSON."""
        methods = {name.decode(): method for name, method in self.methods.items()}
        methods[_OTHERS] = self.others
        return {
            'calls': sum(method.calls for method in methods.values()),
            'errors': sum(method.errors for method in methods.values()),
            'refused': self._refused,
            'repeated': self._repeated,
            'lost': self._lost,
            'in_flight': self.in_flight,
            'queue': len(self._queue),
            'queue_limit': self.queue_limit,
            'queue_bytes': self._queued_size,
            'draining': self.is_draining,
            'methods': {name: each.stats() for name, each in methods.items() if each.calls},
            'workers': [worker.stats(now) for worker in self.workers.values()],
        }
