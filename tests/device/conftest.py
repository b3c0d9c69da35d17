# SPDX-License-Identifier: ZPL-2.1
"""Fixtures: peers of a device, and no descriptor left behind."""

import gc

import pytest
import zmq

from checks import open_fds, wait_until


@pytest.fixture
def context():
    """Context of the peers."""
    context = zmq.Context()
    yield context
    context.destroy(0)


@pytest.fixture
def peer(context):
    """Connect the socket of a peer to an address."""

    sockets = []

    def connect(socket_type, address, identity=None, **options):
        socket = context.socket(socket_type)
        sockets.append(socket)
        socket.linger = 0
        socket.rcvtimeo = socket.sndtimeo = 5000
        if identity:
            socket.identity = identity
        for option, value in options.items():
            setattr(socket, option, value)
        if socket_type == zmq.SUB:
            socket.subscribe(b'')
        socket.connect(address)
        return socket

    yield connect
    for socket in sockets:
        socket.close(0)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left():
    zmq.Context.instance().socket(zmq.PAIR).close()  # which outlives all tests
    fds = open_fds()
    yield
    wait_until(lambda: gc.collect() >= 0 and open_fds() <= fds)
