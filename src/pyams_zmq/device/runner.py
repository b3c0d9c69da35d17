# SPDX-License-Identifier: ZPL-2.1
"""The thread, and the process, in which a device runs."""

import atexit
import errno
import logging
import os
import signal
import socket as tcp
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import ceil, inf
from multiprocessing.connection import Pipe, wait
from threading import RLock, Thread, get_ident
from time import monotonic
from typing import Any
from weakref import WeakSet

import zmq
from pyramid.threadlocal import get_current_registry

from pyams_zmq.auth import Authenticator
from pyams_zmq.device.proxy import HOLD, STATISTICS, TERMINATE, Counts
from pyams_zmq.exceptions import ZMQClosedError, ZMQTimeoutError
from pyams_zmq.process.base import (
    OwnedProcess,
    check_threads,
)
from pyams_zmq.process.channel import make_portable
from pyams_zmq.process.lock import IPCLock
from pyams_zmq.process.server_socket import bind, limit, protect, warn_of_exposure
from pyams_zmq.process.watchdog import SIGNALS, has_ended, wait_for_exit
from pyams_zmq.wire.endpoint import Endpoint

LOGGER = logging.getLogger('PyAMS (zmq)')

INPROC = 'inproc://'

COMMAND_TIMEOUT = 2.0
"""Seconds that a device gets to answer its owner"""

START_TIMEOUT = 10.0
"""Seconds that a process gets to start, besides those in which it waits for its addresses"""

STOP_TIMEOUT = 1.0
"""Seconds after which a device that waits for a peer is stopped the hard way"""

_HELD, _GO, _STOP, _ENDED = b'held', b'go', b'stop', b'ended'
_LAST_ANSWER = 8  # frames, at least, of an answer to STATISTICS


class _Ended(Exception):  # noqa: N818 - no error: it only leaves a loop
    """The thread of a device says that it ends."""


