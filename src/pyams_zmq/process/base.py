# SPDX-License-Identifier: ZPL-2.1
"""A forked process, and the process that owns it."""

import asyncio
import atexit
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Pipe, wait
from multiprocessing.context import ForkProcess
from threading import Lock, RLock
from typing import Any
from weakref import WeakSet

from pyramid import threadlocal
from pyramid.threadlocal import get_current_registry, manager
from zope.component import getSiteManager

from pyams_zmq.exceptions import ZMQStartError, ZMQTimeoutError
from pyams_zmq.process.descendants import open_pidfd
from pyams_zmq.process.heartbeat import HeartbeatCounter
from pyams_zmq.process.watchdog import has_ended, wait_for_exit

LOGGER = logging.getLogger('PyAMS (zmq)')

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
"""What a child handles itself"""

RECYCLED = 75
"""Exit code of a child that wants to be replaced at once (EX_TEMPFAIL of sysexits.h)"""

_MAX_TEXT = 1000  # characters of an error that cannot come as it is

StopOrder = tuple[Callable[[], None], float]
"""What to do to have a child end, and the seconds to wait for that"""

Report = tuple[str | None, Exception | None]
"""What a child says when it is ready, or cannot be: its address, or an error"""


class OwnedProcess(multiprocessing.Process):
    """Process that its owner, the process which started it, asks to stop over a pipe.

    It forks, whatever the start method of the program, and is not daemonic: it may have children.

    :param registry: registry of the application
    """

    drain_timeout: float = 10.0

    _start_method = 'fork'
    _Popen: Any = staticmethod(ForkProcess._Popen)
    _popen: Any
    _parent_pid: int

    _channel: Any = None
    _control: Any = None
    _heartbeat: HeartbeatCounter | None = None

    def __init__(self, registry: Any):
        super().__init__()
        self.registry = registry
        self._stop_lock = RLock()

    # In the parent

    def start(self) -> None:
        """Fork the child and return at once.

        :raises ZMQStartError: in a program that gevent has patched
        """
        if self._popen is not None:
            raise AssertionError(f'{self.name} cannot be started twice')  # as the base class says
        check_threads(self.name)
        # The child reports through this channel, and is asked to stop.
        self._channel, self._control = Pipe()
        # Until the child has its own handlers, those of a web server would swallow these.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            with _forking_is_deliberate():
                super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._control.close()
        _owned.add(self)

    def stop(self) -> None:
        """Ask the child to stop, wait for `drain_timeout`, then terminate it, then kill it.

        Elsewhere than in the owner, before the start and after the end: nothing.
        """
        if self._is_owner():
            with self._stop_lock:
                for order, timeout in self._stop_orders():
                    if has_ended(self):
                        break
                    order()
                    if not wait_for_exit(self, timeout):
                        LOGGER.warning('%s did not stop within %s s', self.name, timeout)

    def _stop_orders(self) -> Iterator[StopOrder]:
        """Give what to do, one after the other, and the seconds to wait for the end after each."""
        yield self._ask_to_stop, self.drain_timeout + 2
        yield self.terminate, 1.0  # which a child that is stopping does not survive
        yield self.kill, 5.0

    def _ask_to_stop(self) -> None:
        # Not by a signal: one which also comes from the terminal, or from systemd, would be the
        # second one and end the child at once.
        with suppress(OSError):
            self._channel.send_bytes(b'stop')

    def _is_owner(self) -> bool:
        """Tell the process that called `start` from the child, and from other forks."""
        return self._popen is not None and self._parent_pid == os.getpid()

    # In the child

    def _cut_off(self) -> None:
        """Cut what was inherited from the parent, which may be a web server in full swing."""
        self._channel.close()
        asyncio._set_running_loop(None)
        asyncio.set_event_loop(None)
        signal.set_wakeup_fd(-1)
        for num in signal.valid_signals():
            if callable(signal.getsignal(num)):
                signal.signal(num, signal.SIG_DFL)
        multiprocessing.set_start_method('fork', force=True)
        getSiteManager.sethook(get_current_registry)
        manager.clear()
        threadlocal.global_registry = self.registry  # what threads of handlers start with
        self._enter_thread()

    def _enter_thread(self) -> None:
        """Make the registry of the application the one of this thread."""
        manager.push({'registry': self.registry, 'request': None})
        utils = sys.modules.get('pyams_utils.registry')
        if utils is not None:  # a site of the parent is bound to the ZODB connection of the parent
            utils.set_local_registry(None)


