# SPDX-License-Identifier: ZPL-2.1
"""The hard end of a process, and the functions that are called before it."""

import logging
import os
import threading
from multiprocessing.context import ForkProcess

import pytest

from checks import TIMEOUT
from pyams_zmq.wire import hard_end


def end(path, functions):
    """End a fork hard after some functions; return its exit code and its log."""

    def run():
        logging.getLogger().handlers[:] = [logging.FileHandler(path)]
        for function in functions:
            hard_end.at_hard_end(function)
        hard_end.end_hard(3)

    child = ForkProcess(target=run)
    child.start()
    child.join(TIMEOUT)
    return child.exitcode, path.read_text(encoding='utf-8')


def fail():
    """Raise an error."""
    raise LookupError('no such tool: ffmpeg')


def note():
    """Log the process."""
    logging.getLogger().warning('called in %s', os.getppid())


def test_functions_are_called(tmp_path):
    """In their order, and also after one that fails."""
    code, log = end(tmp_path / 'log', [fail, note])
    assert code == 3
    assert 'LookupError: no such tool: ffmpeg' in log
    assert log.endswith(f'called in {os.getpid()}\n')


@pytest.mark.parametrize('hangs', [threading.Event().wait, threading.get_ident])
def test_function_that_hangs(tmp_path, hangs):
    """The process ends nevertheless."""
    code, log = end(tmp_path / 'log', [hangs, note])
    assert code == 3
    assert ('called' in log) == (hangs is threading.get_ident)


def test_thread_that_cannot_start(tmp_path, monkeypatch):
    def start(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', start)
    assert end(tmp_path / 'log', [note]) == (3, '')
