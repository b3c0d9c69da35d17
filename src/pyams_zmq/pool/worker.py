# SPDX-License-Identifier: ZPL-2.1
"""A process that gets its messages from the broker of a pool."""

import asyncio
import logging
import mmap
import os
import socket as network
import sys
from collections.abc import Callable
from contextlib import suppress
from math import ceil, inf
from threading import Event, Thread
from time import monotonic
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from pyams_zmq.auth import Users, parse_users
from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.exceptions import ZMQRefusedError
from pyams_zmq.pool.protocol import KEY_SIZE, ROUTE_SIZE, SEPARATOR, Command
from pyams_zmq.pool.scheduler import MAX_INTERVAL, MIN_INTERVAL
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process.base import RECYCLED
from pyams_zmq.process.descendants import end_tree, start_no_more
from pyams_zmq.process.server_socket import limit
from pyams_zmq.process.stream import ReplyStream, ZMQStream
from pyams_zmq.process.watchdog import END_GRACE
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.frames import MORE, NOBLOCK, POLLIN, send_frame
from pyams_zmq.wire.message import encode

LOGGER = logging.getLogger('PyAMS (zmq)')

RECONNECT = (20, 1000)
"""Milliseconds until a broker that is away is looked for again, at first and at most"""

GOODBYE_TIMEOUT = 5.0
"""Seconds to wait for the last word of a broker that is there"""

WELCOME_TIMEOUT = 5.0
"""Seconds after which an announcement that has no answer is made again, if the broker asks"""

_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_CONNECTION_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _REFUSED
_MISSED_BEATS = 3
_CANCEL_GRACE = 0.02  # seconds for the end of a coroutine; meanwhile calls are given back
_WAIT = 1  # milliseconds for the next call, before the loop has its turn
_MIB = 1024 * 1024


class ForwardedFrame:
    """First frame of a message, with what :class:`zmq.Frame` would say of its sender."""

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
    """Stream on which a broker sends the messages of others; it gets the replies.

    It receives always: the broker sends no more calls than it may, and commands come in between.

    :ivar process: the PoolWorker, which hears everything else that the broker says
    :ivar keys: calls that are owed a reply
    """

    process: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        self.keys: set[bytes] = set()
        super().__init__(*args, **kwargs)

    @staticmethod
    def _prepare(socket: Any) -> None:
        """Do nothing: this is no ROUTER socket."""

    @property
    def is_late(self) -> bool:
        """True while a method runs whose call got its reply already, that its deadline passed."""
        return self.in_hand > len(self.keys)

    def _can_receive(self) -> bool:
        return self.envelope is None

    def _handle_events(self, fd: Any, events: int) -> None:
        # Between two calls there is no turn of the loop, which takes longer than a short call,
        # unless nothing comes in for a moment.
        if self.closed():
            return
        deadline = monotonic() + self.turn
        polled = [(self.socket, POLLIN)]
        wait = 0
        self._in_turn = True
        try:
            while self._can_receive() and zmq.zmq_poll(polled, wait):
                self._handle_recv()
                if self.closed() or monotonic() > deadline:
                    break
                wait = 0 if self.in_hand else _WAIT
        finally:
            self._in_turn = False
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
            self.process.obey(*body)
            return None
        key = header[:KEY_SIZE]
        is_full = self.in_hand >= self.concurrency  # what is late has the place of this call
        if is_full:
            self.process.check_late()
        if is_full or self.process.is_leaving or self.process.draining:
            self.process.say(Command.REJECT, key)
            return None
        self.keys.add(key)
        self.envelope = [key]
        if not self._recv_copy and body:
            body[0] = ForwardedFrame(body[0], header[KEY_SIZE:])
        return body

    def _route(self, frames: list[Any], *_args: Any, **_kwargs: Any) -> Any:
        self._route_reply(frames[:-1], frames[-1])

    def _route_reply(self, envelope: list[bytes], data: bytes) -> None:
        self.keys.discard(envelope[0])
        self.process.count_reply()
        try:
            for frame in envelope:
                send_frame(self.socket, frame, MORE)
            send_frame(self.socket, data, NOBLOCK)
        except zmq.Again:  # the broker is away, and will not know this call
            LOGGER.debug('A reply is dropped, its broker is away')


