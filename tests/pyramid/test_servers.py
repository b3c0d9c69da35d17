# SPDX-License-Identifier: ZPL-2.1
"""The process of an application in real servers."""

import os
import signal
import time

import psutil
import pytest

from app.handler import in_hand
from app.program import WebServer, is_running, wait_for_end
from checks import TIMEOUT, wait_until
from pyams_zmq.socket import zmq_response

UWSGI = ('uwsgi', '--master', '--processes', '2', '--die-on-term', '--stats', 'stats.sock')

SERVERS = pytest.mark.parametrize(
    'command',
    [
        ('pserve',),
        ('pserve', '--reload'),
        ('waitress',),
        ('gunicorn',),
        ('gunicorn', '--preload', '--workers', '2'),
        UWSGI,
        (*UWSGI, '--lazy-apps'),
        ('uvicorn',),
        ('uvicorn', '--workers', '2'),
        ('hypercorn', '--workers', '0'),
    ],
    ids=' '.join,
)

SIGNALS = pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name)


def owner_of(server, child):
    """Return the pid of the process that started a child."""
    pid = psutil.Process(child).ppid()
    assert pid in server.running()
    return pid


def address_of(server):
    """Return the address of the ØMQ process."""
    return f'ipc://{server.folder}/zmq.sock'


def nothing_is_left(server):
    """Return True if no process of a server runs, and its ØMQ process has left no file."""
    left = {path.name for path in server.folder.iterdir()}
    return not server.running() and not left & {'zmq.sock', 'zmq.sock.lock'}


@SERVERS
def test_owner_is_killed(serve, command):
    server = serve(*command)
    [child] = server.children()
    os.kill(owner_of(server, child), signal.SIGKILL)
    wait_for_end(child, TIMEOUT)


@SERVERS
@SIGNALS
def test_server_ends(serve, command, num):
    server = serve(*command)
    [child] = server.children()
    server.send_signal(num)
    server.wait(TIMEOUT)
    wait_for_end(child, TIMEOUT)
    wait_until(lambda: nothing_is_left(server), TIMEOUT)
    assert 'Exception ignored' not in server.log.read_text()


@pytest.mark.parametrize(
    ('command', 'num'),
    [
        (('pserve',), signal.SIGINT),
        (('gunicorn',), signal.SIGTERM),
        (('gunicorn', '--preload', '--workers', '2'), signal.SIGINT),
        (('gunicorn', '--preload', '--workers', '2'), signal.SIGTERM),
    ],
    ids=['pserve-SIGINT', 'gunicorn-SIGTERM', 'preload-SIGINT', 'preload-SIGTERM'],
)
def test_all_get_the_signal(serve, command, num):
    """Ctrl-C in a terminal does this, and the stop of a systemd service."""
    server = serve(*command)
    [child] = server.children()
    with in_hand(address_of(server), 'work', 0.3) as socket:
        server.send_signal_to_all(num)
        assert zmq_response(socket) == [200, 0.3]
    server.wait(TIMEOUT)
    wait_for_end(child, TIMEOUT)
    wait_until(lambda: nothing_is_left(server), TIMEOUT)


def test_wait_ready(serve):
    server = serve('gunicorn', '--preload', '--workers', '2', address='127.0.0.1', wait_ready=10)
    answer = server.get()
    assert answer['address'].startswith('tcp://127.0.0.1:')
    assert server.children() == [answer['process']]


@pytest.mark.parametrize('address', ['ipc://{}/zmq.sock', 'ipc://@{}'], ids=['path', 'abstract'])
def test_gunicorn_replaces_its_worker(serve, tmp_path, address):
    server = serve('gunicorn', address=address.format(tmp_path))
    for _ in range(2):
        [child] = server.children()
        os.kill(owner_of(server, child), signal.SIGKILL)
        answer = server.wait_for_service(but=[child])
        assert answer['reply'] == [200, answer['process']]
        assert server.children() == [answer['process']]


def test_gunicorn_replaces_its_worker_while_the_child_works(serve):
    server = serve('gunicorn')
    [child] = server.children()
    with in_hand(address_of(server), 'work'):
        os.kill(owner_of(server, child), signal.SIGKILL)
        wait_for_end(child, TIMEOUT)
        assert server.wait_for_service()['reply'] == [200, *server.children()]


