# SPDX-License-Identifier: ZPL-2.1
"""Values that each process makes for itself."""

import os
import threading
from multiprocessing.context import ForkProcess

from pyams_zmq.wire.fork import ForkLocal


def test_one_value_for_each_process():
    local = ForkLocal(object)
    value = local.get()
    assert local.get() is value

    def run():
        own = local.get()
        assert own is not value
        assert local.get() is own
        assert local._inherited == [value]  # kept, not deleted

    child = ForkProcess(target=run)
    child.start()
    child.join(10)
    assert child.exitcode == 0
    assert local.get() is value


def test_threads_get_the_same_value():
    def make():
        barrier.wait(5)  # all threads make one
        return object()

    def run():
        values.append(local.get())

    barrier = threading.Barrier(8)
    values = []
    local = ForkLocal(make)
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(values) == 8
    assert len(set(map(id, values))) == 1


def test_fork_without_hooks(monkeypatch):
    """After a fork by uWSGI only the process id is different."""
    local = ForkLocal(list)
    parents = local.get()
    pid = os.getpid()
    monkeypatch.setattr(os, 'getpid', lambda: -pid)
    assert local.get() is not parents
    assert local._inherited == [parents]
