# SPDX-License-Identifier: ZPL-2.1
"""The supervisor of a pool: starts, replaces and stops the broker and the workers."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from pyams_zmq.exceptions import ZMQStartError, ZMQTimeoutError
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.process.base import ReadyProcess, StopOrder
from pyams_zmq.process.lock import PrivateFolder
from pyams_zmq.supervisor.policy import SupervisedProcess
from pyams_zmq.supervisor.process import OwnedSupervisor

LOGGER = logging.getLogger('PyAMS (zmq)')

WORKER_GRACE = 2.0
"""Seconds that workers have to exit after their broker"""

BROKER = 'broker'


class PoolSupervisor(OwnedSupervisor):
    """Supervisor of the processes of a pool.

    Without a lock, the pool ends with the first process that fails to start: its owner waits for
    it. With a lock, which a service of an application has, it starts the process again, as it does
    later.

    :param pool: the ZMQPool
    :param folder: private folder for the ipc address of the broker
    """

    _replaces_all = True
    _all_beat = True

    def __init__(self, pool: Any, folder: PrivateFolder):
        local_address = f'ipc://{os.path.join(folder.path, "broker")}'
        factories: dict[str, Callable[[], ReadyProcess]] = {
            BROKER: partial(pool.make_broker, local_address)
        }
        for number in range(1, pool.workers + 1):
            factories[f'worker {number}'] = partial(pool.make_worker, local_address)
        super().__init__(pool, factories)
        self._pool = pool
        self._folder = folder
        self._addresses: Sequence[str] | None = None
        self._has_been_ready = False
        self._is_told_to_stop = False
        self._to_replace: deque[SupervisedProcess] = deque()
        self._replacement: tuple[SupervisedProcess, SupervisedProcess] | None = None

    def step(self, now: float) -> float | None:
        """Do everything that is due: read reports, start, replace and stop processes."""
        for child in list(self._children):
            self._read_report(child)
        was_stopping, replacement = self._stopping, self._replacement
        timeout = super().step(now)
        if not self._stopping:
            self._replace()
        changed = was_stopping != self._stopping or replacement != self._replacement
        return 0.0 if changed else timeout

    def _descriptors(self) -> list[int]:
        channels = [
            child.process._channel.fileno()
            for child in self._children
            if child.running and not child.ready and child.process is not None
        ]
        return channels + super()._descriptors()

    # Reports

    def _read_report(self, child: SupervisedProcess) -> None:
        process = child.process
        if not child.running or child.ready or process is None:
            return
        try:
            process.wait_ready(0)
        except ZMQTimeoutError:
            return
        except Exception as error:  # noqa: BLE001 - any error of the process
            if not self._has_been_ready and self._lock is None:
                self._fail(error)
            return
        child.ready = True
        child.short_lives = 0
        if child.name == BROKER:
            # A broker that replaces this one has to bind the same ports.
            self._addresses = process.bound_addresses
            self._pool.bind_addr, _local, *remote = self._addresses
            if remote:
                self._pool.worker_address = remote[0]
        if not self._has_been_ready and all(each.ready or each.given_up for each in self._children):
            self._has_been_ready = True
            self._pool._send_report(self._addresses, None)

    def _start(self, child: SupervisedProcess, now: float) -> None:
        child.ready = False
        super()._start(child, now)

    # Ends

    def _handle_end(self, child: SupervisedProcess, now: float) -> None:
        self._read_report(child)
        super()._handle_end(child, now)
        if child.retired:
            self._children.remove(child)

    def _restart_later(self, child: SupervisedProcess, now: float, code: int | None) -> None:
        if child.ready:  # it worked: a crash now and then does not make the delay longer
            child.due = now + self.min_delay
            LOGGER.error('%s ended with exit code %s, it is started again', child.name, code)
        else:
            super()._restart_later(child, now, code)

    def _give_up(self, child: SupervisedProcess, code: int | None) -> None:
        super()._give_up(child, code)
        workers = [each for each in self._children if each.name != BROKER]
        if child.name == BROKER or all(worker.given_up for worker in workers):
            self._fail(ZMQStartError(f'{child.name} of {self._pool.name} was given up'))
            if self._lock is not None:  # else another supervisor may start the pool again
                self._notify_given_up(self._pool, self._pool.name, 1)

    def _fail(self, error: Exception) -> None:
        """Stop all processes."""
        self._pool._send_report(None, error)
        self._exit_code = 1
        self._stopping = True

    def stop(self) -> None:
        """Let `step` stop all processes, and `run` return then."""
        self._is_told_to_stop = True
        super().stop()

    def _can_leave(self) -> bool:
        # After a failure it keeps the lock: a standby would fail in the same way.
        return super()._can_leave() and (self._lock is None or self._is_told_to_stop)

    # Replacement

    def reload(self) -> None:
        """Let the broker read users and keys again, and replace the workers one by one."""
        for child in self._children:
            if child.name == BROKER and child.running and child.process is not None:
                child.process.reload()
        self._to_replace = deque(
            each for each in self._children if each.name != BROKER and not each.retired
        )

    def _replace(self) -> None:
        if self._replacement is None:
            while self._to_replace and self._to_replace[0].retired:  # since a second SIGHUP
                self._to_replace.popleft()
            if self._to_replace and self._has_been_ready:
                old = self._to_replace.popleft()
                new = SupervisedProcess(old.name, old.factory)
                self._children.append(new)
                self._replacement = old, new
                LOGGER.info('%s is replaced', old.name)
            return
        old, new = self._replacement
        if new.given_up:
            self._children.remove(new)
            self._to_replace.clear()
            self._replacement = None
        elif old.retired:
            if not old.running:
                self._replacement = None
        elif new.ready:
            old.retired = True
            old.due = None
            if old.running and old.process is not None:
                old.process.reload()
            else:
                self._children.remove(old)

    # The end

    def _next_to_stop(self) -> list[SupervisedProcess]:
        running = super()._next_to_stop()
        brokers = [child for child in running if child.name == BROKER]
        return brokers or running

    def _stop_orders(self, process: ReadyProcess) -> Iterator[StopOrder]:
        orders = super()._stop_orders(process)
        if isinstance(process, PoolWorker):  # the broker has replied to all its calls
            order, _timeout = next(orders)
            yield order, WORKER_GRACE
        yield from orders

    def _on_owner_death(self) -> None:
        self._folder.remove()
