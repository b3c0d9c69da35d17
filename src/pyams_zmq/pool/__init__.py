# SPDX-License-Identifier: ZPL-2.1
"""A pool: several worker processes behind one address."""

import asyncio
import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import zmq
from pyramid.threadlocal import get_current_registry

from pyams_zmq.auth import AccessAttributes, Users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.exceptions import ZMQStartError, ZMQTimeoutError
from pyams_zmq.pool import protocol
from pyams_zmq.pool.broker import PoolBroker, make_worker_access
from pyams_zmq.pool.protocol import check_interval
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.process import LIMITS, ZMQProcess
from pyams_zmq.process.base import ReadyProcess, StopOrder
from pyams_zmq.process.descendants import open_pidfd
from pyams_zmq.process.lock import PrivateFolder
from pyams_zmq.process.server_socket import SocketLimits
from pyams_zmq.supervisor import Child, OwnedSupervisor
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.message import check_concurrency, decode_reply

LOGGER = logging.getLogger('PyAMS (zmq)')

STOP_SLACK = 6.0
"""Seconds after `drain_timeout` in which a pool stops its workers"""

WORKER_GRACE = 2.0
"""Seconds that workers have to exit after their broker"""

BROKER = 'broker'

_LIMITS = (*LIMITS, 'loop_factory')  # of broker and workers
_BROKER_LIMITS = ('queue_limit', 'queue_size', 'stats_users', 'json_load')
_WORKER_LIMITS = ('concurrency', 'beat_interval', 'max_calls', 'max_memory')


class ZMQPool(AccessAttributes, SocketLimits, ReadyProcess):
    """Serves a message handler in several processes behind one address.

    It has the arguments, the limits, and the methods `start`, `wait_ready`, `reload` and `stop` of
    a :class:`~pyams_zmq.process.ZMQProcess`. Each message goes to a free worker, or waits for one.

    :param bind_addr: address to bind, see :class:`pyams_zmq.endpoint.Endpoint`
    :param handler: class of the message handler; each worker has an instance of its own
    :param auth: users that may connect, see :func:`pyams_zmq.auth.parse_users`
    :param clients: IP addresses that may connect, see :func:`pyams_zmq.auth.parse_clients`
    :param registry: registry of the application, by default the current one
    :param workers: number of workers on this machine
    :param curve: keys of the server and its clients (RFC 26/CURVEZMQ)
    :param worker_address: address to bind for workers of other machines
    :param worker_auth: users that may connect as workers
    :param worker_curve: keys of the server and of the workers of other machines
    :raises ValueError: for an invalid address, number, credentials or clients, and for a
        *worker_address* without credentials
    """

    concurrency: int = ZMQProcess.concurrency
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = staticmethod(asyncio.new_event_loop)

    queue_limit: int = PoolBroker.queue_limit
    queue_size: int = PoolBroker.queue_size
    stats_users: Collection[str] = ()
    json_load: int = -1
    beat_interval: float = PoolWorker.beat_interval
    max_calls: int = 0
    max_memory: float = 0.0

    worker_factory: Callable[..., PoolWorker] = PoolWorker
    bound_worker_address: str | None = None

    _local_address: str | None = None

    def __init__(
        self,
        bind_addr: Any,
        handler: Callable[..., Any],
        auth: Users = None,
        clients: str | Iterable[str] | None = None,
        registry: Any = None,
        *,
        workers: int = 4,
        curve: CurveServer | None = None,
        worker_address: Any = None,
        worker_auth: Users = None,
        worker_curve: CurveServer | None = None,
    ):
        super().__init__(get_current_registry() if registry is None else registry)
        if workers < 1:
            raise ValueError(f'Bad workers {workers!r}: write 1 or more')
        Endpoint.parse(bind_addr, bind=True)
        self.bind_addr = bind_addr
        self.handler = handler
        self.workers = workers
        self.set_access(auth, clients, curve)
        self.worker_address = worker_address
        self.worker_access = make_worker_access(worker_address, worker_auth, worker_curve)

    # In the parent

    def start(self) -> None:
        """Fork the pool and return at once.

        :raises ValueError: for an invalid `concurrency` or `beat_interval`
        :raises ZMQStartError: in a program that gevent has patched
        """
        check_concurrency(self.concurrency)
        check_interval(self.beat_interval)
        super().start()

    def wait_ready(self, timeout: float | None = 10) -> str:
        """Wait until the broker has bound its addresses and all workers are ready.

        Afterwards, `bound_worker_address` is the bound endpoint for workers of other machines.

        :param timeout: seconds; None waits without a limit
        :return: the bound endpoint for clients, with its real port
        :raises ZMQTimeoutError: the pool is not ready after *timeout*
        :raises ZMQStartError: the pool ended, or was not started; an exception of a child that can
            be pickled, for instance a ZMQBindError, is raised itself
        """
        address = super().wait_ready(timeout)
        _clients, self._local_address, *remote = self.bound_addresses
        self.bound_worker_address = remote[0] if remote else None
        return address

    def reload(self) -> None:
        """Read users and keys again, and replace the workers one by one; no call is lost."""
        super().reload()

    def stats(self, timeout: float = 5) -> dict[str, Any]:
        """Return the statistics of the pool; only the process that started it may call this.

        :param timeout: seconds
        :raises ZMQTimeoutError: the broker does not reply in time, or the pool is not ready
        :raises ZMQStartError: the pool was not started by this process
        """
        if self._local_address is None:
            self.wait_ready(0)
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(str(self._local_address))
            socket.send_multipart([b'', protocol.STATS])
            if not socket.poll(int(timeout * 1000)):
                raise ZMQTimeoutError(f'The broker of {self.name} did not reply in {timeout} s')
            stats: dict[str, Any] = decode_reply(socket.recv())
        return stats

    def _stop_orders(self) -> Iterator[StopOrder]:
        orders = super()._stop_orders()
        order, _timeout = next(orders)
        yield order, self.drain_timeout + STOP_SLACK
        yield from orders

    # In the child

    def make_broker(self, local_address: str) -> PoolBroker:
        """Return a new broker, which is not started.

        :param local_address: ipc address of the workers on this machine
        """
        broker = PoolBroker(
            self.registry,
            self.bind_addr,
            self.access,
            local_address,
            self.worker_address,
            self.worker_access,
        )
        for name in _LIMITS + _BROKER_LIMITS:
            setattr(broker, name, getattr(self, name))
        return broker

    def make_worker(self, local_address: str) -> PoolWorker:
        """Return a new worker, which is not started.

        :param local_address: ipc address of the broker
        """
        worker = self.worker_factory(local_address, self.handler, registry=self.registry)
        for name in _LIMITS + _WORKER_LIMITS:
            setattr(worker, name, getattr(self, name))
        return worker

    def run(self) -> None:
        """Supervise broker and workers; runs in the child."""
        self._cut_off()
        try:
            with open_pidfd(self._parent_pid) as pidfd, PrivateFolder() as folder:
                code = _PoolSupervisor(self, pidfd, folder).run()
        except Exception as error:
            LOGGER.exception('%s failed', self.name)
            self._send_report(None, error)
            code = 1
        sys.exit(code)


