# SPDX-License-Identifier: ZPL-2.1
"""The signals that a process handles, and those that it inherits from a web server."""

import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
"""Signals that a child handles itself"""

SERVER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which web servers open their logs again, for instance; by default they are fatal"""

BLOCKED_SIGNALS = (*SIGNALS, *SERVER_SIGNALS)
"""Signals that are blocked during a fork: the child has the handlers of its parent at first"""

_END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)

_FAULTS = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)
"""Signals of a crash; SIGTRAP and SIGSYS are not handled by servers"""


def drop_inherited_handlers() -> None:
    """Ignore the signals that the parent handles, and `SERVER_SIGNALS`.

    Whoever sends such a signal to all processes of a server, to rotate its logs for instance, does
    not want to end this one, as the default action would. Only what ends a program, or shows a
    crash, gets the default action. What C code handles stays, `faulthandler.register` for instance,
    but for uWSGI: its handlers would act on the worker that this process was forked from.
    """
    caught = _find_caught()
    has_uwsgi = 'uwsgi' in sys.modules
    for num in signal.valid_signals():
        handler = signal.getsignal(num)
        if callable(handler) or (has_uwsgi and num in caught):
            is_kept = num in (*_END_SIGNALS, *_FAULTS)
            signal.signal(num, signal.SIG_DFL if is_kept else signal.SIG_IGN)
    ignore_server_signals()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else no exit code of a child is known
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SERVER_SIGNALS)


def ignore_server_signals() -> None:
    """Ignore those of `SERVER_SIGNALS` that nothing handles."""
    caught = _find_caught()
    for num in SERVER_SIGNALS:
        if num not in caught:
            signal.signal(num, signal.SIG_IGN)


def _find_caught() -> set[int]:
    """Return the signals that this process handles, in Python or in C, see proc_pid_status(5)."""
    try:
        with open('/proc/self/status', 'rb') as file:
            lines = dict(line.split(b':', 1) for line in file)
    except OSError:
        return set()
    mask = int(lines[b'SigCgt'], 16)
    return {num for num in signal.valid_signals() if mask >> (num - 1) & 1}
