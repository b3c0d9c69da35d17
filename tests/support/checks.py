# SPDX-License-Identifier: ZPL-2.1
"""Waiting for a condition, processes that are not waited for, and checks that tests share."""

import asyncio
import json
import os
import resource
import signal
import threading
import time
from contextlib import contextmanager, suppress
from itertools import pairwise
from multiprocessing.context import ForkProcess
from pathlib import Path

TIMEOUT = 30
"""Seconds to wait for an event on a loaded machine; what a test guards against takes a minute"""

AT_ONCE = 5.0
"""Seconds for what takes milliseconds on an idle machine; the time-outs of clients are longer"""


def wait_until(condition, timeout=TIMEOUT):
    """Poll a condition that no event announces, and return its first true result.

    :param timeout: seconds, after which the test fails
    """
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline, f'not within {timeout} s'
        time.sleep(0.005)
    return result


async def until(condition, timeout=TIMEOUT):
    """Wait for a condition that no event announces; fail after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, 'it did not happen in time'
        await asyncio.sleep(0.001)  # a poll with a deadline, there is nothing to wait for


@contextmanager
def started(process):
    """Start a process, and stop it at the end; `pyams_zmq.testing.running` waits for it, too."""
    process.start()
    try:
        yield process
    finally:
        process.stop()


def freeze(pid):
    """Stop a process with SIGSTOP, and wait until all its threads have stopped.

    The signal is handled when one of them runs next; until then, a thread of libzmq may accept a
    connection.
    """
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(state in 'TZX' for state in _thread_states(pid)))


def _thread_states(pid):
    with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for path in Path(f'/proc/{pid}/task').iterdir():
            yield (path / 'stat').read_text().rpartition(')')[2].split()[0]


def suspend(pids, seconds):
    """Stop processes for a time, as their container or machine does when it is suspended.

    :param pids: process ids; a supervisor comes before its processes
    """
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)  # the length of a suspension is what is tested
    finally:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)


def in_fork(function):
    """Return the exit code of a fork that runs a function."""
    child = ForkProcess(target=function)
    child.start()
    child.join(TIMEOUT)
    return child.exitcode


def fail_to_start(thread):
    """Start of a thread that fails."""
    raise RuntimeError("can't start new thread")


def open_fds():
    """Return the open descriptors of this process, each with its file.

    Compare sets, not numbers: libzmq closes the sockets of an earlier test some time later.
    """
    return {(fd, file) for fd in os.listdir('/proc/self/fd') if (file := _file_of(fd))}


def _file_of(fd):
    with suppress(FileNotFoundError):  # the descriptor of the folder itself, or closed meanwhile
        return os.readlink(f'/proc/self/fd/{fd}')
    return None


def running_threads():
    """Return the threads of this process; compare sets, as for `open_fds`."""
    return set(threading.enumerate())


def check_attempts(server, send_deadline):
    """Check what a ROUTER without replies receives of a call: two attempts within 0.6 s each."""
    deadlines = []
    for _ in range(2):
        assert server.poll(5000)
        name, args, *options = json.loads(server.recv_multipart()[-1])
        assert (name, args) == ('who', 1)
        assert bool(options) == send_deadline
        deadlines += [option['deadline'] for option in options]
    assert not server.poll(100)  # the call has ended: a further attempt would be here
    assert all(later - former > 0.5 for former, later in pairwise(deadlines))


def rss_of(process):
    """Return the resident memory of a process, in bytes."""
    with open(f'/proc/{process.pid}/statm', encoding='ascii') as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Growth(threading.Thread):
    """Measures by how many bytes the memory of a process grows while the block runs."""

    def __init__(self, process):
        super().__init__()
        self.process, self.base, self.peak = process, rss_of(process), 0
        self.stop = threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop.set()
        self.join()

    def run(self):
        """Compare the memory with that at the start."""
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, rss_of(self.process) - self.base)
