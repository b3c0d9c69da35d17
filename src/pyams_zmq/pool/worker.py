# SPDX-License-Identifier: ZPL-2.1
"""A worker of a pool: a process that gets its messages from the broker."""

import asyncio
import logging
import os
import socket as network
import sys
from contextlib import suppress
from math import inf
from typing import Any

import zmq

from pyams_zmq.auth import Users
from pyams_zmq.auth.access import FixedAccess
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.client.connection import ServiceAddress, configure
from pyams_zmq.client.permission import describe_missing_permission
from pyams_zmq.exceptions import ZMQRefusedError, ZMQStartError
from pyams_zmq.handler.description import describe
from pyams_zmq.handler.plain import make_handler
from pyams_zmq.pool import protocol
from pyams_zmq.pool.heartbeat import OVERDUE, HeartbeatThread, SuspensionCheck
from pyams_zmq.pool.local_port import LocalPort
from pyams_zmq.pool.protocol import ROUTE_SIZE
from pyams_zmq.pool.worker_jobs import WorkerJobs
from pyams_zmq.pool.worker_stream import WorkerStream
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process.stream import ZMQStream
from pyams_zmq.process.watchdog import RECYCLED
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.keepalive import keep_alive
from pyams_zmq.wire.log_fields import fields_of
from pyams_zmq.wire.message import decode_reply, encode
from pyams_zmq.wire.monitor import close_monitor, open_monitor, parse_event

LOGGER = logging.getLogger('PyAMS (zmq)')

RECONNECT = (20, 1000)
"""Milliseconds between two attempts to connect to the broker: initial and maximum"""

DISCONNECT_TIMEOUT = 5.0
"""Seconds to wait for DISCONNECT_OK from a connected broker"""

BROKER_TIMEOUT = 5.0
"""Seconds without READY_OK of a broker until the worker logs a warning"""

READY_TIMEOUT = 5.0
"""Seconds to wait for READY_OK before UNKNOWN makes the worker send READY again"""

NO_RULES = (
    'The broker of a pool decides who may connect, not a worker: pass auth, clients and curve to '
    'the pool'
)
"""Error of a worker that changes the access rules"""

_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_CONNECTION_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | _REFUSED
)
_CANCEL_GRACE = 0.02  # seconds for the end of a cancelled coroutine; calls are rejected meanwhile


