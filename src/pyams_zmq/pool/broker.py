# SPDX-License-Identifier: ZPL-2.1
"""The broker of a pool: the process between clients and workers.

Clients use it as any other process. Its workers use :mod:`pyams_zmq.pool.protocol`.
"""

import asyncio
import logging
from functools import partial
from typing import Any

import zmq
from tornado.ioloop import IOLoop

from pyams_zmq.auth import ZAP_DOMAIN, Access
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.pool.inspection import PoolInspection
from pyams_zmq.pool.job_scheduler import JobScheduler
from pyams_zmq.pool.local_port import LocalPort
from pyams_zmq.pool.mailbox import Mailbox
from pyams_zmq.pool.protocol import SEPARATOR
from pyams_zmq.pool.queue import Call, FairQueue
from pyams_zmq.pool.router_stream import RouterStream
from pyams_zmq.pool.scheduler import LOST_ACCESS, Scheduler, WorkerState
from pyams_zmq.pool.socket_pump import SocketPump
from pyams_zmq.pool.worker_messages import WorkerMessages
from pyams_zmq.process import REFUSAL_TURN, REFUSAL_TURNS
from pyams_zmq.process.connections import Envelope
from pyams_zmq.process.inspection import check_stats_access
from pyams_zmq.process.reply_stream import QUESTION, ReplyStream
from pyams_zmq.process.server_socket import SIZE_SLACK, closed_on_error
from pyams_zmq.process.service import TERM_GRACE, ServiceProcess
from pyams_zmq.wire.body import measure_body
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.message import encode, peek_type

LOGGER = logging.getLogger('PyAMS (zmq)')

WORKER_DOMAIN = b'pyams_zmq workers'
LOCAL_DOMAIN = b'pyams_zmq local workers'

REFUSAL_PAUSE = 0.04
"""Seconds that the 503 replies of a full queue wait, at most: a client that repeats its calls at
once would keep the broker busy"""

_PEEK_SIZE = 256  # first bytes of a message, which contain its type
_FRAME_OVERHEAD = 64  # bytes of memory for a frame beside its data, approximately
_CHECK_INTERVAL = 0.25  # seconds between two checks for missed heartbeats


