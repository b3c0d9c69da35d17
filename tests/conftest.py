# SPDX-License-Identifier: ZPL-2.1
"""Fixtures: real processes on free ports, and nothing left behind."""

import gc
import multiprocessing
import tempfile
import threading
from pathlib import Path

import pytest
from pyramid.testing import setUp, tearDown

from checks import wait_until
from handlers import Process
from pyams_zmq.socket import zmq_response, zmq_socket


def pytest_collection_finish():
    """Keep what is there from each collection of garbage, of which there is one for each test."""
    gc.collect()
    gc.freeze()


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
def tmp_path():
    """A folder whose path leaves room for that of an ipc socket, which has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix='t-', ignore_cleanup_errors=True) as folder:
        yield Path(folder)


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
