# SPDX-License-Identifier: ZPL-2.1
"""The messages of workers, as the broker handles them."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from tornado.ioloop import IOLoop

from pyams_zmq.pool import protocol
from pyams_zmq.pool.protocol import ROUTE_SIZE
from pyams_zmq.pool.router_stream import RouterStream
from pyams_zmq.pool.scheduler import Scheduler, WorkerState
from pyams_zmq.pool.socket_pump import SocketPump
from pyams_zmq.process.descendants import open_pidfd
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.frames import SRCFD
from pyams_zmq.wire.log_fields import present_service
from pyams_zmq.wire.message import decode_reply, encode

LOGGER = logging.getLogger('PyAMS (zmq)')

_EXIT_DELAY = 0.02  # seconds that the last messages of a dead worker may take


class WorkerMessages:
    """Registers workers, and passes on what they send.

    :param scheduler: the scheduler of the broker
    :param loop: its loop
    :param pump: reads its sockets
    :param jobs: its JobService, or None
    :param stats: returns its statistics
    :param max_reply_size: bytes of the largest reply, which workers are told
    :ivar local_stream: stream of the workers of this machine
    :ivar forwards_peers: False if no worker needs the user and the address of a client
    """

    local_stream: Any = None
    forwards_peers = True  # until the first worker states whether it needs them
    _has_seen_workers = False

    def __init__(
        self,
        scheduler: Scheduler,
        loop: Any,
        pump: SocketPump,
        *,
        jobs: Any,
        stats: Callable[[], dict[str, Any]],
        max_reply_size: int,
    ):
        self._scheduler = scheduler
        self._loop = loop
        self._pump = pump
        self._jobs = jobs
        self._stats = stats
        self._max_reply_size = max_reply_size

    def handle(self, stream: RouterStream, first: Any, frames: list[Any]) -> None:
        """Handle a message.

        :param stream: stream from which it was read
        :param first: routing id of its worker, a zmq.Frame
        :param frames: its other frames
        """
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
        self, stream: RouterStream, first: Any, command: bytes, rest: list[Any]
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
            case protocol.PROGRESS, [key, data] if self._jobs is not None:
                self._jobs.handle_progress(key, data)
            case protocol.DISCONNECT, [asked]:
                self._scheduler.handle_disconnect(route, was_asked=asked == b'1')
                stream.send_frames([route, b'', protocol.DISCONNECT_OK])
            case protocol.REJECT, [key]:
                self._scheduler.handle_reject(route, key)
            case protocol.STATS, [] if stream is self.local_stream:
                stream.send_frames([route, encode(self._stats())])
            case _:
                LOGGER.warning(
                    'A worker sent the unknown command %r: install the same version of pyams_zmq '
                    'for all workers',
                    bytes(command)[:16],
                )

    def _register(
        self, stream: RouterStream, user: str, route: bytes, info: Any, now: float
    ) -> WorkerState | None:
        known = self._scheduler.workers.get(route)
        if not stream.access.admits(user) or (known is not None and known.stream is not stream):
            return None
        worker = self._scheduler.handle_ready(route, info, now, stream=stream, user=user)
        needs_peers = bool(info['peers'])
        self.forwards_peers = needs_peers or (self.forwards_peers and self._has_seen_workers)
        self._has_seen_workers = True
        service = present_service()  # for the log of workers on other machines
        settings = encode({'max_reply_size': self._max_reply_size, 'service': service})
        stream.send_frames([route, b'', protocol.READY_OK, settings])
        self._scheduler.assign_queued()
        if self._jobs is not None:
            self._jobs.warn_of_unknown_types()
        if stream is self.local_stream and not worker.is_watched:
            self._watch(worker)
        LOGGER.info('Worker %s of %s is ready', worker.pid, worker.host)
        return worker

    def _watch(self, worker: WorkerState) -> None:
        stack = ExitStack()
        pidfd = stack.enter_context(open_pidfd(worker.pid))
        if pidfd is not None:
            worker.is_watched = True
            on_exit = partial(self._on_exit, worker.route, stack)
            self._loop.add_handler(pidfd, on_exit, IOLoop.READ)
            stack.callback(self._loop.remove_handler, pidfd)

    def _on_exit(self, route: bytes, stack: ExitStack, fd: int, events: int) -> None:
        stack.close()
        self._scheduler.handle_disconnect(route)
        # Its last replies may arrive after its exit.
        self._loop.call_later(_EXIT_DELAY, self._remove_dead, route)

    def _remove_dead(self, route: bytes) -> None:
        self._pump.run()
        self._scheduler.remove(route, monotonic(), 'died')
        self._pump.run()
