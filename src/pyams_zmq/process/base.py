# SPDX-License-Identifier: ZPL-2.1
"""A forked process, and the process that owns it.

The methods are in two groups: the owner calls the first, the child the second.
"""

import asyncio
import atexit
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.context import ForkProcess
from socket import socket
from threading import RLock
from typing import Any
from weakref import WeakSet

from pyramid import threadlocal
from pyramid.threadlocal import get_current_registry, manager
from zope.component import getSiteManager

from pyams_zmq.exceptions import ZMQStartError, ZMQTimeoutError
from pyams_zmq.process.channel import Command, Outcome, OwnerChannel, open_channel
from pyams_zmq.process.deadlines import CallDeadlines
from pyams_zmq.process.descendants import continue_without_parent, open_pidfd
from pyams_zmq.process.heartbeat import HeartbeatCounter
from pyams_zmq.process.log_locks import holding_log_locks
from pyams_zmq.process.server_socket import close_inherited_listeners
from pyams_zmq.process.signals import BLOCKED_SIGNALS, drop_inherited_handlers
from pyams_zmq.process.title import set_title
from pyams_zmq.process.watchdog import Watchdog, has_ended, wait_for_exit
from pyams_zmq.wire.environment import ELSEWHERE, check_fork, leave_server
from pyams_zmq.wire.log_fields import add_service

LOGGER = logging.getLogger('PyAMS (zmq)')

SIGNALLED = 128
"""Added to the number of a signal: exit code of a process that has obeyed it, as in a shell"""

StopOrder = tuple[Callable[[], None], float]
"""A function that makes a child end, and the seconds to wait for the end"""


def describe_exit_code(code: int | None) -> str:
    """Return the exit code of a process as text, with the name of the signal that ended it.

    :param code: exit code, negative for a signal; None if it is unknown
    """
    if code is None:
        return 'an unknown exit code'
    text = f'exit code {code}'
    if code < 0:
        with suppress(ValueError):  # a real-time signal has no name
            text += f' ({signal.Signals(-code).name})'
    elif code > SIGNALLED:
        with suppress(ValueError):
            text += f' (after {signal.Signals(code - SIGNALLED).name})'
    if code == -signal.SIGABRT:
        text += ': probably an assertion in libzmq has failed, which prints it to stderr'
    return text


