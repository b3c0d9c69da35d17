# SPDX-License-Identifier: ZPL-2.1
"""The hard end of a process, which runs neither `atexit` nor the finalizers of multiprocessing."""

import logging
import os
from collections.abc import Callable
from threading import Thread
from typing import NoReturn

LOGGER = logging.getLogger('PyAMS (zmq)')

TIMEOUT = 0.5
"""Seconds for all functions together"""

_functions: list[Callable[[], None]] = []


def at_hard_end(function: Callable[[], None]) -> None:
    """Call a function before the hard end of this process, or of a fork of it.

    :param function: it runs in a thread of its own. Other threads may hang, with any lock: it must
        not wait for one without a time limit
    """
    _functions.append(function)


def end_hard(code: int) -> NoReturn:
    """Call the functions, and end this process, even if they do not return.

    :param code: exit code
    """
    try:
        thread = Thread(target=_call_functions, daemon=True)
        thread.start()
        thread.join(TIMEOUT)
    finally:
        os._exit(code)


def _call_functions() -> None:
    for function in _functions:
        try:
            function()
        except Exception:
            LOGGER.exception('A function failed at the end of this process')
