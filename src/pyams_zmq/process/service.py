# SPDX-License-Identifier: ZPL-2.1
"""A child process that runs an IOLoop until it is stopped: signals, sockets, drain, end."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from multiprocessing.util import _exit_function  # type: ignore[attr-defined] # not in typeshed
from threading import local
from typing import Any
from weakref import WeakSet

import zmq
from tornado.ioloop import IOLoop

from pyams_zmq.auth import AccessAttributes
from pyams_zmq.auth.authenticator import Authenticator
from pyams_zmq.exceptions import ZMQHandlerError, ZMQJournalError
from pyams_zmq.handler.executor import ServiceExecutor
from pyams_zmq.process.attendant import Attendant
from pyams_zmq.process.base import SIGNALLED, ReadyProcess
from pyams_zmq.process.channel import RELOAD, Command
from pyams_zmq.process.deadlines import CallDeadlines
from pyams_zmq.process.descendants import (
    become_subreaper,
    end_descendants,
    forbid_new_processes,
    wait_for_descendants,
    warn_without_proc,
)
from pyams_zmq.process.guard import ConnectionGuard
from pyams_zmq.process.reply_stream import ReplyStream
from pyams_zmq.process.server_socket import (
    FILE_INTERVAL,
    LINGER,
    SOCKET_LIMITS,
    ServerSockets,
    SocketLimits,
    close_inherited_listeners,
)
from pyams_zmq.process.signals import SIGNALS, STOP_SIGNALS
from pyams_zmq.process.stream import ZMQStream
from pyams_zmq.process.watchdog import END_GRACE, RECYCLED
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.context import check_descriptors, raise_descriptor_limit
from pyams_zmq.wire.log_fields import fields_of
from pyams_zmq.wire.message import DRAINING_REPLY

LOGGER = logging.getLogger('PyAMS (zmq)')

LIMITS = ('drain_timeout', 'orphan_timeout', 'overdue_grace', 'stats_users', *SOCKET_LIMITS)
"""Class attributes of a process that a setting can override"""

TERM_GRACE = 0.5  # seconds before `drain_timeout` ends when descendants that run are terminated
KILL_GRACE = 1.0  # seconds for descendants after a SIGTERM, unless the process must end earlier

MAX_FAILURES = 100
"""Errors that leave the loop, without a turn of it between them, until the process ends"""


class ServiceProcess(AccessAttributes, SocketLimits, ReadyProcess):
    """Child process that runs an IOLoop until it is stopped.

    A subclass opens its sockets in `init_stream`, and may override `_on_started`, `_log_start`,
    `_report_ready`, `_reload`, `_drain`, `_on_stopped` and `_teardown`; all run in the child.

    It needs `access`, the rules who may connect: a subclass assigns it, or calls `set_access`.

    :param registry: registry of the application
    """

    loop_factory: Callable[[], asyncio.AbstractEventLoop] = staticmethod(asyncio.new_event_loop)

    #: Users that may read the statistics, and reload the service, from other machines
    stats_users: Collection[str] = ()

    context: Any = None
    loop: Any = None
    auth_thread: Authenticator | None = None
    draining: bool = False
    call_deadlines: CallDeadlines | None = None
    """In the child of a supervisor: the calls of methods that have a time limit"""

    _guard: ConnectionGuard | None = None
    _attendant: Attendant | None = None
    _sockets: Any = None
    _needs_replacement = False
    _exit_code = 0  # if it ends in an orderly way
    _pid = 0  # of the child
    _started = False
    _stopping = False
    _failures = 0  # errors that have left the loop since its last turn

    def __init__(self, registry: Any):
        super().__init__(registry)
        self._streams: WeakSet[ZMQStream] = WeakSet()

    def stop(self) -> None:
        """End the process; see :meth:`pyams_zmq.interfaces.IZMQProcess.stop`."""
        if self.loop is not None:
            self.loop.add_callback(self.exit)
        else:
            super().stop()

    def reload(self) -> None:
        """Read users and keys again; see :meth:`pyams_zmq.interfaces.IZMQProcess.reload`."""
        if self._is_owner():
            super().reload()
        else:
            self._reload()

    # For subclasses

    def init_stream(self) -> None:
        """Open the sockets, and add their streams to `_streams`."""

    def _on_started(self) -> None:
        """Do what has to be done before the first message is handled."""

    def _log_start(self) -> None:
        """Log that messages are handled from now on."""
        LOGGER.info('%s serves %s', self.name, self.bound_address)

    def _report_ready(self) -> None:
        """Report to the owner that the process is ready."""
        self._send_report([self.bound_address], None)

    def _reload(self) -> None:
        """Read again what can change while the process runs."""
        self.access.try_reload(self.name)

    async def _drain(self) -> None:
        """Finish the messages in hand, refuse others; after that the loop stops."""

    def _on_stopped(self) -> None:
        """Do what has to be done before the sockets are closed; only if it was started."""

    # Life of the child

    def _bootstrap(self, *args: Any, **kwargs: Any) -> int:
        # A subclass may do its own work in `run` before it calls ours: wrap both.
        self.run = self._run_child  # type: ignore[method-assign] # on this instance
        code: int = super()._bootstrap(*args, **kwargs)  # type: ignore[misc] # it is private
        _exit_function()  # Python 3.13 calls it later, when nothing limits the time of a flush
        forbid_new_processes()
        end_descendants(END_GRACE)  # of processes that threads have started since `_leave_child`
        if self._watchdog is not None:
            self._watchdog.disarm()  # two threads that exit at once would race for the exit code
        return code

    def _run_child(self) -> None:
        del self.run
        self._enter_child()
        try:
            self.run()
            if self._exit_code:
                sys.exit(self._exit_code)
        except Exception as error:
            if isinstance(error, ZMQHandlerError | ZMQJournalError):  # its text is enough
                LOGGER.error('%s failed: %s', self.name, error)
            else:
                LOGGER.exception('%s failed', self.name)
            self._send_report(None, error)
            sys.exit(1)
        finally:
            self._leave_child()

    def _enter_child(self) -> None:
        self._pid = os.getpid()
        self._drop_inherited_state()
        become_subreaper()
        warn_without_proc(self.name)
        self._masks = local()
        os.register_at_fork(
            before=self._mask_signals,
            after_in_parent=self._unmask_signals,
            after_in_child=self._enter_grandchild,
        )
        if self.is_supervised:
            self.call_deadlines = CallDeadlines(self.overdue_grace, self._heartbeat)
        self._start_watchdog(
            self._on_command,
            self._on_stop_request,
            calls=self.call_deadlines,
            on_overdue=self._notice_overdue,
        )
        for num in STOP_SIGNALS:
            signal.signal(num, self.exit)
        signal.signal(signal.SIGHUP, self._on_hangup)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _mask_signals(self) -> None:
        # A fork would lose a signal that arrives before it has reset our handlers.
        self._masks.signals = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _unmask_signals(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.signals)

    def _enter_grandchild(self) -> None:
        """Keep our signal handlers and addresses out of a fork, which may outlive us."""
        self._drop_child_state()
        self._unmask_signals()

    def _drop_child_state(self) -> None:
        signal.set_wakeup_fd(-1)
        for num in SIGNALS:
            signal.signal(num, signal.SIG_DFL)
        self.loop = self._watchdog = None
        self._pid = 0
        if self._attendant is not None:
            self._attendant.forget()
        if self._sockets is not None and self._sockets.uris:
            close_inherited_listeners(uris=self._sockets.local_uris)

    def _leave_child(self) -> None:
        assert self._watchdog is not None  # noqa: S101 - for mypy: `_enter_child` made it
        deadline = self._watchdog.arm(self.drain_timeout + 1)
        if self._needs_replacement:  # do not wait: the hung method may have started them
            forbid_new_processes()
            end_descendants(END_GRACE)
            # The same for threads, which Python joins: the method may hang in one of them, for
            # instance in that of an executor. Python 3.13 calls the exit functions after that.
            _exit_function()
            self._watchdog.exit_code = RECYCLED
            self._watchdog.arm(END_GRACE)
        elif not wait_for_descendants(max(END_GRACE, deadline - TERM_GRACE - monotonic())):
            forbid_new_processes()
            end_descendants(KILL_GRACE)

    def run(self) -> None:
        """Set up everything and serve until `stop`."""
        try:
            self.setup()
            self._on_started()
            self._started = True
            if not self.draining:
                self._log_start()
                self.loop.add_callback(self._report_ready)
                self._serve()
        finally:
            self._teardown()

    def setup(self) -> None:
        """Create context, loop, authenticator and streams."""
        self.check_curve()
        raise_descriptor_limit()
        check_descriptors()
        self.context = zmq.Context()
        self.context.max_sockets = self.context.get(zmq.SOCKET_LIMIT)  # by default 1023
        asyncio.set_event_loop(None)  # otherwise Python 3.12 warns that there is no loop
        loop = self.loop_factory()
        with suppress(AttributeError):  # uvloop has a clock of its own
            loop.time = monotonic  # type: ignore[method-assign] # on this instance
        if getattr(loop, '_default_executor', None) is None:  # the factory may have set one
            loop.set_default_executor(ServiceExecutor(thread_name_prefix='asyncio'))
        self.loop = IOLoop(make_current=True, asyncio_loop=loop)
        self.loop.run_sync = partial(_run_sync, self.loop.run_sync, loop)
        self._wake_for_signals()
        # Always: without a ZAP handler libzmq does not check the addresses of NULL peers, and keeps
        # peers that send garbage.
        self._guard = ConnectionGuard(self.name, self)
        self.auth_thread = Authenticator(self.context, self.access, self.enter_thread, self._guard)
        self.auth_thread.start()
        self._sockets = ServerSockets(self.name, self, self._guard, self._exit_if_draining)
        self.init_stream()

    def _wake_for_signals(self) -> None:
        # Python runs a handler only between two instructions of the main thread, which may be about
        # to sleep in the loop: asyncio also writes a byte to a socket of the loop. Our handler is
        # set again, because it also runs while the loop is busy.
        for num in SIGNALS:
            handler = signal.getsignal(num)
            self.loop.asyncio_loop.add_signal_handler(num, int)
            signal.signal(num, handler)

    def _exit_if_draining(self) -> None:
        if self.draining:
            sys.exit(self._exit_code)

    def _serve(self) -> None:
        if self._sockets.has_files:
            self._restore_files()
        error: BaseException | None = None
        while True:
            try:
                if error is not None:
                    self.loop.asyncio_loop.call_soon(setattr, self, '_failures', 0)
                    self._recover(error)
                    error = None
                    if self._stopping:
                        return
                self.loop.start()
                return
            except BaseException as raised:
                self._failures += 1
                if self._failures > MAX_FAILURES:  # the loop is closed, or its descriptor
                    raise
                error = raised  # handled in the block above: a signal handler may raise once more

    def _recover(self, error: BaseException) -> None:
        """Log an exception that has left the loop; let the streams continue."""
        # Of a task, whose SystemExit asyncio lets through, or of a signal handler at any place.
        LOGGER.error('A task or a signal handler of %s failed', self.name, exc_info=error)
        for stream in self._streams:
            try:
                stream.recover()
            except zmq.ZMQError:  # its socket or its context has ended
                stream.close()

    def _restore_files(self) -> None:
        self.loop.call_later(FILE_INTERVAL, self._restore_files)
        if self._sockets.restore_files():
            for stream in self._streams:
                stream._rebuild_io_state()  # any access to a socket clears its wake-up

    def _stop_loop(self) -> None:
        self._stopping = True
        self.loop.stop()

    def exit(self, num: int | None = None, frame: Any = None) -> None:
        """Finish the message in hand, refuse others, then stop."""
        if self._pid not in (0, os.getpid()):  # a fork made by C code, which runs no hooks
            self._drop_child_state()
            os.kill(os.getpid(), signal.SIGTERM if num is None else num)
        elif self._watchdog is None and self.loop is None:
            self.stop()
        elif not self.draining:
            self.draining = True
            if self._watchdog is not None:
                self._watchdog.arm(self.drain_timeout)
            if self.loop is not None:
                self.loop.asyncio_loop.call_soon_threadsafe(self._start_drain)
        if self._watchdog is not None and num is not None and not self._watchdog.has_asked():
            # A second signal ends the process at once. Only the same one: the other may already be
            # on its way, from the terminal or from the owner.
            signal.signal(num, signal.SIG_DFL)
            if self.is_supervised and not self._exit_code:
                self._exit_code = SIGNALLED + num  # nobody who supervises it has asked for that

    def _on_stop_request(self) -> None:
        """Stop because the owner asks for it, or has died; runs in the watchdog."""
        assert self._watchdog is not None  # noqa: S101 - for mypy: it calls this
        if signal.getsignal(signal.SIGTERM) == self.exit:
            self._watchdog.terminate()
        if self.draining:
            return
        # A library handles the signal itself, or the main thread is in a native call.
        loop = self.loop
        if loop is None:
            self.draining = True  # `run` looks at it
        else:
            with suppress(RuntimeError):  # the loop is closed: this process is ending
                loop.asyncio_loop.call_soon_threadsafe(self.exit)

    def _on_command(self, command: Command) -> None:
        """Execute a command of the owner; runs in the watchdog."""
        loop = self.loop
        if command != Command(RELOAD):
            self._control.refuse(command)
        elif loop is None:
            os.kill(os.getpid(), signal.SIGHUP)
        else:
            loop.asyncio_loop.call_soon_threadsafe(self.reload)

    def restart(self) -> None:
        """Finish the messages in hand, refuse others, and exit; the supervisor replaces it."""
        if not self.draining:
            LOGGER.info('%s ends in order, a new process replaces it', self.name)
            self._exit_code = RECYCLED
            self.exit()

    def _notice_overdue(self, call: object, confirm: Callable[[], None]) -> None:
        with suppress(AttributeError, RuntimeError):  # the loop is closed: this process is ending
            self.loop.asyncio_loop.call_soon_threadsafe(self._leave_overdue, call, confirm)

    def _leave_overdue(self, call: object, confirm: Callable[[], None]) -> None:
        reason = f'has a method that passed its deadline and does not end ({call})'
        self.leave(reason, call)
        confirm()

    def leave(self, reason: str, call: object = None) -> None:
        """Finish the messages in hand, refuse others, and exit; the supervisor replaces it.

        :param reason: verb for the log
        :param call: the call that is the reason, or None
        """
        if not self.draining:
            LOGGER.error(
                '%s %s, a new process replaces it', self.name, reason, extra=fields_of(call)
            )
            self._needs_replacement = True
            self._exit_code = RECYCLED
            self.exit()

    def _on_hangup(self, num: int, frame: Any) -> None:
        if self.loop is None:
            self.reload()
        else:  # not in the middle of a message
            self.loop.asyncio_loop.call_soon_threadsafe(self.reload)

    def _start_drain(self) -> None:
        self._drain_task = asyncio.ensure_future(self._drain_and_stop())

    async def _drain_and_stop(self) -> None:
        try:
            await self._drain()
        finally:
            self._stop_loop()

    def _count_received(self) -> int:
        return sum(stream.received for stream in self._streams)

    def _teardown(self) -> None:
        if self._watchdog is not None:
            self._watchdog.arm(self.drain_timeout + 1)
        if self._started:
            self._on_stopped()
        if self._attendant is not None:
            self._attendant.stop()
        for stream in self._streams:
            if isinstance(stream, ReplyStream):
                stream.refuse_waiting(DRAINING_REPLY)  # what came in since the loop has ended
            stream.close()
        if self.auth_thread is not None:
            self.auth_thread.stop()
        if self._guard is not None:
            self._guard.close()
        if self.loop is not None:
            loop, self.loop = self.loop, None
            _cancel_tasks(loop.asyncio_loop)
            # asyncio removes its handlers, and ours with them, which stay needed while descendants
            # are awaited.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            handlers = [signal.getsignal(num) for num in SIGNALS]
            signal.set_wakeup_fd(-1)  # asyncio closes its socket before; another thread may use it
            loop.close()
            for num, handler in zip(SIGNALS, handlers, strict=True):
                signal.signal(num, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if self.context is not None:
            self.context.destroy(LINGER)
        if self._sockets is not None:
            self._sockets.release()


def _run_sync(
    run_sync: Callable[..., Any], loop: asyncio.AbstractEventLoop, *args: Any, **kwargs: Any
) -> Any:
    """Call `run_sync` of an IOLoop, unless it runs: then that would fail, and stop it later."""
    if loop.is_running():
        raise RuntimeError('This event loop is already running')
    return run_sync(*args, **kwargs)


def _cancel_tasks(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=1))