class PoolWorker(ZMQProcess):
    """Processes the messages that it gets from a broker; see :class:`pyams_zmq.pool.ZMQPool`.

    It sends READY on every new connection, and heartbeats. On SIGHUP it finishes its calls, without
    a time limit, and exits; on SIGTERM it does so within `drain_timeout`. Its exit code requests
    that a supervisor replaces it.

    The broker decides who may connect. A change of the access rules in a worker, by `auth_thread`,
    `passwords` or `clients`, raises a ZMQStartError.

    :param address: address of the broker
    :param handler: class with the methods, or a message handler, see
        :class:`~pyams_zmq.process.ZMQProcess`
    :param auth: `'user:password'` of the worker at the broker
    :param registry: registry of the application, by default the current one
    :param curve: keys of the worker and the broker
    :raises ValueError: for an invalid address or invalid credentials
    """

    max_message_size: int = sys.maxsize  #: No limit: the broker checks the size
    overdue_grace: float = 1.0  #: As of ZMQProcess; earlier if the broker sends a further call
    beat_interval: float = 0.5  #: Seconds between two heartbeats to the broker
    max_calls: int = 0  #: Calls after which it is replaced; 0 for no limit
    max_memory: float = 0.0  #: Resident MiB above which it is replaced; 0 for no limit

    takes_jobs: bool = True
    """False if the pool has no journal"""

    local_port: LocalPort | None = None  #: Inherited listener of the broker, None on other machines

    is_leaving = False
    was_asked = False  #: True if somebody has asked it to leave
    is_connected = False  #: True while the broker is connected, as far as is known

    suspension: SuspensionCheck  # of this process; from `init_stream` on

    _has_been_ready = False
    _is_registered = False  # since the last connection
    _has_warned = False  # since it was registered
    _broker_timer: Any = None
    _leaves_at_start = False
    _route: bytes
    _replies = 0
    _ready_sent = -inf  # time of a READY without READY_OK
    _refusal: ZMQRefusedError | None = None
    _heartbeats: HeartbeatThread | None = None
    _sends_heartbeats = False
    _overdue_check: Any = None

    def __init__(
        self,
        address: Any,
        handler: Any,
        auth: Users = None,
        registry: Any = None,
        *,
        curve: CurveClient | None = None,
    ):
        super().__init__(address, handler, registry=registry)
        self._broker = ServiceAddress.parse(address, auth, curve)
        self.jobs = WorkerJobs()

    def start(self) -> None:
        """Fork the worker and return at once.

        :raises ValueError: for an invalid `concurrency` or `beat_interval`
        :raises ZMQStartError: in a program that cannot fork
        """
        protocol.check_interval(self.beat_interval)
        super().start()

    def set_access(self, auth: Users, clients: Any, curve: Any) -> None:
        """Set rules that cannot be changed; the broker decides who may connect.

        :raises ZMQStartError: if rules are given, or the class has its own value of `curve`
        """
        super().set_access(auth, clients, curve)
        if self.clients is not None or self.access.has_credentials:
            raise ZMQStartError(NO_RULES)
        self.access = FixedAccess(NO_RULES)

    def _is_set_up(self) -> bool:
        """Raise the error of rules that are assigned, also before the start."""
        raise ZMQStartError(NO_RULES)

    def _drop_inherited_state(self) -> None:
        super()._drop_inherited_state()
        if self.local_port is not None:
            self.local_port.close()

    def init_stream(self) -> None:
        """Connect to the broker."""
        # The last heartbeat before a suspension may be older by one interval.
        self.suspension = SuspensionCheck(self.beat_interval * (protocol.MISSED_HEARTBEATS - 1))
        self._route = os.urandom(ROUTE_SIZE)
        self._is_disconnected = asyncio.Event()
        socket = self.make_socket(self._route)
        monitor = open_monitor(socket, _CONNECTION_EVENTS)
        self.rep_stream = WorkerStream(socket, self.loop, concurrency=self.concurrency)
        self.rep_stream.process = self
        self.rep_stream.takes_jobs = self.takes_jobs
        self._monitor = ZMQStream(monitor, self.loop)
        self._monitor.on_recv(self._on_connection)
        self._streams.update([self.rep_stream, self._monitor])
        self._message_handler = make_handler(self.handler, self, self.rep_stream)
        self.rep_stream.on_recv(self._message_handler)
        self.bound_address = self._broker.endpoint.uri
        socket.connect(self._broker.endpoint.encoded)
        self._heartbeats = HeartbeatThread(self)
        self._heartbeats.start()
        self._expect_broker()
        if self._leaves_at_start:
            self.loop.add_callback(self.reload)

    def _on_connection(self, frames: list[bytes]) -> None:
        event, _value = parse_event(frames)
        if event & _REFUSED:  # libzmq does not connect again after it
            self._refusal = ZMQRefusedError(
                f'The broker at {self._broker.endpoint} refuses this worker: compare its user or '
                'keys with worker_auth and worker_curve of the pool'
            )
            self._stop_loop()
        elif event == zmq.EVENT_CLOSED:  # an attempt to connect has failed
            problem = describe_missing_permission(self._broker.endpoint)
            if problem is not None:
                self._refusal = ZMQRefusedError(f'{self._broker.endpoint}: {problem}')
                self._stop_loop()
        elif event == zmq.EVENT_DISCONNECTED:
            self.is_connected = False
            self._is_disconnected.set()  # DISCONNECT_OK will not arrive
            self._ready_sent = -inf
            self._expect_broker()
        else:
            self.rep_stream.drop_waiting()  # READY does not list them
            self.is_connected = True
            if self._sends_heartbeats:
                self.send_ready()

    def _expect_broker(self) -> None:
        """Log a warning if no broker registers this worker soon."""
        self._is_registered = False
        if self._broker_timer is None and not self._has_warned:
            self._broker_timer = self.loop.call_later(BROKER_TIMEOUT, self._warn_without_broker)

    def _warn_without_broker(self) -> None:
        self._broker_timer = None
        if self._is_registered or self.is_leaving or self.draining:
            return
        self._has_warned = True
        if self.is_connected:
            text = (
                'is connected, but not registered: the program there is not the broker of a pool, '
                'or this is not its worker_address'
            )
        else:
            text = (
                'cannot connect: check that the pool runs, its worker_address, and the network in '
                'between'
            )
        LOGGER.warning(
            '%s gets no calls from %s, and tries again: it %s', self.name, self.bound_address, text
        )

    def _on_heartbeats(self) -> None:
        """Register when heartbeats have a connection, too: it might wait behind a large call."""
        self._sends_heartbeats = True
        self.send_ready()

    def make_socket(self, route: bytes) -> Any:
        """Return a new socket with all options, which is not connected.

        :param route: routing id of the socket
        """
        socket = self.context.socket(zmq.DEALER)
        configure(socket, *self._broker)
        self.apply_limits(socket, -1)
        socket.sndhwm = socket.rcvhwm = 0  # a reply above a limit would be lost
        socket.routing_id = route
        socket.reconnect_ivl, socket.reconnect_ivl_max = RECONNECT
        if self.local_port is None:  # a host may be gone
            keep_alive(socket, self.heartbeat_interval, self.heartbeat_timeout, limit_sending=True)
        return socket

    def connect_by_ipv6(self) -> None:
        """Connect again: its name has got IPv6 addresses only, or was looked up late."""
        socket, uri = self.rep_stream.socket, self._broker.endpoint.encoded
        socket.disconnect(uri)
        socket.ipv6 = True
        socket.connect(uri)
        self.rep_stream._rebuild_io_state()  # any access to a socket clears its wake-up

    # Messages to the broker, and from it

    def send_command(self, *frames: bytes) -> bool:
        """Send a command to the broker; return False if there is no connection."""
        if self.is_connected:
            self.rep_stream.socket.send_multipart([b'', *frames], zmq.NOBLOCK)
            self.rep_stream._rebuild_io_state()  # any access to a socket clears its wake-up
        return self.is_connected

    def send_ready(self) -> None:
        """Register this worker at the broker."""
        handler = self._message_handler
        methods = getattr(handler, 'methods', {})
        info = {
            'pid': os.getpid(),
            'host': network.gethostname(),
            'slots': 0 if self.is_leaving else self.concurrency,
            'asked': self.was_asked,
            'interval': self.beat_interval,
            'methods': list(methods),
            'repeatable': [name for name, method in methods.items() if method.repeatable],
            'described': describe(methods),
            'peers': getattr(handler, 'wants_frames', False),
            'calls': [key.hex() for key in self.rep_stream.pending],
            'replies': [key.hex() for key in self.jobs.replies],
            'jobs': {name: method.job for name, method in methods.items() if method.job},
        }
        if self.send_command(protocol.READY, encode(info)):
            self._ready_sent = monotonic()

    def handle_command(self, command: bytes, *rest: bytes) -> None:
        """Handle a command of the broker."""
        match command:
            case protocol.READY_OK:
                settings = decode_reply(*rest)
                self.rep_stream.max_size = settings['max_reply_size']
                self.service_name = settings.get('service') or self.service_name
                self._ready_sent = -inf
                self.suspension.reset()
                if not self._is_registered:
                    self._is_registered = True
                    self._has_warned = False
                    super()._log_start()
                self.jobs.repeat_progress()
                self.rep_stream.repeat_replies()
                if not self._has_been_ready:
                    self._has_been_ready = True
                    super()._report_ready()
            case protocol.DISCONNECT_OK:
                self._is_disconnected.set()
            case protocol.ACK:
                self.jobs.acknowledge(*rest)
            case protocol.CANCEL:
                key, force = rest
                self.jobs.cancel(key, force == b'1')
            case _:  # UNKNOWN
                self._monitor.flush()  # handle a new connection before what arrives through it
                # The broker sends UNKNOWN for each heartbeat until it reads READY. A second READY
                # would not list the calls that it has sent since, and so lose them.
                if monotonic() - self._ready_sent > READY_TIMEOUT:
                    self.send_ready()

    def _log_start(self) -> None:
        """Do nothing: this worker gets no calls before READY_OK."""

    def _report_ready(self) -> None:
        """Do nothing: this worker is ready on READY_OK, not before."""

    def count_reply(self) -> None:
        """Count a reply that is about to be sent; leave with the last one of `max_calls`."""
        self._replies += 1
        if self._replies == self.max_calls:
            self.leave(f'has processed {self._replies} calls')

    # The end

    def _reload(self) -> None:
        """Leave when SIGHUP arrives, so that a new worker takes over."""
        if self.loop is None:  # before `init_stream`
            self._leaves_at_start = True
        else:
            self.was_asked = True
            self.leave('was asked to leave')

    def leave(self, reason: str, call: object = None) -> None:
        """Accept no more calls, finish the present ones, and exit.

        :param reason: verb for the log
        :param call: the call that is the reason, or None
        """
        if not (self.is_leaving or self.draining):
            LOGGER.info('%s %s, a new worker replaces it', self.name, reason, extra=fields_of(call))
            self._send_disconnect()  # before a reply that is about to be sent
            self._leave_task = asyncio.ensure_future(self._leave())

    def leave_with_lost_call(self) -> None:
        """Leave without waiting for the broker, which waits for the reply to a call."""
        self.leave('was interrupted, and may have lost a call')
        self._is_disconnected.set()
        self._stop_task = asyncio.ensure_future(self._stop_after_replies())

    async def _stop_after_replies(self) -> None:
        await self._wait_for_replies()
        self._stop_loop()

    async def _wait_for_replies(self) -> None:
        while self.owed_replies:
            await asyncio.wait(self.owed_replies)

    def check_overdue(self) -> None:
        """Leave if a method is still overdue after the time that a cancelled coroutine needs."""
        if self._overdue_check is None:
            self._overdue_check = self.loop.call_later(_CANCEL_GRACE, self._leave_if_overdue)

    def _leave_if_overdue(self) -> None:
        self._overdue_check = None
        if self.rep_stream.has_overdue:
            self.leave(OVERDUE)

    def _send_disconnect(self) -> None:
        self.is_leaving = True
        self._is_disconnected.clear()
        if not self.send_command(protocol.DISCONNECT, b'%d' % self.was_asked):
            self._is_disconnected.set()

    async def _drain(self) -> None:
        self.was_asked = True
        self._send_disconnect()
        if not self.is_connected:  # the pool stops: nobody records what its jobs return
            self.jobs.stop()
        await self._leave()

    async def _leave(self) -> None:
        # Calls that are on their way until DISCONNECT_OK are rejected.
        await self._wait_for_disconnect()
        await self._wait_for_replies()
        if self.jobs.replies and self.is_connected:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.jobs.wait_for_acks(), DISCONNECT_TIMEOUT)
        # The broker may notice our exit before it reads our last replies: wait until it has.
        self._send_disconnect()
        await self._wait_for_disconnect()
        self._stop_loop()

    async def _wait_for_disconnect(self) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._is_disconnected.wait(), DISCONNECT_TIMEOUT)

    def run(self) -> None:
        """Process calls until the end.

        :raises ZMQRefusedError: the broker refuses this worker
        :raises SystemExit: 75, the exit code that requests a replacement
        """
        super().run()
        if self._refusal is not None:
            raise self._refusal
        self._needs_replacement = self.rep_stream.has_overdue
        sys.exit(RECYCLED)

    def _teardown(self) -> None:
        if self._heartbeats is not None:
            self._heartbeats.stop()
            close_monitor(self.rep_stream.socket, self._monitor)
        super()._teardown()