class ThreadRunner:
    """A device that runs in a thread of this process.

    The thread has the data sockets. It is steered over a pair of sockets, whose other end belongs
    to whoever holds the lock.

    :param device: configuration
    :param on_end: called in the thread, at its end
    """

    def __init__(self, device: Any, on_end: Callable[[], None] = lambda: None):
        check_threads(device)
        self.addresses: dict[str, list[str]] = {}
        self.error: Exception | None = None
        self._device = device
        self._on_end = on_end
        self._lock = RLock()
        self._totals = Counts()
        self._current = Counts()
        self._asked = self._answered = 0
        self._holds = self._held = 0
        self._is_paused = self._says_no_more = self._is_released = False
        self._commanders: set[int] = set()
        self._stop_is_due = False
        self._sockets: list[Any] = []
        self._locks: dict[str, IPCLock] = {}
        self._authenticator: Authenticator | None = None
        self._has_context = device._owns_context
        self._context = device._make_context()
        self._steering = self._context.socket(zmq.PAIR, socket_class=zmq.Socket)
        try:
            self._open()
            self.launcher = Thread(target=self._run, name=f'pyams_zmq {device}', daemon=True)
            self.launcher.start()
        except BaseException:
            self._close()
            raise
        _runners.add(self)

    # In the thread of the owner

    @property
    def is_alive(self) -> bool:
        """True until the thread has ended."""
        return self.launcher.is_alive()

    def check(self) -> None:
        """Raise the error of the thread."""
        if self.error is not None:
            raise self.error

    def join(self, timeout: float | None) -> None:
        """Wait for the end of the thread."""
        self.launcher.join(timeout)

    def statistics(self) -> Counts:
        """Tell what was forwarded since the start."""
        if self.is_alive:  # else it has ended, or is that of the process from which this was forked
            with suppress(_Ended), self._command():
                if not self._is_paused:
                    self._order(STATISTICS)
                self._listen(COMMAND_TIMEOUT)
        return self.counts

    @property
    def counts(self) -> Counts:
        """What is known of it without asking."""
        return self._totals.plus(self._current)

    def pause(self) -> None:
        """Forward nothing, from the return of this on."""
        try:
            with self._command():
                self._hold(COMMAND_TIMEOUT)
        except _Ended:
            self._raise_end()

    def resume(self) -> None:
        """Forward again."""
        try:
            with self._command():
                if self._is_paused:
                    self._order(_GO)
                    self._is_paused = False
        except _Ended:
            self._raise_end()

    def reload(self) -> None:
        """Follow the access rules that the device has read by now."""
        if self._authenticator is not None:
            self._authenticator.policy = self._device._make_policy()
        LOGGER.info('%s has read its users and keys again', self._device)

    def stop(self) -> None:
        """End the thread."""
        if not self.is_alive:
            return
        if get_ident() in self._commanders:
            # A signal handler has interrupted a command, which uses the socket, and has the lock,
            # for which the thread would wait at its end: the command stops the device.
            self._stop_is_due = True
            return
        with suppress(_Ended), self._command():
            try:
                self._hold(STOP_TIMEOUT)
                self._order(_STOP)
            except ZMQTimeoutError:
                if not self._has_context:
                    raise
                # It waits in a send: only the end of the context gets it out of there.
                LOGGER.warning('%s waits for a peer, it is stopped the hard way', self._device)
                self._release()
        self.join(None)

    @contextmanager
    def _command(self) -> Iterator[None]:
        me = get_ident()
        is_first = me not in self._commanders
        self._commanders.add(me)
        try:
            with self._lock:
                if self._says_no_more or self._is_released:
                    raise _Ended
                yield
        except zmq.ContextTerminated:
            raise _Ended from None
        finally:
            if is_first:
                self._commanders.discard(me)
                if self._stop_is_due:
                    self._stop_is_due = False
                    self.stop()

    def _raise_end(self) -> None:
        self.launcher.join()
        self.check()
        raise ZMQClosedError(f'{self._device} does not run')

    def _hold(self, timeout: float) -> None:
        if not self._is_paused:
            for word in (HOLD, STATISTICS, TERMINATE):
                self._order(word)
            self._is_paused = True
        self._listen(timeout)

    def _order(self, word: bytes) -> None:
        self._asked += word == STATISTICS
        self._holds += word == TERMINATE
        with suppress(zmq.Again):  # it has ended
            self._steering.send(word, zmq.DONTWAIT)

    def _listen(self, timeout: float) -> None:
        """Wait for the answers to all that was asked: some may be late."""
        deadline = monotonic() + timeout
        while self._answered < self._asked or self._held < self._holds:
            left = max(0, ceil((deadline - monotonic()) * 1000))
            if self._steering.poll(left):
                self._take_answer(self._steering.recv_multipart())
            elif not left:  # else a signal handler may have taken the answers meanwhile
                raise ZMQTimeoutError(f'{self._device} waits for a peer that takes nothing')

    def _take_answer(self, frames: list[bytes]) -> None:
        if frames == [_ENDED]:
            self._says_no_more = True
            raise _Ended
        if frames == [_HELD]:
            self._held += 1
            self._totals, self._current = self._totals.plus(self._current), Counts()
        elif len(frames) >= _LAST_ANSWER:
            self._answered += 1
            self._current = Counts.decode(frames)
        # else libzmq 4.3.5 has answered a command, which others do not

    # Sockets

    def _open(self) -> None:
        if self._has_context:
            self._authenticator = Authenticator(self._context, self._device._make_policy())
            self._authenticator.start()
        self._control = self._make_socket(zmq.PAIR)
        address = f'{INPROC}pyams_zmq.device-{id(self)}'
        self._control.bind(address)
        self._steering.connect(address)
        self._relay = self._device._make_relay(self._open_sides())

    def _make_socket(self, socket_type: int) -> Any:
        socket = self._context.socket(socket_type, socket_class=zmq.Socket)
        self._sockets.append(socket)
        return socket

    def _open_sides(self) -> list[Any]:
        sockets: list[Any] = []
        for side in self._device._sides:
            is_single = side.type < 0
            with _naming(f'type {side.type} of the {side.name} socket'):
                socket = sockets[0] if is_single else self._make_socket(side.type)
            sockets.append(socket)
            if not is_single:
                limit(socket, self._device, self._device.max_message_size)
            self._configure(socket, side)
        return sockets

    def _configure(self, socket: Any, side: Any) -> None:
        if any(address.startswith('tcp://[') for address in side.addresses):
            socket.ipv6 = True
        for option, value in side.options:
            with _naming(f'option {_name(option)} of the {side.name} socket'):
                socket.setsockopt(option, value)
        if side.bindings and self._has_context:
            protect(socket, self._device.curve, bool(self._device.users))
        self.addresses[side.name] = [self._bind(socket, binding) for binding in side.bindings]
        for address in side.peers:
            socket.connect(address)

    def _bind(self, socket: Any, binding: Any) -> str:
        device = self._device
        if binding.listener is not None:
            socket.setsockopt(zmq.USE_FD, binding.listener.detach())
            socket.bind(binding.address)
            socket.setsockopt(zmq.USE_FD, -1)
        else:
            is_inproc = binding.address.startswith(INPROC)
            path = None if is_inproc else Endpoint.parse(binding.address, bind=True).path
            bind(socket, binding.address, path, self._locks, device.bind_timeout)
        address: str = socket.last_endpoint.decode()
        warn_of_exposure(device, address, device.curve, bool(device.users))
        return address

    def _close(self) -> None:
        for socket in self._sockets:
            socket.close()
        self._release()

    def _release(self) -> None:
        """Give back the rest, if nobody has; the context waits for the sockets of the thread."""
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
            if self._authenticator is not None:
                self._authenticator.stop()
            self._steering.close(0)
            if self._has_context:
                self._context.term()
            for lock in self._locks.values():
                lock.release()

    # In the thread

    def _run(self) -> None:
        # libzmq would forget its statistics when a signal interrupts it.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        word = _GO
        try:
            while word != _STOP:
                self._relay.run(self._control)
                self._control.send(_HELD)
                word = self._control.recv()
        except zmq.ContextTerminated:
            LOGGER.info('%s ends with its context', self._device)
        except Exception as error:
            LOGGER.exception('%s failed', self._device)
            self.error = error
        with suppress(zmq.ZMQError):
            self._control.send(_ENDED, zmq.DONTWAIT)
        self._close()
        self._on_end()


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say in an error what libzmq does not take; not its value, which may be a password."""
    try:
        yield
    except zmq.ZMQError as error:
        if error.errno != errno.EINVAL:
            raise
        raise zmq.ZMQError(error.errno, f'{error.strerror}: {what}') from None


def _name(option: int) -> str:
    return zmq.SocketOption(option).name if option in _OPTIONS else str(option)


_OPTIONS = frozenset(map(int, zmq.SocketOption))

_runners: WeakSet[ThreadRunner] = WeakSet()


@atexit.register
def _stop_runners() -> None:
    for runner in list(_runners):
        with suppress(ZMQTimeoutError):  # a peer takes nothing, and the context is not ours
            runner.stop()


class _DeviceProcess(OwnedProcess):
    """Process of a device.

    :param device: configuration
    """

    drain_timeout = 5.0
    orphan_timeout = 0.5

    def __init__(self, device: Any):
        super().__init__(get_current_registry())
        self._device = device
        self.pipe, self._child_pipe = Pipe()

    @property
    def is_owned(self) -> bool:
        """True in the process that started this one; false in others which were forked from it."""
        return self._is_owner()

    def start(self) -> None:
        """Fork the child and return at once."""
        try:
            super().start()
        finally:
            self._child_pipe.close()

    def run(self) -> None:
        """Run the device, and do what the owner says; runs in the child."""
        self._cut_off()
        self.pipe.close()
        _drop_listeners(self._device._reserved)
        wake, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake)
        for num in SIGNALS:
            signal.signal(num, _ignore)  # the byte which Python writes to the pipe wakes us
        watchdog = self._start_watchdog()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            runner = ThreadRunner(self._device, self._wake_up)
        except Exception as error:
            LOGGER.exception('%s failed', self._device)
            self._say('ended', (make_portable(error), Counts()))
            sys.exit(1)
        self._say('ready', runner.addresses)
        with suppress(EOFError, OSError):  # the owner is gone
            self._serve(runner, wake)
        watchdog.arm(self.drain_timeout)
        runner.stop()
        failure = None if runner.error is None else make_portable(runner.error)
        self._say('ended', (failure, runner.counts))
        sys.exit(int(failure is not None))

    def _wake_up(self) -> None:
        os.write(self._wake, b'\0')

    def _serve(self, runner: ThreadRunner, wake: int) -> None:
        while True:
            ready = wait([self._child_pipe, wake])
            if wake in ready:
                if set(os.read(wake, 64)) != {signal.SIGHUP}:
                    return
                self._on_hangup(runner)
            if self._child_pipe in ready:
                self._obey(runner, *self._child_pipe.recv())

    def _on_hangup(self, runner: ThreadRunner) -> None:
        try:
            self._reload(runner)
        except ValueError as error:
            LOGGER.error('%s keeps its users and keys: %s', self._device, error)

    def _reload(self, runner: ThreadRunner) -> None:
        self._device._read_access()
        runner.reload()

    def _obey(self, runner: ThreadRunner, number: int, order: str) -> None:
        try:
            if order == 'reload':
                self._reload(runner)
                result = None
            else:
                result = getattr(runner, order)()
            self._say('done', (number, None, result))
        except Exception as error:  # noqa: BLE001 - the owner gets it
            self._say('done', (number, make_portable(error), None))

    def _say(self, word: str, value: Any) -> None:
        with suppress(OSError):  # the owner is gone
            self._child_pipe.send((word, value))


def _drop_listeners(kept: set[int]) -> None:
    """Give up the listeners of the parent, and the connections that came in by them.

    It might end them, and nobody would serve their peers, who could not tell.

    :param kept: descriptors of listeners that this process needs
    """
    sockets: list[tuple[int, Any]] = []
    listening = set()
    for fd in map(int, os.listdir('/proc/self/fd')):
        with suppress(OSError):  # the one that has listed them is closed
            if fd in kept or not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            socket = tcp.socket(fileno=fd)
            try:
                name = socket.getsockname()
                key = name[1] if isinstance(name, tuple) else name
                sockets.append((fd, key))
                if socket.getsockopt(tcp.SOL_SOCKET, tcp.SO_ACCEPTCONN):
                    listening.add(key)
            finally:
                socket.detach()
    with open(os.devnull, 'rb') as null:
        for fd, key in sockets:
            if key in listening:
                os.dup2(null.fileno(), fd)  # closed, its number might be another one's


def _ignore(num: int, frame: Any) -> None:
    pass


def _start_timeout(device: Any) -> float:
    bindings = sum(len(side.bindings) for side in device._sides)
    return START_TIMEOUT + bindings * float(device.bind_timeout)


class ProcessRunner:
    """A device that runs in a child; the child has a :class:`ThreadRunner`.

    :param device: configuration
    """

    def __init__(self, device: Any):
        self.error: Exception | None = None
        self._device = device
        self._lock = RLock()
        self._counts = Counts()
        self._number = 0
        self._has_ended = False
        self.launcher = _DeviceProcess(device)
        self.launcher.start()
        try:
            self.addresses: dict[str, list[str]] = self._hear(_start_timeout(device))[1]
            self.check()
        except BaseException:
            self.launcher.stop()
            raise

    @property
    def is_alive(self) -> bool:
        """True until the process has ended."""
        return self.launcher.is_owned and not has_ended(self.launcher)

    def check(self) -> None:
        """Raise the error of the process."""
        with self._lock:
            while self.launcher.is_owned and not (self.is_alive or self._has_ended):
                self._hear(0)
        if self.error is not None:
            raise self.error

    def join(self, timeout: float | None) -> None:
        """Wait for the end of the process."""
        wait_for_exit(self.launcher, inf if timeout is None else timeout)

    def statistics(self) -> Counts:
        """Tell what was forwarded since the start."""
        if self.is_alive:
            with suppress(_Ended):
                self._counts = self._ask('statistics')
        return self._counts

    def pause(self) -> None:
        """Forward nothing, from the return of this on."""
        self._tell('pause')

    def resume(self) -> None:
        """Forward again."""
        self._tell('resume')

    def reload(self) -> None:
        """Have the process read users and keys again."""
        self._tell('reload')

    def stop(self) -> None:
        """End the process."""
        self.launcher.stop()

    def _tell(self, order: str) -> None:
        try:
            self._ask(order)
        except _Ended:
            self.launcher.join()
            self.check()
            raise ZMQClosedError(f'{self._device} does not run') from None

    def _ask(self, order: str) -> Any:
        with self._lock:
            if self._has_ended:
                raise _Ended
            self._number += 1
            with suppress(OSError):  # it has ended
                self.launcher.pipe.send((self._number, order))
            number = None
            while number != self._number:  # some answers may be late
                word, value = self._hear(COMMAND_TIMEOUT + 1)
                if word == 'ended':
                    raise _Ended
                number, error, result = value
        if error is not None:
            raise error
        return result

    def _hear(self, timeout: float) -> tuple[str, Any]:
        """Give the next word of the process; the last one is `ended`."""
        try:
            self._wait(timeout)
            word, value = self.launcher.pipe.recv()
        except ZMQTimeoutError:
            raise
        except (EOFError, OSError):
            if self._has_ended:  # a signal handler has stopped it in the meantime
                return 'ended', None
            wait_for_exit(self.launcher, 1)
            text = f'{self._device} ended with exit code {self.launcher.exitcode}'
            word, value = 'ended', (ZMQClosedError(text), self._counts)
        if word == 'ended':
            self._has_ended = True
            self.error, self._counts = value
            self.launcher.pipe.close()
        return word, value

    def _wait(self, timeout: float) -> None:
        pipe = self.launcher.pipe
        if pipe.poll(timeout):
            return
        if self.is_alive:
            raise ZMQTimeoutError(f'{self._device} does not answer')
        if not pipe.poll(0):  # another fork of the owner has the other end of the pipe, too
            raise EOFError
