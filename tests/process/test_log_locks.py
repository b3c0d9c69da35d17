# SPDX-License-Identifier: ZPL-2.1
"""A process that is forked while another thread writes to a log file."""

import logging
import threading

import pytest

from pyams_zmq.process import log_locks
from pyams_zmq.process.log_locks import holding_log_locks


@pytest.fixture
def handler(tmp_path):
    """A handler of a logger, with a file."""
    handler = logging.FileHandler(tmp_path / 'log')
    logger = logging.getLogger('test of log locks')
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    handler.close()


def is_free(handler):
    """Return True if another thread can have the lock of a handler."""
    found = []

    def acquire():
        found.append(handler.lock.acquire(blocking=False))
        if found[0]:
            handler.lock.release()

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join()
    return found[0]


def test_no_other_thread_writes(handler):
    with holding_log_locks():
        assert not is_free(handler)
    assert is_free(handler)


def test_handler_that_hangs(handler, monkeypatch):
    """The fork waits for a limited time only, and leaves the lock to its thread."""
    monkeypatch.setattr(log_locks, 'TIMEOUT', 0.01)
    held, end = threading.Event(), threading.Event()

    def hold():
        with handler.lock:
            held.set()
            end.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    with holding_log_locks():
        pass
    assert not is_free(handler)
    end.set()
    thread.join()


def test_handler_without_a_lock(handler, monkeypatch):
    monkeypatch.setattr(handler, 'lock', None)
    with holding_log_locks():
        pass