class ReadyProcess(OwnedProcess):
    """Process that tells its owner when it is ready, or why it cannot be.

    :param registry: registry of the application
    """

    bound_address: str | None = None

    _report: Report | None = None

    def __init__(self, registry: Any):
        super().__init__(registry)
        self._report_lock = Lock()

    def wait_ready(self, timeout: float | None = 10) -> str:
        """Wait until the child has bound its socket and serves it.

        :param timeout: seconds; None waits without end
        :return: the bound endpoint, with its real port
        :raises ZMQTimeoutError: it is still not ready after *timeout*
        :raises ZMQStartError: it ended, or was never started; an exception of the child which
            can be pickled is raised as it was, a ZMQBindError for instance
        """
        if not self._is_owner():
            raise ZMQStartError(f'{self.name} was not started by this process')
        with self._report_lock:
            if self._report is None:
                self._report = self._receive_report(timeout)
        self.bound_address, error = self._report
        if error is None and has_ended(self):
            error = self._describe_end()
        if error is not None:
            raise error
        return str(self.bound_address)

    def _receive_report(self, timeout: float | None) -> Report:
        with open_pidfd(self.pid) as pidfd:
            if not wait([self._channel, self.sentinel if pidfd is None else pidfd], timeout):
                raise ZMQTimeoutError(f'{self.name} is not ready after {timeout} s')
        with suppress(EOFError, OSError):
            if self._channel.poll():
                report: Report = self._channel.recv()
                return report
        wait_for_exit(self, 1)
        return None, self._describe_end()

    def _describe_end(self) -> ZMQStartError:
        return ZMQStartError(f'{self.name} ended with exit code {self.exitcode}, its log says why')

    def reload(self) -> None:
        """Ask the child, by SIGHUP, to read again what may have changed."""
        if self._is_owner() and not has_ended(self):
            os.kill(self._popen.pid, signal.SIGHUP)

    def _send_report(self, address: str | None, error: Exception | None) -> None:
        if self._control is not None:
            with suppress(OSError):  # the parent is gone
                report = address, None if error is None else make_portable(error)
                self._control.send(report)


def check_threads(name: object) -> None:
    """Make sure that threads are threads.

    :param name: who needs them
    :raises ZMQStartError: in a program that gevent has patched
    """
    gevent = sys.modules.get('gevent.monkey')
    if gevent is not None and gevent.is_module_patched('threading'):
        raise ZMQStartError(
            f'{name} needs threads, which gevent has replaced in this program: start it '
            'in another one, or before (gunicorn --preload)'
        )


def make_portable(error: Exception, max_size: int = 32 * 1024) -> Exception:
    """Give an error that comes through a pipe as it is, or one that tells what it was.

    :param max_size: bytes; more might wait for a reader who does not read
    """
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # noqa: S301 - our own: some exceptions pickle, and do not come back
        if len(data) <= max_size:
            return error
    except Exception:  # noqa: BLE001 - whatever the pickling of a foreign exception raises
        LOGGER.debug('%s cannot be pickled', type(error).__name__)
    return ZMQStartError(f'{type(error).__name__}: {error}'[:_MAX_TEXT])


_owned: WeakSet[OwnedProcess] = WeakSet()


@atexit.register
def _stop_owned() -> None:
    processes = [process for process in _owned if process._is_owner()]
    for process in processes:  # all at once: each may take its `drain_timeout`
        process._ask_to_stop()
    for process in processes:
        process.stop()


def _disown() -> None:
    # A worker of a preforking server has inherited the list of children of its master; at its
    # end multiprocessing would try to join them.
    for process in _owned:
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined] # private


os.register_at_fork(after_in_child=_disown)


@contextmanager
def _forking_is_deliberate() -> Iterator[None]:
    # Python 3.12 and later warn that forking a process with threads may deadlock the child. Ours
    # takes no lock that a thread of the parent could hold: it has a loop, a context and signal
    # handlers of its own. The filter is inherited by the child, which forks for its handlers.
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'This process .* is multi-threaded', DeprecationWarning)
        yield