class _PoolSupervisor(OwnedSupervisor):
    """Runs the broker and the workers of a pool."""

    _replaces_all = True
    _all_beat = True

    def __init__(self, pool: ZMQPool, pidfd: int | None, folder: PrivateFolder):
        local_address = f'ipc://{os.path.join(folder.path, "broker")}'
        factories: dict[str, Callable[[], ReadyProcess]] = {
            BROKER: partial(pool.make_broker, local_address)
        }
        for number in range(1, pool.workers + 1):
            factories[f'worker {number}'] = partial(pool.make_worker, local_address)
        super().__init__(pool, factories, pidfd)
        self._pool = pool
        self._folder = folder
        self._addresses: Sequence[str] | None = None
        self._has_been_ready = False
        self._to_replace: deque[Child] = deque()
        self._replacement: tuple[Child, Child] | None = None

    def step(self, now: float) -> float | None:
        """Do whatever is due, learn who is ready, replace workers."""
        for child in list(self._children):
            self._look_for_report(child)
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

    # Who is ready

    def _look_for_report(self, child: Child) -> None:
        process = child.process
        if not child.running or child.ready or process is None:
            return
        try:
            process.wait_ready(0)
        except ZMQTimeoutError:
            return
        except Exception as error:  # noqa: BLE001 - whatever has ended the child
            if not self._has_been_ready:
                self._fail(error)
            return
        child.ready = True
        child.short_lives = 0
        if child.name == BROKER:
            self._remember(process.bound_addresses)
        if not self._has_been_ready and all(each.ready for each in self._children):
            self._has_been_ready = True
            self._pool._send_report(self._addresses, None)

    def _remember(self, addresses: Sequence[str]) -> None:
        # The next broker has to serve the same ports.
        self._addresses = addresses
        self._pool.bind_addr, _local, *remote = addresses
        if remote:
            self._pool.worker_address = remote[0]

    def _fail(self, error: Exception) -> None:
        self._pool._send_report(None, error)
        self._exit_code = 1
        self.stop()

    def _bury(self, child: Child, now: float) -> None:
        self._look_for_report(child)
        super()._bury(child, now)
        if child.retired:
            self._children.remove(child)

    def _start_again(self, child: Child, now: float, code: int | None) -> None:
        if child.ready:  # it worked: a crash now and then is no reason to wait longer
            child.due = now + self.min_delay
            LOGGER.error('%s ended with exit code %s, it is started again', child.name, code)
        else:
            super()._start_again(child, now, code)

    def _start(self, child: Child, now: float) -> None:
        child.ready = False
        super()._start(child, now)

    def _give_up(self, child: Child, code: int | None) -> None:
        super()._give_up(child, code)
        workers = [each for each in self._children if each.name != BROKER]
        if child.name == BROKER or all(worker.given_up for worker in workers):
            self._fail(ZMQStartError(f'{child.name} of {self._pool.name} was given up'))

    # One by one

    def reload(self) -> None:
        """Let the broker read users and keys again, and replace the workers."""
        for access in (self._pool.access, self._pool.worker_access):
            with suppress(ValueError):  # the broker, which does the same, logs it
                access.reload()  # a new broker, after the death of this one, inherits it
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
                new = Child(old.name, old.factory)
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

    def _next_to_stop(self) -> list[Child]:
        running = super()._next_to_stop()
        brokers = [child for child in running if child.name == BROKER]
        return brokers or running

    def _stop_orders(self, process: ReadyProcess) -> Iterator[StopOrder]:
        orders = super()._stop_orders(process)
        if isinstance(process, PoolWorker):  # whose calls are answered, or given up
            order, _timeout = next(orders)
            yield order, WORKER_GRACE
        yield from orders

    def _abandon(self) -> None:
        self._folder.remove()
