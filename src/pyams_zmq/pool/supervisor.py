# SPDX-License-Identifier: ZPL-2.1
"""The supervisor of a pool: starts, replaces and stops the broker and the workers."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pyams_zmq.exceptions import ZMQStartError, ZMQTimeoutError
from pyams_zmq.pool.local_port import LocalPort
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.process.base import ReadyProcess, StopOrder, describe_exit_code
from pyams_zmq.supervisor.owned import OwnedSupervisor
from pyams_zmq.supervisor.policy import SupervisedProcess
from pyams_zmq.wire.log_fields import service_fields

LOGGER = logging.getLogger('PyAMS (zmq)')

WORKER_GRACE = 2.0
"""Seconds that workers have to exit after their broker"""


class PoolSupervisor(OwnedSupervisor):
    """Supervisor of the processes of a pool.

    The pool ends with the first process that fails before all are ready: its owner waits for it.
    With `retries_start`, as in the service of an application, it starts the process again, as it
    does later.

    :param pool: the ZMQPool
    :param local_port: listener at which the workers reach their broker
    """

    _replaces_all = True
    _all_beat = True

    _replacement: tuple[SupervisedProcess, SupervisedProcess] | None = None

    def __init__(self, pool: Any, local_port: LocalPort):
        factories: dict[str, Callable[[], ReadyProcess]] = {
            f'{pool.name} broker': partial(pool.make_broker, local_port)
        }
        for number in range(1, pool.workers + 1):
            factories[f'{pool.name} worker {number}'] = self._make_worker
        super().__init__(pool, factories)
        self._local_port = local_port
        self._broker = self._children[0]
        self._to_replace: deque[SupervisedProcess] = deque()

    def _make_worker(self) -> PoolWorker:
        port = self._local_port
        worker: PoolWorker = self._process.make_worker(port.uri, port.secret.auth)
        worker.local_port = port
        return worker

    @property
    def _workers(self) -> list[SupervisedProcess]:
        """The workers, without those that have been replaced."""
        return [each for each in self._children if each is not self._broker and not each.retired]

    def step(self, now: float) -> float | None:
        """Do everything that is due: read reports, start, replace and stop processes."""
        was_stopping, replacement = self._stopping, self._replacement
        timeout = super().step(now)
        if not self._stopping:
            self._check_ready()
            self._replace()
        changed = was_stopping != self._stopping or replacement != self._replacement
        return 0.0 if changed else timeout

    # Reports

    def _read_report(self, child: SupervisedProcess) -> None:
        try:
            child.process.wait_ready(0)
        except ZMQTimeoutError:
            return
        except Exception as error:  # noqa: BLE001 - any error of the process
            if not self._has_been_ready:
                if self._process.retries_start:
                    self._process._send_report(None, error)  # its clients get the reason
                else:
                    self._fail(error)
            return
        child.ready = True
        child.failures = 0
        child.has_failed = False
        if child is self._broker:
            # A broker that replaces this one has to bind the same ports.
            self._process.bind_addr, _local, *remote = child.process.bound_addresses
            if remote:
                self._process.worker_address = remote[0]

    def _check_ready(self) -> None:
        if (
            not self._has_been_ready
            and self._broker.ready
            and any(worker.ready for worker in self._workers)
            and all(each.ready or each.has_failed for each in self._children)
        ):
            self._has_been_ready = True
            self._process._send_report(self._broker.process.bound_addresses, None)

    # Ends

    def _handle_end(self, child: SupervisedProcess, now: float) -> None:
        if not child.ready:
            self._read_report(child)
        super()._handle_end(child, now)
        if child.retired:
            self._children.remove(child)

    def _restart_later(self, child: SupervisedProcess, now: float, code: int | None) -> None:
        if child.ready:  # it worked: a crash now and then does not make the delay longer
            child.due = now + self.min_delay
            text = describe_exit_code(code)
            LOGGER.error(
                '%s ended with %s; it is started again',
                child.name,
                text,
                extra=service_fields(child.name),
            )
        else:
            super()._restart_later(child, now, code)

    def _give_up(self, child: SupervisedProcess, code: int | None, error: Exception) -> None:
        """End the pool: no worker can have a handler; its clients need not wait for one."""
        for worker in self._workers:
            worker.give_up()
        self._fail(error)
        super()._give_up(child, code, error)

    def _on_failure(self, child: SupervisedProcess, code: int | None) -> None:
        super()._on_failure(child, code)
        if child is self._broker or all(worker.has_failed for worker in self._workers):
            if not (self._has_been_ready or self._stopping):
                error = ZMQStartError(f'{child.name} fails, see its log')
                self._process._send_report(None, error)
            if not (self._stopping and self._process.is_supervised):  # else that one notifies
                self._notify_given_up(self._process, self._process.name, code)

    def _fail(self, error: Exception) -> None:
        """Stop all processes."""
        self._process._send_report(None, error)
        self._exit_code = 1
        self._stopping = True

    # Replacement

    def reload(self) -> None:
        """Let the broker read users and keys again, and replace the workers one by one."""
        self._process.try_reload_access()  # the next broker may find the files unreadable
        if self._broker.running:
            self._broker.process.reload()
        self._to_replace = deque(self._workers)

    def _replace(self) -> None:
        if self._replacement is None:
            while self._to_replace and self._to_replace[0].retired:  # since a second SIGHUP
                self._to_replace.popleft()
            if self._to_replace and self._has_been_ready:
                old = self._to_replace.popleft()
                new = SupervisedProcess(old.name, old.factory)
                self._children.append(new)
                self._replacement = old, new
                LOGGER.info('%s is replaced', old.name, extra=service_fields(old.name))
            return
        old, new = self._replacement
        if new.has_failed:
            if not old.retired:
                self._children.remove(new)
            self._to_replace.clear()
            self._replacement = None
        elif old.retired:
            if not old.running:
                self._replacement = None
        elif new.ready:
            old.retired = True
            old.due = None
            if old.running:
                old.process.reload()
            else:
                self._children.remove(old)

    # The end

    def _next_to_stop(self) -> list[SupervisedProcess]:
        return [self._broker] if self._broker.running else super()._next_to_stop()

    def _stop_orders(self, process: ReadyProcess) -> Iterator[StopOrder]:
        orders = super()._stop_orders(process)
        if isinstance(process, PoolWorker):  # the broker has replied to all its calls
            yield next(orders)[0], WORKER_GRACE
        yield from orders

    def _log_late(self, child: SupervisedProcess) -> None:
        if isinstance(child.process, PoolWorker):  # the broker has replied to its call, if any
            LOGGER.info(
                '%s is ended while it works: its job begins again later',
                child.name,
                extra=service_fields(child.name),
            )
        else:
            super()._log_late(child)
