# SPDX-License-Identifier: ZPL-2.1
"""What a supervisor tells systemd."""

import os
import signal
import socket
import time
from math import inf
from pathlib import Path

import pytest

from app.external import INI
from app.handler import Process
from checks import TIMEOUT, started, wait_until
from pyams_zmq.supervisor import Supervisor
from pyams_zmq.supervisor.notify import ServiceManager, States

NAMES = {'NOTIFY_SOCKET', 'WATCHDOG_USEC', 'WATCHDOG_PID'}
STARTING = States([], ['converter'], [], [])
SERVING = States(['converter'], [], [], [])


class Listener:
    """The socket of a service manager."""

    def __init__(self, address):
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace('@', '\0', 1))
        self.socket.settimeout(TIMEOUT)

    def read(self):
        """Return the variables of the next message, in their order."""
        lines = self.socket.recv(4096).decode().split('\n')
        return dict(line.split('=', 1) for line in lines)

    def is_empty(self):
        self.socket.setblocking(False)
        try:
            return not self.socket.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(TIMEOUT)

    def wait_for(self, name):
        """Read messages until one has a variable; return its value, and the names before."""
        names = []
        while name not in (message := self.read()):
            names += message
        return message[name], names


@pytest.fixture(params=['path', 'abstract'])
def listener(request, tmp_path):
    listener = Listener(f'{tmp_path}/notify' if request.param == 'path' else f'@{tmp_path}')
    yield listener
    listener.socket.close()


def test_life(listener):
    """READY=1 once, and the states when they change."""
    manager = ServiceManager(listener.address)
    assert manager.step(0, STARTING, is_stopping=False) == inf
    assert listener.read() == {'STATUS': 'starting: converter'}
    manager.begin_reload()
    manager.end_reload()
    manager.step(1, STARTING, is_stopping=False)
    assert listener.is_empty()
    manager.step(2, SERVING, is_stopping=False)
    assert listener.read() == {'READY': '1', 'STATUS': 'serving: converter'}
    manager.begin_reload()
    before = time.monotonic()
    reloading = listener.read()
    assert list(reloading) == ['RELOADING', 'MONOTONIC_USEC']
    assert before - 1 < int(reloading['MONOTONIC_USEC']) / 1e6 <= before
    manager.end_reload()
    assert listener.read() == {'READY': '1'}
    manager.step(3, STARTING, is_stopping=False)
    assert listener.read() == {'STATUS': 'starting: converter'}
    manager.step(4, STARTING, is_stopping=True)
    assert listener.read() == {'STOPPING': '1'}
    manager.step(5, SERVING._replace(ended=['x\ny']), is_stopping=True)
    assert listener.read() == {'STATUS': 'serving: converter; ended: x y'}
    assert listener.is_empty()


def test_failing_ones(listener):
    """READY=1 needs one that serves, or has stopped itself; else the program ends with an error."""
    manager = ServiceManager(listener.address)
    failing = States([], [], ['broken'], [])
    manager.step(0, failing, is_stopping=False)
    assert listener.read() == {'STATUS': 'failing: broken'}
    manager.step(1, failing._replace(ended=['importer']), is_stopping=False)
    assert listener.read() == {'READY': '1', 'STATUS': 'failing: broken; ended: importer'}


def test_watchdog(listener):
    manager = ServiceManager(listener.address, 10.0)
    assert manager.step(100, SERVING, is_stopping=False) == 5
    assert listener.read()['WATCHDOG'] == '1'
    assert manager.step(104, SERVING, is_stopping=False) == 1
    assert listener.is_empty()
    assert manager.step(105, SERVING, is_stopping=False) == 5
    assert listener.read() == {'WATCHDOG': '1'}


@pytest.mark.parametrize(
    ('environ', 'interval'),
    [
        ({}, inf),
        ({'WATCHDOG_USEC': '4000000'}, 2),
        ({'WATCHDOG_USEC': '4000000', 'WATCHDOG_PID': '7'}, 2),
        ({'WATCHDOG_USEC': '4000000', 'WATCHDOG_PID': '8'}, inf),
        ({'WATCHDOG_USEC': '0'}, inf),
        ({'WATCHDOG_USEC': '-5'}, inf),
        ({'WATCHDOG_USEC': 'soon'}, inf),
    ],
)
def test_environment(listener, environ, interval):
    """The variables are not there for the programs that this one starts."""
    environ = {'NOTIFY_SOCKET': listener.address, 'HOME': '/', **environ}
    manager = ServiceManager.take(environ, 7)
    assert environ == {'HOME': '/'}
    assert manager.step(0, SERVING, is_stopping=False) == interval


@pytest.mark.parametrize('address', [None, '', 'vsock:2:3', 'relative'])
def test_no_service_manager(address):
    environ = {'WATCHDOG_USEC': '1'} if address is None else {'NOTIFY_SOCKET': address}
    assert ServiceManager.take(environ, 7) is None
    assert environ == {}


