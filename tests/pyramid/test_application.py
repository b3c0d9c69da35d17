# SPDX-License-Identifier: ZPL-2.1
"""A declared service of an application in real servers: started once, restarted, called."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest

from app.program import Program, WebServer, is_running, wait_for_end
from checks import TIMEOUT, freeze, wait_until

SERVERS = pytest.mark.parametrize(
    'command',
    [
        ('pserve',),
        ('pserve', '--reload'),
        ('gunicorn', '--workers', '3'),
        ('gunicorn', '--preload', '--workers', '2'),
    ],
    ids=' '.join,
)


@pytest.fixture
def serve(serve):
    """Start servers of the application with a declared service."""
    return partial(serve, application='declared')


def supervisor_of(child):
    """Return the pid of the process that started a child."""
    return psutil.Process(child).ppid()


def next_child(server, former):
    """Wait for the only child that is not a former one; return its pid."""
    answer = server.wait_for_service(TIMEOUT, but=[former])
    assert server.children() == [answer['reply'][1]]
    return answer['reply'][1]


@SERVERS
def test_one_child(serve, command):
    server = serve(*command)
    [child] = server.children()
    for _ in range(10):
        assert server.get()['reply'] == [200, child]


@SERVERS
def test_child_is_killed(serve, command):
    server = serve(*command)
    [child] = server.children()
    for _ in range(2):
        os.kill(child, signal.SIGKILL)
        child = next_child(server, child)


@SERVERS
def test_supervisor_is_killed(serve, command):
    server = serve(*command)
    [child] = server.children()
    os.kill(supervisor_of(child), signal.SIGKILL)
    wait_for_end(child, TIMEOUT)
    if command == ('gunicorn', '--workers', '3'):
        next_child(server, child)


def test_owner_worker_is_killed(serve):
    server = serve('gunicorn', '--workers', '3')
    [child] = server.children()
    for _ in range(2):
        supervisor = supervisor_of(child)
        owner = psutil.Process(supervisor).ppid()
        assert owner in server.workers()
        os.kill(owner, signal.SIGKILL)
        wait_for_end(supervisor, TIMEOUT)
        wait_for_end(child, TIMEOUT)
        child = next_child(server, child)


@SERVERS
@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGKILL], ids=lambda num: num.name)
def test_server_ends(serve, command, num):
    server = serve(*command)
    [child] = server.children()
    server.send_signal(num)
    server.wait(TIMEOUT)
    wait_for_end(child, TIMEOUT)
    wait_until(lambda: not server.running(), TIMEOUT)
    assert 'Exception ignored' not in server.log.read_text()


# Several services


def services(folder, count):
    """Return settings of further services; the last one is a pool of two workers."""
    settings = {}
    for number in range(1, count + 1):
        settings[f'pyams_zmq.more{number}.handler'] = 'app.declared.MessageHandler'
        settings[f'pyams_zmq.more{number}.address'] = f'ipc://{folder}/more{number}'
    settings[f'pyams_zmq.more{count}.workers'] = 2
    return settings


def test_one_supervisor_of_all_services(serve, tmp_path):
    """Each web worker has one supervisor, and one of them has the processes of all services."""
    server = serve('gunicorn', '--workers', '4', **services(tmp_path, 4))
    leader = None
    for _ in range(2):
        noted = wait_until(lambda: len(pids := server.children()) == 6 and pids, TIMEOUT)
        [leader] = {pid for child in noted for pid in ancestors(child, 2)} & supervisors(server)
        below = psutil.Process(leader).children(recursive=True)
        assert len(below) == 4 + 4  # services; a pool with its broker and two workers
        wait_until(lambda: len(server.workers()) == len(supervisors(server)) == 4, TIMEOUT)
        wait_until(lambda: len(server.running()) == 1 + 4 + 4 + 8, TIMEOUT)
        os.kill(psutil.Process(leader).ppid(), signal.SIGKILL)
        for process in below:
            wait_for_end(process.pid, TIMEOUT)
    server.send_signal(signal.SIGTERM)
    assert server.wait(TIMEOUT) == 0
    wait_until(lambda: not server.running(), TIMEOUT)


def ancestors(pid, count):
    return [each.pid for each in psutil.Process(pid).parents()[:count]]


def supervisors(server):
    """Return the pids of the supervisors: the children of the web workers."""
    return {child.pid for worker in server.workers() for child in psutil.Process(worker).children()}


def test_service_that_cannot_start(serve, tmp_path):
    """It is given up, and the other service serves."""
    settings = services(tmp_path, 1) | {
        'pyams_zmq.more1.factory': 'handlers.ExitingSetup',
        'pyams_zmq.more1.workers': 0,
    }
    server = serve('pserve', **settings)
    [child] = server.children()
    wait_until(lambda: 'more1 fails: each of its last 5' in server.log.read_text(), TIMEOUT)
    assert server.get()['reply'] == [200, child]


# On commit


@SERVERS
def test_send(serve, command):
    server = serve(*command)
    notes = server.folder / 'notes'
    assert server.get('/send?how=fail&text=failed') is None
    assert server.get('/send?how=good&text=first')['reply'] == [200, 0]
    assert server.get('/send?how=conflict&text=second')['reply'] == [200, 1]
    assert server.get('/send?how=good&text=third')['reply'] == [200, 0]
    expected = ['first 1', 'first 2', 'second 1', 'second 2', 'third 1', 'third 2']
    wait_until(
        lambda: notes.exists() and len(notes.read_text().splitlines()) >= len(expected), TIMEOUT
    )
    assert sorted(notes.read_text().splitlines()) == expected


def test_send_while_the_service_is_down(serve):
    """The transaction is aborted before it is committed."""
    server = serve('pserve')
    [child] = server.children()
    supervisor = supervisor_of(child)
    freeze(supervisor)  # so that the child is not started again
    os.kill(child, signal.SIGKILL)
    wait_for_end(child, TIMEOUT)
    assert server.get('/send?how=good&text=lost') is None
    os.kill(supervisor, signal.SIGCONT)
    next_child(server, child)
    assert server.get('/send?how=good&text=kept')['reply'] == [200, 0]
    wait_until((server.folder / 'notes').exists, TIMEOUT)
    assert 'lost' not in (server.folder / 'notes').read_text()


# Programs


def run(tmp_path, *args):
    """Run a program with the application."""
    ini = WebServer.configure(tmp_path, 'declared', {})
    address = f'ipc://{tmp_path}/zmq.sock'
    arguments = [str(ini) if arg == 'INI' else arg for arg in args]
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', *arguments, f'address={address}'],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        env=Program.environ(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize('script', ['proutes', 'pviews', 'pshell'])
def test_scripts_start_nothing(tmp_path, script):
    arguments = ['INI', '/'] if script == 'pviews' else ['INI']
    result = run(tmp_path, f'pyramid.scripts.{script}', *arguments)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / 'children').exists()


@pytest.fixture
def external(run_program, tmp_path, address):
    """The service in a separate program, and the pid of its process."""
    ini = WebServer.configure(tmp_path, 'declared', {})
    program = run_program('-m', 'pyams_zmq', 'serve', str(ini), 'worker', f'address={address}')
    noted = tmp_path / 'children'
    wait_until(lambda: noted.exists() and noted.read_text().endswith('\n'), TIMEOUT)
    return program, int(noted.read_text())


def test_external(external):
    program, child = external
    program.send_signal(signal.SIGTERM)
    assert program.wait(TIMEOUT) == 0
    assert not is_running(child)


# gevent

GEVENT = ('gunicorn', '--worker-class', 'gevent', '--workers', '1')


def test_gevent_worker_serves_others_during_a_call(external, serve):
    _program, child = external
    server = serve(*GEVENT, **{'pyams_zmq.worker.start': 'external'})
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(server.get, '/slow') for _ in range(2)]
        quick = 0
        while not calls[0].done():
            assert server.get('/quick')['reply'] == [200, None]
            quick += 1
        assert [call.result()['reply'] for call in calls] == [[200, child]] * 2
    assert quick > 10


def test_gevent_worker_refuses_to_start_a_process(run_program, address):
    """It fails with an error, instead of serving without the process."""
    server = run_program(
        *GEVENT[1:], factory=WebServer.gunicorn, address=address, application='declared'
    )
    assert server.wait(TIMEOUT) != 0
    assert 'set pyams_zmq.worker.start = external' in server.log.read_text()
