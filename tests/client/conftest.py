# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of clients."""

import logging
import select
import socket as sockets
from math import inf

import pytest
import transaction
import zmq

from handlers import RecordingMessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import pace as pace_module
from pyams_zmq.client import send_queue as send_queue_module
from pyams_zmq.client import unanswered as unanswered_module
from pyams_zmq.client.sender import sender_thread
from scripted_service import ScriptedService, StoredMessages
from transaction_checks import without_ids


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


@pytest.fixture
def service():
    """Service whose replies the test sends."""
    with zmq.Context() as context:
        service = ScriptedService(context)
        yield service
        service.socket.close()


@pytest.fixture
def to_service(service):
    """Client of the service whose replies the test sends."""
    with ZMQClient(service.address) as client:
        yield client
        client.withdraw(start=-inf)  # what the test has left, at once


@pytest.fixture
def stored(to_service):
    """Messages to that service which are stored elsewhere."""
    return StoredMessages(to_service.offer)


@pytest.fixture
def soon(monkeypatch):
    """Make the pauses after a refusal short."""
    for name in ('FIRST_DELAY', 'MAX_DELAY', 'DRAINING_DELAY'):
        monkeypatch.setattr(pace_module, name, 0.01)


@pytest.fixture
def impatient(monkeypatch):
    """Make messages late soon."""
    monkeypatch.setattr(unanswered_module, 'PATIENCE', 0.1)
    monkeypatch.setattr(send_queue_module, 'PATIENCE', 0.1)


@pytest.fixture
def warnings(caplog):
    """Function that returns the texts of the logged warnings and errors, with their levels."""
    caplog.set_level('WARNING', 'PyAMS (zmq)')
    return lambda: [
        f'{record.levelname}: {without_ids([record.getMessage()])[0]}' for record in caplog.records
    ]


@pytest.fixture
def flush(monkeypatch):
    """Function that does what the sender does when a program ends."""
    thread = sender_thread.get()
    for name in ('_is_flushed', '_flush_time', '_reported'):
        monkeypatch.setattr(thread, name, getattr(thread, name))  # undone at the end
    return thread.flush
