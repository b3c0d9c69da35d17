# SPDX-License-Identifier: ZPL-2.1
"""What the events of a monitor tell of a connection."""

import pytest
import zmq

from pyams_zmq.client.connection import MAX_HANGUPS, RETRIED, ConnectionState
from pyams_zmq.endpoint import Endpoint
from pyams_zmq.exceptions import ZMQRefusedError, ZMQTimeoutError, ZMQUnreachableError

ENDPOINT = Endpoint.parse('10.1.1.1:5555', bind=False)


@pytest.fixture
def link():
    """A link that was never connected."""
    return ConnectionState(ENDPOINT)


def test_life(link):
    assert not link.is_connected
    assert not link.note(zmq.EVENT_DISCONNECTED)  # before the end of the handshake
    for _ in range(2):
        assert not link.note(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        assert link.is_connected
        assert link.note(zmq.EVENT_DISCONNECTED)
        assert not link.is_connected


@pytest.mark.parametrize(
    'event', [zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL]
)
def test_refused(link, event):
    with pytest.raises(ZMQRefusedError, match='10.1.1.1:5555.*check user, password or keys'):
        link.note(event)


def test_hangups(link):
    """One that goes down hangs up, too; but not again and again."""
    for _ in range(2):
        for _ in range(MAX_HANGUPS - 1):
            assert not link.note(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        link.note(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    for _ in range(MAX_HANGUPS - 1):
        link.note(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
    with pytest.raises(ZMQRefusedError):
        link.note(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)


def test_silence(link):
    error = link.describe_silence(0.5)
    assert isinstance(error, ZMQUnreachableError)
    assert str(error) == 'No service has answered at tcp://10.1.1.1:5555 for 0.5 s'
    link.note(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    error = link.describe_silence(0.5)
    assert isinstance(error, ZMQTimeoutError)
    assert str(error) == 'tcp://10.1.1.1:5555 has not replied within 0.5 s'
    assert isinstance(link.describe_loss(), RETRIED)
