# SPDX-License-Identifier: ZPL-2.1
"""Applications with an outbox in real servers, whose processes are killed."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from threading import Event
from uuid import uuid4

import pytest

from app.program import WebServer, wait_for_end
from checks import TIMEOUT, wait_until
from outbox_applications import open_storage, remove_lock

WORKERS = ('gunicorn', '--workers', '2')
PRELOAD = ('gunicorn', '--preload', '--workers', '2')


@pytest.fixture
def settings(database, services):
    """Return the settings of the application."""
    name = f'test {uuid4()}'
    yield {
        'application': 'outboxed',
        'check_interval': 0.3,
        'pyams_zmq.application': name,
        **database,
        **services.settings,
    }
    remove_lock(name)


@pytest.fixture
def serve(serve, settings):
    """Start servers of the application; kill them before their database ends."""
    servers = []

    def start(*command):
        servers.append(serve(*command, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture
def storage(settings):
    """Return the storage of the application."""
    with open_storage(settings) as storage:
        yield storage


def upload(server, name):
    """Upload a clip; return the pid of the process that has committed it."""
    answer = server.get(f'/upload?name={name}')
    assert answer is not None, f'{name} failed'
    return answer['pid']


def upload_from_all(server, prefix):
    """Upload clips until each worker has committed some; return the names by pid."""
    names = {pid: [] for pid in server.workers()}
    numbers = count()

    def try_one():
        name = f'{prefix}{next(numbers)}'
        names[upload(server, name)].append(name)
        return min(map(len, names.values())) >= 3

    wait_until(try_one)
    return names


def check_order(found, names):
    """Check that clips have arrived, those of each process in its order."""
    assert sorted(found) == sorted(name for each in names.values() for name in each)
    for each in names.values():
        assert [name for name in found if name in each] == each


@pytest.mark.parametrize(
    ('command', 'database'),
    [
        (WORKERS, 'sqlite'),
        (WORKERS, 'postgresql'),
        (WORKERS, 'zeo'),
        (PRELOAD, 'sqlite'),
        (PRELOAD, 'postgresql'),
    ],
    indirect=['database'],
    ids=['workers-sqlite', 'workers-postgresql', 'workers-zeo', 'preload-sqlite', 'preload-pg'],
)
def test_worker_is_killed(serve, services, storage, command):
    """Its messages arrive; those of workers that live are dropped when they have arrived."""
    server = serve(*command)
    names = upload_from_all(server, 'a')
    victim = min(names)
    os.kill(victim, signal.SIGKILL)
    wait_for_end(victim, TIMEOUT)
    services.start('converter')
    number = sum(map(len, names.values()))
    wait_until(lambda: len(services.names()) >= number)
    check_order(services.names(), names)
    wait_until(lambda: len(server.workers()) == 2, TIMEOUT)
    names = upload_from_all(server, 'b')
    wait_until(lambda: not storage.read_waiting())
    check_order([name for name in services.names() if name[0] == 'b'], names)
    assert 'Traceback' not in server.log.read_text()


@pytest.mark.parametrize('database', ['sqlite', 'postgresql', 'zeo'], indirect=True)
def test_server_is_killed(serve, services, storage):
    """Its messages are sent when it runs again, although no request sends one."""
    server = serve('pserve')
    names = [f'clip{number}' for number in range(5)]
    for name in names:
        upload(server, name)
    server.end()
    services.start('converter')
    serve('pserve')
    services.wait_for(*names)
    wait_until(lambda: not storage.read_waiting())


@pytest.mark.parametrize('database', ['sqlite', 'postgresql'], indirect=True)
def test_service_is_restarted(serve, services, storage):
    """All uploads succeed meanwhile."""
    services.start('converter')
    server = serve(*WORKERS)
    names, is_done = {pid: [] for pid in server.workers()}, Event()

    def upload_many():
        numbers = count()
        while not is_done.is_set():
            name = f'clip{next(numbers)}'
            names[upload(server, name)].append(name)

    with ThreadPoolExecutor() as pool:
        result = pool.submit(upload_many)
        for _restart in range(3):
            arrived = len(services.names())
            wait_until(lambda arrived=arrived: len(services.names()) > arrived + 5)
            services.stop('converter')
            sent = sum(map(len, names.values()))
            wait_until(lambda sent=sent: sum(map(len, names.values())) > sent + 5)
            services.start('converter')
        is_done.set()
        result.result()
    wait_until(lambda: not storage.read_waiting())
    check_order(list(dict.fromkeys(services.names())), names)
    assert 'Traceback' not in server.log.read_text()


@pytest.mark.parametrize('database', ['sqlite', 'zeo'], indirect=True)
def test_pyams_zmq_serve(serve, run_program, settings, services, storage, tmp_path, request):
    """It sends what a web server has left, although no web server runs, and ends in order.

    Its first processes are forked without a thread of the outbox.
    """
    is_zeo = request.node.callspec.params['database'] == 'zeo'
    server = serve('pserve')
    names = [f'clip{number}' for number in range(5)]
    for name in names:
        upload(server, name)
    server.end()
    changed = {
        **settings,
        'pyams_zmq.converter.handler': 'app.declared.MessageHandler',
        'pyams_zmq.converter.start': 'external',
        'notes': services.recorders['converter'].path,
    }
    ini = WebServer.configure(tmp_path, changed.pop('application'), changed)
    program = run_program('-m', 'pyams_zmq', 'serve', str(ini), 'converter', 'address=')
    services.wait_for(*names)
    wait_until(lambda: not storage.read_waiting())
    program.send_signal(signal.SIGTERM)
    assert program.wait(TIMEOUT) == 0
    assert 'Traceback' not in program.log.read_text()
    threads = re.findall(r'runs (\d+) threads beside the supervisor', program.log.read_text())
    assert threads == (['1'] if is_zeo else [])  # that of the client of ZEO
