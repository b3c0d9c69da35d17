# SPDX-License-Identifier: ZPL-2.1
"""The locks of log handlers, which a fork must not inherit from a thread that is writing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT = 1.0
"""Seconds to wait for a handler, at most"""


@contextmanager
def holding_log_locks() -> Iterator[None]:
    """Let no other thread write to a log until the block ends.

    logging makes new locks for the handlers in a fork, but a file has a lock of its own: a fork
    that inherits it while another thread writes blocks at its first record.
    """
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {id(each): each for one in loggers for each in getattr(one, 'handlers', ())}
    locks = [each.lock for each in handlers.values() if each.lock is not None]
    held = [lock for lock in locks if lock.acquire(timeout=TIMEOUT)]
    try:
        yield
    finally:
        for lock in held:
            lock.release()
