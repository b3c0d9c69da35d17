# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of clients."""

import logging
import select
import socket as sockets

import pytest
import transaction

from handlers import RecordingMessageHandler
from pyams_zmq.client import ZMQClient


@pytest.fixture(autouse=True)
def _abort():
    """Abort the transaction of each test."""
    transaction.abort()
    yield
    transaction.abort()


@pytest.fixture
def process(start):
    """Process with a recording handler."""
    return start(handler=RecordingMessageHandler)


@pytest.fixture
def client(process):
    """Client of the process."""
    with ZMQClient(process.bound_address) as client:
        yield client


@pytest.fixture
def errors(caplog):
    """Function that returns the texts of the logged errors."""
    caplog.set_level(logging.ERROR, 'PyAMS (zmq)')
    return lambda: [record.getMessage() for record in caplog.records]


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
