# SPDX-License-Identifier: ZPL-2.1
"""An orderly stop of an application, or of its services, logs no warning and no error."""

import re
import signal

import pytest

from app.program import WebServer
from checks import TIMEOUT, wait_until

SENDERS = pytest.mark.parametrize('to', ['program', 'group'])
SIGNALS = pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name)

PROCESSES = 1 + 1 + 2
"""Processes of the services that note their start: two services, and two workers of a pool"""


@pytest.fixture
def settings(tmp_path):
    """Settings of two further services; one is a pool with jobs."""
    found = {}
    for name in ('single', 'pool'):
        found[f'pyams_zmq.{name}.handler'] = 'app.declared.MessageHandler'
        found[f'pyams_zmq.{name}.address'] = f'ipc://{tmp_path}/{name}'
    return {**found, 'pyams_zmq.pool.workers': 2, 'pyams_zmq.pool.journal': f'{tmp_path}/jobs'}


def stop(program, num, to):
    """Stop a program; return the bad lines of its log."""
    send = program.send_signal_to_all if to == 'group' else program.send_signal
    send(num)
    program.wait(TIMEOUT)
    wait_until(lambda: not program.running(), TIMEOUT)
    # waitress says that it has been busy; the server of gunicorn does not set up logging.
    return [
        line
        for line in program.log.read_text().splitlines()
        if re.search('WARNING|ERROR|CRITICAL|Traceback|PyAMS', line)
        and not re.search('INFO|waitress', line)
    ]


@SENDERS
@SIGNALS
@pytest.mark.parametrize(
    'command', [('pserve',), ('pserve', '--reload'), ('gunicorn', '--workers', '2')], ids=' '.join
)
def test_server(serve, settings, command, num, to):
    server = serve(*command, application='declared', **settings)
    wait_until(lambda: len(server.children()) == PROCESSES, TIMEOUT)
    assert stop(server, num, to) == []


@SENDERS
@SIGNALS
def test_serve(run_program, tmp_path, address, settings, num, to):
    ini = WebServer.configure(tmp_path, 'declared', settings)
    options = ('-W', 'ignore', '-m', 'pyams_zmq', 'serve', str(ini))
    program = run_program(*options, 'worker', 'single', 'pool', f'address={address}')
    noted = tmp_path / 'children'
    wait_until(lambda: noted.exists() and len(noted.read_text().split()) == PROCESSES, TIMEOUT)
    assert stop(program, num, to) == []
    assert program.process.returncode == 0