class PoolBroker(ServiceProcess):
    """Sends each message of a client to a free worker of the pool, and the reply to the client.

    :param pool: the ZMQPool, which has addresses, access rules and limits
    :param local_port: listener for the workers that the pool has started
    """

    auth_thread: Any = None  # an Authenticator

    inspection: PoolInspection
    _jobs: Any = None  # a JobService, if the pool has a journal

    def __init__(self, pool: Any, local_port: LocalPort):
        super().__init__(pool.registry)
        self._pool = pool
        self.bind_addr, self.access = pool.bind_addr, pool.access
        self.local_port = local_port
        self.worker_address, self.worker_access = pool.worker_address, pool.worker_access
        self.worker_access.networks = self.access.networks
        self.queue_limit, self.queue_size = pool.queue_limit, pool.queue_size
        self.client_queue_size = pool.client_queue_size
        self.max_reply_size = pool.max_reply_size
        # Workers of other machines, and several at a time, end calls in any order anyhow.
        self.is_ordered = (pool.workers, pool.concurrency, pool.worker_address) == (1, 1, None)
        self.json_load = pool.json_load
        self._refusals: list[tuple[Envelope, list[Any]]] = []

    def kept_listeners(self) -> list[int]:
        """Return the descriptors of inherited listeners that this process uses."""
        return [self.local_port.fileno()]

    def init_stream(self) -> None:
        """Bind the sockets for clients and workers."""
        self.pump = SocketPump(self.loop.add_callback, self._on_drained)
        queue = FairQueue(self.queue_limit, self.queue_size, self.client_queue_size)
        make_scheduler = Scheduler if self._pool.journal is None else JobScheduler
        self._scheduler = make_scheduler(
            self._send_request,
            self._send_reply,
            self._send_refusal,
            queue=queue,
            is_ordered=self.is_ordered,
        )
        self.inspection = PoolInspection(self, self._pool.name, self._scheduler)
        if isinstance(self._scheduler, JobScheduler):
            from pyams_zmq.pool.job_service import JobService  # noqa: PLC0415 - it needs sqlite3

            self._mailbox = Mailbox()
            fd = self._mailbox.fileno()
            self.pump.add(fd, self._mailbox.read)
            self.loop.add_handler(fd, lambda *_args: self.pump.run(), IOLoop.READ)
            self._jobs = JobService(
                self._pool,
                self._scheduler,
                post=self._mailbox.post,
                reply=self._send_reply,
                is_local=lambda worker: worker.stream is self._workers.local_stream,
                check_access=partial(check_stats_access, self.stats_users),
                json_load=self.json_load,
            )
        self._workers = WorkerMessages(
            self._scheduler,
            self.loop,
            self.pump,
            jobs=self._jobs,
            stats=self.inspection.stats,
            max_reply_size=self.max_reply_size,
        )
        self._client_stream = self._open(self.bind_addr, self.access, ZAP_DOMAIN)
        self._workers.local_stream = self._open(
            self.local_port.uri, self.local_port.secret.make_access(), LOCAL_DOMAIN
        )
        if self.worker_address is not None:
            self._open(self.worker_address, self.worker_access, WORKER_DOMAIN)
        self.bound_address = self._sockets.uris[0]
        self._clients = queue.listener = clients = self._client_stream.listener
        clients.counts = True
        clients.refresh = partial(self.loop.asyncio_loop.call_soon_threadsafe, self.pump.run)
        self._check_workers()

    def _open(self, address: Any, access: Access, domain: bytes) -> RouterStream:
        is_for_clients = domain == ZAP_DOMAIN
        on_message = self._handle_request if is_for_clients else self._workers.handle
        self.auth_thread.policies[domain] = access
        endpoint = Endpoint.parse(address, bind=True)
        with closed_on_error(self.context.socket(zmq.ROUTER)) as socket:
            max_size = self.max_message_size if is_for_clients else self.max_reply_size
            self.apply_limits(socket, max_size + SIZE_SLACK, counts=endpoint.protocol == 'tcp')
            socket.ipv6 = endpoint.is_ipv6
            if not is_for_clients:
                socket.sndhwm = socket.rcvhwm = 0  # the slots of the workers limit them
                # A worker may connect again before libzmq notices that its connection is lost.
                socket.router_handover = True
            if domain == LOCAL_DOMAIN:
                self.local_port.hand_over(socket)
            self._sockets.bind(socket, endpoint.uri, access, path=endpoint.path, domain=domain)
            if domain == LOCAL_DOMAIN:
                self._sockets.listeners[socket].max_connections = self.local_port.max_connections
        stream = RouterStream(self, socket, access, on_message)
        stream.listener = self._sockets.listeners[socket]
        self._streams.add(stream)
        self.pump.add(socket, stream.read)
        return stream

    def _report_ready(self) -> None:
        self._send_report(self._sockets.uris, None)

    def _reload(self) -> None:
        super()._reload()
        if self.worker_address is None:
            return
        if self.worker_access.try_reload(f'{self.name} (workers)') and self.loop is not None:
            # Without a loop, SIGHUP came before `init_stream`: no worker is registered.
            for worker in list(self._scheduler.workers.values()):
                if not worker.stream.access.admits(worker.user):
                    self._scheduler.remove(worker.route, monotonic(), LOST_ACCESS)
            self.pump.run()

    # Clients

    def _handle_request(self, _stream: RouterStream, first: Any, frames: list[Any]) -> None:
        envelope = Envelope((first.bytes,))
        envelope.connection = self._clients.count_received(first, self._clients.measure(frames))
        try:
            size = frames.index(b'') + 1  # of the envelope after the routing id
        except ValueError:
            self._send_reply(envelope, [ReplyStream.no_delimiter_reply])
            return
        envelope.extend(frames[:size])
        try:
            self._handle_body(first, envelope, frames[size:])
        except ZMQMessageError as error:
            self._send_reply(envelope, [encode([error.status, error.text])])

    def _handle_body(self, first: Any, envelope: Envelope, body: list[Any]) -> None:
        size = measure_body(body)
        if size > self.max_message_size:
            raise ZMQMessageError(
                413, f'Message is {size} bytes; the limit is {self.max_message_size}'
            )
        sender = b''
        if self._workers.forwards_peers or self.access.has_credentials:
            user = first['User-Id']
            if not self.access.admits(user):
                raise ZMQMessageError(401, 'Your access was withdrawn')
            if self._workers.forwards_peers:
                sender = user.encode() + SEPARATOR + first['Peer-Address'].encode()
        name = self._peek_type(body)
        if name.startswith(QUESTION):
            reply = self.inspection.answer(name, first)
            if reply is not None:
                self._send_reply(envelope, [reply])
                return
        if self._jobs is not None and self._jobs.handles(name):
            self._jobs.handle(envelope, name, body, first['User-Id'], first['Peer-Address'])
        else:
            size += sum(map(len, envelope)) + _FRAME_OVERHEAD * (len(envelope) + len(body))
            self._scheduler.handle_request(envelope, sender, body, size, name, monotonic())

    def _peek_type(self, body: list[Any]) -> bytes:
        try:
            data = body[self.json_load]
        except IndexError:
            return b''
        return peek_type(memoryview(data)[:_PEEK_SIZE] if len(data) > _PEEK_SIZE else data)

    def job_stats(self) -> dict[str, Any] | None:
        """Return the statistics of the jobs; None without a journal."""
        return None if self._jobs is None else self._jobs.stats()

    def _send_reply(self, envelope: Envelope, reply: list[Any]) -> None:
        # A client that is gone, or does not read its replies, loses this one.
        is_sent = self._client_stream.send_frames(envelope + reply)
        envelope.count_reply(sum(map(len, reply)) if is_sent else None)

    def _send_refusal(self, envelope: Envelope, reply: list[Any]) -> None:
        if not self._refusals:
            self.loop.call_later(REFUSAL_PAUSE, self._end_pause)
        self._refusals.append((envelope, reply))

    def _send_refusals(self) -> None:
        refusals, self._refusals = self._refusals, []
        for envelope, reply in refusals:
            self._send_reply(envelope, reply)

    def _end_pause(self) -> None:
        self._send_refusals()
        self.pump.run()

    # Workers

    def _send_request(self, worker: WorkerState, call: Call) -> bool:
        sent: bool = worker.stream.send_frames([worker.route, call.header, *call.body])
        return sent

    # The loop

    def _on_drained(self) -> None:
        self._clients.drained = monotonic()

    def _check_workers(self) -> None:
        self.loop.call_later(_CHECK_INTERVAL, self._check_workers)  # also if this check fails
        self.pump.run()  # heartbeats may wait
        now = monotonic()
        for worker in self._scheduler.find_late(now):
            # On a slow link its heartbeats may wait behind a large reply, which is still coming in.
            worker.last_seen = max(worker.last_seen, now - worker.measure_silence())
        for worker in self._scheduler.check(now):
            LOGGER.error(
                'Worker %s of %s missed its heartbeats, and its calls are repeated or fail: see '
                'its log; raise beat_interval if its methods block all threads for so long',
                worker.pid,
                worker.host,
            )
        if self._jobs is not None:
            self._jobs.check(now)
        self.pump.run()

    async def _drain(self) -> None:
        # The rest of `drain_timeout` is for the 502 replies to unfinished calls.
        deadline = monotonic() + self.drain_timeout - min(TERM_GRACE, self.drain_timeout / 2)
        self._scheduler.drain()
        if self._jobs is not None:
            self._jobs.drain()
        turns = 0
        while turns < REFUSAL_TURNS and monotonic() < deadline:
            received = self._count_received()
            await asyncio.sleep(REFUSAL_TURN)
            self.pump.run()
            if not (self._scheduler.in_flight or (self._jobs and self._jobs.is_busy)):
                turns = turns + 1 if received != self._count_received() else REFUSAL_TURNS
        self._scheduler.abort(monotonic())
        self._send_refusals()

    def _teardown(self) -> None:
        if self._jobs is not None:
            self._jobs.close()
        super()._teardown()