def test_service_manager_that_is_gone(tmp_path, caplog):
    """It is logged once, until it is there again."""
    address = f'{tmp_path}/notify'
    manager = ServiceManager(address, 2.0)
    for now in range(3):
        manager.step(now, SERVING, is_stopping=False)
    assert caplog.text.count('The service manager cannot be notified: ') == 1
    listener = Listener(address)
    manager.step(4, SERVING, is_stopping=False)
    assert listener.read() == {'WATCHDOG': '1'}
    listener.socket.close()
    manager.step(5, SERVING, is_stopping=False)
    assert caplog.text.count('The service manager cannot be notified: ') == 2


def test_states(fakes):
    """One that fails again and again does not delay the others."""
    supervisor = fakes.supervisor = Supervisor(
        {'good': fakes.make, 'broken': {}.popitem, 'ending': fakes.make, 'slow': fakes.make}
    )
    supervisor.max_starts = 2
    assert str(States.of(supervisor._children)) == 'starting: good, broken, ending, slow'
    fakes.step()
    good, ending, slow = fakes.made
    good.ready = slow.ready = True
    ending.end(0)
    fakes.step(0.1)
    assert str(States.of(supervisor._children)) == (
        'serving: good, slow; failing: broken; ended: ending'
    )
    slow.end(1)
    fakes.step()
    assert States.of(supervisor._children).starting == ['slow']


def variables_of_program(ask, address):
    """Return the names of the environment variables of a program that a handler starts."""
    _, pid = ask(address, ['start_async_program', None])
    # The kernel shows it at the end of `execve`, a moment after asyncio knows of that.
    text = wait_until(Path(f'/proc/{pid}/environ').read_text)
    return {line.partition('=')[0] for line in text.split('\0')}


def test_process_of_a_web_server(listener, ask, tmp_path, monkeypatch):
    """It does not notify in the name of that, nor do its programs."""
    monkeypatch.setenv('NOTIFY_SOCKET', listener.address)
    monkeypatch.setenv('WATCHDOG_USEC', '1000000')
    address = f'ipc://{tmp_path}/zmq'
    with started(Process(address)):
        names = variables_of_program(ask, address)
    assert 'PATH' in names
    assert NAMES.isdisjoint(names)


# The commands


@pytest.fixture
def run(run_program, tmp_path, listener):
    """Start programs that notify."""
    ini = tmp_path / 'application.ini'
    ini.write_text(INI.format(folder=tmp_path, setting=f'app.address = ipc://{tmp_path}/'))

    def start(command, *args):
        arguments = [str(ini) if arg == 'INI' else arg for arg in args]
        return run_program(
            *('-W', 'ignore', '-m', 'pyams_zmq', command, *arguments),
            NOTIFY_SOCKET=listener.address,
            WATCHDOG_USEC='400000',
        )

    return start


def test_serve(run, listener, ask, tmp_path):
    """It is ready when all services are; programs that they start do not notify."""
    program = run('serve', 'INI', 'echo', 'other')
    assert listener.read()['STATUS'] == 'starting: echo, other'
    assert listener.wait_for('READY')[0] == '1'
    for name in ('echo', 'other'):
        assert ask(f'ipc://{tmp_path}/{name}', ['pid', None])[0] == 200
    assert listener.wait_for('WATCHDOG')[0] == '1'
    assert NAMES.isdisjoint(variables_of_program(ask, f'ipc://{tmp_path}/echo'))
    program.send_signal(signal.SIGHUP)
    assert listener.wait_for('RELOADING')[0] == '1'
    assert listener.wait_for('READY') == ('1', [])
    program.send_signal(signal.SIGTERM)
    assert listener.wait_for('STOPPING')[0] == '1'
    assert program.wait(TIMEOUT) == 0


def test_serve_with_one_that_cannot_start(run, listener):
    """It is ready when the other one is, and says which one fails."""
    program = run('serve', 'INI', 'echo', 'broken')
    _, names = listener.wait_for('READY')
    assert 'STATUS' in names
    os.kill(program.pid, signal.SIGTERM)
    assert program.wait(TIMEOUT) == 0


def test_serve_one_that_cannot_start(run, listener):
    """It is never ready, so that `systemctl start` fails."""
    program = run('serve', 'INI', 'broken')
    messages = [{}]
    while messages[-1].get('STATUS') != 'failing: broken':
        messages.append(listener.read())
    assert not any('READY' in message for message in messages)
    assert program.wait(TIMEOUT) == 1
    assert listener.is_empty()


def test_worker(run, listener, tmp_path):
    """A worker without a broker is not ready, and the watchdog is served."""
    users = tmp_path / 'users'
    users.write_text('worker:secret')
    handler = 'pool_handlers.PoolMessageHandler'
    program = run('worker', f'ipc://{tmp_path}/nothing', handler, '--auth-file', str(users))
    assert listener.read() == {'STATUS': 'starting: worker 1', 'WATCHDOG': '1'}
    assert listener.wait_for('WATCHDOG')[1] == []
    program.send_signal(signal.SIGTERM)
    _, names = listener.wait_for('STOPPING')
    assert 'READY' not in names
    assert program.wait(TIMEOUT) == 0
