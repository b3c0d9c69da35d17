# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of clients."""

import select
import socket as sockets

import pytest


@pytest.fixture(params=['poll of libzmq', 'poll of the system'])
def poll(request, monkeypatch):
    """Wait with each poll; under gevent it is the poll of the system, which is not the builtin."""
    if request.param == 'poll of the system':
        builtin = select.poll
        monkeypatch.setattr(select, 'poll', lambda: builtin())  # noqa: PLW0108 - not the builtin


@pytest.fixture
def down():
    """Address where no server listens."""
    with sockets.socket() as reserved:
        reserved.bind(('127.0.0.1', 0))
        yield f'127.0.0.1:{reserved.getsockname()[1]}'


@pytest.fixture
def address(tmp_path):
    """Address at which a service can be restarted."""
    return f'ipc://{tmp_path}/zmq.sock'
