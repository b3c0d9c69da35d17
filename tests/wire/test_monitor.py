# SPDX-License-Identifier: ZPL-2.1
"""Monitors of sockets."""

import errno

import pytest
import zmq

from pyams_zmq.wire.monitor import close_monitor, open_monitor, parse_event


@pytest.fixture
def socket():
    """A socket that is not bound."""
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.linger = 0
        yield socket


def test_events(socket):
    monitor = open_monitor(socket)
    assert monitor.last_endpoint.startswith(b'inproc://pyams_zmq.')
    assert not monitor.poll(0)
    socket.bind('tcp://127.0.0.1:0')
    event, value = parse_event(monitor.recv_multipart())
    assert event == zmq.EVENT_LISTENING
    assert value > 0  # the descriptor
    close_monitor(socket, monitor)
    assert monitor.closed


def test_chosen_events(socket):
    monitor = open_monitor(socket, zmq.EVENT_CLOSED)
    socket.bind('tcp://127.0.0.1:0')
    socket.unbind(socket.last_endpoint)
    assert monitor.poll(5000)
    assert parse_event(monitor.recv_multipart())[0] == zmq.EVENT_CLOSED
    close_monitor(socket, monitor)


def test_several_monitors_one_after_the_other(socket):
    addresses = set()
    for _ in range(3):
        monitor = open_monitor(socket)
        addresses.add(monitor.last_endpoint)
        close_monitor(socket, monitor)
    assert len(addresses) == 3


def test_monitor_of_a_closed_socket(socket):
    monitor = open_monitor(socket)
    socket.close()
    close_monitor(socket, monitor)
    assert monitor.closed


@pytest.mark.parametrize('left', [0, 1], ids=['its socket', 'the socket of libzmq'])
def test_monitor_that_cannot_be_opened(left):
    """It needs two sockets; without the second one the first one is closed again."""
    with zmq.Context() as context:
        context.max_sockets = 1 + left
        with context.socket(zmq.REP) as socket:
            with pytest.raises(zmq.ZMQError) as raised:
                open_monitor(socket)
            assert raised.value.errno == errno.EMFILE
            assert list(context._sockets) == [socket]
