# SPDX-License-Identifier: ZPL-2.1
"""The process of a pool that talks to clients and workers.

It talks to clients as any other process does, and to workers in the words of
:mod:`pyams_zmq.words`.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from ipaddress import IPv6Address, ip_address
from time import monotonic
from types import MappingProxyType
from typing import Any

import zmq
from pyramid.registry import Registry
from tornado.ioloop import IOLoop

from pyams_zmq.auth import AccessPolicy, Users, parse_users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.pool.protocol import ROUTE_SIZE, SEPARATOR, Command
from pyams_zmq.pool.scheduler import Call, Scheduler, Worker, peek_type
from pyams_zmq.process import REFUSAL_TURN, REFUSAL_TURNS, SIZE_SLACK, TERM_GRACE, ZMQProcess
from pyams_zmq.process.descendants import open_pidfd
from pyams_zmq.process.server_socket import limit, protect, warn_of_exposure
from pyams_zmq.process.stream import ReplyStream, ZMQStream
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.frames import MORE, NOBLOCK, POLLIN, send_frame
from pyams_zmq.wire.message import decode_reply, encode

LOGGER = logging.getLogger('PyAMS (zmq)')

STATS_TYPE = 'pyams_zmq.stats'
"""Type of the message that the broker itself answers; no method can have this name"""

WORKER_DOMAIN = b'pyams_zmq workers'
LOCAL_DOMAIN = b'pyams_zmq local workers'

_STATS = STATS_TYPE.encode()
_PEEKED = 256  # bytes at the beginning of a message that hold its type
_WAIT = 2  # milliseconds for the next message, before the loop has its turn
_TURN = 0.02  # seconds after which it has it in any case
_LARGE = 64 * 1024  # bytes of a frame that is not worth copying
_FRAME_SIZE = 64  # bytes that a frame takes beside its own, about
_LAST_WORDS = 0.02  # seconds that the last words of a dead worker may take
_TICK = 0.25  # seconds between two looks for lost workers
_GONE = frozenset({zmq.EHOSTUNREACH, zmq.EAGAIN})


class _Gate(ZMQStream):
    """Stream that leaves its messages to the broker, which looks after all sockets at once."""

    def __init__(self, socket: Any, loop: Any, take: Callable[..., None], wake: Callable[[], None]):
        self._take = take
        self._wake = wake
        self._receive_frame = socket.recv
        socket.router_mandatory = True
        super().__init__(socket, loop)

    def _handle_events(self, fd: Any, events: int) -> None:
        if not self.closed():
            self._wake()

    def read(self) -> None:
        """Take a message; there has to be one."""
        receive = self._receive_frame
        first = frame = receive(NOBLOCK, False)
        self.received += 1
        frames = []
        while frame.more:
            frame = receive(NOBLOCK, False)
            frames.append(frame.bytes if len(frame) < _LARGE else frame)
        try:
            self._take(self, first, frames)
        except Exception:
            LOGGER.exception('A message could not be handled')

    def send_frames(self, frames: Sequence[Any]) -> bool:
        """Send a message; tell if its peer is there, and takes it."""
        try:
            for frame in frames[:-1]:
                send_frame(self.socket, frame, MORE)
            send_frame(self.socket, frames[-1], NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in _GONE:
                raise
            return False
        return True


class PoolBroker(ZMQProcess):
    """Hands the messages of clients to the workers of a pool, each to a free one.

    :param bind_addr: address of the clients
    :param local_address: ipc address of the workers of this pool, in a folder that nobody else may
        enter
    :param auth: users that may connect, as for a ZMQProcess
    :param clients: addresses that may connect, as for a ZMQProcess
    :param curve: keys, as for a ZMQProcess
    :param worker_address: address of workers of other machines
    :param worker_auth: users that may connect as workers
    :param worker_curve: keys of workers
    :raises ValueError: as ZMQProcess does; and for workers of other machines without credentials
    """

    queue_limit: int = 1000
    queue_size: int = 256 * 1024 * 1024
    stats_users: Collection[str] = ()
    json_load: int = -1

    _wants_peers = True  # until the first worker says what it wants
    _knows_workers = False
    _pumps_again = False

    def __init__(
        self,
        bind_addr: Any,
        local_address: str,
        auth: Users = None,
        clients: str | Iterable[str] | None = None,
        *,
        curve: CurveServer | None = None,
        worker_address: Any = None,
        worker_auth: Users = None,
        worker_curve: CurveServer | None = None,
    ):
        # Subscribers to the start of a process open what handlers need: here they have none.
        registry = Registry('pyams_zmq broker')
        super().__init__(bind_addr, ZMQMessageHandler, auth, clients, registry, curve=curve)
        self.worker_passwords = check_workers(worker_address, worker_auth, worker_curve)
        self.local_address = local_address
        self.worker_address = worker_address
        self.worker_curve = worker_curve
        self._worker_auth = worker_auth
        self._addresses: list[str] = []
        self._gates: dict[Any, _Gate] = {}
        self._polled: list[tuple[Any, int]] = []
        self._watches: dict[bytes, ExitStack] = {}

    def init_stream(self) -> None:
        """Bind the sockets of clients and workers."""
        self._scheduler = Scheduler(
            self._deliver, self._reply, queue_limit=self.queue_limit, queue_size=self.queue_size
        )
        self._access: Any = self.auth_thread
        self._set_worker_policies()
        self._front = self._open(self.bind_addr, self._take_request)
        self.rep_stream = self._front
        self._local = self._open(self.local_address, self._take_word, LOCAL_DOMAIN)
        if self.worker_address is not None:
            self._open(
                self.worker_address,
                self._take_word,
                WORKER_DOMAIN,
                self.worker_passwords,
                self.worker_curve,
            )
        self._tick()

    def _open(
        self,
        address: Any,
        take: Callable[..., None],
        domain: bytes | None = None,
        passwords: Mapping[str, str] = MappingProxyType({}),
        curve: CurveServer | None = None,
    ) -> _Gate:
        endpoint = Endpoint.parse(address, bind=True)
        socket = self.context.socket(zmq.ROUTER)
        try:
            limit(socket, self, self.max_message_size + SIZE_SLACK)
            socket.ipv6 = endpoint.is_ipv6
            if domain is None:
                self._bind(socket, endpoint)
            else:
                socket.maxmsgsize = -1  # a reply may be larger than a request
                socket.sndhwm = socket.rcvhwm = 0  # there are no more calls than slots
                socket.router_handover = True  # a worker may come back before we know it was away
                protect(socket, curve, bool(passwords), domain)
                uri = self._listen(socket, endpoint)
                warn_of_exposure(self.name, uri, curve, bool(passwords))
            self._addresses.append(socket.last_endpoint.decode())
        except BaseException:
            socket.close(0)
            raise
        gate = _Gate(socket, self.loop, take, self._wake)
        self._streams.add(gate)
        self._gates[socket] = gate
        self._polled.append((socket, POLLIN))
        return gate

    def _send_report(self, addresses: Any, error: Exception | None) -> None:
        super()._send_report(None if addresses is None else self._addresses, error)

    # Access

    def _set_worker_policies(self) -> None:
        keys = () if self.worker_curve is None else self.worker_curve.clients
        policies = self._access.policies
        policies[LOCAL_DOMAIN] = AccessPolicy({}, ())  # the folder keeps others away
        policies[WORKER_DOMAIN] = self._worker_policy = AccessPolicy(
            self.worker_passwords, (), keys
        )

    def reload(self) -> None:
        """Read users and keys again, also those of workers."""
        super().reload()
        if self._is_owner() or self.worker_address is None:
            return
        try:
            self.worker_passwords = parse_users(self._worker_auth)
            if self.worker_curve is not None:
                self.worker_curve.reload()
        except ValueError as error:
            LOGGER.error('%s keeps the users and keys of workers: %s', self.name, error)
            return
        self._set_worker_policies()
        for worker in list(self._scheduler.workers.values()):
            if not self._admits(worker.where, worker.user):
                self._lose(worker.route, 'is not let in any more')
        self._pump()

    def _admits(self, gate: _Gate, user: str) -> bool:
        return gate is self._local or self._worker_policy.admits(user)

    # Clients

    def _take_request(self, _gate: _Gate, first: Any, frames: list[Any]) -> None:
        try:
            size = frames.index(b'') + 1  # of the envelope behind the route
        except ValueError:
            self._reply([first.bytes], [ReplyStream.no_delimiter_reply])
            return
        envelope = [first.bytes, *frames[:size]]
        try:
            self._take_body(first, envelope, frames[size:])
        except ZMQMessageError as error:
            self._reply(envelope, [encode([error.status, error.text])])

    def _take_body(self, first: Any, envelope: list[Any], body: list[Any]) -> None:
        size = sum(map(len, body))
        if size > self.max_message_size:
            raise ZMQMessageError(
                413, f'Message of {size} bytes, the service takes {self.max_message_size}'
            )
        sender = b''
        if self._wants_peers or self.has_credentials:
            user = first['User-Id']
            if not self._access.policy.admits(user):
                raise ZMQMessageError(401, 'Your access was withdrawn')
            if self._wants_peers:
                sender = user.encode() + SEPARATOR + first['Peer-Address'].encode()
        name = self._peek(body)
        if name == _STATS:
            self._check_stats_right(first)
            self._reply(envelope, [encode([200, self._stats()])])
        else:
            size += sum(map(len, envelope)) + _FRAME_SIZE * (len(envelope) + len(body))
            self._scheduler.request(envelope, sender, body, size, name, monotonic())

    def _peek(self, body: list[Any]) -> bytes:
        try:
            data = body[self.json_load]
        except IndexError:
            return b''
        return peek_type(memoryview(data)[:_PEEKED] if len(data) > _PEEKED else data)

    def _check_stats_right(self, first: Any) -> None:
        user, address = first['User-Id'], first['Peer-Address']
        if not is_here(address) and user not in self.stats_users:
            raise ZMQMessageError(
                403, f'Statistics are for this machine and the users of stats_users, not {user!r}'
            )

    def _stats(self) -> dict[str, Any]:
        return {
            'pid': os.getpid(),
            'addresses': self._addresses,
            **self._scheduler.stats(monotonic()),
        }

    def _reply(self, envelope: list[Any], reply: list[Any]) -> None:
        self._front.send_frames(envelope + reply)  # a peer that is gone, or reads nothing, loses it

    # Workers

    def _deliver(self, worker: Worker, call: Call) -> bool:
        sent: bool = worker.where.send_frames([worker.route, call.header, *call.body])
        return sent

    def _take_word(self, gate: _Gate, first: Any, frames: list[Any]) -> None:
        route = first.bytes
        match frames:
            case [key, _first, *_more] if len(key):
                self._scheduler.answer(route, key, frames[1:], monotonic())
            case [b'', word, *rest]:
                self._obey(gate, first, route, word, rest)
            case _:
                LOGGER.warning('A worker says what nobody understands')

    def _obey(self, gate: _Gate, first: Any, route: bytes, word: bytes, rest: list[Any]) -> None:
        now = monotonic()
        match word, rest:
            case Command.HEARTBEAT, [memory]:
                if not self._scheduler.heard(route[:ROUTE_SIZE], int(memory), now):
                    gate.send_frames([route[:ROUTE_SIZE], b'', Command.UNKNOWN])
            case Command.READY, [info]:
                self._welcome(gate, first['User-Id'], route, decode_reply(info), now)
            case Command.DISCONNECT, []:
                self._scheduler.leave(route)
                gate.send_frames([route, b'', Command.DISCONNECT_OK])
            case Command.REJECT, [key]:
                self._scheduler.give_back(route, key)
            case Command.STATS, [] if gate is self._local:
                gate.send_frames([route, encode(self._stats())])
            case _:
                LOGGER.warning('A worker says %r, which nobody understands', word[:8])

    def _welcome(self, gate: _Gate, user: str, route: bytes, info: Any, now: float) -> None:
        known = self._scheduler.workers.get(route)
        if not self._admits(gate, user) or (known is not None and known.where is not gate):
            return
        worker = self._scheduler.ready(route, info, now, where=gate, user=user)
        wants_peers = bool(info['peers'])
        self._wants_peers = wants_peers or (self._wants_peers and self._knows_workers)
        self._knows_workers = True
        gate.send_frames([route, b'', Command.READY_OK])
        if gate is self._local and route not in self._watches:
            self._watch(worker)
        LOGGER.info('Worker %s of %s serves', worker.pid, worker.host)

    def _watch(self, worker: Worker) -> None:
        stack = ExitStack()
        pidfd = stack.enter_context(open_pidfd(worker.pid))
        self._watches[worker.route] = stack
        if pidfd is not None:
            worker.is_watched = True
            self.loop.add_handler(pidfd, partial(self._on_death, worker.route), IOLoop.READ)
            stack.callback(self.loop.remove_handler, pidfd)

    def _on_death(self, route: bytes, fd: int, events: int) -> None:
        self._unwatch(route)
        self._scheduler.leave(route)
        # What it has said before counts, and may come in later than the news of its death.
        self.loop.call_later(_LAST_WORDS, self._bury, route)

    def _bury(self, route: bytes) -> None:
        self._pump()
        self._lose(route, 'died')
        self._pump()

    def _lose(self, route: bytes, reason: str) -> None:
        self._scheduler.lose(route, monotonic(), reason)
        self._unwatch(route)

    def _unwatch(self, route: bytes) -> None:
        stack = self._watches.pop(route, None)
        if stack is not None:
            stack.close()

    # Life

    def _pump(self) -> None:
        """Handle messages, from all sockets, until none has come in for some milliseconds.

        Between two messages of a conversation there is no turn of the loop, which would take longer
        than everything else. Whatever touches the sockets calls this afterwards: it leaves them
        in a state in which their next message wakes the loop.
        """
        deadline = monotonic() + _TURN
        gates = self._gates
        while ready := zmq.zmq_poll(self._polled, _WAIT):
            for socket, _events in ready:
                gates[socket].read()
            if monotonic() > deadline:
                # Once for each turn of the loop, which would else take longer from turn to turn.
                if not self._pumps_again:
                    self._pumps_again = True
                    self.loop.add_callback(self._pump_again)
                break

    def _pump_again(self) -> None:
        self._pumps_again = False
        self._pump()

    def _wake(self) -> None:
        if not self._pumps_again:
            self._pump()

    def _tick(self) -> None:
        self._pump()  # heartbeats may wait
        for worker in self._scheduler.expire(monotonic()):
            LOGGER.error('Worker %s of %s is not heard of any more', worker.pid, worker.host)
            self._unwatch(worker.route)
        self.loop.call_later(_TICK, self._tick)
        self._pump()

    async def _drain(self) -> None:
        # Some of `drain_timeout` is left for the answers to what does not finish in time.
        deadline = monotonic() + self.drain_timeout - min(TERM_GRACE, self.drain_timeout / 2)
        self._scheduler.drain()
        turns = 0
        while turns < REFUSAL_TURNS and monotonic() < deadline:
            received = self._count_received()
            await asyncio.sleep(REFUSAL_TURN)
            self._pump()
            if not self._scheduler.in_flight:
                turns = turns + 1 if received != self._count_received() else REFUSAL_TURNS
        self._scheduler.abandon(monotonic())
        self._stop_loop()

    def _teardown(self) -> None:
        for route in list(self._watches):
            self._unwatch(route)
        super()._teardown()
        self._gates.clear()


def check_workers(address: Any, auth: Users, curve: CurveServer | None) -> dict[str, str]:
    """Check that workers of other machines have to show who they are.

    :param address: address that they connect to, None for no such workers
    :return: passwords by user name
    :raises ValueError: if not
    """
    users = parse_users(auth)
    if address is None:
        if users or curve is not None:
            raise ValueError('worker_auth and worker_curve are for a worker_address, give one')
    else:
        Endpoint.parse(address, bind=True)
        if not users and curve is None:
            raise ValueError(
                f'Give worker_auth or worker_curve: without, whoever reaches {address!r} would get '
                'the messages of all clients'
            )
        if users and curve is not None:
            raise ValueError('Give worker_auth or worker_curve: a socket has one mechanism')
    return users


def is_here(address: str) -> bool:
    """Tell if a peer is on this machine, by its address as libzmq gives it."""
    if address.startswith('localhost:'):  # of ipc
        return True
    ip = ip_address(address.partition('%')[0])
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return ip.is_loopback
