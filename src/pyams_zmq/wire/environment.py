# SPDX-License-Identifier: ZPL-2.1
"""The environments in which a program cannot fork, or cannot have threads."""

import multiprocessing
import os
import sys
from importlib import import_module
from typing import Any

from pyams_zmq.exceptions import ZMQStartError

ELSEWHERE = 'start it in another program'

NOTIFY_VARIABLES = ('NOTIFY_SOCKET', 'WATCHDOG_USEC', 'WATCHDOG_PID')
"""Variables by which a program finds its service manager, see sd_notify(3)"""

_left_servers: list[Any] = []


def leave_server() -> None:
    """Note that this process is not one of the web server from which it was forked.

    It does not notify the service manager in the name of that, nor do programs that it starts.
    """
    for name in NOTIFY_VARIABLES:
        os.environ.pop(name, None)
    _left_servers.append(sys.modules.get('uwsgi'))


def check_server_threads(name: object) -> None:
    """Check that the web server lets threads run while it waits for requests.

    :param name: name of what needs threads
    :raises ZMQStartError: in a process of uWSGI without threads
    """
    uwsgi: Any = sys.modules.get('uwsgi')
    if uwsgi is not None and uwsgi not in _left_servers and not getattr(uwsgi, 'has_threads', True):
        raise ZMQStartError(
            f'{name} needs threads, which uWSGI runs only with the option enable-threads = true'
        )


def check_threads(name: object) -> None:
    """Check that this program can have threads.

    :param name: name of what needs threads
    :raises ZMQStartError: in a program that gevent or eventlet has patched, and in a process of
        uWSGI without threads
    """
    check_server_threads(name)
    _check_patches(name)


def check_fork(name: object) -> None:
    """Check that this program can start a process by a fork.

    :param name: name of the process
    :raises ZMQStartError: in a program that gevent or eventlet has patched, in a sub-interpreter of
        Python, and in a daemonic process of :mod:`multiprocessing`
    """
    _check_patches(name)
    if not _is_main_interpreter():
        raise ZMQStartError(
            f'{name} cannot be forked in a sub-interpreter of Python: {ELSEWHERE}, or run the '
            'application in the main interpreter (mod_wsgi: WSGIApplicationGroup %{GLOBAL})'
        )
    if multiprocessing.current_process().daemon:
        raise ZMQStartError(
            f'{name} cannot be started in a daemonic process, which may not have children (a '
            f'worker of hypercorn, for instance): {ELSEWHERE}'
        )


def _check_patches(name: object) -> None:
    gevent = sys.modules.get('gevent.monkey')
    eventlet = sys.modules.get('eventlet.patcher')
    if gevent is not None and gevent.is_module_patched('threading'):
        library = 'gevent'
    elif eventlet is not None and eventlet.is_monkey_patched('thread'):
        library = 'eventlet'
    else:
        return
    raise ZMQStartError(
        f'{name} needs threads, which {library} has replaced in this program: {ELSEWHERE}, or '
        'before that (gunicorn --preload)'
    )


def _is_main_interpreter() -> bool:
    """Return True in the main interpreter, and if this Python cannot tell."""
    for module in ('_interpreters', '_xxsubinterpreters'):  # since Python 3.13, and before
        try:
            interpreters: Any = import_module(module)
        except ImportError:
            continue
        return bool(interpreters.get_current() == interpreters.get_main())
    return True