class PoolWorker(ZMQProcess):
    """Serves the messages that a broker hands to it; see :class:`pyams_zmq.pool.ZMQPool`.

    It announces itself whenever it gets connected, and shows by heartbeats that it lives. SIGHUP
    lets it finish what it has in hand, however long that takes, and end; SIGTERM does it within
    `drain_timeout`. Its exit code says that it is to be replaced.

    :param address: address of the broker
    :param handler: class of the message handler
    :param auth: `'user:password'` that it presents to the broker
    :param registry: registry of the application, by default the current one
    :param curve: keys that it presents to the broker
    :raises ValueError: for an address or credentials that cannot be understood
    """

    max_message_size: int = sys.maxsize  # the broker knows better
    beat_interval: float = 0.5
    max_calls: int = 0
    max_memory: float = 0

    is_leaving = False

    _has_to_leave = False
    _route: bytes
    _calls = 0
    _announced = -inf
    _refusal: ZMQRefusedError | None = None
    _beats: 'Heartbeat | None' = None
    _late_check: Any = None

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
        self.address = Endpoint.parse(address, bind=False)
        self._users = parse_users(auth)
        self._keys = curve
        if len(self._users) > 1 or (self._users and curve is not None):
            raise ValueError('A worker has one user, or keys')

    def start(self) -> None:
        """Fork the worker and return at once.

        :raises ValueError: for a `concurrency` or `beat_interval` that cannot be
        :raises ZMQStartError: in a program that gevent has patched
        """
        check_interval(self.beat_interval)
        super().start()

    def init_stream(self) -> None:
        """Connect to the broker."""
        self._route = os.urandom(ROUTE_SIZE)
        self._welcome = asyncio.Event()
        self._goodbye = asyncio.Event()
        socket = self.connect(self._route)
        monitor = socket.get_monitor_socket(_CONNECTION_EVENTS)
        self.rep_stream = WorkerStream(socket, self.loop, concurrency=self.concurrency)
        self.rep_stream.process = self
        self._monitor = ZMQStream(monitor, self.loop)
        self._monitor.on_recv(self._on_connection)
        self._streams.update([self.rep_stream, self._monitor])
        self._message_handler = self.handler(self, self.rep_stream, self.stop)
        self.rep_stream.on_recv(self._message_handler)
        self.bound_address = self.address.uri
        socket.connect(self.address.uri)
        self._beats = Heartbeat(self)
        self._beats.start()
        if self._has_to_leave:
            self.loop.add_callback(self.reload)

    def _on_connection(self, frames: list[bytes]) -> None:
        event = parse_monitor_message(frames)['event']
        if event & _REFUSED:  # after that libzmq does not try again
            self._refusal = ZMQRefusedError(
                f'The broker at {self.address} refuses this worker: compare its user, or keys, '
                'with worker_auth and worker_curve of the pool'
            )
            self._stop_loop()
        elif event == zmq.EVENT_DISCONNECTED:
            self._goodbye.set()  # it is not to come any more
            self._announced = -inf
        else:
            self.announce()

    def connect(self, route: bytes) -> Any:
        """Make a socket which is ready to be connected to the broker.

        :param route: its name
        """
        socket = self.context.socket(zmq.DEALER)
        limit(socket, self, -1)
        socket.sndhwm = socket.rcvhwm = 0  # else a reply which does not fit in would be lost
        socket.routing_id = route
        socket.ipv6 = self.address.is_ipv6
        socket.immediate = 1  # nothing is kept for a broker which is away: it would not know it
        socket.reconnect_ivl, socket.reconnect_ivl_max = RECONNECT
        # These are sent and answered by libzmq, whatever our threads do.
        socket.heartbeat_ivl = ceil(self.beat_interval * 1000)
        socket.heartbeat_timeout = ceil(self.beat_interval * 1000 * _MISSED_BEATS)
        for user, password in self._users.items():
            socket.plain_username, socket.plain_password = user.encode(), password.encode()
        if self._keys is not None:
            self._keys.apply(socket)
        return socket

    # What the broker hears

    def say(self, *frames: bytes) -> bool:
        """Say something to the broker; tell if it is there."""
        try:
            self.rep_stream.socket.send_multipart([b'', *frames], zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            self.rep_stream._rebuild_io_state()  # to send may swallow the news of a message
        return True

    def announce(self) -> None:
        """Tell the broker who we are."""
        handler = self._message_handler
        methods = getattr(handler, '_methods', {})
        info = {
            'pid': os.getpid(),
            'host': network.gethostname(),
            'slots': 0 if self.is_leaving else self.concurrency,
            'interval': self.beat_interval,
            'methods': list(methods),
            'repeatable': [name for name, method in methods.items() if method.repeatable],
            'peers': getattr(handler, 'wants_frames', False),
            'calls': [key.hex() for key in self.rep_stream.keys],
        }
        if self.say(Command.READY, encode(info)):
            self._announced = monotonic()

    def obey(self, word: bytes, *_rest: bytes) -> None:
        """Do what the broker says."""
        match word:
            case Command.READY_OK:
                self._announced = -inf
                if not self._welcome.is_set():
                    self._welcome.set()
                    super()._send_report([self.bound_address], None)
            case Command.DISCONNECT_OK:
                self._goodbye.set()
            case _:  # UNKNOWN
                self._monitor.flush()  # the news of a connection come before what comes in by it
                # It may have asked several times, before it had our answer, and have sent a call
                # since, which a second answer would not speak of: that would be lost for it.
                if monotonic() - self._announced > WELCOME_TIMEOUT:
                    self.announce()

    def _send_report(self, addresses: Any, error: Exception | None) -> None:
        if error is not None:  # ready it is when the broker knows it
            super()._send_report(addresses, error)

    def count_reply(self) -> None:
        """Count a reply that is about to be sent; leave with the last one."""
        self._calls += 1
        if self._calls == self.max_calls:
            self.leave(f'has served {self._calls} calls')

    # Its end

    def reload(self) -> None:
        """Let a fresh worker take over; that is what SIGHUP does."""
        if self._is_owner():
            super().reload()
        elif self.loop is None:  # so early that there is nobody to say it to
            self._has_to_leave = True
        else:
            self.leave('was asked to')

    def leave(self, reason: str) -> None:
        """Take no more calls, finish those in hand, end."""
        if not (self.is_leaving or self.draining):
            LOGGER.info('%s %s, another one takes over', self.name, reason)
            self._say_bye()  # before a reply which is about to be sent
            self._leave_task = asyncio.ensure_future(self._leave())

    def check_late(self) -> None:
        """Leave, if what is late does not end now: a coroutine, which is cancelled, does."""
        if self._late_check is None:
            self._late_check = self.loop.call_later(_CANCEL_GRACE, self._leave_if_late)

    def _leave_if_late(self) -> None:
        self._late_check = None
        if self.rep_stream.is_late:
            self.leave('has a method that passed its deadline')

    def _say_bye(self) -> None:
        self.is_leaving = True
        self._goodbye.clear()
        if not self.say(Command.DISCONNECT):
            self._goodbye.set()

    async def _drain(self) -> None:
        self._say_bye()
        await self._leave()

    async def _leave(self) -> None:
        # Until the answer calls may be under way, which are given back.
        await self._wait_for_goodbye()
        while self.owed_replies:
            await asyncio.wait(self.owed_replies)
        # The broker may hear of our end sooner than of what we have said last.
        self._say_bye()
        await self._wait_for_goodbye()
        self._stop_loop()

    async def _wait_for_goodbye(self) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._goodbye.wait(), GOODBYE_TIMEOUT)

    def run(self) -> None:
        """Serve; the exit code says that this worker is to be replaced."""
        super().run()
        if self._refusal is not None:
            raise self._refusal
        if self.rep_stream.is_late:  # what it has started would be waited for
            start_no_more()
            end_tree(END_GRACE)
        sys.exit(RECYCLED)

    def _teardown(self) -> None:
        if self._beats is not None:
            self._beats.stop()
            self.rep_stream.socket.disable_monitor()  # an event for nobody would block its thread
        super()._teardown()


