# SPDX-License-Identifier: ZPL-2.1
"""The thread in which a device runs."""

import atexit
import errno
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import ceil
from threading import Event, RLock, Thread, get_ident
from time import CLOCK_THREAD_CPUTIME_ID, pthread_getcpuclockid
from typing import Any
from weakref import WeakSet

import zmq

from pyams_zmq.auth import ZAP_DOMAIN
from pyams_zmq.auth.authenticator import Authenticator
from pyams_zmq.device.proxy import (
    NO_COUNTS,
    PAUSE,
    STATISTICS,
    TERMINATE,
    Counts,
    Statistics,
    decode_counts,
    summarize,
)
from pyams_zmq.device.socket_config import INPROC, Binding, SocketConfig
from pyams_zmq.device.spin_watch import SpinWatch
from pyams_zmq.exceptions import ZMQClosedError, ZMQTimeoutError
from pyams_zmq.process.guard import ConnectionGuard
from pyams_zmq.process.server_socket import FILE_INTERVAL, ServerSockets
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.environment import check_threads
from pyams_zmq.wire.names import needs_ipv6

LOGGER = logging.getLogger('PyAMS (zmq)')

COMMAND_TIMEOUT = 2.0
"""Seconds in which a device must answer a command"""

STOP_TIMEOUT = 1.0
"""Seconds after which `stop` terminates the context of a device that waits for a peer"""

WATCH_TIMEOUT = 0.05
"""Seconds in which the loop of libzmq answers unless it waits for a peer"""

_PAUSED, _RESUME, _STOP, _ENDED = b'paused', b'resume', b'stop', b'ended'
_RESTORE = b'restore'  # files of ipc addresses


class _Ended(Exception):  # noqa: N818 - not an error, but the end of a command
    """The device has ended during a command."""