class OwnedProcess(multiprocessing.Process):
    """Process that its owner, the process which started it, controls over a channel.

    It always forks, and is not daemonic: it may have children.

    :param registry: registry of the application, by default the current one
    """

    drain_timeout: float = 10.0  #: Seconds in which a stopping process finishes its messages
    orphan_timeout: float = 0.5  #: The same, when its owner has died
    #: Seconds after the time limit of a method in which it must end, if a supervisor has started
    #: this process; else a new process replaces it
    overdue_grace: float = 5.0
    service_name: str | None = None  #: Name of its service, for the log and traces
    is_supervised: bool = False  #: True if a supervisor starts this process again when it ends

    _stop_slack = 2.0  # seconds after `drain_timeout` until the child is terminated

    _start_method = 'fork'
    _Popen: Any = staticmethod(ForkProcess._Popen)
    _popen: Any
    _parent_pid: int

    _channel: OwnerChannel  # from the start on
    _control: Any = None  # a ChildChannel
    _watchdog: Watchdog | None = None
    _heartbeat: HeartbeatCounter | None = None

    def __init__(self, registry: Any = None):
        super().__init__()
        self.registry = get_current_registry() if registry is None else registry
        self._stop_lock = RLock()
        self._channel_lock = RLock()

    # In the parent

    def start(self) -> None:
        """Fork the child and return at once.

        :raises AssertionError: it was started before
        :raises ZMQStartError: in a program that cannot fork, see `check_fork`
        """
        if self._popen is not None:
            raise AssertionError(f'{self.name} cannot be started twice')  # as the base class says
        check_fork(self.name)
        self._channel, self._control = open_channel()
        # Until the child has its own handlers, it has those of a web server, which ignore these.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)
        try:
            with holding_log_locks(), warnings.catch_warnings():
                # Python 3.12 and later warn that forking a process with threads may deadlock the
                # child. Ours takes no lock that a thread of the parent could hold: it has a loop, a
                # context and signal handlers of its own. It inherits the filter: its handlers fork.
                warnings.filterwarnings(
                    'ignore', 'This process .* is multi-threaded', DeprecationWarning
                )
                super().start()
        except OSError as error:  # a limit of processes, or a filter of system calls
            self._channel.close()
            raise ZMQStartError(
                f'{self.name} cannot be forked: {error}; raise the limit, or {ELSEWHERE}'
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._control.close()
        _owned.add(self)

    def stop(self) -> None:
        """Ask the child to stop, wait for `drain_timeout`, then terminate it, then kill it.

        It does nothing before the start, after the end, and in processes that are not the owner.
        """
        if self._is_owner():
            with self._stop_lock:
                for order, timeout in self._stop_orders():
                    if has_ended(self):
                        break
                    order()
                    if not wait_for_exit(self, timeout):
                        LOGGER.warning(
                            '%s did not stop within %s s, it is ended harder: see its log, or '
                            'raise drain_timeout',
                            self.name,
                            timeout,
                        )

    def _stop_orders(self) -> Iterator[StopOrder]:
        """Return the ways to stop the child, from gentle to hard."""
        yield self._ask_to_stop, self.drain_timeout + self._stop_slack
        yield self.terminate, 1.0  # ends at once a child that is stopping
        yield self.kill, 5.0

    def _ask_to_stop(self) -> None:
        # Not by a signal: the terminal or systemd may send one too, and a second signal ends the
        # child at once.
        self._owner_channel.ask_to_stop()

    def _is_owner(self) -> bool:
        """Return True in the process that called `start`, not in the child and in other forks."""
        return self._popen is not None and self._parent_pid == os.getpid()

    def _wait_report(self, timeout: float | None) -> Any:
        """Wait until the child is ready, and return the addresses that it has reported.

        :param timeout: seconds; None waits without end
        :raises ZMQTimeoutError: it is still not ready after *timeout*
        :raises Exception: the error that it has reported, or that of `_describe_end`
        """
        return self._receive(
            lambda end: self._owner_channel.wait('report', end, timeout),
            f'is not ready after {timeout} s: see its log, or wait longer',
        )

    def _call(self, name: str, *args: Any, timeout: float) -> Any:
        """Send a command to the child, and return its result.

        :param args: arguments, which can be pickled
        :param timeout: seconds
        :raises ZMQTimeoutError: it does not answer in time
        :raises Exception: the error of the command, or that of `_describe_end`
        """
        return self._receive(
            lambda end: self._owner_channel.call(name, args, end, timeout),
            f'does not answer within {timeout} s',
        )

    def _receive_result(self) -> Outcome | None:
        """Return the last value and the error that a child reported before its end, if any."""
        with self._channel_lock:
            return self._owner_channel.wait('result', None, 0)

    def _was_ready(self) -> bool:
        """Return True if a child has reported that it is ready, also if it has ended."""
        outcome = self._report
        return outcome is not None and outcome[1] is None

    def _start_error(self) -> Exception | None:
        """Return the error of its start that a child has reported, also if it has ended."""
        outcome = self._report
        return None if outcome is None else outcome[1]

    @property
    def _report(self) -> Outcome | None:
        with self._channel_lock:
            return self._owner_channel.wait('report', None, 0)

    def _receive(self, receive: Callable[[int | None], Outcome | None], complaint: str) -> Any:
        with self._channel_lock, open_pidfd(self.pid) as pidfd:
            end = self.sentinel if pidfd is None and not has_ended(self) else pidfd
            try:
                outcome = receive(end)
            except TimeoutError:
                raise ZMQTimeoutError(f'{self.name} {complaint}') from None
        if outcome is None:
            wait_for_exit(self, 1)
            raise self._describe_end()
        value, error = outcome
        if error is not None:
            raise error
        return value

    @property
    def _owner_channel(self) -> OwnerChannel:
        if not self._is_owner():
            raise ZMQStartError(
                f'{self.name} was not started by this process: call its start first'
            )
        return self._channel

    def _describe_end(self) -> Exception:
        return ZMQStartError(
            f'{self.name} ended with {describe_exit_code(self.exitcode)}; see its log'
        )

    # In the child

    def kept_listeners(self) -> list[int]:
        """Return the descriptors of inherited listening sockets that this process uses.

        The others are closed. By default these are the sockets that are attributes of this object.
        """
        return [each.fileno() for each in vars(self).values() if isinstance(each, socket)]

    def _drop_inherited_state(self) -> None:
        """Reset what was inherited from the parent, which may be a running web server."""
        self._channel.close()
        set_title(self.name)
        continue_without_parent()
        asyncio._set_running_loop(None)
        asyncio.set_event_loop(None)
        signal.set_wakeup_fd(-1)
        drop_inherited_handlers()
        leave_server()
        close_inherited_listeners(self.kept_listeners())
        multiprocessing.set_start_method('fork', force=True)
        getSiteManager.sethook(get_current_registry)
        manager.clear()
        threadlocal.global_registry = self.registry  # the registry of new threads
        LOGGER.addFilter(add_service)
        self.enter_thread()

    def enter_thread(self) -> None:
        """Make the registry of the application that of this thread."""
        manager.push({'registry': self.registry, 'request': None})
        utils = sys.modules.get('pyams_utils.registry')
        if utils is not None:  # a site of the parent is bound to the ZODB connection of the parent
            utils.set_local_registry(None)

    def _start_watchdog(
        self,
        on_command: Callable[[Command], None] | None = None,
        on_stop: Callable[[], None] | None = None,
        calls: CallDeadlines | None = None,
        on_overdue: Callable[[object, Callable[[], None]], None] | None = None,
    ) -> Watchdog:
        """Start the watchdog of this process; see :class:`Watchdog` for the arguments."""
        self._watchdog = Watchdog(
            self._parent_pid,
            self.orphan_timeout,
            self._control,
            lambda: self.drain_timeout,
            self.enter_thread,
            self._heartbeat,
            on_command,
            on_stop=on_stop,
            calls=calls,
            on_overdue=on_overdue,
        )
        self._watchdog.start()
        return self._watchdog

    def _send_report(self, addresses: Any, error: Exception | None) -> None:
        """Report to the owner the bound addresses, or why this process cannot be ready."""
        if self._control is not None:  # `run` can also be called without `start`
            self._control.send_outcome('report', addresses, error)


class ReadyProcess(OwnedProcess):
    """Process that binds addresses, and reports them to its owner."""

    bound_address: str | None = None
    """First of `bound_addresses`"""

    bound_addresses: Sequence[str] = ()

    def wait_ready(self, timeout: float | None = 10) -> str:
        """Wait until the child is ready.

        See :meth:`pyams_zmq.interfaces.IZMQProcess.wait_ready`.
        """
        addresses = self._wait_report(timeout)
        if has_ended(self):
            raise self._describe_end()
        self.bound_addresses = addresses
        self.bound_address = addresses[0]
        return str(self.bound_address)

    def _drop_inherited_state(self) -> None:
        self.service_name = self.service_name or self.name
        super()._drop_inherited_state()

    def reload(self) -> None:
        """Ask the child to read users and keys again."""
        if self._is_owner() and not has_ended(self):
            self._owner_channel.ask_to_reload()


_owned: WeakSet[OwnedProcess] = WeakSet()


@atexit.register
def _stop_owned() -> None:
    processes = [process for process in _owned if process._is_owner()]
    for process in processes:  # all at once: each may take its `drain_timeout`
        process._ask_to_stop()
    for process in processes:
        process.stop()
    _disown()  # a fork made by C code (uWSGI) runs no hooks


def _disown() -> None:
    # A worker of a preforking server has inherited the list of children of its master; at its
    # end multiprocessing would try to join them.
    for process in _owned:
        if not process._is_owner():
            multiprocessing.process._children.discard(process)  # type: ignore[attr-defined] # private


os.register_at_fork(after_in_child=_disown)
