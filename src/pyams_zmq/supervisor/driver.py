# SPDX-License-Identifier: ZPL-2.1
"""Starts processes, watches them, starts them again, and stops them."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from math import inf
from typing import Any

from pyams_zmq.exceptions import ZMQHandlerError, ZMQStartError
from pyams_zmq.interfaces import ZMQProcessGivenUpEvent
from pyams_zmq.process.address_lock import AddressLock
from pyams_zmq.process.base import SIGNALLED, ReadyProcess, StopOrder, describe_exit_code
from pyams_zmq.process.descendants import (
    LIST_INTERVAL,
    POLL_INTERVAL,
    OrphanCleanup,
    ProcessInfo,
    Reaper,
    children,
    open_pidfd,
    subreaper,
    warn_without_proc,
)
from pyams_zmq.process.heartbeat import (
    CHECK_INTERVAL,
    HANG_TIMEOUT,
    HeartbeatCounter,
    LivenessCheck,
)
from pyams_zmq.process.signals import SIGNALS, STOP_SIGNALS, ignore_server_signals
from pyams_zmq.process.socket_lock import SocketLock
from pyams_zmq.process.watchdog import RECYCLED, has_ended
from pyams_zmq.supervisor.notify import ServiceManager, States
from pyams_zmq.supervisor.policy import (
    Factory,
    RestartLimits,
    SupervisedProcess,
    describe_start_error,
)
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.hard_end import end_hard
from pyams_zmq.wire.log_fields import service_fields
from pyams_zmq.wire.poll import wait_readable

LOGGER = logging.getLogger('PyAMS (zmq)')

LOCK_INTERVAL = 0.2
"""Seconds between two attempts of a standby to take a lock"""

LOCK_REFRESH = 10.0
"""Seconds after which the file of a lock is touched, and made again if it was removed"""

_TERMINATED = [SIGNALLED + num for num in STOP_SIGNALS]


class Supervisor(RestartLimits):
    """Starts processes, and starts those again that crash.

    - A process that ends with exit code 0 has stopped itself, and is not started again.
    - A process that asks its supervisor for a replacement, by exit code 75, is replaced at once.
    - A process that hangs, because it was stopped (SIGSTOP) for instance, is killed after
      `hang_timeout` seconds. A process that computes or waits does not hang, unless one of its
      methods has passed its time limit and the `overdue_grace` of the process.
    - A process that crashes is started again after `min_delay` seconds, then after twice as many,
      up to `max_delay`. When `max_starts` starts in a row ended within `min_life` seconds, there is
      a :class:`~pyams_zmq.interfaces.ZMQProcessGivenUpEvent`, and from then on one start each
      `give_up_delay` seconds, with a CRITICAL log, until a process lives longer.
    - A process whose handler cannot be made (:class:`~pyams_zmq.exceptions.ZMQHandlerError`) is not
      started again: each fork would fail as the first one. An error of the handler's own code does
      not count as that: it may find a database later.
    - A process that was ready and obeys a SIGTERM or SIGINT which its supervisor did not send is
      started again after `min_delay` seconds, however often that happens.

    As the first process of a container (PID 1) it collects the orphans of all programs there, and
    leaves those alone that run.

    What a process leaves behind, a running ffmpeg for instance, is ended before the next process
    is started. While `run` runs, this program adopts such orphans. Children that it forks itself
    meanwhile, without :mod:`multiprocessing` and :mod:`subprocess`, are treated as orphans.

    It does not have threads. It forks, so the program should not have any either.

    :param factories: functions that make a fresh process, which is not started, by its name: logs,
        errors, `ps` and `top` show that
    :param registry: registry that gets the events; by default that of the process
    :ivar address_locks: locks of the addresses of processes, by the name of the process
    :ivar service_manager: systemd, for instance, to be notified by `run`; by default None
    """

    hang_timeout: float = HANG_TIMEOUT  #: Seconds without a heartbeat until a process is killed

    service_manager: ServiceManager | None = None

    _replaces_all = False  # also those that have stopped themselves
    _has_been_ready = False  # in a pool: broker and workers have served
    _all_beat = False  # all processes beat as soon as they run: one that never does hangs, too

    _stopping = False
    _exit_code: int | None = None
    _reload_is_due = False
    _is_subreaper = False

    def __init__(self, factories: Mapping[str, Factory], *, registry: Any = None):
        self.registry = registry
        self.address_locks: Mapping[str, AddressLock | SocketLock] = {}
        self._children = [SupervisedProcess(*item) for item in factories.items()]
        self._former_children: set[ProcessInfo] = set()  # which are not orphans
        self._cleanup: OrphanCleanup | None = None
        self._reaper: Reaper | None = None  # only as PID 1

    @property
    def processes(self) -> dict[str, ReadyProcess]:
        """The processes that run, by name."""
        return {child.name: child.process for child in self._children if child.running}

    @property
    def is_finished(self) -> bool:
        """True when no process runs, and none that was ever ready is to be started again."""
        return not any(
            child.running or (child.due is not None and not child.is_hopeless)
            for child in self._children
        )

    @property
    def exit_code(self) -> int:
        """1 if all processes ended before `stop`, and one of them could not be started; else 0."""
        if self._exit_code is not None:
            return self._exit_code
        return int(self.is_finished and any(child.has_failed for child in self._children))

    def step(self, now: float) -> float | None:
        """Do everything that is due, without waiting.

        :param now: present time in seconds, on the monotonic clock
        :return: seconds after which it has to be called again, or earlier if a process ends; None
            if only that is a reason
        """
        for child in self._starting:
            self._read_report(child)
        for child in list(self._children):
            if child.running and has_ended(child.process):
                self._handle_end(child, now)
        self._kill_hanging(now)
        timeout = self._step_cleanup(now)
        if self._stopping:
            timeout = min(timeout, self._step_stop(now))
        elif timeout == inf:  # else orphans may use what the next process needs
            timeout = self._step_start(now)
        timeout = min(timeout, self._keep_addresses())
        if any(child.running and child.pidfd is None for child in self._children):
            timeout = min(timeout, POLL_INTERVAL)
        if any(child.liveness is not None for child in self._children):
            timeout = min(timeout, CHECK_INTERVAL)
        if self._stopping and self._exit_code is None:  # `stop` was called in this step
            timeout = 0.0
        return None if timeout == inf else max(0.0, timeout)

    def run(self) -> int:
        """Supervise until `stop`, SIGTERM or SIGINT, or until no process is left; stop them all.

        A process that fails again and again is left only if it was never ready: it is badly
        configured, or another program uses its address. SIGHUP reloads the processes. This must be
        called in the main thread.

        :return: exit code of the program: 1 if no process is left and one has failed, else 0
        """
        threads = threading.active_count() - 1
        if threads:
            LOGGER.warning(
                'This program runs %s threads beside the supervisor: a lock which one of them '
                'holds while a process is forked is never released there',
                threads,
            )
        warn_without_proc(', '.join(child.name for child in self._children))
        with subreaper() as self._is_subreaper:
            self._former_children = children()
            try:
                if os.getpid() == 1:
                    self._reaper = Reaper(LIST_INTERVAL)
                with self._handle_signals() as wake:
                    while True:
                        timeout = self.step(monotonic())
                        if self._reaper is not None:
                            timeout = min(LIST_INTERVAL, inf if timeout is None else timeout)
                            self._collect_orphans(self._reaper, monotonic())
                        if self.service_manager is not None:
                            timeout = self._notify(self.service_manager, monotonic(), timeout)
                        if self._can_leave():
                            return self.exit_code
                        if wake in wait_readable([wake, *self._descriptors()], timeout):
                            os.read(wake, 64)
                        if self._reload_is_due:
                            self._reload_is_due = False
                            self._reload_and_notify()
            finally:
                self._stop_all()

    def stop(self) -> None:
        """Let `step` stop all processes, and `run` return then; signal handlers may call this."""
        self._stopping = True

    def reload(self) -> None:
        """Let the processes read their users and keys again."""
        for process in self.processes.values():
            process.reload()

    # The service manager

    def _notify(self, manager: ServiceManager, now: float, timeout: float | None) -> float | None:
        due = manager.step(now, States.of(self._children), is_stopping=self._stopping)
        timeout = min(due, inf if timeout is None else timeout)
        return None if timeout == inf else timeout

    def _reload_and_notify(self) -> None:
        if self.service_manager is not None:
            self.service_manager.begin_reload()
        self.reload()
        if self.service_manager is not None:
            self.service_manager.end_reload()

    # Hooks

    def _can_leave(self) -> bool:
        return self.is_finished

    def _descriptors(self) -> list[int]:
        """Return descriptors that become readable when `step` has to be called."""
        channels = [child.process._channel.fileno() for child in self._starting]
        return channels + [child.pidfd for child in self._children if child.pidfd is not None]

    @property
    def _starting(self) -> list[SupervisedProcess]:
        """The processes that run, and are not ready."""
        return [child for child in self._children if child.running and not child.ready]

    def _read_report(self, child: SupervisedProcess) -> None:
        """Note that a process is ready, or why it is not."""
        child.ready = child.process._was_ready()
        if not child.has_problem:  # else it is noted when the process ends
            self._note_problem(child, child.process._start_error())

    def _next_to_stop(self) -> list[SupervisedProcess]:
        return [child for child in self._children if child.running]

    def _stop_orders(self, process: ReadyProcess) -> Iterator[StopOrder]:
        return process._stop_orders()

    def _address_lock_of(self, child: SupervisedProcess) -> AddressLock | None:
        """Return the lock of the addresses that a process binds."""
        lock = self.address_locks.get(child.name)
        return lock if isinstance(lock, AddressLock) else None

    # Addresses

    def _take_address(self, child: SupervisedProcess) -> None:
        """Take the address lock of a process, if another application does not have it.

        Another process of this application may still have it: the new one then waits to bind.

        :raises ZMQStartError: another application has it
        """
        lock = self._address_lock_of(child)
        if lock is not None and not lock.acquire() and (owner := lock.find_other_owner()):
            raise ZMQStartError(
                f'Another application of this user serves {lock.address} ({owner}): stop that one, '
                'or choose another address'
            )

    def _keep_addresses(self) -> float:
        """Take the locks that have become free; note which addresses are not in use any more.

        :return: seconds after which it has to be called again
        """
        timeout = inf
        for child in self._children:
            if not child.running:
                continue
            if child.is_refused or child.has_problem:
                lock = self._address_lock_of(child)
                if lock is not None and child.process._was_ready():
                    if child.is_refused:
                        lock.note_use(False)
                    lock.note_problem('')
                    child.is_refused = child.has_problem = False
                else:
                    timeout = min(timeout, LOCK_INTERVAL)
            if child.name in self.address_locks:
                is_held = self.address_locks[child.name].acquire()
                timeout = min(timeout, LOCK_REFRESH if is_held else LOCK_INTERVAL)
        return timeout

    def _note_problem(self, child: SupervisedProcess, error: Exception | None) -> None:
        """Note for clients why a process could not start."""
        lock = self._address_lock_of(child)
        if lock is None or error is None:
            return
        child.has_problem = True
        lock.note_problem(describe_start_error(error))
        if lock.is_in_use(error):
            child.is_refused = True
            lock.note_use(True)

    # Start and end of a process

    def _step_start(self, now: float) -> float:
        for child in self._children:
            if child.due is not None and child.due <= now:
                self._start(child, now)
        return min((each.due for each in self._children if each.due is not None), default=inf) - now

    def _start(self, child: SupervisedProcess, now: float) -> None:
        child.due = None
        child.ready = False
        child.started = now
        child.was_overdue = False
        heartbeat = None
        try:
            self._take_address(child)
            process = child.factory()
            process.name = child.name
            process.is_supervised = True
            if self.hang_timeout:
                heartbeat = child.resources.enter_context(closing(HeartbeatCounter()))
                process._heartbeat = heartbeat
                if self._all_beat:
                    heartbeat.beat()
            process.start()
        except Exception as error:
            LOGGER.exception('%s cannot be started', child.name, extra=service_fields(child.name))
            self._note_problem(child, error)
            child.release()
            self._restart_later(child, now, None)
            return
        child.process = process
        child.running = True
        if heartbeat is not None:
            child.liveness = LivenessCheck(heartbeat, process.pid, self.hang_timeout)
        child.pidfd = child.resources.enter_context(open_pidfd(process.pid))
        LOGGER.info('%s is process %s', child.name, process.pid, extra=service_fields(child.name))

    def _handle_end(self, child: SupervisedProcess, now: float) -> None:
        child.has_served = child.has_served or child.process._was_ready()
        error = child.process._start_error()
        self._note_problem(child, error)
        child.release()
        if self._is_subreaper:
            self._cleanup = OrphanCleanup(self._former_children, now)
        code = child.process.exitcode
        if self._stopping or child.retired or (code == 0 and not self._replaces_all):
            LOGGER.info(
                '%s has ended with %s',
                child.name,
                describe_exit_code(code),
                extra=service_fields(child.name),
            )
        elif code in (0, RECYCLED) or child.was_overdue:
            LOGGER.info('%s is replaced', child.name, extra=service_fields(child.name))
            child.due = now
        # An orderly end that nobody here has asked for; a process that was not ready has failed.
        elif code in _TERMINATED and child.process._was_ready():
            LOGGER.error(
                '%s ended with %s; it is started again',
                child.name,
                describe_exit_code(code),
                extra=service_fields(child.name),
            )
            child.due = now + self.min_delay
        elif isinstance(error, ZMQHandlerError) and not (child.has_served or self._has_been_ready):
            self._give_up(child, code, error)
        else:
            self._restart_later(child, now, code)

    def _give_up(self, child: SupervisedProcess, code: int | None, error: Exception) -> None:
        """End a service whose handler cannot be made, in this fork and in any other one."""
        child.give_up()
        LOGGER.critical(
            '%s is not started again, each start would fail: %s',
            child.name,
            error,
            extra=service_fields(child.name),
        )
        self._on_failure(child, code)

    def _restart_later(self, child: SupervisedProcess, now: float, code: int | None) -> None:
        had_failed = child.has_failed
        delay = child.schedule_restart(now, self)
        if not child.has_failed:
            LOGGER.error(
                '%s ended after %.1f s with %s; it is started again in %s s',
                child.name,
                now - child.started,
                describe_exit_code(code),
                delay,
                extra=service_fields(child.name),
            )
            return
        LOGGER.critical(
            '%s fails: each of its last %s starts ended within %s s, the last one with %s; see its '
            'log; the next start is in %s s',
            child.name,
            child.failures,
            self.min_life,
            describe_exit_code(code),
            delay,
            extra=service_fields(child.name),
        )
        if not had_failed:
            self._on_failure(child, code)

    def _on_failure(self, child: SupervisedProcess, code: int | None) -> None:
        """Report that a process has failed too often; from now on there are long pauses."""
        self._notify_given_up(child.process, child.name, code)

    def _notify_given_up(self, process: Any, name: str, code: int | None) -> None:
        registry = self.registry or getattr(process, 'registry', None)
        try:
            if registry is not None:
                registry.notify(ZMQProcessGivenUpEvent(process, name, code))
        except Exception:
            LOGGER.exception(
                'A subscriber to the ZMQProcessGivenUpEvent of %s failed',
                name,
                extra=service_fields(name),
            )

    def _kill_hanging(self, now: float) -> None:
        for child in self._children:
            if child.liveness is not None and child.liveness.check(now):
                child.was_overdue = child.liveness.is_overdue
                LOGGER.error(
                    '%s (process %s) hangs: no heartbeat for %s s%s, it is killed',
                    child.name,
                    child.process.pid,
                    self.hang_timeout,
                    ' and a method is overdue' * child.was_overdue,
                    extra=service_fields(child.name),
                )
                child.liveness = None
                child.process.kill()

    def _step_cleanup(self, now: float) -> float:
        timeout = None if self._cleanup is None else self._cleanup.step(now)
        if timeout is None:
            self._cleanup = None
            return inf
        return timeout

    def _collect_orphans(self, reaper: Reaper, now: float) -> None:
        """Collect the orphans of others that have ended; note those that run, they are not ours."""
        if now >= reaper.due:
            reaper.step(now)
            present = children()
            # Those of a process of ours come when it ends, so later than this.
            if self._cleanup is None and not any(
                child.running and has_ended(child.process) for child in self._children
            ):
                self._former_children = present

    # The end

    def _step_stop(self, now: float) -> float:
        if self._exit_code is None:
            self._exit_code = self.exit_code
        for child in self._children:
            child.due = None
        stopping = self._next_to_stop()
        for child in stopping:
            self._stop_further(child, now)
        return min((each.stop_deadline for each in stopping if each.running), default=inf) - now

    def _stop_further(self, child: SupervisedProcess, now: float) -> None:
        """Execute the next order to stop, if the process did not end in time after the last one."""
        if child.stop_orders is None:
            child.stop_orders = self._stop_orders(child.process)
        elif now < child.stop_deadline:
            return
        else:
            self._log_late(child)
        order, timeout = next(child.stop_orders, (None, 0.0))
        if order is None:  # SIGKILL did not end it: the system waits for a device
            child.release()
        else:
            order()
            child.stop_deadline = now + timeout

    def _log_late(self, child: SupervisedProcess) -> None:
        LOGGER.warning(
            '%s did not stop in time, it is ended harder: see its log, or raise drain_timeout',
            child.name,
            extra=service_fields(child.name),
        )

    def _stop_all(self) -> None:
        """Stop the processes that still run because the loop failed, and end their orphans."""
        processes = self.processes.values()
        for process in processes:
            process._ask_to_stop()
        for process in processes:
            process.stop()
        for child in self._children:
            child.release()
        if self._is_subreaper:
            cleanup = OrphanCleanup(self._former_children, monotonic())
            while (timeout := cleanup.step(monotonic())) is not None:
                wait_readable([], timeout)

    # Signals

    @contextmanager
    def _handle_signals(self) -> Iterator[int]:
        """Handle signals; yield a descriptor that is readable when a signal has arrived."""
        wake, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        former_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        handlers = dict.fromkeys(STOP_SIGNALS, self._on_stop_signal)
        handlers[signal.SIGHUP] = self._on_hangup
        former = {num: signal.signal(num, handler) for num, handler in handlers.items()}
        # Else the system, or a handler of the program, would collect the exit codes.
        former[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        former.update(ignore_server_signals())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            yield wake
        finally:
            for num, handler in former.items():
                signal.signal(num, signal.SIG_DFL if handler is None else handler)
            signal.set_wakeup_fd(former_fd)
            os.close(wake)
            os.close(write)

    def _on_stop_signal(self, num: int, frame: Any) -> None:
        self.stop()
        # The second one of a kind ends this process at once; the default does not end PID 1.
        signal.signal(num, signal.SIG_DFL if os.getpid() != 1 else _end)

    def _on_hangup(self, num: int, frame: Any) -> None:
        self._reload_is_due = True


def _end(num: int, _frame: Any) -> None:
    end_hard(SIGNALLED + num)
