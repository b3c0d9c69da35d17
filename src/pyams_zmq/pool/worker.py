# SPDX-License-Identifier: ZPL-2.1
"""A worker of a pool: a process that gets its messages from the broker."""

import asyncio
import logging
import mmap
import os
import resource
import socket as network
import sys
from collections.abc import Callable
from contextlib import suppress
from math import inf
from threading import Event, Thread
from typing import Any

import zmq

from pyams_zmq.auth import Users
from pyams_zmq.auth.access import FixedAccess
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.client.connection import ServiceAddress, configure
from pyams_zmq.client.permission import describe_missing_permission
from pyams_zmq.exceptions import ZMQRefusedError, ZMQStartError
from pyams_zmq.pool import protocol
from pyams_zmq.pool.local_port import LocalPort
from pyams_zmq.pool.protocol import KEY_SIZE, ROUTE_SIZE, SEPARATOR
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process.connections import Envelope
from pyams_zmq.process.stream import ReplyStream, ZMQStream
from pyams_zmq.process.watchdog import RECYCLED
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.frames import NOBLOCK, POLLIN
from pyams_zmq.wire.keepalive import keep_alive
from pyams_zmq.wire.message import decode_reply, encode
from pyams_zmq.wire.monitor import close_monitor, open_monitor, parse_event
from pyams_zmq.wire.names import needs_ipv6

LOGGER = logging.getLogger('PyAMS (zmq)')

RECONNECT = (20, 1000)
"""Milliseconds between two attempts to connect to the broker: initial and maximum"""

DISCONNECT_TIMEOUT = 5.0
"""Seconds to wait for DISCONNECT_OK from a connected broker"""

READY_TIMEOUT = 5.0
"""Seconds to wait for READY_OK before UNKNOWN makes the worker send READY again"""

OVERDUE = 'has a method that passed its deadline'
"""Reason to leave"""

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
_POLL_TIMEOUT = 1  # milliseconds to wait for the next call before the loop may run
_CONNECT_INTERVAL = 50  # milliseconds between two checks whether a worker without a broker ends
_MIB = 1024 * 1024


class ForwardedFrame:
    """First frame of a message, with the metadata that a :class:`zmq.Frame` of the client has."""

    __slots__ = ('_data', '_sender')

    def __init__(self, data: bytes, sender: bytes):
        self._data = data
        self._sender = sender

    def __bytes__(self) -> bytes:
        return self._data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, name: str) -> str:
        user, _separator, address = self._sender.rpartition(SEPARATOR)
        return {'User-Id': user, 'Peer-Address': address}[name].decode()


class WorkerStream(ReplyStream):
    """Stream on which a worker gets requests from the broker, and sends replies to it.

    It always receives: the broker limits the requests, and sends commands between them.

    :ivar process: the PoolWorker, which handles the commands
    :ivar pending: keys of the calls that have no reply yet
    """

    process: Any = None
    max_size: int = sys.maxsize
    """Bytes of the largest reply, which the broker states"""

    def __init__(self, *args: Any, **kwargs: Any):
        self.pending: set[bytes] = set()
        super().__init__(*args, **kwargs)

    @property
    def has_overdue(self) -> bool:
        """True while a method runs whose call was answered with 504 at its deadline."""
        return self.in_hand > len(self.pending)

    def refuse_waiting(self, data: bytes) -> None:
        """Do nothing: the broker has confirmed that it sends no further calls."""

    def drop_waiting(self) -> None:
        """Drop the calls of a former connection that were not read."""
        with suppress(zmq.Again):
            while True:
                self.socket.recv_multipart(zmq.NOBLOCK)

    def _can_receive(self) -> bool:
        return self.envelope is None

    def _handle_events(self, fd: Any, events: int) -> None:
        # The loop does not run between two calls, unless none arrives for `_POLL_TIMEOUT`: a turn
        # of it takes longer than a short call.
        if self.closed():
            return
        deadline = monotonic() + self.time_slice
        polled = [(self.socket, POLLIN)]
        timeout = 0
        self._is_handling = True
        try:
            while self._can_receive() and zmq.zmq_poll(polled, timeout):
                self._handle_recv()
                if self.closed() or monotonic() > deadline:
                    break
                timeout = 0 if self.in_hand else _POLL_TIMEOUT
        except BaseException:  # a signal handler can raise it at any place
            self._loop.call_soon(self.process.leave_with_lost_call)
            raise
        finally:
            self._is_handling = False
            self._rebuild_io_state()

    def _receive(self) -> list[Any] | None:
        receive = self.socket.recv
        frame = receive(NOBLOCK, False)
        header = frame.bytes
        body: list[Any] = []
        while frame.more:
            frame = receive(NOBLOCK, False)
            body.append(frame.bytes)
        if not header:
            self.process.handle_command(*body)
            return None
        key = header[:KEY_SIZE]
        is_full = self.in_hand >= self.concurrency  # an overdue method has the slot of this call
        if is_full:
            self.process.check_overdue()
        if is_full or self.process.is_leaving or self.process.draining:
            self.process.send_command(protocol.REJECT, key)
            return None
        self.pending.add(key)
        self.envelope = Envelope((key,))
        if not self._recv_copy and body:
            body[0] = ForwardedFrame(body[0], header[KEY_SIZE:])
        return body

    def _route(self, frames: list[Any], *_args: Any, **_kwargs: Any) -> Any:
        self._route_reply(frames[:-1], frames[-1])

    def _route_reply(self, envelope: list[bytes], data: bytes) -> None:
        self.pending.discard(envelope[0])
        self.process.count_reply()
        size = len(data) if len(envelope) == 1 else sum(map(len, envelope[1:]), len(data))
        if size > self.max_size:  # the broker would end the connection
            text = f'The reply is {size} bytes; the limit is {self.max_size} (max_reply_size)'
            LOGGER.error('%s: %s', self.process.name, text)
            envelope, data = envelope[:1], encode([500, text])
        if self.process.is_connected:  # the next broker does not know this call
            super()._route_reply(envelope, data)


