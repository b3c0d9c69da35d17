# SPDX-License-Identifier: ZPL-2.1
"""The signals that a process handles, and those that it inherits from a web server."""

import signal
import sys
from contextlib import suppress
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
"""Signals that a child handles itself"""

SERVER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which web servers open their logs again, for instance; by default they are fatal"""

BLOCKED_SIGNALS = (*SIGNALS, *SERVER_SIGNALS)
"""Signals that are blocked during a fork: the child has the handlers of its parent at first"""

_CRASH_SIGNALS = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)


def do_nothing(num: int, frame: Any) -> None:
    """Handle a signal; programs that this process starts have its default action."""


# Of signals that the parent handles. Those that are not here are ignored, also in programs that
# this process starts; not by `do_nothing`: many handlers at once overflow the stack for signals
# that `faulthandler.enable` has set.
_ACTIONS: dict[int, Any] = {
    **dict.fromkeys((*STOP_SIGNALS, signal.SIGQUIT, *_CRASH_SIGNALS), signal.SIG_DFL),
    **dict.fromkeys((signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF), do_nothing),
}


def drop_inherited_handlers() -> None:
    """Ignore the signals that the parent handles, and `SERVER_SIGNALS`.

    They are sent to all processes of a server, to rotate its logs for instance, and the default
    action would end this one. Only what ends a program, or shows a crash, gets the default action.
    What C code handles stays, `faulthandler.register` for instance, but for uWSGI: its handlers
    would act on the worker that this process was forked from.
    """
    caught = _find_caught()
    has_uwsgi = 'uwsgi' in sys.modules
    for num in signal.valid_signals():
        handler = signal.getsignal(num)
        if callable(handler) or (has_uwsgi and num in caught):
            signal.signal(num, _ACTIONS.get(num, signal.SIG_IGN))
    ignore_server_signals()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else no exit code of a child is known
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SERVER_SIGNALS)


def ignore_server_signals() -> dict[signal.Signals, Any]:
    """Ignore those of `SERVER_SIGNALS` that nothing handles, also in programs started from here.

    :return: the former handlers of these signals
    """
    caught = _find_caught()
    return {
        num: signal.signal(num, signal.SIG_IGN)
        for num in SERVER_SIGNALS
        if num not in caught and signal.getsignal(num) == signal.SIG_DFL
    }


def _find_caught() -> set[int]:
    """Return the signals that this process handles, in Python or in C, see proc_pid_status(5)."""
    mask = 0
    with suppress(OSError, ValueError), open('/proc/self/status', 'rb') as file:
        for line in file:  # gVisor has no such line
            if line.startswith(b'SigCgt:'):
                mask = int(line[7:], 16)
    return {num for num in signal.valid_signals() if mask >> (num - 1) & 1}
