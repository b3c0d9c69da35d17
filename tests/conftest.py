# SPDX-License-Identifier: ZPL-2.1
"""Fixtures: real processes on free ports, which a test must not leave running."""

import gc
import multiprocessing
import os
import sys
import tempfile
import threading
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from pyramid.testing import setUp, tearDown

from app.program import Program
from checks import wait_until
from handlers import Process
from pyams_zmq.process.name_lock import NameLock
from pyams_zmq.socket import zmq_response, zmq_socket

# On a loaded machine an example takes longer than hypothesis allows.
settings.register_profile('suite', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('suite')


def pytest_collection_finish():
    """Exclude the imported modules from the collection of garbage after each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Fail a test that leaves a child process or a thread running."""
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
    """Return a folder with a short path: the path of an ipc socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix='t-', ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def address(tmp_path):
    """Address at which a service can be restarted."""
    return f'ipc://{tmp_path}/zmq.sock'


@pytest.fixture
def lock():
    """Return the name of a lock that is not in use; its file is removed with the test."""
    name = f'test {uuid4()}'
    yield name
    Path(NameLock(name).path).unlink(missing_ok=True)


@pytest.fixture
def lock_folder(tmp_path, monkeypatch):
    """Return the folder of the locks of this process, one of its own."""
    folder = tmp_path / 'tmp'
    folder.mkdir()
    # It is not safe, without a sticky bit, so that the folder for temporary files is used.
    monkeypatch.setattr('pyams_zmq.process.lock_folder._FOLDER', str(tmp_path))
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    return folder / f'pyams_zmq-{os.geteuid()}'


@pytest.fixture(autouse=True)
def _program_keeps_its_name():
    """Fail if a test leaves another `sys.argv`: by its name, later tests would be no web server."""
    argv = list(sys.argv)
    yield
    assert sys.argv == argv


@pytest.fixture
def config():
    """Return a Pyramid configurator."""
    yield setUp(hook_zca=True)
    tearDown()


@pytest.fixture
def start():
    """Start processes and wait until they are ready; stop them at the end."""
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
def run_program(tmp_path):
    """Start programs, of Python or of another factory; at the end kill those that still run.

    Their logs are shown with a test that fails.
    """
    programs = []

    def start(*args, factory=Program, **options):
        programs.append(factory(tmp_path, *args, **options))
        return programs[-1]

    yield start
    for program in programs:
        program.end()
        print(program.log.read_text(errors='replace'))


@pytest.fixture
def ask():
    """Send a message to a process or an address; return the reply."""

    def send(process, message, **kwargs):
        address = process if isinstance(process, str) else process.bound_address
        timeout = kwargs.pop('timeout', 20)
        socket = zmq_socket(address, **kwargs)
        try:
            socket.send_json(message)
            return zmq_response(socket, timeout=timeout)
        finally:
            socket.close()

    return send


@pytest.fixture(scope='session')
def postgresql():
    """Return a PostgreSQL server, one for each process of pytest-xdist."""
    from postgresql import run_postgresql  # here, because few tests need what it imports

    with run_postgresql() as server:
        yield server


@pytest.fixture
def postgresql_url(postgresql):
    """Return the URL of an empty database of PostgreSQL; no connection to it may be left."""
    url = postgresql.make_database()
    yield url
    postgresql.drop_database(url)
