# SPDX-License-Identifier: ZPL-2.1
"""Decides which worker gets which call, and what happens to a call whose worker is lost.

It does no I/O and reads no clock: the broker, or a test, passes events and the present time, and
functions that send requests to workers and replies to clients.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import count
from math import inf
from os import urandom
from typing import Any

from pyams_zmq.handler.description import trim
from pyams_zmq.handler.statistics import MAX_METHODS, MethodStats, sum_up
from pyams_zmq.pool.protocol import MAX_INTERVAL, MIN_INTERVAL, MISSED_HEARTBEATS
from pyams_zmq.pool.queue import Call, FairQueue
from pyams_zmq.wire.message import DRAINING_REPLY, encode

MAX_ATTEMPTS = 3
"""Workers that may die during a call before the call fails"""

SILENT = 'missed its heartbeats'
"""Why a worker is removed: it may only be silent, or its connection is lost"""

LOST_ACCESS = 'lost its access'
"""Why a worker is removed, although it runs"""

SUSPENDED = 1.0
"""Seconds between two checks from which on the broker itself is considered to have been suspended,
and the heartbeats that it has not read do not count as missed"""

MAX_WORKERS = 1000
MAX_SLOTS = 1000  # of a worker: calls that it may have at a time


class WorkerState:
    """A registered worker.

    :ivar route: routing id of the worker at the socket of the broker
    :ivar stream: stream of the broker to which the worker is connected
    :ivar user: name or key of the worker
    :ivar is_open: true if the worker takes further calls
    :ivar needs_ready: true if a call could not be sent, so that the worker has to send READY again
    :ivar is_watched: true if the broker is notified of the end of the worker; its heartbeats are
        not checked then
    :ivar measure_silence: returns the seconds since data came in on its connection
    :ivar calls: its calls, by key
    :ivar unknown_calls: keys of its calls of an earlier broker, or of an earlier registration
    :ivar jobs: keys of the jobs that its methods run
    :ivar job_types: the message types that are jobs
    :ivar owner: what the journal calls it
    :ivar was_asked: true if somebody ends it, which is not the fault of its jobs
    """

    def __init__(
        self, route: bytes, info: Mapping[str, Any], now: float, stream: Any = None, user: str = ''
    ):
        self.route = route
        self.stream = stream
        self.user = user
        self.registered_at = now
        self.last_seen = now
        self.memory = 0
        self.replies = 0
        self.is_watched = False
        self.measure_silence: Callable[[], float] = lambda: inf
        self.calls: dict[bytes, Call] = {}
        self.unknown_calls: set[bytes] = set()
        self.jobs: set[bytes] = set()
        self.job_types: frozenset[str] = frozenset()
        self.owner: Any = None
        self.update(info)

    def update(self, info: Mapping[str, Any]) -> None:
        """Apply the data of READY.

        :raises KeyError, TypeError, ValueError: a member is missing or invalid
        """
        self.pid = int(info['pid'])
        self.host = str(info['host'])[:255]
        self.slots = min(max(0, int(info['slots'])), MAX_SLOTS)
        self.interval = min(max(MIN_INTERVAL, float(info['interval'])), MAX_INTERVAL)
        self.is_open = self.slots > 0
        self.needs_ready = False
        self.was_asked = bool(info.get('asked'))

    @property
    def in_flight(self) -> int:
        """Number of calls that the worker has."""
        return len(self.calls) + len(self.unknown_calls) + len(self.jobs)

    def stats(self, now: float) -> dict[str, Any]:
        """Return the statistics; the age is in seconds since READY, the memory in MiB."""
        state = 'leaving' if not self.is_open else 'busy' if self.in_flight else 'idle'
        return {
            'pid': self.pid,
            'host': self.host,
            'state': state,
            'age': round(now - self.registered_at, 3),
            'memory': self.memory,
            'calls': self.replies,
            'in_flight': self.in_flight,
            'slots': self.slots,
        }


class Scheduler:
    """Assigns each call to the worker that has been free for the longest time.

    :param send_request: sends a call to a worker; returns False if the worker is unreachable
    :param send_reply: sends the frames of a reply with an envelope
    :param send_refusal: the same for a call that the queue does not take
    :param queue: the calls that wait for a worker
    :param is_ordered: true to assign a call when the one before it has ended, also while one worker
        replaces another
    """

    def __init__(
        self,
        send_request: Callable[[WorkerState, Call], bool],
        send_reply: Callable[[Any, list[Any]], None],
        send_refusal: Callable[[Any, list[Any]], None],
        *,
        queue: FairQueue,
        is_ordered: bool = False,
    ):
        self._send_request = send_request
        self._send_reply = send_reply
        self._send_refusal = send_refusal
        self.workers: dict[bytes, WorkerState] = {}
        self.is_draining = False
        self.methods: dict[bytes, MethodStats] = {}
        self.descriptions: dict[str, Any] = {}  # of the methods
        self.other_methods = MethodStats()
        self._queue = queue
        self._is_ordered = is_ordered
        self._free: deque[WorkerState] = deque()  # one entry for each free slot
        self._refused = self._repeated = self._lost = 0
        # Random, because a worker may still reply to a call of an earlier broker.
        self._numbers = count(int.from_bytes(urandom(7), 'big'))
        self._checked_at = 0.0

    @property
    def in_flight(self) -> int:
        """Number of calls that workers have."""
        return sum(len(worker.calls) for worker in self.workers.values())

    # Calls

    def handle_request(
        self,
        envelope: list[Any],
        sender: bytes,
        body: list[Any],
        size: int,
        name: bytes,
        now: float,
    ) -> None:
        """Assign a request to a worker, queue it, or refuse it with 503; see :class:`Call`.

        :param sender: user and address of the client, see :mod:`pyams_zmq.pool.protocol`
        :param now: present time in seconds
        """
        if self.is_draining:
            self._refused += 1
            self._send_reply(envelope, [DRAINING_REPLY])
            return
        key = next(self._numbers).to_bytes(8, 'big')
        method = self.methods.get(name, self.other_methods)
        call = Call(key, envelope, key + sender, body, size, name, method, now)
        if self._queue or not self._assign(call):
            for refused in self._queue.put(call):
                self._refuse_overload(refused)

    def handle_reply(self, route: bytes, key: bytes, reply: list[Any], now: float) -> None:
        """Send the reply of a worker to its client; drop it if the call is unknown."""
        worker = self.workers.get(route)
        if worker is None:
            return
        call = worker.calls.pop(key, None)
        if call is not None:
            worker.replies += 1
            # Assign the next call before replying, so that the worker does not wait.
            self._release(worker)
            self._finish(call, reply, now)
        elif key in worker.unknown_calls:
            worker.unknown_calls.discard(key)
            self._release(worker)

    def _refuse_overload(self, call: Call) -> None:
        self._refused += 1
        text = f'The service is overloaded: {len(self._queue)} calls wait, try again later'
        self._send_refusal(call.envelope, [encode([503, text])])

    def _release(self, worker: WorkerState) -> None:
        if worker.is_open and worker.in_flight < worker.slots:
            self._free.append(worker)
        self.assign_queued()

    def _finish(self, call: Call, reply: list[Any], now: float) -> None:
        call.method.count(now - call.received, reply)
        self._send_reply(call.envelope, reply)

    def assign_queued(self) -> None:
        """Assign calls that wait to free workers."""
        while self._queue and self._free:
            call = self._queue.take()
            if call.method is self.other_methods:  # a worker may have announced it since
                call.method = self.methods.get(call.name, self.other_methods)
            if not self._assign(call):
                self._queue.put_back(call)
                break

    def _assign(self, call: Call) -> bool:
        if self._is_ordered and self.in_flight:
            return False
        while self._free:
            worker = self._free.popleft()
            if worker.is_open:
                if self._send_request(worker, call):
                    worker.calls[call.key] = call
                    return True
                worker.is_open = False  # its connection is lost
                worker.needs_ready = True
        return False

    # Workers

    def handle_ready(
        self,
        route: bytes,
        info: Mapping[str, Any],
        now: float,
        *,
        stream: Any = None,
        user: str = '',
    ) -> WorkerState:
        """Register a worker, or register it again after a lost connection.

        In the second case, the calls that *info* does not contain were lost on their way. The
        worker gets no calls before `assign_queued`.

        :param info: data of READY
        :param stream, user: see :class:`WorkerState`
        :raises KeyError, TypeError, ValueError: *info* is incomplete or invalid
        """
        keys = {bytes.fromhex(key) for key in info['calls']}
        worker = self.workers.get(route)
        if worker is not None:
            worker.update(info)
        elif len(self.workers) >= MAX_WORKERS:
            raise ValueError(f'The limit of {MAX_WORKERS} workers is reached')
        else:
            worker = WorkerState(route, info, now, stream, user)
        self._add_methods(info['methods'], info['repeatable'])
        self._add_descriptions(info.get('described', {}))
        worker.last_seen = now
        self.workers[route] = worker
        lost = [call for key, call in worker.calls.items() if key not in keys]
        for call in lost:
            del worker.calls[call.key]
        self._free = deque(each for each in self._free if each is not worker)
        self._register_jobs(worker, info, keys)
        worker.unknown_calls = keys - worker.calls.keys() - worker.jobs
        if worker.is_open:
            self._free.extend([worker] * (worker.slots - worker.in_flight))
        self._repeat(lost, 'lost its connection', now)
        return worker

    def _register_jobs(
        self, worker: WorkerState, info: Mapping[str, Any], keys: set[bytes]
    ) -> None:
        """Do nothing: without a journal there are no jobs."""

    def _add_methods(self, names: Iterable[str], repeatable: Collection[str]) -> None:
        for name in names:
            key = str(name).encode()
            if key in self.methods or len(self.methods) < MAX_METHODS:
                self.methods.setdefault(key, MethodStats()).repeatable = name in repeatable

    def _add_descriptions(self, described: Mapping[str, Any]) -> None:
        """Keep what a worker says about its methods, in the place of what others have said."""
        for name, description in described.items():
            if name.encode() in self.methods:
                self.descriptions[name] = trim(description)

    def handle_heartbeat(self, route: bytes, memory: int, now: float) -> bool:
        """Note that a worker is alive.

        :param memory: resident memory of the worker in MiB
        :return: False if the worker is unknown, or has to send READY again
        """
        worker = self.workers.get(route)
        if worker is None:
            return False
        worker.last_seen = now
        worker.memory = memory
        return not worker.needs_ready

    def find_late(self, now: float) -> list[WorkerState]:
        """Return the workers whose next heartbeat is late."""
        return [
            worker
            for worker in self.workers.values()
            if now - worker.last_seen > worker.interval and not worker.is_watched
        ]

    def handle_disconnect(self, route: bytes, was_asked: bool = False) -> None:
        """Assign no more calls to a worker, which finishes those that it has.

        :param was_asked: true if it leaves because it was asked to
        """
        worker = self.workers.get(route)
        if worker is not None:
            worker.is_open = False
            worker.was_asked = worker.was_asked or was_asked

    def handle_reject(self, route: bytes, key: bytes) -> None:
        """Put a call that a worker has not started in front of the queue."""
        worker = self.workers.get(route)
        if worker is not None and (call := worker.calls.pop(key, None)) is not None:
            self._queue.put_back(call)
            if self.is_draining:
                self._refuse_queue()
            self._release(worker)  # unless it is leaving, it takes a call as soon as it can

    def remove(self, route: bytes, now: float, reason: str = 'died') -> None:
        """Remove a worker, and repeat or fail its calls.

        :param reason: verb for the error text of its calls
        """
        worker = self.workers.pop(route, None)
        if worker is not None:
            worker.is_open = False
            calls, worker.calls = list(worker.calls.values()), {}
            self._repeat(calls, reason, now)
            self.assign_queued()

    def _repeat(self, calls: list[Call], reason: str, now: float) -> None:
        for call in reversed(calls):  # the first one is put back last, before the others
            call.attempts += 1
            if call.method.repeatable and call.attempts < MAX_ATTEMPTS and not self.is_draining:
                self._repeated += 1
                self._queue.put_back(call)
            else:
                self._lost += 1
                text = f'The worker {reason} during this call'
                self._finish(call, [encode([502, text])], now)

    def check(self, now: float) -> list[WorkerState]:
        """Remove the workers that have missed their heartbeats.

        :return: those of them that had not left: each has calls, or was expected to take more
        """
        elapsed, self._checked_at = now - self._checked_at, now
        lost = []
        for worker in list(self.workers.values()):
            if elapsed > max(SUSPENDED, worker.interval):
                worker.last_seen = now
            elif (
                now - worker.last_seen > worker.interval * MISSED_HEARTBEATS
                and not worker.is_watched
            ):
                if worker.is_open or worker.needs_ready or worker.in_flight:
                    lost.append(worker)
                self.remove(worker.route, now, SILENT)
        return lost

    # The end

    def drain(self) -> None:
        """Refuse the calls that wait, and all further ones."""
        self.is_draining = True
        self._refuse_queue()

    def _refuse_queue(self) -> None:
        while self._queue:
            self._refused += 1
            self._send_reply(self._queue.take().envelope, [DRAINING_REPLY])

    def abort(self, now: float) -> None:
        """Fail the calls that workers have not finished in time."""
        for route in list(self.workers):
            self.remove(route, now, 'was stopped')

    def stats(self, now: float) -> dict[str, Any]:
        """Return the statistics, as JSON types."""
        methods = {
            name.decode(): method.stats()
            for name, method in [*self.methods.items(), (b'(others)', self.other_methods)]
            if method.latency.count
        }
        return {
            **sum_up(methods),
            'refused': self._refused,
            'repeated': self._repeated,
            'lost': self._lost,
            'in_flight': self.in_flight,
            'queue': len(self._queue),
            'queue_limit': self._queue.limit,
            'queue_bytes': self._queue.size,
            'oldest': self._queue.age(now),
            'methods': methods,
            'workers': [worker.stats(now) for worker in self.workers.values()],
        }
