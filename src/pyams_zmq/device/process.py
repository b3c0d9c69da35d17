# SPDX-License-Identifier: ZPL-2.1
"""The process in which a device runs."""

import logging
import os
import signal
import socket as tcp
import stat
import sys
from contextlib import suppress
from math import inf
from multiprocessing.connection import Pipe, wait
from threading import RLock
from typing import Any

import zmq
from pyramid.threadlocal import get_current_registry

from pyams_zmq.device.base import BackgroundDevice
from pyams_zmq.device.proxy import Counts
from pyams_zmq.device.runner import COMMAND_TIMEOUT, Ended, ThreadRunner
from pyams_zmq.exceptions import ZMQClosedError, ZMQTimeoutError
from pyams_zmq.process.base import SIGNALS, OwnedProcess, make_portable
from pyams_zmq.process.watchdog import Watchdog, has_ended, wait_for_exit

LOGGER = logging.getLogger('PyAMS (zmq)')

START_TIMEOUT = 10.0
"""Seconds in which a process must be ready, in addition to `bind_timeout` for each address"""


class InProcess(BackgroundDevice):
    """Device in a process, which ends with its owner, the process that started it."""

    @property
    def _owns_context(self) -> bool:
        return True

    def _check(self) -> None:
        if self._has_inproc:
            raise ValueError(
                f'The inproc:// address of {self} cannot be reached from another process: use '
                'a device in a thread, or tcp:// or ipc://'
            )
        super()._check()

    def _make_context(self) -> Any:
        context = super()._make_context()
        threads = _count_threads()
        context.socket(zmq.PAIR, socket_class=zmq.Socket).close()  # the first one starts them
        if _count_threads() == threads:
            raise ValueError(
                f'context_factory of {self} returned a context whose threads are in another '
                'process: return a new one, as zmq.Context does'
            )
        return context

    def _make_runner(self) -> Any:
        return ProcessRunner(self)


def _count_threads() -> int:
    return len(os.listdir('/proc/self/task'))


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
        watchdog = Watchdog(
            self._parent_pid,
            self.orphan_timeout,
            self._control.fileno(),
            lambda: self.drain_timeout,
            self._enter_thread,
        )
        watchdog.start()
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
    bindings = sum(len(side.bindings) for side in device._sockets)
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
            with suppress(Ended):
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
        except Ended:
            self.launcher.join()
            self.check()
            raise ZMQClosedError(f'{self._device} is not running') from None

    def _ask(self, order: str) -> Any:
        with self._lock:
            if self._has_ended:
                raise Ended
            self._number += 1
            with suppress(OSError):  # it has ended
                self.launcher.pipe.send((self._number, order))
            number = None
            while number != self._number:  # some answers may be late
                word, value = self._hear(COMMAND_TIMEOUT + 1)
                if word == 'ended':
                    raise Ended
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
