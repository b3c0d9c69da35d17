# SPDX-License-Identifier: ZPL-2.1
"""Fixtures: real processes on free ports, and nothing left behind."""

import gc
import json
import multiprocessing
import os
import threading
import time
from itertools import pairwise

import pytest
from pyramid.testing import setUp, tearDown

from handlers import Process
from pyams_zmq.socket import zmq_response, zmq_socket


def pytest_collection_finish():
    """Keep what is there from each collection of garbage, of which there is one for each test."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape what UTF-8 cannot encode, a lone surrogate in a log line: pytest-xdist would abort."""
    report = yield
    report.sections = [
        (title, text.encode(errors='backslashreplace').decode()) for title, text in report.sections
    ]
    return report


def wait_until(condition, timeout=5):
    """Wait for a condition which no event announces; fail after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, 'it did not happen in time'
        time.sleep(0.01)  # a poll with a deadline, there is nothing to wait for


def open_fds():
    """Descriptors of this process, without the one that lists them."""
    return len(os.listdir('/proc/self/fd'))


def check_attempts(server, send_deadline):
    """Check what a silent ROUTER got of a call with one retry and a time-out of 0.6 seconds."""
    deadlines = []
    for _ in range(2):
        assert server.poll(5000)
        name, args, *options = json.loads(server.recv_multipart()[-1])
        assert (name, args) == ('who', 1)
        assert bool(options) == send_deadline
        deadlines += [option['deadline'] for option in options]
    assert not server.poll(100)  # a further attempt would have been before the end of the call
    assert all(later - former > 0.5 for former, later in pairwise(deadlines))


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Fail a test that leaves a child or a thread."""
    threads = set(threading.enumerate())
    yield
    gc.collect()
    left = multiprocessing.active_children()
    for child in left:
        child.kill()
        child.join()
    assert not left, f'children left: {left}'
    wait_until(
        lambda: (
            not [
                thread
                for thread in set(threading.enumerate()) - threads
                if thread.is_alive() and not thread.name.startswith('ThreadPoolExecutor')
            ]
        )
    )


@pytest.fixture
def config():
    """Pyramid configurator of a test."""
    yield setUp(hook_zca=True)
    tearDown()


@pytest.fixture
def start():
    """Start processes, wait until they are ready, stop them at the end."""
    started = []

    def start_process(*args, factory=Process, **kwargs):
        process = factory(*args, **kwargs)
        process.start()
        started.append(process)
        process.wait_ready()
        return process

    yield start_process
    for process in started:
        process.stop()
        process.join(5)


@pytest.fixture
def ask():
    """Send one message to an address, return the reply."""

    def send(process, message, **kwargs):
        address = process if isinstance(process, str) else process.bound_address
        timeout = kwargs.pop('timeout', 5)
        socket = zmq_socket(address, **kwargs)
        try:
            socket.send_json(message)
            return zmq_response(socket, timeout=timeout)
        finally:
            socket.close()

    return send
