# SPDX-License-Identifier: ZPL-2.1
"""Bounds the connections of the bound sockets of a server, in number, in bytes and in time.

libzmq limits neither the number of connections nor the bytes that wait for a peer, and it keeps a
peer that stops in the middle of a message. The monitor of a socket reports the descriptor of each
connection that libzmq accepts; `shutdown(2)` ends a connection, and libzmq handles that as the end
of any other peer. Of ipc connections only the number is bounded.
"""

import logging
import os
import resource
import socket as network
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from typing import Any

import zmq

from pyams_zmq.auth import AccessPolicy
from pyams_zmq.process.connections import (
    NEW,
    QUIET,
    USED,
    Connection,
    Listener,
    local_name,
    open_null,
)
from pyams_zmq.process.growth import ReceivedMemory
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.context import MAX_DESCRIPTORS
from pyams_zmq.wire.frames import EVENTS, NOBLOCK, POLLIN
from pyams_zmq.wire.monitor import close_monitor, open_monitor, parse_event
from pyams_zmq.wire.traffic import Traffic

LOGGER = logging.getLogger('PyAMS (zmq)')

TICK = 0.025
"""Seconds between two looks at new connections and at the memory of the process, while peers are
connected"""

MEMORY_STEP = 16 * 1024 * 1024
"""Bytes by which the memory of the process grows until all connections are checked"""

MAX_OVERHEAD = 64 * 1024 * 1024
"""Bytes that libzmq may take for waiting frames in addition to their own size, which matters for
millions of small frames"""

MAX_RATIO = 40
"""Times its size on the wire that libzmq takes for a frame of two bytes, and something more"""

UNADMITTED_SIZE = 4096
"""Bytes that a peer may send before its handshake has succeeded, which needs less than 1 KiB"""

RESERVE = 1024
"""Descriptors that connections leave to the rest of the process, and to those that libzmq accepts
before they are closed; half of a limit that is lower than two times this"""

REPORT_INTERVAL = 10.0
"""Seconds between two log entries about closed connections"""

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED


