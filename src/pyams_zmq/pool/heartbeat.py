# SPDX-License-Identifier: ZPL-2.1
"""The thread of a worker that sends heartbeats to the broker."""

import logging
from contextlib import suppress
from math import ceil, inf
from threading import Event, Thread
from typing import Any

import zmq

from pyams_zmq.pool import protocol
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.memory import read_memory
from pyams_zmq.wire.names import needs_ipv6

LOGGER = logging.getLogger('PyAMS (zmq)')

OVERDUE = 'has a method that passed its deadline'
"""Reason of a worker to leave"""

LATE = 0.5
"""Seconds after a suspension in which what was sent before may come in"""

_CONNECT_INTERVAL = 50  # milliseconds between two checks whether a worker without a broker ends


class SuspensionCheck:
    """Notices that this process was stopped, or suspended with its machine, for some time.

    The broker may have considered the worker lost meanwhile, and given its jobs to others: one that
    was on its way must not begin. It does no I/O.

    :param limit: seconds between two turns
    """

    def __init__(self, limit: float):
        self._limit = limit
        self._last = inf
        self._late_until = -inf

    def turn(self, now: float) -> None:
        """Note that the process runs; a thread calls this at intervals."""
        if now - self._last > self._limit:
            self._late_until = now + LATE
        self._last = now

    def is_late(self, now: float) -> bool:
        """Return True if what comes in now may have been sent before a suspension."""
        return now < self._late_until or now - self._last > self._limit

    def reset(self) -> None:
        """Note that the broker knows this worker again."""
        self._late_until = -inf


class HeartbeatThread(Thread):
    """Sends heartbeats to the broker, also while the main thread computes, and checks the limits.

    :param worker: :class:`~pyams_zmq.pool.worker.PoolWorker`
    """

    def __init__(self, worker: Any):
        super().__init__(name='pyams_zmq heartbeat', daemon=True)
        self._worker = worker
        self._end = Event()
        self._is_known = False  # true if the worker knows that there was a connection

    def run(self) -> None:
        """Connect, register the worker, and send heartbeats until `stop`."""
        worker = self._worker
        worker.enter_thread()
        has_failed = False
        while not self._end.is_set():
            try:
                with worker.make_socket(worker._route + b'\1') as socket:
                    socket.linger = 0
                    socket.immediate = 1  # keeps no heartbeats; libzmq may abort if it receives
                    socket.connect(worker._broker.endpoint.encoded)
                    self._send_heartbeats(socket)
            except zmq.ZMQError as error:  # no descriptor is free, for instance
                if not has_failed:
                    LOGGER.error(
                        '%s cannot send heartbeats, and tries again: %s', worker.name, error
                    )
                has_failed = True
                self._end.wait(worker.beat_interval)

    def _send_heartbeats(self, socket: Any) -> None:
        worker = self._worker
        has_overdue = False
        memory = 0.0
        while not (self._is_known or self._end.is_set()):
            if socket.poll(_CONNECT_INTERVAL, zmq.POLLOUT):
                self._is_known = True
                worker.suspension.turn(monotonic())
                worker.loop.add_callback(worker._on_heartbeats)
            elif not socket.ipv6 and needs_ipv6(worker._broker.endpoint):
                worker.loop.add_callback(worker.connect_by_ipv6)
                return  # `run` makes another socket, with this option
        turns = ceil(worker.beat_interval / protocol.PROGRESS_INTERVAL)  # for each heartbeat
        turn = 0
        while not self._end.wait(worker.beat_interval / turns):
            worker.suspension.turn(monotonic())
            for key, progress in worker.jobs.take_progress():
                with suppress(zmq.Again):
                    socket.send_multipart([b'', protocol.PROGRESS, key, progress], zmq.NOBLOCK)
            turn += 1
            if turn % turns:
                continue
            with suppress(OSError):  # without a free descriptor the worker is still alive
                memory = read_memory()
            had_overdue, has_overdue = has_overdue, worker.rep_stream.has_overdue
            if had_overdue and has_overdue:
                worker.loop.add_callback(worker.leave, OVERDUE)
            with suppress(zmq.Again):
                socket.send_multipart([b'', protocol.HEARTBEAT, b'%d' % memory], zmq.NOBLOCK)
            if 0 < worker.max_memory < memory:
                worker.loop.add_callback(worker.leave, f'uses {memory:.1f} MiB')

    def stop(self) -> None:
        """End the thread, and wait for that."""
        self._end.set()
        self.join()