def test_workers_share_the_child_of_the_master(serve):
    server = serve('gunicorn', '--preload', '--workers', '2')
    [child] = server.children()
    for num in (signal.SIGKILL, signal.SIGTERM):  # SIGTERM runs the atexit hooks of the worker
        victim = server.workers()[0]
        os.kill(victim, num)
        wait_for_end(victim, TIMEOUT)
        wait_until(lambda: len(server.workers()) == 2, TIMEOUT)
        assert server.wait_for_service()['reply'] == [200, child]
        assert server.children() == [child]
    assert 'Exception ignored' not in server.log.read_text()


def reload(server):
    """Make `pserve --reload` restart its worker; wait until it serves again."""
    [child] = server.children()
    worker = owner_of(server, child)
    start = 0
    while is_running(worker):
        # pserve checks the file once a second; the first check only reads its time.
        if time.monotonic() > start + 1.5:
            start = time.monotonic()
            (server.folder / 'watched').touch()
        time.sleep(0.01)  # a poll, which the time limit of the test ends
    answer = server.wait_for_service(but=[child])
    wait_for_end(child, TIMEOUT)
    assert server.children() == [answer['process']]


def check_reloads(serve, count):
    server = serve('pserve', '--reload')
    for _ in range(count - 1):
        reload(server)
    with in_hand(address_of(server), 'work'):
        reload(server)
    assert len(server.running()) == 3


def test_reload(serve):
    check_reloads(serve, 3)


@pytest.mark.slow
def test_many_reloads(serve):
    check_reloads(serve, 20)


# uWSGI


def wait_until_loaded(server, loads):
    """Wait until all workers of uWSGI serve: those that load miss the signal of a reload.

    :param int loads: how often the application has been loaded then
    """

    def all_serve():
        loaded = server.log.read_text().count('WSGI app 0 ') == loads
        return loaded and all(worker['accepting'] for worker in server.stats()['workers'])

    wait_until(all_serve, TIMEOUT)


@pytest.mark.parametrize('mode', [(), ('--lazy-apps',)], ids=['preforking', 'lazy'])
@pytest.mark.parametrize('application', ['application', 'declared'])
def test_uwsgi_is_reloaded(serve, mode, application):
    """Its new HTTP router binds the address of the former one, which no service may hold."""
    server = serve(*UWSGI, *mode, application=application)
    [child] = server.children()
    for count in (1, 2):
        wait_until_loaded(server, count * (2 if mode else 1))
        server.send_signal(signal.SIGHUP)
        answer = server.wait_for_service(but=[child])
        wait_for_end(child, TIMEOUT)
        [child] = server.children()
        assert answer['reply'] == [200, child]
    wait_until_loaded(server, 6 if mode else 3)
    server.send_signal(signal.SIGTERM)
    assert server.wait(TIMEOUT) == 0
    wait_until(lambda: nothing_is_left(server), TIMEOUT)
    assert 'Traceback' not in server.log.read_text()


def test_uwsgi_replaces_a_worker(serve):
    server = serve(*UWSGI)
    [child] = server.children()
    victim = server.get()['pid']
    os.kill(victim, signal.SIGTERM)
    wait_for_end(victim, TIMEOUT)
    wait_until(lambda: (answer := server.get()) and answer['pid'] != victim, TIMEOUT)
    assert server.wait_for_service()['reply'] == [200, child]
    assert 'Traceback' not in server.log.read_text()


@pytest.mark.parametrize('command', [('gunicorn',), UWSGI], ids=' '.join)
def test_logs_are_rotated(serve, command):
    """By name or by group, the signal of the server also reaches the process."""
    server = serve(*command)
    [child] = server.children()
    server.send_signal_to_all(signal.SIGUSR1)
    assert server.wait_for_service()['reply'] == [200, child]
    assert server.children() == [child]


# Servers whose workers may not have children


def test_hypercorn_worker_refuses_to_start_a_process(run_program, address):
    server = run_program(factory=WebServer.hypercorn, address=address, application='declared')
    server.wait(TIMEOUT)
    text = server.log.read_text()
    assert 'cannot be started in a daemonic process' in text
    assert 'set pyams_zmq.worker.start = external' in text
