# SPDX-License-Identifier: ZPL-2.1
"""The process in which a device runs."""

import logging
import os
import signal
import sys
from contextlib import suppress
from math import inf
from queue import SimpleQueue
from typing import Any

import zmq

from pyams_zmq.device.base import BackgroundDevice
from pyams_zmq.device.proxy import NO_COUNTS, Statistics, summarize
from pyams_zmq.device.thread import COMMAND_TIMEOUT, DeviceThread
from pyams_zmq.exceptions import ZMQClosedError
from pyams_zmq.process.base import OwnedProcess, describe_exit_code
from pyams_zmq.process.channel import Command
from pyams_zmq.process.signals import SIGNALS
from pyams_zmq.process.watchdog import has_ended, wait_for_exit
from pyams_zmq.wire.context import raise_descriptor_limit

LOGGER = logging.getLogger('PyAMS (zmq)')

START_TIMEOUT = 10.0
"""Seconds in which a process must be ready, in addition to `bind_timeout` for each address"""


class DeviceProcess(OwnedProcess):
    """Process in which a device runs once; it has the methods of a :class:`DeviceThread`.

    :param device: configuration
    """

    drain_timeout = 5.0

    def __init__(self, device: Any):
        super().__init__()
        self.name = str(device)
        self.addresses: dict[str, list[str]] = {}
        self._device = device
        self._statistics = summarize(NO_COUNTS, is_native=device._is_native)

    # In the owner

    def start(self) -> None:
        """Start the process, and wait until it is ready; see :meth:`BackgroundDevice.start`."""
        super().start()
        timeout = START_TIMEOUT + len(self._device._bindings) * self._device.bind_timeout
        try:
            self.addresses = self._wait_report(timeout)
        except BaseException:
            self.stop()
            raise

    @property
    def is_running(self) -> bool:
        """True in the owner, until the process has ended."""
        return self._is_owner() and not has_ended(self)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the process ends."""
        wait_for_exit(self, inf if timeout is None else timeout)

    def defer_stop(self) -> bool:
        """Return False: a process can be stopped during a command."""
        return False

    def check(self) -> None:
        """Raise the error by which the device has ended."""
        if self._is_owner() and has_ended(self):
            error = self._receive_error()
            if error is not None:
                raise error

    def statistics(self) -> Statistics:
        """Return what was forwarded since the start."""
        if self.is_running:
            with suppress(ZMQClosedError):
                self._statistics = self._command('statistics')
        return self._statistics

    def pause(self) -> None:
        """See :meth:`Device.pause`."""
        self._command('pause')

    def resume(self) -> None:
        """See :meth:`Device.resume`."""
        self._command('resume')

    def reload(self) -> None:
        """See :meth:`Device.reload`."""
        self._command('reload')

    def _command(self, name: str) -> Any:
        return self._call(name, timeout=COMMAND_TIMEOUT + 1)

    def _receive_error(self) -> Exception | None:
        result = self._receive_result()
        if result is None:
            return ZMQClosedError(f'{self.name} ended with {describe_exit_code(self.exitcode)}')
        self._statistics, error = result
        return error

    def _describe_end(self) -> Exception:
        return self._receive_error() or ZMQClosedError(f'{self.name} is not running')

    # In the process

    def kept_listeners(self) -> list[int]:
        """Return the descriptors of inherited listeners that this process uses."""
        listeners = [binding.listener for binding in self._device._bindings]
        return [each.fileno() for each in listeners if each is not None]

    def run(self) -> None:
        """Run the device until a signal or the owner stops it."""
        self._drop_inherited_state()
        commands: SimpleQueue[Command] = SimpleQueue()
        watchdog = self._start_watchdog(commands.put)
        watchdog.forward_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        raise_descriptor_limit()
        thread = DeviceThread(self._device, lambda: commands.put(Command('ended')))
        try:
            thread.start()
        except Exception as error:
            LOGGER.exception('%s failed', self.name)
            self._send_report({}, error)
            sys.exit(1)
        self._send_report(thread.addresses, None)
        access = self._device.access
        functions = {
            function.__name__: function
            for function in (thread.statistics, thread.pause, thread.resume, access.reload)
        }
        while (command := commands.get()).name in (*functions, 'SIGHUP'):
            if command.name == 'SIGHUP':
                access.try_reload(self.name)
            else:
                self._control.run(command, functions[command.name])
        watchdog.arm(self.drain_timeout)
        thread.stop()
        self._control.send_outcome('result', thread.statistics(), thread.error)
        sys.exit(int(thread.error is not None))


class InProcess(BackgroundDevice):
    """Device in a process, which ends with its owner, the process that started it."""

    _launcher_class = DeviceProcess

    @property
    def _owns_context(self) -> bool:
        return True

    def _runs_elsewhere(self) -> bool:
        return self._is_running

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
        if threads and _count_threads() == threads:
            raise ValueError(
                f'context_factory of {self} returned a context whose threads are in another '
                'process: return a new one, as zmq.Context does'
            )
        return context

    def reload(self) -> None:
        """Read users and keys again, also in the process; see :meth:`Device.reload`."""
        super().reload()
        self._get_launcher().reload()


def _count_threads() -> int:
    try:
        return len(os.listdir('/proc/self/task'))
    except OSError:  # /proc is not mounted: the check of the context is left out
        return 0
