# SPDX-License-Identifier: ZPL-2.1
"""Forks that wait for a background thread."""

import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager

import pytest

from checks import TIMEOUT, in_fork
from pyams_zmq.wire import fork_barrier
from pyams_zmq.wire.fork_barrier import ForkBarrier


@pytest.fixture
def barrier():
    """Barrier of this test."""
    return ForkBarrier()


@contextmanager
def held(barrier):
    """Let another thread hold a barrier; yield a function that lets it end."""

    def hold():
        with barrier.hold():
            begun.set()
            assert ended.wait(TIMEOUT)

    begun, ended = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(hold)
        assert begun.wait(TIMEOUT)
        try:
            yield ended.set
        finally:
            ended.set()
            holder.result(TIMEOUT)


def use(barrier):
    """Hold a barrier, with a limit of time for a lock that is never released."""

    def hold():
        with barrier.hold():
            done.set()

    done = threading.Event()
    threading.Thread(target=hold, daemon=True).start()
    assert done.wait(TIMEOUT)


def test_fork_waits_for_the_block(barrier, monkeypatch):
    """The block has ended in the child, too."""
    monkeypatch.setattr(fork_barrier, 'TIMEOUT', TIMEOUT)
    steps = []

    def fork():
        forks.set()
        return in_fork(lambda: os._exit(7 if steps == ['end'] else 1))

    forks = threading.Event()
    with held(barrier) as end, ThreadPoolExecutor(1) as pool:
        child = pool.submit(fork)
        assert forks.wait(TIMEOUT)
        with pytest.raises(FutureTimeout):
            child.result(0.1)
        steps.append('end')
        end()
        assert child.result(TIMEOUT) == 7
    use(barrier)


def test_block_waits_for_the_fork(barrier):
    """The thread cannot begin again before the fork is done."""
    with ThreadPoolExecutor(1) as pool:
        barrier.before_fork()
        user = pool.submit(use, barrier)
        assert not user.done()
        assert barrier._lock.locked()
        barrier.after_fork_in_parent()
        user.result(TIMEOUT)


def test_block_that_takes_long(barrier, monkeypatch):
    """The fork waits for a limited time; both processes can use the barrier afterwards."""
    monkeypatch.setattr(fork_barrier, 'TIMEOUT', 0.1)
    with held(barrier):
        start = time.monotonic()
        assert in_fork(lambda: use(barrier)) == 0
        assert time.monotonic() - start > 0.1
        assert barrier._lock.locked()
    use(barrier)
    assert in_fork(lambda: use(barrier)) == 0


def test_child(barrier):
    """It can use the barrier at once, and fork again."""

    def check():
        use(barrier)
        assert in_fork(lambda: use(barrier)) == 0
        use(barrier)

    assert in_fork(check) == 0
    use(barrier)


def test_fork_in_the_block(barrier, monkeypatch):
    """It does not wait for itself without end."""
    monkeypatch.setattr(fork_barrier, 'TIMEOUT', 0.1)
    with barrier.hold():
        assert in_fork(lambda: use(barrier)) == 0
    use(barrier)


def test_block_that_fails(barrier):
    with pytest.raises(LookupError), barrier.hold():
        raise LookupError
    assert in_fork(lambda: use(barrier)) == 0


def test_several_barriers(monkeypatch):
    """A fork waits for all of them, also if one takes too long."""
    monkeypatch.setattr(fork_barrier, 'TIMEOUT', 0.1)
    barriers = [ForkBarrier() for _ in range(4)]

    def check():
        for barrier in barriers:
            use(barrier)

    with held(barriers[1]):
        assert in_fork(check) == 0
        for barrier in (barriers[0], *barriers[2:]):
            use(barrier)
    check()
    assert in_fork(check) == 0


def test_barrier_that_is_gone():
    """It does not keep forks, nor the barrier itself, alive."""
    barrier = ForkBarrier()
    before = len(fork_barrier._barriers)
    del barrier
    gc.collect()
    assert len(fork_barrier._barriers) < before
    assert in_fork(int) == 0


def test_two_forks_at_once(barrier, monkeypatch):
    """One that has waited too long for the other one does not take its lock away."""
    monkeypatch.setattr(fork_barrier, 'TIMEOUT', 0.01)
    barrier.before_fork()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(barrier.before_fork).result(TIMEOUT)
        pool.submit(barrier.after_fork_in_parent).result(TIMEOUT)
    assert barrier._lock.locked()
    barrier.after_fork_in_parent()
    use(barrier)


def test_forks_of_many_threads(barrier):
    """While another thread uses the barrier all the time."""

    def work():
        while not ended.is_set():
            with barrier.hold():
                count.append(None)

    def fork():
        # ForkProcess cannot be used by several threads: each collects the exit codes of all.
        pid = os.fork()
        if not pid:
            with barrier.hold():
                os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    count, ended = [], threading.Event()
    with ThreadPoolExecutor(4) as pool:
        worker = pool.submit(work)
        try:
            forks = [pool.submit(fork) for _ in range(15)]
            assert [each.result(TIMEOUT) for each in forks] == [7] * 15
        finally:
            ended.set()
        worker.result(TIMEOUT)
    assert count
