# SPDX-License-Identifier: ZPL-2.1
"""A pool: several worker processes behind one address."""

import asyncio
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from typing import Any

import zmq

from pyams_zmq.auth import AccessAttributes, Users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.exceptions import ZMQTimeoutError
from pyams_zmq.pool import protocol
from pyams_zmq.pool.broker import PoolBroker
from pyams_zmq.pool.local_port import LocalPort, LocalSecret
from pyams_zmq.pool.protocol import check_interval
from pyams_zmq.pool.supervisor import PoolSupervisor
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.pool.worker_access import make_worker_access
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process.base import ReadyProcess
from pyams_zmq.process.inspection import check_stats_users
from pyams_zmq.process.server_socket import SocketLimits
from pyams_zmq.process.service import LIMITS
from pyams_zmq.supervisor.process import SupervisingProcess
from pyams_zmq.wire.context import check_descriptors
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.job_limits import JOURNAL_SIZE
from pyams_zmq.wire.message import check_integer, check_timeout, decode_reply

__all__ = ['PoolWorker', 'ZMQPool']

_LIMITS = (*LIMITS, 'loop_factory')  # of broker and workers
_STATS_LINGER = 100  # milliseconds for a request that could not be sent yet
_PROCESS_HOOKS = (
    *('setup', 'init_stream', 'stream', 'exit', 'socket_type', '_teardown'),
    *('_on_started', '_log_start', '_report_ready', '_reload', '_drain', '_on_stopped'),
)  # of a ZMQProcess, which a pool does not have
_WORKER_LIMITS = ('concurrency', 'beat_interval', 'max_calls', 'max_memory')


