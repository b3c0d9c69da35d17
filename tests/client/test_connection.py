# SPDX-License-Identifier: ZPL-2.1
"""The state of a connection, derived from monitor events."""

import pytest
import zmq

from pyams_zmq.client.connection import RETRIED, ConnectionState
from pyams_zmq.endpoint import Endpoint
from pyams_zmq.exceptions import ZMQRefusedError, ZMQTimeoutError, ZMQUnreachableError

ENDPOINT = Endpoint.parse('10.1.1.1:5555', bind=False)


@pytest.fixture
def state():
    """State before any event."""
    return ConnectionState(ENDPOINT)


def test_life(state):
    assert not state.is_connected
    for _ in range(2):
        assert not state.handle_event(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        assert state.is_connected
        assert state.handle_event(zmq.EVENT_DISCONNECTED)
        assert not state.is_connected


@pytest.mark.parametrize(
    'event', [zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL]
)
def test_refused(state, event):
    with pytest.raises(ZMQRefusedError, match='10.1.1.1:5555.*check user, password or keys'):
        state.handle_event(event)


def test_end_without_a_handshake(state):
    """Events of a server without ZMTP, for a client with credentials."""
    assert not state.handle_event(zmq.EVENT_DISCONNECTED)  # of a connection before the monitor
    state.handle_event(zmq.EVENT_CONNECTED)
    with pytest.raises(ZMQRefusedError):
        state.handle_event(zmq.EVENT_DISCONNECTED)


def test_hangups(state):
    """They never count as a refusal."""
    for _ in range(2):
        for _ in range(100):
            assert not state.handle_event(zmq.EVENT_CONNECTED)
            assert not state.handle_event(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
            assert not state.handle_event(zmq.EVENT_DISCONNECTED)
        assert 'accepted, but get no further' in str(state.describe_silence(1))
        following = ConnectionState(ENDPOINT)
        following.follow(state)  # of the next socket, before its first event
        assert 'accepted, but get no further' in str(following.describe_silence(1))
        state.handle_event(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        assert state.handle_event(zmq.EVENT_DISCONNECTED)
        assert str(state.describe_silence(1)).endswith(' for 1 s')


def test_down(state):
    assert not state.is_down
    for _ in range(2):
        assert not state.handle_event(zmq.EVENT_CLOSED)
        assert state.is_down
        assert str(state.describe_silence(1)).endswith(' for 1 s')
    assert not state.handle_event(zmq.EVENT_CONNECTED)
    assert not state.is_down
    assert 'accepted, but get no further' in str(state.describe_silence(1))


def test_missing(state):
    """The pause that has begun does not count: a restart would look longer than it is."""
    for pause, missing in ((10, 0), (20, 0.01), (200, 0.03), (200, 0.23)):
        state.handle_event(zmq.EVENT_CLOSED)
        state.handle_event(zmq.EVENT_CONNECT_RETRIED, pause)
        assert state.missing == pytest.approx(missing)
    state.handle_event(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    state.handle_event(zmq.EVENT_CONNECT_RETRIED, 10)
    assert state.missing == 0


def test_silence(state):
    error = state.describe_silence(0.5)
    assert isinstance(error, ZMQUnreachableError)
    assert str(error) == 'No service has answered at tcp://10.1.1.1:5555 for 0.5 s'
    state.handle_event(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    error = state.describe_silence(0.5)
    assert isinstance(error, ZMQTimeoutError)
    assert str(error) == 'tcp://10.1.1.1:5555 has not replied within 0.5 s'
    assert isinstance(state.describe_loss(), RETRIED)