def _usable_descriptors() -> int:
    """Return how many descriptors this process may use for everything, without the reserve."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_DESCRIPTORS * 16 if soft == resource.RLIM_INFINITY else soft
    return limit - min(RESERVE, limit // 2)


class ConnectionGuard:
    """Closes connections that use more than their share; runs in the thread of the authenticator.

    The thread calls `step` before it answers a request of libzmq (RFC 27/ZAP): so a connection is
    known before its first message.

    :param name: name of the server, for the log
    :param limits: its limits, see :class:`~pyams_zmq.process.server_socket.SocketLimits`
    :ivar wake: wakes the thread, which then waits for the sockets in `polled`
    """

    def __init__(self, name: object, limits: Any):
        self.listeners: list[Listener] = []
        self.wake: Callable[[], None] = lambda: None
        self._name = name
        self._limits = limits
        # `dup2` needs no free descriptor; the duplicate stays the same connection when libzmq
        # closes its own meanwhile, and another file gets the number. AF_UNIX has the longest names.
        self._probe = network.socket(network.AF_UNIX)
        self._null = open_null()
        self._statm = -1
        with suppress(OSError):
            self._statm = os.open('/proc/self/statm', os.O_RDONLY | os.O_CLOEXEC)
        self._memory = 0
        self._received_memory = ReceivedMemory()
        self._tick = self._scan = self._report = self._quiet_at = 0.0
        self._is_idle = True  # no connections: the thread sleeps until the next peer connects
        self._usable = 0
        self._is_crowded = False
        self._is_full_until = 0.0
        self._closed: dict[str, int] = {}

    def close(self) -> None:
        """Close the monitors, and the descriptors of this object."""
        while self.listeners:
            self.listeners.pop().monitor.close(0)
        self._probe.close()
        for fd in (self._null, self._statm):
            if fd >= 0:
                os.close(fd)
        self._null = self._statm = -1

    # In the thread that binds

    @contextmanager
    def watch(self, socket: Any, policy: AccessPolicy) -> Iterator[Callable[[str], Listener]]:
        """Watch the connections of a socket, which is bound in the block.

        :param policy: access policy of its peers
        :return: function to call with the bound address
        """
        monitor = open_monitor(socket, _EVENTS)
        try:
            yield partial(self._add, monitor, policy)
        except BaseException:
            close_monitor(socket, monitor)
            raise

    def _add(self, monitor: Any, policy: AccessPolicy, uri: str) -> Listener:
        listener = Listener(uri, monitor, policy)
        self.listeners.append(listener)
        self.wake()
        return listener

    # In the thread of the authenticator

    @property
    def polled(self) -> list[Any]:
        """The sockets to wait for: the first peer wakes the thread, and each one in a crowd.

        Soon after the last peer has left, the next one does not count as the first: a tick notices
        it. Programs that connect for each call would wake the thread twice each time.
        """
        if not (self._is_idle or self._is_crowded):
            return []
        return [each.monitor for each in self.listeners]

    @property
    def timeout(self) -> float | None:
        """Seconds until the next step, None if no step is due."""
        return None if self._is_idle else max(0.0, self._tick - monotonic())

    def step(self) -> None:
        """Note new connections, and those that have ended; when that is due, check all of them."""
        now = monotonic()
        if now >= self._tick:
            self._usable = self._usable_descriptors()  # the limit may be changed
        for listener in list(self.listeners):
            self._read_events(listener, now)
        if any(each.connections for each in self.listeners):
            self._quiet_at = now + QUIET
        self._is_idle = now >= self._quiet_at
        if now < self._tick or self._is_idle:
            return
        self._tick = now + TICK
        memory = self._read_memory()
        limits = self._limits
        patience = limits.heartbeat_interval + limits.heartbeat_timeout
        is_due = now >= self._scan
        if is_due or memory > self._memory + MEMORY_STEP:
            self._memory = memory
            if is_due:
                self._scan = now + min(2.5, max(TICK, patience / 4))
            for listener in self.listeners:
                self._check(listener, now, patience)
            self._check_overhead(memory)
        self._memory = min(self._memory, memory)
        if self._closed and now >= self._report:
            self._report = now + REPORT_INTERVAL
            self._log_closed()

    def _read_memory(self) -> int:
        try:
            return int(os.pread(self._statm, 256, 0).split()[1]) * resource.getpagesize()
        except OSError:  # /proc is not mounted: the peak is a substitute
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _read_events(self, listener: Listener, now: float) -> None:
        # While this thread works libzmq accepts more, and without a descriptor it aborts.
        monitor, newest = listener.monitor, -1
        is_full = now < self._is_full_until
        while monitor.get(EVENTS) & POLLIN:
            event, fd = parse_event([monitor.recv(NOBLOCK)])
            monitor.recv(NOBLOCK)  # the address
            if event == zmq.EVENT_MONITOR_STOPPED:
                self.listeners.remove(listener)
                monitor.close(0)
                return
            if event == zmq.EVENT_DISCONNECTED:  # sent before another connection gets the number
                listener.note_end(fd)
                continue
            listener.connections[fd] = Connection(now)
            if is_full and fd >= self._last_descriptor(listener):
                self._end_all(listener, [fd])
            else:
                newest = max(newest, fd)
        if newest >= 0:
            self._is_crowded = newest > self._usable // 2
            is_beyond = newest >= self._last_descriptor(listener)
            if is_beyond or len(listener.connections) > self._max_connections(listener):
                self._make_room(listener, now)

    def _last_descriptor(self, listener: Listener) -> float:
        return self._usable if listener.max_connections is None else inf

    def _inspect(
        self, listener: Listener, chosen: Iterable[int] | None = None
    ) -> Iterator[tuple[int, Connection, Traffic | None]]:
        """Return all or some connections, with their traffic; remove those that have ended.

        Until the next one, `_probe` is a duplicate of the connection.
        """
        try:
            for fd in list(listener.connections) if chosen is None else chosen:
                try:
                    os.dup2(fd, self._probe.fileno(), inheritable=False)
                    is_ours = local_name(self._probe) in listener.names
                except OSError:
                    is_ours = False
                if is_ours:
                    connection = listener.connections[fd]
                    connection.counted = connection.received
                    yield fd, connection, Traffic.read(self._probe)
                else:
                    listener.note_end(fd)
        finally:
            os.dup2(self._null, self._probe.fileno(), inheritable=False)

    def _check(self, listener: Listener, now: float, patience: float) -> None:
        for _fd, connection, traffic in self._inspect(listener):
            if traffic is not None and not connection.is_ended:
                reason = self._find_fault(listener, connection, traffic, now, patience)
                if reason is not None:
                    self._end(listener, connection, reason)

    def _check_overhead(self, memory: int) -> None:
        """End the connection with the most waiting bytes, if these take much more memory."""
        waiting = [
            (connection.unread, number, fd)
            for number, listener in enumerate(self.listeners)
            for fd, connection in listener.connections.items()
            if connection.unread > UNADMITTED_SIZE and not connection.is_ended
        ]
        overhead = self._received_memory.measure_overhead(
            memory, sum(unread for unread, *_rest in waiting)
        )
        if overhead <= MAX_OVERHEAD:
            return
        unread, number, fd = max(waiting)
        if unread * MAX_RATIO < overhead:  # other sockets of this process have received it
            return
        listener = self.listeners[number]
        for _fd, connection, _traffic in self._inspect(listener, [fd]):
            reason = (
                f'small frames that waited to be read took {MAX_OVERHEAD >> 20} MiB more memory'
            )
            self._end(listener, connection, reason)
        self._received_memory.reset()

    def _find_fault(
        self,
        listener: Listener,
        connection: Connection,
        traffic: Traffic,
        now: float,
        patience: float,
    ) -> str | None:
        """Return why a connection has to be closed, or None."""
        if connection.measure_stall(traffic, now) > patience:
            return 'the host of the peer does not answer'
        unread = traffic.received - connection.counted
        if unread > UNADMITTED_SIZE and not listener.is_admitted(traffic):
            return f'more than {UNADMITTED_SIZE} bytes came before the handshake was done'
        if not listener.counts:
            return None
        rest = connection.unread = listener.track(connection, traffic, now)
        unsent = connection.sent - connection.last_sent - traffic.written
        reason = self._check_sizes(rest, unsent)
        is_silent = traffic.since_received > patience and not connection.owed > 0
        if (
            reason is None
            and is_silent
            and listener.has_part(connection)
            and listener.is_fault(connection, rest, now)
        ):
            reason = f'a part of a message was not continued within {patience:g} s'
        return reason

    def _check_sizes(self, unread: int, unsent: int) -> str | None:
        limits = self._limits
        if unread > max(limits.receive_size, 2 * limits.max_message_size):
            return f'more than {limits.receive_size} bytes waited to be read (receive_size)'
        if unsent > limits.send_size:
            return f'more than {limits.send_size} bytes waited to be sent (send_size)'
        return None

    def _max_connections(self, listener: Listener) -> int:
        own = listener.max_connections
        return self._limits.max_connections if own is None else own

    def _usable_descriptors(self) -> int:
        """Return how many descriptors may be used without those that are set aside."""
        usable = _usable_descriptors()
        aside = sum(each.max_connections or 0 for each in self.listeners)
        return max(usable - aside, usable // 2)

    def _count_excess(self) -> int:
        aside = sum(
            min(each.max_connections, len(each.connections))
            for each in self.listeners
            if each.max_connections is not None
        )
        try:
            used = len(os.listdir('/proc/self/fd'))
        except OSError:  # /proc is not mounted, or all descriptors are used
            used = sum(len(each.connections) for each in self.listeners) + RESERVE // 2
        return used - aside - self._usable_descriptors()

    def _make_room(self, listener: Listener, now: float) -> None:
        """Close connections because there are too many, see :meth:`Listener.rank`."""
        connections = list(self._inspect(listener))
        limit = self._max_connections(listener)
        excess = max(
            len(connections) - limit,
            0 if listener.max_connections is not None else self._count_excess(),
        )
        if excess <= 0:
            return
        ranks = sorted(
            (*rank, fd)
            for fd, connection, traffic in connections
            if (rank := listener.rank(connection, traffic, now)) is not None
        )
        # Up to a quarter of the connections, new ones replace idle ones; others replace each other.
        new = [rank for rank in ranks if rank[0] == NEW]
        surplus = new[: max(0, len(new) - limit // 4)]
        unused, idle = bisect_left(ranks, (USED,)), len(ranks) - len(new)
        ranks = [*ranks[:unused], *surplus, *ranks[unused:idle], *new[len(surplus) :]]
        idle += len(surplus)
        if idle < excess:
            self._is_full_until = now + TICK * 8
        # More than needed of the idle ones, so that not each further connection needs a check.
        most = max(excess, min(idle, excess + limit // 10))
        self._end_all(listener, [fd for *_rank, fd in ranks[:most]])

    def _end_all(self, listener: Listener, chosen: Iterable[int]) -> None:
        for fd, connection, _traffic in self._inspect(listener, chosen):
            self._end(listener, connection, 'there were too many connections (max_connections)')
            listener.connections.pop(fd, None)

    def _end(self, listener: Listener, connection: Connection, reason: str) -> None:
        connection.is_ended = True
        with suppress(OSError):  # the peer has left meanwhile
            self._probe.shutdown(network.SHUT_RDWR)
        text = f'{listener.uri}: {reason}'
        self._closed[text] = self._closed.get(text, 0) + 1

    def _log_closed(self) -> None:
        closed, self._closed = self._closed, {}
        for text, number in closed.items():
            LOGGER.warning('%s closed %d connections to %s', self._name, number, text)