class PoolWorker(ZMQProcess):
    """Processes the messages that it gets from a broker; see :class:`pyams_zmq.pool.ZMQPool`.

    It sends READY on every new connection, and heartbeats. On SIGHUP it finishes its calls, without
    a time limit, and exits; on SIGTERM it does so within `drain_timeout`. Its exit code requests
    that a supervisor replaces it.

    The broker decides who may connect. A change of the access rules in a worker, by `auth_thread`,
    `passwords` or `clients`, raises a ZMQStartError.

    :param address: address of the broker
    :param handler: class of the message handler
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

    local_port: LocalPort | None = None  #: Inherited listener of the broker, None on other machines

    is_leaving = False
    is_connected = False  #: True while the broker is connected, as far as is known

    _has_been_ready = False
    _leaves_at_start = False
    _route: bytes
    _replies = 0
    _ready_sent = -inf  # time of a READY without READY_OK
    _refusal: ZMQRefusedError | None = None
    _heartbeats: '_HeartbeatThread | None' = None
    _sends_heartbeats = False
    _overdue_check: Any = None

    def __init__(
        self,
        address: Any,
        handler: Callable[..., Any],
        auth: Users = None,
        registry: Any = None,
        *,
        curve: CurveClient | None = None,
    ):
        super().__init__(address, handler, registry=registry)
        self._broker = ServiceAddress.parse(address, auth, curve)

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
        self._route = os.urandom(ROUTE_SIZE)
        self._is_disconnected = asyncio.Event()
        socket = self.make_socket(self._route)
        monitor = open_monitor(socket, _CONNECTION_EVENTS)
        self.rep_stream = WorkerStream(socket, self.loop, concurrency=self.concurrency)
        self.rep_stream.process = self
        self._monitor = ZMQStream(monitor, self.loop)
        self._monitor.on_recv(self._on_connection)
        self._streams.update([self.rep_stream, self._monitor])
        self._message_handler = self.handler(self, self.rep_stream, self.stop)
        self.rep_stream.on_recv(self._message_handler)
        self.bound_address = self._broker.endpoint.uri
        socket.connect(self._broker.endpoint.encoded)
        self._heartbeats = _HeartbeatThread(self)
        self._heartbeats.start()
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
        else:
            self.rep_stream.drop_waiting()  # READY does not list them
            self.is_connected = True
            if self._sends_heartbeats:
                self.send_ready()

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
            'interval': self.beat_interval,
            'methods': list(methods),
            'repeatable': [name for name, method in methods.items() if method.repeatable],
            'peers': getattr(handler, 'wants_frames', False),
            'calls': [key.hex() for key in self.rep_stream.pending],
        }
        if self.send_command(protocol.READY, encode(info)):
            self._ready_sent = monotonic()

    def handle_command(self, command: bytes, *rest: bytes) -> None:
        """Handle a command of the broker."""
        match command:
            case protocol.READY_OK:
                self._ready_sent = -inf
                self.rep_stream.max_size = decode_reply(*rest)['max_reply_size']
                if not self._has_been_ready:
                    self._has_been_ready = True
                    super()._report_ready()
            case protocol.DISCONNECT_OK:
                self._is_disconnected.set()
            case _:  # UNKNOWN
                self._monitor.flush()  # handle a new connection before what arrives through it
                # The broker sends UNKNOWN for each heartbeat until it reads READY. A second READY
                # would not list the calls that it has sent since, and so lose them.
                if monotonic() - self._ready_sent > READY_TIMEOUT:
                    self.send_ready()

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
            self.leave('was asked to leave')

    def leave(self, reason: str) -> None:
        """Accept no more calls, finish the present ones, and exit.

        :param reason: verb for the log
        """
        if not (self.is_leaving or self.draining):
            LOGGER.info('%s %s, a new worker replaces it', self.name, reason)
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
        if not self.send_command(protocol.DISCONNECT):
            self._is_disconnected.set()

    async def _drain(self) -> None:
        self._send_disconnect()
        await self._leave()

    async def _leave(self) -> None:
        # Calls that are on their way until DISCONNECT_OK are rejected.
        await self._wait_for_disconnect()
        await self._wait_for_replies()
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


class _HeartbeatThread(Thread):
    """Sends heartbeats to the broker, also while the main thread computes, and checks the limits.

    :param worker: the PoolWorker
    """

    def __init__(self, worker: PoolWorker):
        super().__init__(name='pyams_zmq heartbeat', daemon=True)
        self._worker = worker
        self._end = Event()
        self._is_known = False  # true if the worker knows that there was a connection

    def run(self) -> None:
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
                worker.loop.add_callback(worker._on_heartbeats)
            elif not socket.ipv6 and needs_ipv6(worker._broker.endpoint):
                worker.loop.add_callback(worker.leave, 'has a broker with IPv6 addresses only')
                self._end.wait()
        while not self._end.wait(worker.beat_interval):
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
        self._end.set()
        self.join()


def read_memory() -> float:
    """Return the resident memory of this process in MiB, see proc_pid_statm(5)."""
    try:
        with open('/proc/self/statm', 'rb', buffering=0) as file:
            return int(file.read(256).split()[1]) * mmap.PAGESIZE / _MIB
    except (FileNotFoundError, PermissionError):  # no /proc for us: the peak is a substitute
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
