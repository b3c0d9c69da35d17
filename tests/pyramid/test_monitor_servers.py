# SPDX-License-Identifier: ZPL-2.1
"""The pages of the monitor in real servers, those that fork among them."""

import os
import signal

import pytest

from checks import wait_until

UP = {'status': 'up', 'services': {'worker': {'status': 'up'}}}


@pytest.mark.parametrize(
    'command',
    [
        ('pserve',),
        ('gunicorn', '--preload', '--workers', '2'),
        ('uwsgi', '--master', '--processes', '2', '--die-on-term'),  # without threads
        ('uvicorn',),
    ],
    ids=' '.join,
)
def test_ready(serve, command):
    settings = {'pyramid.includes': 'pyams_zmq.health'}
    server = serve(*command, application='declared', **settings)
    assert wait_until(lambda: server.get('/zmq/ready')) == UP
    [child] = server.children()
    os.kill(child, signal.SIGKILL)
    # It is started again; every worker of the server sees it.
    for _ in range(4):
        assert wait_until(lambda: server.get('/zmq/ready')) == UP
    assert server.get('/zmq/live') == {'status': 'up'}
