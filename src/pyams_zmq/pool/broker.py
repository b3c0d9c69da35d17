# SPDX-License-Identifier: ZPL-2.1
"""The broker of a pool: the process between clients and workers.

Clients use it as any other process. Its workers use :mod:`pyams_zmq.pool.protocol`.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import zmq
from tornado.ioloop import IOLoop

from pyams_zmq.auth import ZAP_DOMAIN, Access, Users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.pool import protocol
from pyams_zmq.pool.local_port import LocalPort
from pyams_zmq.pool.protocol import ROUTE_SIZE, SEPARATOR
from pyams_zmq.pool.queue import Call, FairQueue
from pyams_zmq.pool.scheduler import Scheduler, WorkerState
from pyams_zmq.process import REFUSAL_TURN, REFUSAL_TURNS
from pyams_zmq.process.connections import Envelope
from pyams_zmq.process.descendants import open_pidfd
from pyams_zmq.process.reply_stream import ReplyStream
from pyams_zmq.process.server_socket import SIZE_SLACK, closed_on_error
from pyams_zmq.process.service import TERM_GRACE, ServiceProcess
from pyams_zmq.process.stream import ZMQStream
from pyams_zmq.wire.body import measure_body
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.endpoint import Endpoint, parse_ip
from pyams_zmq.wire.frames import NOBLOCK, POLLIN, SRCFD, send_frames
from pyams_zmq.wire.message import decode_reply, encode, peek_type

LOGGER = logging.getLogger('PyAMS (zmq)')

STATS_TYPE = b'pyams_zmq.stats'
"""Message type to which the broker itself replies; a method name cannot contain a dot"""

WORKER_DOMAIN = b'pyams_zmq workers'
LOCAL_DOMAIN = b'pyams_zmq local workers'

REFUSAL_PAUSE = 0.04
"""Seconds that the 503 replies of a full queue wait, at most: a client that repeats its calls at
once would keep the broker busy"""

_PEEK_SIZE = 256  # first bytes of a message, which contain its type
_POLL_TIMEOUT = 2  # milliseconds to wait for the next message before the loop may run
_TURN = 0.02  # seconds after which the loop may run in any case
_NO_COPY_SIZE = 64 * 1024  # bytes; larger frames are not copied
_FRAME_OVERHEAD = 64  # bytes of memory for a frame beside its data, approximately
_EXIT_DELAY = 0.02  # seconds that the last messages of a dead worker may take
_CHECK_INTERVAL = 0.25  # seconds between two checks for missed heartbeats
_UNREACHABLE = frozenset({zmq.EHOSTUNREACH, zmq.EAGAIN})


class _RouterStream(ZMQStream):
    """Stream of a ROUTER socket from which the broker reads, because it polls all its sockets.

    :ivar access: access rules of its peers
    :ivar listener: what is known about their connections
    """

    listener: Any

    def __init__(
        self, broker: 'PoolBroker', socket: Any, access: Access, on_message: Callable[..., None]
    ):
        self.access = access
        self._broker = broker
        self._on_message = on_message
        self._receive_frame = socket.recv
        socket.router_mandatory = True
        super().__init__(socket, broker.loop)

    def _handle_events(self, fd: Any, events: int) -> None:
        if not (self.closed() or self._broker._pump_is_scheduled):
            self._broker._pump()

    def read(self) -> None:
        """Receive a message, which must be there, and handle it."""
        receive = self._receive_frame
        first = frame = receive(NOBLOCK, False)
        self.received += 1
        frames = []
        while frame.more:
            frame = receive(NOBLOCK, False)
            frames.append(frame.bytes if len(frame) < _NO_COPY_SIZE else frame)
        try:
            self._on_message(self, first, frames)
        except Exception:
            LOGGER.exception('%s could not handle a message', self._broker.name)

    def send_frames(self, frames: Sequence[Any]) -> bool:
        """Send a message; return False if its peer is gone, or does not read."""
        try:
            send_frames(self.socket, frames)
        except zmq.ZMQError as error:
            if error.errno not in _UNREACHABLE:
                raise
            return False
        return True


class PoolBroker(ServiceProcess):
    """Sends each message of a client to a free worker of the pool, and the reply to the client.

    :param pool: the ZMQPool, which has addresses, access rules and limits
    :param local_port: listener for the workers that the pool has started
    """

    auth_thread: Any = None  # an Authenticator

    _forwards_peers = True  # until the first worker states whether it needs them
    _has_seen_workers = False
    _pump_is_scheduled = False

    def __init__(self, pool: Any, local_port: LocalPort):
        super().__init__(pool.registry)
        self.bind_addr, self.access = pool.bind_addr, pool.access
        self.local_port = local_port
        self.worker_address, self.worker_access = pool.worker_address, pool.worker_access
        self.worker_access.networks = self.access.networks
        self.queue_limit, self.queue_size = pool.queue_limit, pool.queue_size
        self.client_queue_size = pool.client_queue_size
        self.max_reply_size = pool.max_reply_size
        # Workers of other machines, and several at a time, end calls in any order anyhow.
        self.is_ordered = (pool.workers, pool.concurrency, pool.worker_address) == (1, 1, None)
        self.stats_users, self.json_load = pool.stats_users, pool.json_load
        self._by_socket: dict[Any, _RouterStream] = {}
        self._polled: list[tuple[Any, int]] = []
        self._refusals: list[tuple[Envelope, list[Any]]] = []

    def kept_listeners(self) -> list[int]:
        """Return the descriptors of inherited listeners that this process uses."""
        return [self.local_port.fileno()]

    def init_stream(self) -> None:
        """Bind the sockets for clients and workers."""
        queue = FairQueue(self.queue_limit, self.queue_size, self.client_queue_size)
        self._scheduler = Scheduler(
            self._send_request,
            self._send_reply,
            self._send_refusal,
            queue=queue,
            is_ordered=self.is_ordered,
        )
        self._client_stream = self._open(self.bind_addr, self.access, ZAP_DOMAIN)
        self._local_stream = self._open(
            self.local_port.uri, self.local_port.secret.make_access(), LOCAL_DOMAIN
        )
        if self.worker_address is not None:
            self._open(self.worker_address, self.worker_access, WORKER_DOMAIN)
        self.bound_address = self._sockets.uris[0]
        self._clients = queue.listener = clients = self._client_stream.listener
        clients.counts = True
        clients.refresh = partial(self.loop.asyncio_loop.call_soon_threadsafe, self._pump)
        self._check_workers()

    def _open(self, address: Any, access: Access, domain: bytes) -> _RouterStream:
        is_for_clients = domain == ZAP_DOMAIN
        on_message = self._handle_request if is_for_clients else self._handle_worker_message
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
        stream = _RouterStream(self, socket, access, on_message)
        stream.listener = self._sockets.listeners[socket]
        self._streams.add(stream)
        self._by_socket[socket] = stream
        self._polled.append((socket, POLLIN))
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
                    self._scheduler.remove(worker.route, monotonic(), 'lost its access')
            self._pump()

    # Clients

    def _handle_request(self, _stream: _RouterStream, first: Any, frames: list[Any]) -> None:
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
        if self._forwards_peers or self.access.has_credentials:
            user = first['User-Id']
            if not self.access.admits(user):
                raise ZMQMessageError(401, 'Your access was withdrawn')
            if self._forwards_peers:
                sender = user.encode() + SEPARATOR + first['Peer-Address'].encode()
        name = self._peek_type(body)
        if name == STATS_TYPE:
            self._check_stats_access(first['User-Id'], first['Peer-Address'])
            self._send_reply(envelope, [encode([200, self._stats()])])
        else:
            size += sum(map(len, envelope)) + _FRAME_OVERHEAD * (len(envelope) + len(body))
            self._scheduler.handle_request(envelope, sender, body, size, name, monotonic())

    def _peek_type(self, body: list[Any]) -> bytes:
        try:
            data = body[self.json_load]
        except IndexError:
            return b''
        return peek_type(memoryview(data)[:_PEEK_SIZE] if len(data) > _PEEK_SIZE else data)

    def _check_stats_access(self, user: str, address: str) -> None:
        if not parse_ip(address).is_loopback and user not in self.stats_users:
            raise ZMQMessageError(
                403,
                f'User {user!r} at {address} may not read the statistics: add it to stats_users',
            )

    def _stats(self) -> dict[str, Any]:
        return {
            'pid': os.getpid(),
            'addresses': self._sockets.uris,
            **self._scheduler.stats(monotonic()),
        }

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
        self._pump()

    # Workers

    def _send_request(self, worker: WorkerState, call: Call) -> bool:
        sent: bool = worker.stream.send_frames([worker.route, call.header, *call.body])
        return sent

    def _handle_worker_message(self, stream: _RouterStream, first: Any, frames: list[Any]) -> None:
        match frames:
            case [key, _first, *_more] if len(key):
                self._scheduler.handle_reply(first.bytes, key, frames[1:], monotonic())
            case [b'', command, *rest]:
                self._handle_command(stream, first, command, rest)
            case _:
                LOGGER.warning(
                    'A worker sent %d frames that are not a message: install the same version of '
                    'pyams_zmq for all workers',
                    len(frames),
                )

    def _handle_command(
        self, stream: _RouterStream, first: Any, command: bytes, rest: list[Any]
    ) -> None:
        route, now = first.bytes, monotonic()
        # Of many connections, those without a message are closed first.
        size = stream.listener.measure([command])
        connection = stream.listener.count_received(first, size)
        match command, rest:
            case protocol.HEARTBEAT, [memory]:
                route = route[:ROUTE_SIZE]
                if not self._scheduler.handle_heartbeat(route, int(memory), now):
                    stream.send_frames([route, b'', protocol.UNKNOWN])
            case protocol.READY, [info]:
                worker = self._register(stream, first['User-Id'], route, decode_reply(info), now)
                if worker is not None and connection is not None:
                    worker.measure_silence = partial(
                        stream.listener.measure_silence, first.get(SRCFD), connection
                    )
            case protocol.DISCONNECT, []:
                self._scheduler.handle_disconnect(route)
                stream.send_frames([route, b'', protocol.DISCONNECT_OK])
            case protocol.REJECT, [key]:
                self._scheduler.handle_reject(route, key)
            case protocol.STATS, [] if stream is self._local_stream:
                stream.send_frames([route, encode(self._stats())])
            case _:
                LOGGER.warning(
                    'A worker sent the unknown command %r: install the same version of pyams_zmq '
                    'for all workers',
                    bytes(command)[:16],
                )

    def _register(
        self, stream: _RouterStream, user: str, route: bytes, info: Any, now: float
    ) -> WorkerState | None:
        known = self._scheduler.workers.get(route)
        if not stream.access.admits(user) or (known is not None and known.stream is not stream):
            return None
        worker = self._scheduler.handle_ready(route, info, now, stream=stream, user=user)
        needs_peers = bool(info['peers'])
        self._forwards_peers = needs_peers or (self._forwards_peers and self._has_seen_workers)
        self._has_seen_workers = True
        settings = encode({'max_reply_size': self.max_reply_size})
        stream.send_frames([route, b'', protocol.READY_OK, settings])
        self._scheduler.assign_queued()
        if stream is self._local_stream and not worker.is_watched:
            self._watch(worker)
        LOGGER.info('Worker %s of %s is ready', worker.pid, worker.host)
        return worker

    def _watch(self, worker: WorkerState) -> None:
        stack = ExitStack()
        pidfd = stack.enter_context(open_pidfd(worker.pid))
        if pidfd is not None:
            worker.is_watched = True
            on_exit = partial(self._on_exit, worker.route, stack)
            self.loop.add_handler(pidfd, on_exit, IOLoop.READ)
            stack.callback(self.loop.remove_handler, pidfd)

    def _on_exit(self, route: bytes, stack: ExitStack, fd: int, events: int) -> None:
        stack.close()
        self._scheduler.handle_disconnect(route)
        # Its last replies may arrive after its exit.
        self.loop.call_later(_EXIT_DELAY, self._remove_dead, route)

    def _remove_dead(self, route: bytes) -> None:
        self._pump()
        self._scheduler.remove(route, monotonic(), 'died')
        self._pump()

    # The loop

    def _pump(self) -> None:
        """Handle messages of all sockets until none has arrived for `_POLL_TIMEOUT`.

        The loop does not run between two messages: a turn of it takes longer than all the rest. Any
        access to a ØMQ socket clears its wake-up, so every method that accesses one calls this
        afterwards: it ends when all sockets are empty, and their next message wakes the loop.
        """
        deadline = monotonic() + _TURN
        streams = self._by_socket
        while ready := zmq.zmq_poll(self._polled, _POLL_TIMEOUT):
            for socket, _events in ready:
                streams[socket].read()
            if monotonic() > deadline:
                # Once for each turn of the loop, else each turn would take longer than the last.
                if not self._pump_is_scheduled:
                    self._pump_is_scheduled = True
                    self.loop.add_callback(self._pump_again)
                break
        else:
            self._clients.drained = monotonic()

    def _pump_again(self) -> None:
        self._pump_is_scheduled = False
        self._pump()

    def _check_workers(self) -> None:
        self._pump()  # heartbeats may wait
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
        self.loop.call_later(_CHECK_INTERVAL, self._check_workers)
        self._pump()

    async def _drain(self) -> None:
        # The rest of `drain_timeout` is for the 502 replies to unfinished calls.
        deadline = monotonic() + self.drain_timeout - min(TERM_GRACE, self.drain_timeout / 2)
        self._scheduler.drain()
        turns = 0
        while turns < REFUSAL_TURNS and monotonic() < deadline:
            received = self._count_received()
            await asyncio.sleep(REFUSAL_TURN)
            self._pump()
            if not self._scheduler.in_flight:
                turns = turns + 1 if received != self._count_received() else REFUSAL_TURNS
        self._scheduler.abort(monotonic())
        self._send_refusals()


def make_worker_access(address: Any, auth: Users, curve: CurveServer | None) -> Access:
    """Return the access rules for workers of other machines, which must authenticate.

    :param address: address to bind for them, or None
    :param auth: users that may connect as workers
    :param curve: keys of the server and the workers
    :raises ValueError: an *address* without credentials, credentials without *address*, or both
        kinds of credentials
    """
    access = Access(auth, curve=curve)
    if address is None:
        if access.has_credentials:
            raise ValueError('worker_auth and worker_curve need a worker_address')
    else:
        Endpoint.parse(address, bind=True)
        if not access.has_credentials:
            raise ValueError(
                f'worker_address {address!r} needs worker_auth or worker_curve: without them, any '
                'program that reaches it would get the messages of all clients'
            )
    return access