class ZMQPool(AccessAttributes, SocketLimits, SupervisingProcess, ReadyProcess):
    """Serves a message handler in several processes behind one address.

    It has the arguments, the limits, and the methods `start`, `wait_ready`, `reload` and `stop` of
    a :class:`~pyams_zmq.process.ZMQProcess`. Each message goes to a free worker, or waits for one.
    `wait_ready` waits until the broker and all workers are ready. `reload` also replaces the
    workers one by one; no call is lost.

    It does not have the methods that a subclass of a ZMQProcess overrides, `setup` for instance: a
    subclass that defines one raises a TypeError. Override them in `worker_factory`. Neither can
    `workers` be a class attribute.

    :param bind_addr: address to bind, see :class:`pyams_zmq.endpoint.Endpoint`
    :param handler: class with the methods, or a message handler, see
        :class:`~pyams_zmq.process.ZMQProcess`; each worker has an instance of its own
    :param auth: users that may connect, see :func:`pyams_zmq.auth.parse_users`
    :param clients: IP addresses that may connect, as clients and as workers of other machines, see
        :func:`pyams_zmq.auth.parse_clients`
    :param registry: registry of the application, by default the current one
    :param workers: number of workers on this machine
    :param curve: keys of the server and its clients (RFC 26/CURVEZMQ)
    :param worker_address: address to bind for workers of other machines
    :param worker_auth: users that may connect as workers
    :param worker_curve: keys of the server and of the workers of other machines
    :raises ValueError: for an invalid address, number, credentials or clients, and for a
        *worker_address* without credentials
    :raises TypeError: for a *curve* or *worker_curve* of another class
    """

    #: Calls that a worker handles at a time
    concurrency: int = ZMQProcess.concurrency
    #: Function that returns a new asyncio loop for broker and workers
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = staticmethod(asyncio.new_event_loop)

    #: Calls that wait for a worker; the clients share it, and further calls get 503
    queue_limit: int = 1000
    #: Bytes of the calls that wait for a worker; further ones get 503
    queue_size: int = 256 * 1024 * 1024
    #: Bytes of the calls of one client connection that wait for a worker; further ones get 503
    client_queue_size: int = 32 * 1024 * 1024
    #: Bytes of the largest reply of a worker; the client gets 500 instead of a larger one
    max_reply_size: int = 32 * 1024 * 1024
    #: Users that may read the statistics from other machines
    stats_users: Collection[str] = ()
    #: Index of the frame with the JSON text, as of the message handler
    json_load: int = -1
    #: Seconds between two heartbeats of a worker
    beat_interval: float = PoolWorker.beat_interval
    #: Calls after which a worker is replaced; 0 for no limit
    max_calls: int = 0
    #: Resident MiB above which a worker is replaced; 0 for no limit
    max_memory: float = 0.0
    #: Seconds after the time limit of a method until its worker is replaced, or earlier
    overdue_grace: float = PoolWorker.overdue_grace
    #: File with the jobs, see :func:`pyams_zmq.jobs.zmq_job`; it is made if it is missing
    journal: str | os.PathLike[str] | None = None
    #: Bytes of that file above which no job is accepted; 0 for no limit
    journal_size: int = JOURNAL_SIZE
    #: Jobs at a time, so that calls have room; 0 for one less than all workers handle at a time
    jobs: int = 0
    #: Days that ended jobs are kept
    keep: float = 7.0
    #: Seconds from a cancel until the worker of a job that does not end is killed
    cancel_grace: float = 10.0
    #: Class of the workers
    worker_factory: Callable[..., PoolWorker] = PoolWorker

    _stop_slack = 6.0  # the workers stop after the broker

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _PROCESS_HOOKS:
            if hasattr(cls, name):
                raise TypeError(
                    f'{cls.__name__}.{name} would be ignored, a pool does not use it: define it in '
                    'a subclass of PoolWorker, the worker_factory of the pool, and pass auth, '
                    'clients and curve to the pool'
                )
        if hasattr(cls, 'workers'):
            raise TypeError(
                f'{cls.__name__}.workers would be ignored: pass workers to the constructor, as in '
                f'{cls.__name__}(address, handler, workers=2)'
            )

    def __init__(
        self,
        bind_addr: Any,
        handler: Any,
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
        super().__init__(registry)
        Endpoint.parse(bind_addr, bind=True)
        self.bind_addr = bind_addr
        self.handler = handler
        self.workers = check_integer('workers', workers, 1)
        self.set_access(auth, clients, curve)
        self.worker_address = worker_address
        self.worker_access = make_worker_access(worker_address, worker_auth, worker_curve)
        self._local_secret = LocalSecret()

    # In the parent

    def start(self) -> None:
        """Fork the pool and return at once.

        :raises ValueError: for an invalid `concurrency`, `beat_interval`, `journal_size`, `jobs`,
            `keep` or `cancel_grace`, and an empty `journal`
        :raises TypeError: for `stats_users` that are a string, and a `journal` that is not a path
        :raises ZMQStartError: in a program that cannot fork, and if `curve` was assigned
            after the construction
        """
        self.check_curve()
        check_integer('concurrency', self.concurrency, 1)
        check_interval(self.beat_interval)
        self._check_jobs()
        check_stats_users(self.stats_users)
        super().start()

    def _check_jobs(self) -> None:
        check_integer('jobs', self.jobs, 0)
        check_integer('journal_size', self.journal_size, 0)
        for name, value, least in ('keep', self.keep, None), ('cancel_grace', self.cancel_grace, 0):
            if value != least:
                try:
                    check_timeout(value)
                except ValueError:
                    raise ValueError(f'Bad {name} {value!r}: write a number above 0') from None
        if not isinstance(self.journal, str | os.PathLike | None):
            raise TypeError(f'Bad journal {self.journal!r}: write the path of a file')
        if self.journal == '':  # it would be the current folder
            raise ValueError("Bad journal '': write the path of a file, or None for no jobs")

    @property
    def bound_worker_address(self) -> str | None:
        """The bound endpoint for workers of other machines, after `wait_ready`."""
        return next(iter(self.bound_addresses[2:]), None)

    def stats(self, timeout: float = 5) -> dict[str, Any]:
        """Return the statistics of the pool; only the process that started it may call this.

        :param timeout: seconds
        :raises ZMQTimeoutError: the broker does not reply in time, or the pool is not ready
        :raises ZMQStartError: the pool was not started by this process
        :raises zmq.ZMQError: EMFILE, when this process has no descriptor left
        """
        if not self.bound_addresses:
            self.wait_ready(0)
        check_descriptors()
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.linger = _STATS_LINGER
            self._local_secret.apply(socket)
            socket.connect(self.bound_addresses[1])
            socket.send_multipart([b'', protocol.STATS])
            if not socket.poll(int(timeout * 1000)):
                raise ZMQTimeoutError(
                    f'The broker of {self.name} did not reply in {timeout} s: see its log'
                )
            stats: dict[str, Any] = decode_reply(socket.recv())
        return stats

    # In the child

    def try_reload_access(self) -> None:
        """Read users and keys for the next broker; keep those that cannot be read."""
        self.access.try_reload(self.name)
        if self.worker_address is not None:
            self.worker_access.try_reload(f'{self.name} (workers)')

    def make_broker(self, local_port: LocalPort) -> PoolBroker:
        """Return a new broker, which is not started.

        :param local_port: listener for the workers of this machine
        """
        self.try_reload_access()  # the files may have changed since the start of the pool
        broker = PoolBroker(self, local_port)
        broker.service_name = self.service_name
        for name in _LIMITS:
            setattr(broker, name, getattr(self, name))
        return broker

    def make_worker(self, address: Any, auth: Users = None) -> PoolWorker:
        """Return a new worker, which is not started.

        :param address: address of the broker
        :param auth: `'user:password'` of the worker there
        """
        worker = self.worker_factory(address, self.handler, auth, registry=self.registry)
        for name in _LIMITS + _WORKER_LIMITS:
            setattr(worker, name, getattr(self, name))
        worker.takes_jobs = self.journal is not None
        worker.service_name = self.service_name or self.name
        return worker

    def _supervise(self) -> int:
        with closing(LocalPort(self._local_secret, self.workers)) as port:
            return PoolSupervisor(self, port).run()