class Heartbeat(Thread):
    """Shows the broker that a worker lives, while its main thread is busy with a call.

    :param worker: the PoolWorker
    """

    def __init__(self, worker: PoolWorker):
        super().__init__(name='pyams_zmq heartbeat', daemon=True)
        self._worker = worker
        self._end = Event()

    def run(self) -> None:
        """Send heartbeats."""
        worker = self._worker
        worker._enter_thread()
        with worker.connect(worker._route + b'\1') as socket:
            socket.linger = 0
            socket.connect(worker.address.uri)
            is_late = False
            memory = 0
            while not self._end.wait(worker.beat_interval):
                with suppress(OSError):  # a worker out of descriptors still lives
                    memory = read_memory()
                was_late, is_late = is_late, worker.rep_stream.is_late
                if was_late and is_late:
                    worker.loop.add_callback(worker.leave, 'has a method that passed its deadline')
                with suppress(zmq.Again):
                    socket.send_multipart([b'', Command.HEARTBEAT, b'%d' % memory], zmq.NOBLOCK)
                if 0 < worker.max_memory < memory:
                    worker.loop.add_callback(worker.leave, f'takes {memory} MiB')

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        self.join()


def check_interval(interval: float) -> float:
    """Check seconds between two heartbeats.

    :return: them
    :raises ValueError: if they are too few, which would keep broker and worker busy, or too many
    """
    if not MIN_INTERVAL <= interval <= MAX_INTERVAL:
        raise ValueError(
            f'Bad beat_interval {interval!r}: write {MIN_INTERVAL} to {MAX_INTERVAL} seconds'
        )
    return interval


def read_memory() -> int:
    """Give the resident memory of this process in MiB, see proc_pid_statm(5)."""
    with open('/proc/self/statm', 'rb', buffering=0) as file:
        return int(file.read(256).split()[1]) * mmap.PAGESIZE // _MIB