class DeviceThread(Thread):
    """Thread in which a device runs once.

    The data sockets belong to the thread. Its owner sends it commands over a pair of sockets; a
    lock protects the owner's end.

    :param device: configuration
    :param on_end: called in the thread when it ends
    """

    def __init__(self, device: Any, on_end: Callable[[], None] = lambda: None):
        super().__init__(name=f'pyams_zmq {device}', daemon=True)
        self.addresses: dict[str, list[str]] = {}
        self.error: Exception | None = None
        self._device = device
        self._on_end = on_end
        self._pid = os.getpid()
        self._lock = RLock()
        self._totals = self._current = NO_COUNTS
        self._pending = 0  # answers
        self._is_paused = self._has_ended = False
        self._is_released = Event()
        self._threads_in_command: set[int] = set()
        self._threads_to_stop: set[int] = set()
        self._sockets: list[Any] = []
        self._authenticator: Authenticator | None = None
        self._guard: ConnectionGuard | None = None
        self._owns_context = device._owns_context
        self._is_native = device._is_native
        self.uses_python = not self._is_native
        self.cpu_clock = CLOCK_THREAD_CPUTIME_ID  # until the thread runs
        self._watch = SpinWatch(self) if self._is_native else None

    # In the thread of the owner

    def start(self) -> None:
        """Open the sockets, and start the thread; see :meth:`BackgroundDevice.start`."""
        check_threads(self._device)
        self._zmq_context = self._device._make_context()
        self._commands = self._zmq_context.socket(zmq.PAIR, socket_class=zmq.Socket)
        try:
            self._open()
            if self._watch is not None:
                self._watch.start()
            super().start()
        except BaseException:
            self._close()
            raise
        _threads.add(self)
        if self._server_sockets.has_files:
            Thread(target=self._watch_files, name=f'{self.name} (files)', daemon=True).start()

    @property
    def is_running(self) -> bool:
        """True until the thread has ended, in its own process: a fork by C code runs no hooks."""
        return self._pid == os.getpid() and self.is_alive()

    def check(self) -> None:
        """Raise the error by which the device has ended."""
        if self.error is not None:
            raise self.error

    def statistics(self) -> Statistics:
        """Return what was forwarded since the start."""
        if self.is_running:  # else it has ended, or belongs to the process that forked this one
            self._update_counts(COMMAND_TIMEOUT)
        return summarize(self._counts, is_native=self._is_native)

    def _update_counts(self, timeout: float) -> None:
        with suppress(_Ended), self._command():
            if not self._is_paused:
                self._send(STATISTICS)
            self._receive(timeout)

    @property
    def _counts(self) -> Counts:
        return [*map(sum, zip(self._totals, self._current, strict=True))]

    def pause(self) -> None:
        """See :meth:`Device.pause`."""
        with self._command_or_error():
            self._pause(COMMAND_TIMEOUT)

    def resume(self) -> None:
        """See :meth:`Device.resume`."""
        with self._command_or_error():
            if self._is_paused:
                self._send(_RESUME)
                self._is_paused = False

    def stop(self) -> None:
        """See :meth:`Device.stop`."""
        if not self.is_running or self.defer_stop():
            return
        with suppress(_Ended), self._command():
            try:
                self._pause(STOP_TIMEOUT)
                self._send(_STOP)
            except ZMQTimeoutError:
                if not self._owns_context:
                    raise
                # It blocks in a send, which only the termination of the context interrupts.
                LOGGER.warning('%s: a peer does not read, its message is dropped', self._device)
                self._release()
        self.join()

    def defer_stop(self) -> bool:
        """Let the command stop the device that this thread is in; return False if it is in none.

        A signal handler or a finalizer has interrupted the command, which uses the socket and holds
        the lock, or waits for it. The device thread needs the lock to end. So the command stops the
        device when it returns, and no other: the thread of another one may be needed meanwhile.
        """
        thread = get_ident()
        if thread not in self._threads_in_command:
            return False
        self._threads_to_stop.add(thread)
        return True

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread ends, and its watch; the thread itself must not wait for it."""
        super().join(timeout)
        if self._watch is not None and not self.is_alive():
            with suppress(RuntimeError):  # it is this thread
                self._watch.join()

    # In the thread of the watch

    def count_frames(self) -> int:
        """Return the number of frames that a native device has forwarded."""
        with suppress(ZMQTimeoutError):
            self._update_counts(WATCH_TIMEOUT)
        statistics = summarize(self._counts, is_native=True)
        return statistics.in_to_out.frames + statistics.out_to_in.frames

    def use_loop(self, *, python: bool) -> None:
        """Go on with the other loop, unless the device is paused."""
        with suppress(_Ended), self._command():
            if not self._is_paused:
                self.uses_python = python
                self._leave_loop()
                self._send(_RESUME)

    # In these threads

    @contextmanager
    def _command(self) -> Iterator[None]:
        thread = get_ident()
        is_outermost = thread not in self._threads_in_command
        self._threads_in_command.add(thread)
        try:
            with self._lock:
                if self._has_ended or self._commands.closed:
                    raise _Ended
                yield
        except zmq.ContextTerminated:
            raise _Ended from None
        finally:
            if is_outermost:
                self._threads_in_command.discard(thread)
                if thread in self._threads_to_stop:
                    self._threads_to_stop.discard(thread)
                    self.stop()

    @contextmanager
    def _command_or_error(self) -> Iterator[None]:
        """Raise the error of the device if it has ended."""
        try:
            with self._command():
                yield
        except _Ended:
            # In a signal handler that has interrupted a command, see `stop`, a join never returns.
            if get_ident() not in self._threads_in_command:
                self.join()
            self.check()
            raise ZMQClosedError(f'{self._device} is not running') from None

    def _pause(self, timeout: float) -> None:
        if not self._is_paused:
            self._leave_loop()
            self._is_paused = True
        self._receive(timeout)

    def _leave_loop(self) -> None:
        for command in (PAUSE, STATISTICS, TERMINATE):
            self._send(command)

    def _send(self, command: bytes) -> None:
        self._pending += command in (STATISTICS, TERMINATE)
        with suppress(zmq.Again):  # the thread has ended
            self._commands.send(command, zmq.DONTWAIT)

    def _receive(self, timeout: float) -> None:
        """Wait for the answers to all commands; those to earlier commands may be late.

        A signal handler may receive some of them meanwhile.
        """
        deadline = monotonic() + timeout
        while self._pending and not self._has_ended:
            left = max(0, ceil((deadline - monotonic()) * 1000))
            if self._commands.poll(left):
                self._handle_answer(self._commands.recv_multipart())
            elif not left:
                raise ZMQTimeoutError(f'{self._device} waits for a peer that does not read')
        if self._has_ended:
            raise _Ended

    def _handle_answer(self, frames: list[bytes]) -> None:
        if frames == [_ENDED]:
            self._has_ended = True
        elif frames == [_PAUSED]:
            self._pending -= 1
            self._totals, self._current = self._counts, NO_COUNTS
        elif len(frames) == len(NO_COUNTS):
            self._pending -= 1
            self._current = decode_counts(frames)
        # else an answer of libzmq 4.3.5 to PAUSE or TERMINATE, which other versions do not answer

    def _watch_files(self) -> None:
        """Let the thread of the device bind ipc addresses again whose file was removed."""
        while not self._is_released.wait(FILE_INTERVAL):
            if self._server_sockets.has_lost_files:
                with suppress(ZMQTimeoutError, _Ended), self._command():
                    self._receive(0)  # no answer is missing: the thread does not wait for a peer
                    was_paused = self._is_paused
                    try:
                        self._pause(COMMAND_TIMEOUT)
                    finally:  # if a peer does not read, it is done later
                        self._send(_RESTORE)
                        if not was_paused:
                            self._send(_RESUME)
                            self._is_paused = False

    # Sockets

    def _open(self) -> None:
        if self._owns_context:
            self._guard = ConnectionGuard(self._device, self._device)
        self._server_sockets = ServerSockets(self._device, self._device, self._guard)
        if self._guard is not None:
            self._authenticator = Authenticator(
                self._zmq_context, self._device.access, guard=self._guard
            )
            self._authenticator.start()
        self._control = self._make_socket(zmq.PAIR)
        address = f'{INPROC}pyams_zmq.device-{id(self)}'
        self._control.bind(address)
        self._commands.connect(address)
        sockets = self._open_data_sockets()
        self.python_loop = self._device._make_loop(sockets)
        self._native_loop: Callable[..., Any] = partial(zmq.proxy_steerable, *sockets)

    def _make_socket(self, socket_type: int) -> Any:
        socket = self._zmq_context.socket(socket_type, socket_class=zmq.Socket)
        self._sockets.append(socket)
        return socket

    def _open_data_sockets(self) -> list[Any]:
        sockets: list[Any] = []
        for config in self._device._sockets:
            if config.type < 0:
                socket = sockets[0]
            else:
                with _explain_error(f'type {config.type} of the {config.name} socket'):
                    socket = self._make_socket(config.type)
                self._device.apply_limits(socket, self._device._max_size_of(config))
            sockets.append(socket)
            self._configure(socket, config)
        return sockets

    def _configure(self, socket: Any, config: SocketConfig) -> None:
        if any(address.startswith('tcp://[') for address in config.addresses):
            socket.ipv6 = True
        for option, value in config.options:
            name = getattr(option, 'name', option)  # a plain number has none
            with _explain_error(f'option {name} of the {config.name} socket'):
                socket.setsockopt(option, value)
        self.addresses[config.name] = [self._bind(socket, binding) for binding in config.bindings]
        uses_ipv6 = socket.ipv6
        for address in config.peers:
            if not address.startswith(INPROC):
                socket.ipv6 = uses_ipv6 or needs_ipv6(Endpoint.parse(address, bind=False))
            socket.connect(os.fsencode(address))

    def _bind(self, socket: Any, binding: Binding) -> str:
        if binding.listener is not None:
            socket.setsockopt(zmq.USE_FD, binding.listener.detach())
        address = self._server_sockets.bind(
            socket,
            binding.address,
            self._device.access,
            path=binding.path,
            domain=ZAP_DOMAIN if self._owns_context else None,
        )
        socket.setsockopt(zmq.USE_FD, -1)
        return address

    def _close(self) -> None:
        if self._watch is not None:
            self._watch.end()
        for socket in self._sockets:
            socket.close()
        self._release()

    def _release(self) -> None:
        """Release the rest once; the context waits for the sockets of the thread."""
        with self._lock:
            if self._commands.closed:
                return
            self._is_released.set()
            self._commands.close(0)
            if self._authenticator is not None:
                self._authenticator.stop()
            if self._guard is not None:
                self._guard.close()
            if self._owns_context:
                self._zmq_context.term()
            self._server_sockets.release()

    # In the thread

    def run(self) -> None:
        """Forward until `stop`, or until the context is terminated."""
        self.cpu_clock = pthread_getcpuclockid(get_ident())
        # libzmq loses its statistics when a signal interrupts its loop.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        command = _RESUME
        try:
            while command != _STOP:
                if command == _RESTORE:
                    self._server_sockets.restore_files()
                else:
                    self._run_loop()
                    self._control.send(_PAUSED)
                command = self._control.recv()
        except zmq.ContextTerminated:
            LOGGER.info('%s ends with its context', self._device)
        except Exception as error:
            LOGGER.exception('%s failed', self._device)
            self.error = error
        with suppress(zmq.ZMQError):
            self._control.send(_ENDED, zmq.DONTWAIT)
        self._close()
        self._on_end()

    def _run_loop(self) -> None:
        # A message that waits in the loop in Python must not be overtaken.
        self.uses_python |= self.python_loop.has_message
        if self.uses_python:
            self.python_loop.run(self._control)
        else:
            self._native_loop(control=self._control)


@contextmanager
def _explain_error(what: str) -> Iterator[None]:
    """Name in an error what libzmq rejects; not its value, which may be a password."""
    try:
        yield
    except zmq.ZMQError as error:
        if error.errno != errno.EINVAL:
            raise
        raise zmq.ZMQError(error.errno, f'{error.strerror}: {what}') from None


_threads: WeakSet[DeviceThread] = WeakSet()


@atexit.register
def _stop_threads() -> None:
    for thread in list(_threads):
        with suppress(ZMQTimeoutError):  # a peer does not read, and the context belongs to others
            thread.stop()
