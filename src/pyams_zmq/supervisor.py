# SPDX-License-Identifier: ZPL-2.1
"""Processes that are started again when they crash."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

from pyramid.threadlocal import get_current_registry

from pyams_zmq.interfaces import ZMQProcessGivenUpEvent
from pyams_zmq.process.base import (
    RECYCLED,
    OwnedProcess,
    ReadyProcess,
    StopOrder,
)
from pyams_zmq.process.channel import STOP
from pyams_zmq.process.descendants import (
    POLL_INTERVAL,
    OrphanCleanup,
    ProcessInfo,
    children,
    open_pidfd,
    poll,
    subreaper,
)
from pyams_zmq.process.heartbeat import (
    HANG_TIMEOUT,
    HEARTBEAT_INTERVAL,
    LOOK_INTERVAL,
    HeartbeatCounter,
    LivenessCheck,
)
from pyams_zmq.process.lock import NameLock
from pyams_zmq.process.watchdog import SIGNALS, STOP_SIGNALS, has_ended

LOGGER = logging.getLogger('PyAMS (zmq)')

LOCK_INTERVAL = 0.2
"""Seconds between two attempts of a standby to take the lock"""

LOCK_REFRESH = 3600.0
"""Seconds after which the file of a lock is touched, so that nobody tidies it away"""

Factory = Callable[[], ReadyProcess]


class Child:
    """What a supervisor knows of a child."""

    def __init__(self, name: str, factory: Factory):
        self.name = name
        self.factory = factory
        self.process: ReadyProcess | None = None
        self.hang: LivenessCheck | None = None
        self.running = False
        self.given_up = False
        self.retired = False
        self.ready = False
        self.started = 0.0
        self.due: float | None = 0.0
        self.short_lives = 0
        self.pidfd: int | None = None
        self.resources = ExitStack()
        self.stop_orders: Iterator[StopOrder] | None = None
        self.stop_deadline = 0.0


class Supervisor:
    """Starts processes, and starts those again that crash.

    A process that ends with exit code 0 has stopped itself, and stays so. One that wants to be
    replaced says so by its exit code, and the next one is started at once. One that hangs, because
    it was stopped (SIGSTOP) for instance, is killed after `hang_timeout` seconds; a process that
    computes, or waits for whatever it does, does not hang. One that crashes is
    started again after `min_delay` seconds, then after twice as many, up to `max_delay`. When
    `max_starts` of its starts in a row ended within `min_life` seconds, it is given up: a CRITICAL
    log and a :class:`~pyams_zmq.interfaces.ZMQProcessGivenUpEvent` tell.

    Whatever a process leaves behind, a running ffmpeg for instance, is ended before any process is
    started. While `run` runs, this program adopts such orphans, and takes for one what it has
    forked itself meanwhile without :mod:`multiprocessing` and :mod:`subprocess`.

    It has no threads. It forks, so the program should have none either.

    :param factories: functions that make a fresh process, which is not started, by the name of the
        child
    :param registry: registry that gets the events; by default that of the process
    :param clock: gives the present time in seconds
    """

    min_delay: float = 0.1
    max_delay: float = 30.0
    min_life: float = 10.0
    max_starts: int = 5
    hang_timeout: float = HANG_TIMEOUT

    _replaces_all = False  # also those that have stopped themselves
    _all_beat = False  # all processes beat as soon as they run: one that never does hangs, too

    def __init__(
        self,
        factories: Mapping[str, Factory],
        *,
        registry: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.registry = registry
        self._clock = clock
        self._children = [Child(name, factory) for name, factory in factories.items()]
        self._stopping = False
        self._exit_code: int | None = None
        self._hung_up = False
        self._adopts = False
        self._keep: set[ProcessInfo] = set()
        self._sweep: OrphanCleanup | None = None

    @property
    def processes(self) -> dict[str, ReadyProcess]:
        """The processes that run, by the name of the child."""
        return {
            child.name: child.process
            for child in self._children
            if child.running and child.process is not None
        }

    @property
    def is_finished(self) -> bool:
        """True when no child runs or is to be started."""
        return not any(child.running or child.due is not None for child in self._children)

    @property
    def exit_code(self) -> int:
        """1 if one child was given up, and none was left before `stop`; else 0."""
        if self._exit_code is not None:
            return self._exit_code
        return int(self.is_finished and any(child.given_up for child in self._children))

    def step(self, now: float) -> float | None:
        """Do whatever is due.

        :param now: present time in seconds, on the clock of this supervisor
        :return: seconds after which it has to be called again, or earlier if a child ends; None if
            that is the only reason
        """
        for child in list(self._children):
            if child.running and has_ended(child.process):
                self._bury(child, now)
        self._kill_hanging(now)
        timeouts = self._step_cleanup(now)
        if self._stopping:
            timeouts += self._step_stop(now)
        elif not timeouts:  # else what is to start would meet what the last one has left behind
            timeouts = self._step_start(now)
        if any(child.running and child.pidfd is None for child in self._children):
            timeouts.append(POLL_INTERVAL)
        if any(child.hang is not None for child in self._children):
            timeouts.append(LOOK_INTERVAL)
        if self._stopping and self._exit_code is None:  # since just now
            timeouts.append(0.0)
        return min(timeouts, default=None)

    def run(self) -> int:
        """Supervise until `stop`, SIGTERM or SIGINT, or until no child is left; stop them all.

        SIGHUP reloads the processes. To be called in the main thread.

        :return: exit code of the program: 1 if no child is left and one was given up, else 0
        """
        threads = threading.active_count() - 1
        if threads:
            LOGGER.warning(
                'This program runs %s threads beside the supervisor: a lock which one of them '
                'holds while a process is forked is never released there',
                threads,
            )
        with subreaper() as self._adopts:
            self._keep = children()
            try:
                with self._hear_signals() as wake:
                    while True:
                        timeout = self.step(self._clock())
                        if self._may_leave():
                            return self.exit_code
                        if wake in poll([wake, *self._descriptors()], timeout):
                            os.read(wake, 64)
                        if self._hung_up:
                            self._hung_up = False
                            self.reload()
            finally:
                self._end()

    def stop(self) -> None:
        """Let `step` stop all processes, and `run` end then; for signal handlers, for instance."""
        self._stopping = True

    def reload(self) -> None:
        """Let the processes read their users and keys again."""
        for process in self.processes.values():
            process.reload()

    def _may_leave(self) -> bool:
        return self.is_finished

    def _descriptors(self) -> list[int]:
        """List what gets readable when `step` has something to do."""
        return [child.pidfd for child in self._children if child.pidfd is not None]

    def _end(self) -> None:
        """Leave nothing behind, if the loop failed."""
        processes = self.processes.values()
        for process in processes:
            process._ask_to_stop()
        for process in processes:
            process.stop()
        for child in self._children:
            self._release(child)
        if self._adopts:
            sweep = OrphanCleanup(self._keep, time.monotonic())
            while (timeout := sweep.step(time.monotonic())) is not None:
                poll([], timeout)

    def _step_cleanup(self, now: float) -> list[float]:
        timeout = None if self._sweep is None else self._sweep.step(now)
        if timeout is None:
            self._sweep = None
            return []
        return [timeout]

    def _kill_hanging(self, now: float) -> None:
        for child in self._children:
            process = child.process
            if process is not None and child.hang is not None and child.hang.look(now):
                LOGGER.error(
                    '%s (process %s) hangs: no sign of life for %s s, it is killed',
                    child.name,
                    process.pid,
                    self.hang_timeout,
                )
                child.hang = None
                process.kill()

    def _step_start(self, now: float) -> list[float]:
        for child in self._children:
            if child.due is not None and child.due <= now:
                self._start(child, now)
        return [max(0.0, child.due - now) for child in self._children if child.due is not None]

    def _step_stop(self, now: float) -> list[float]:
        if self._exit_code is None:
            self._exit_code = self.exit_code
        for child in self._children:
            child.due = None
        children = [(child, child.process) for child in self._next_to_stop() if child.process]
        for child, process in children:
            self._press(child, process, now)
        return [max(0.0, child.stop_deadline - now) for child, _ in children if child.running]

    def _next_to_stop(self) -> list[Child]:
        return [child for child in self._children if child.running]

    def _press(self, child: Child, process: ReadyProcess, now: float) -> None:
        if child.stop_orders is None:
            child.stop_orders = self._stop_orders(process)
        elif now < child.stop_deadline:
            return
        else:
            LOGGER.warning('%s did not stop in time', child.name)
        order, timeout = next(child.stop_orders, (None, 0.0))
        if order is None:  # not even killed: it hangs in the system
            self._release(child)
        else:
            order()
            child.stop_deadline = now + timeout

    def _stop_orders(self, process: ReadyProcess) -> Iterator[StopOrder]:
        return process._stop_orders()

    def _start(self, child: Child, now: float) -> None:
        child.due = None
        child.started = now
        heartbeat = None
        try:
            process = child.factory()
            if self.hang_timeout:
                heartbeat = child.resources.enter_context(closing(HeartbeatCounter()))
                process._heartbeat = heartbeat
                if self._all_beat:
                    heartbeat.beat()
            process.start()
        except Exception:
            LOGGER.exception('%s cannot be started', child.name)
            self._release(child)
            self._start_again(child, now, None)
            return
        child.process = process
        child.running = True
        if heartbeat is not None:
            child.hang = LivenessCheck(heartbeat, process.pid, self.hang_timeout)
        child.pidfd = child.resources.enter_context(open_pidfd(process.pid))
        LOGGER.info('%s is process %s', child.name, process.pid)

    def _bury(self, child: Child, now: float) -> None:
        self._release(child)
        if self._adopts:
            self._sweep = OrphanCleanup(self._keep, now)
        code = None if child.process is None else child.process.exitcode
        if self._stopping or child.retired or (code == 0 and not self._replaces_all):
            LOGGER.info('%s has ended with exit code %s', child.name, code)
        elif code in (0, RECYCLED):
            LOGGER.info('%s is replaced', child.name)
            child.due = now
        else:
            self._start_again(child, now, code)

    @staticmethod
    def _release(child: Child) -> None:
        child.running = False
        child.pidfd = None
        child.hang = None
        child.resources.close()

    def _start_again(self, child: Child, now: float, code: int | None) -> None:
        life = now - child.started
        child.short_lives = 0 if life >= self.min_life else child.short_lives + 1
        if child.short_lives >= self.max_starts:
            self._give_up(child, code)
            return
        doublings = max(0, child.short_lives - 1)
        # A float has no room for more doublings, which a large `max_starts` would let happen.
        delay = min(self.max_delay, self.min_delay * 2.0 ** min(doublings, 100))
        child.due = now + delay
        LOGGER.error(
            '%s ended after %.1f s with exit code %s, it is started again in %s s',
            child.name,
            life,
            code,
            delay,
        )

    def _give_up(self, child: Child, code: int | None) -> None:
        child.given_up = True
        LOGGER.critical(
            '%s is given up: each of its last %s starts ended within %s s, the last one with exit '
            'code %s, and its log says why; mend that and start the program again',
            child.name,
            self.max_starts,
            self.min_life,
            code,
        )
        registry = self.registry
        if registry is None:
            registry = getattr(child.process, 'registry', None)
        try:
            if registry is not None:
                registry.notify(ZMQProcessGivenUpEvent(child.process, child.name, code))
        except Exception:
            LOGGER.exception('A subscriber to the giving up of %s failed', child.name)

    @contextmanager
    def _hear_signals(self) -> Iterator[int]:
        """Handle signals, and give a descriptor that gets readable when one came in."""
        wake, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        former_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        handlers = dict.fromkeys(STOP_SIGNALS, self._on_stop_signal)
        handlers[signal.SIGHUP] = self._on_hangup
        former = {num: signal.signal(num, handler) for num, handler in handlers.items()}
        # Else the system, or a handler of the program, would collect the exit codes.
        former[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
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
        signal.signal(num, signal.SIG_DFL)  # the second one of a kind ends this process at once

    def _on_hangup(self, num: int, frame: Any) -> None:
        self._hung_up = True


class SupervisorProcess(OwnedProcess):
    """Process beside a web server which runs a supervisor; it ends with its owner.

    :param factories: see :class:`Supervisor`; they are called in this process
    :param registry: registry of the application, by default the current one
    :param lock: of all processes of this user and machine with the same lock, just one runs its
        children; the others stand by, and one of them takes over when it goes. The one that has it
        keeps it until it is stopped, also when all its children were given up.
    """

    drain_timeout: float = 30.0
    """Seconds that `stop` gives all children; more than the longest of theirs"""

    def __init__(
        self, factories: Mapping[str, Factory], *, registry: Any = None, lock: str | None = None
    ):
        super().__init__(get_current_registry() if registry is None else registry)
        self.factories = factories
        self.lock = lock
        self._name_lock: NameLock | None = None

    def start(self) -> None:
        """Fork the child and return at once.

        :raises ZMQStartError: in a program that gevent has patched
        :raises OSError: the folder of the locks is not this user's own
        """
        if self.lock is not None:
            self._name_lock = NameLock(self.lock)
        super().start()

    def run(self) -> None:
        """Supervise; runs in the child."""
        self._cut_off()
        with open_pidfd(self._parent_pid) as pidfd:
            try:
                code = OwnedSupervisor(self, self.factories, pidfd, self._name_lock).run()
            except Exception:
                LOGGER.exception('%s failed', self.name)
                code = 1
        sys.exit(code)


class OwnedSupervisor(Supervisor):
    """Supervisor which also heeds its owner, and the lock, in its loop.

    :param process: process that it runs in
    :param factories: see :class:`Supervisor`
    :param pidfd: descriptor of the owner, if the system has such
    :param lock: that of a :class:`SupervisorProcess`
    """

    def __init__(
        self,
        process: OwnedProcess,
        factories: Mapping[str, Factory],
        pidfd: int | None,
        lock: NameLock | None = None,
    ):
        super().__init__(factories, registry=process.registry)
        self._owner = process._parent_pid
        self._owner_pidfd = pidfd
        self._control = process._control
        self._heartbeat = process._heartbeat
        self._lock = lock
        self._names = tuple(factories)
        self._stands_by = False

    def step(self, now: float) -> float | None:
        """Do whatever is due, if this process has the lock."""
        self._heed_owner()
        timeouts = [POLL_INTERVAL] if self._owner_pidfd is None else []
        if self._heartbeat is not None:
            self._heartbeat.beat()
            timeouts.append(HEARTBEAT_INTERVAL)
        if self._lock is None:
            timeout = super().step(now)
        elif self._stopping or self._acquire(self._lock):
            timeout = super().step(now)
            timeouts.append(LOCK_REFRESH)
        else:
            timeout = LOCK_INTERVAL
        if timeout is not None:
            timeouts.append(timeout)
        return min(timeouts, default=None)

    def _acquire(self, lock: NameLock) -> bool:
        is_free = lock.acquire()
        if not is_free and not self._stands_by:
            LOGGER.info('Stands by for %s, which another process runs', ', '.join(self._names))
        self._stands_by = not is_free
        return is_free

    def _may_leave(self) -> bool:
        # With the lock it stays: a standby would start what was given up, or has stopped itself.
        return self.is_finished and (self._lock is None or self._stopping)

    def _descriptors(self) -> list[int]:
        own = [self._control.fileno(), self._owner_pidfd]
        return [fd for fd in own if fd is not None] + super()._descriptors()

    def _heed_owner(self) -> None:
        if os.getppid() == self._owner:
            with suppress(EOFError):
                command = self._control.receive()
                if command is not None and command.name == STOP:
                    self.stop()
                elif command is not None:
                    self._control.refuse(command)
                return
        # It has died, or has become another program, which no pidfd tells. The next owner may want
        # the addresses: at our end the processes have their `orphan_timeout`.
        LOGGER.warning('The owner of this process (pid %s) died, stopping', self._owner)
        now = time.monotonic()
        # Nothing else would end the orphans: kill them now.
        OrphanCleanup(self._keep, now, 0.0).step(now)
        self._abandon()
        os._exit(1)

    def _abandon(self) -> None:
        """Do what cannot wait before this process ends, because its owner died."""
