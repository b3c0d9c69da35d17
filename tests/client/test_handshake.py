# SPDX-License-Identifier: ZPL-2.1
"""Servers that end the handshake of a client without an error of ZMTP."""

import os
import socket as network
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress

import pytest
import zmq

from access_cases import client_options, make_keys, server_options
from calls import CLIENTS
from checks import AT_ONCE, wait_until
from peers import Forwarder
from pyams_zmq.client.connection import ConnectionState
from pyams_zmq.client.handshake import HANGUPS, HandshakeWatch
from pyams_zmq.endpoint import Endpoint
from pyams_zmq.exceptions import ZMQRefusedError, ZMQUnreachableError

GREETING = bytes(64)
WELCOME = bytes(170)


@CLIENTS
@pytest.mark.parametrize('bind_addr', ['127.0.0.1', '[::1]', 'ipc://@pyams_zmq-handshake-{}'])
def test_wrong_key_of_the_server(start, tmp_path, client, bind_addr):
    keys = make_keys(tmp_path)
    process = start(bind_addr.format(os.getpid()), **server_options('CURVE', keys))
    begin = time.monotonic()
    with pytest.raises(ZMQRefusedError):
        client(process.bound_address, 60, **client_options('wrong server key', keys))
    assert time.monotonic() - begin < AT_ONCE


@CLIENTS
def test_wrong_key_behind_a_forwarder(start, tmp_path, client):
    """Hanging up counts when the service behind the port sends its greeting, and not before."""
    keys = make_keys(tmp_path)
    process = start(**server_options('CURVE', keys))
    options = client_options('wrong server key', keys)
    host, _, port = process.bound_address[6:].partition(':')
    with Forwarder() as forwarder:
        with pytest.raises(ZMQUnreachableError):
            client(forwarder.address, 0.5, **options)
        assert forwarder.hangups > HANGUPS
        forwarder.target = (host, int(port))
        with pytest.raises(ZMQRefusedError):
            client(forwarder.address, 60, **options)
        assert forwarder.forwarded >= HANGUPS


def test_refused_connections_count_anew():
    """Only handshakes that end one after the other tell that a key is wrong."""
    with connection() as client:
        endpoint = Endpoint('tcp', '127.0.0.1', client.getpeername()[1])
        state = ConnectionState(endpoint)

        def hang_up():
            state.handle_event(zmq.EVENT_CONNECTED, client.fileno())
            state.handle_event(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)

        for _ in range(HANGUPS - 1):
            hang_up()
        state.handle_event(zmq.EVENT_CLOSED)
        assert state.is_down
        for _ in range(HANGUPS - 1):
            hang_up()
        with pytest.raises(ZMQRefusedError):
            hang_up()


# HandshakeWatch


@contextmanager
def connection(data=GREETING, ends=True):
    """A connection whose server sends data, and ends it; yield the socket of the client."""
    with (
        network.create_server(('127.0.0.1', 0)) as listener,
        network.create_connection(listener.getsockname()) as client,
    ):
        server = listener.accept()[0]
        with server:
            server.sendall(data)
            if ends:
                server.shutdown(network.SHUT_WR)
            assert client.recv(len(data), network.MSG_WAITALL) == data
            if ends:
                assert client.recv(1) == b''
            yield client


def watch_for(client):
    return HandshakeWatch(Endpoint('tcp', '127.0.0.1', client.getpeername()[1]))


def count_hangups(watch, client, times=HANGUPS):
    """Handle the events of some handshakes; return the results."""
    results = []
    for _ in range(times):
        # In the tests each connection has a server of its own.
        watch._endpoint = Endpoint('tcp', '127.0.0.1', client.getpeername()[1])
        watch.begin(client.fileno())
        results.append(watch.fail())
    return results


@pytest.mark.parametrize('data', [GREETING, GREETING[:11]], ids=['whole', 'beginning'])
def test_ends_after_the_greeting(data):
    with connection(data) as client:
        watch = watch_for(client)
        assert count_hangups(watch, client) == [False, False, True]
        watch.reset()
        assert count_hangups(watch, client) == [False, False, True]


@pytest.mark.parametrize('data', [b'', GREETING[:10], GREETING[1:-1], GREETING + WELCOME])
def test_ends_elsewhere(data):
    """They also end a row."""
    with connection() as refused, connection(data) as other:
        watch = watch_for(refused)
        assert count_hangups(watch, refused, 2) == [False, False]
        assert count_hangups(watch, other) == [False, False, False]
        assert count_hangups(watch, refused) == [False, False, True]


def test_connection_that_has_not_ended():
    """The descriptor is that of the next attempt: the events were read late."""
    with connection(ends=False) as client:
        watch = watch_for(client)
        assert count_hangups(watch, client, 10) == [False] * 10


def test_descriptor_of_another_file():
    with connection() as refused, connection() as other:
        watch = watch_for(refused)
        assert count_hangups(watch, refused, 2) == [False, False]
        with (
            open(os.devnull) as file,
            network.socket(network.AF_INET, network.SOCK_DGRAM) as datagrams,
            network.socket() as unconnected,
        ):
            datagrams.connect(refused.getpeername())
            unix, peer_of_unix = network.socketpair()
            with unix, peer_of_unix:
                watch.begin(unix.fileno())
                assert not watch.fail()
            for each in (file, datagrams, unconnected, other):
                watch.begin(each.fileno())
                assert not watch.fail()
            closed = os.dup(file.fileno())
        os.close(closed)
        watch.begin(closed)
        assert not watch.fail()
        assert count_hangups(watch, refused, 1) == [True]  # none of these has counted


@pytest.mark.parametrize(
    ('data', 'expected'),
    [
        (b'\xff' + bytes(63), [False, False, True]),
        (b'\xff' + bytes(9), [False] * 3),
        (b'SSH-2.0' + bytes(63), [False] * 3),
        (b'', [False] * 3),
    ],
    ids=['greeting', 'part of it', 'something else', 'nothing'],
)
@pytest.mark.parametrize('address', ['@pyams_zmq-handshake', 'socket'])
def test_ipc(data, expected, address, tmp_path):
    """A server that hangs up counts if it sends a greeting, and one that forwards does not."""
    host = f'{address}-{os.getpid()}' if address.startswith('@') else str(tmp_path / address)
    watch = HandshakeWatch(Endpoint('ipc', host))
    with serve_unix(host, data):
        assert [watch.fail() for _ in range(HANGUPS)] == expected
    assert [watch.fail() for _ in range(HANGUPS)] == [False] * HANGUPS  # nobody listens


@contextmanager
def serve_unix(host, data):
    """Send data to the clients of an ipc address, and hang up."""

    def serve():
        for _ in range(HANGUPS):
            with listener.accept()[0] as connection:
                connection.recv(64)
                connection.sendall(data)

    with network.socket(network.AF_UNIX) as listener:
        listener.bind('\0' + host[1:] if host.startswith('@') else host)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@CLIENTS
def test_forwarded_path(client, tmp_path):
    """A file that is forwarded, as by `ssh -L`: the service behind it is not there."""
    path = str(tmp_path / 'socket')
    keys = make_keys(tmp_path)
    with network.socket(network.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=hang_up, args=(listener,))
        thread.start()
        with pytest.raises(ZMQUnreachableError):
            client(f'ipc://{path}', 0.5, **client_options('good key', keys))
        listener.shutdown(network.SHUT_RDWR)
        thread.join()


def hang_up(listener):
    with suppress(OSError):  # it was shut down
        while True:
            listener.accept()[0].close()


def duplicates():
    """Sockets of this process that have more than one descriptor."""
    names = Counter()
    for fd in os.listdir('/proc/self/fd'):
        with suppress(OSError):  # that of the folder
            names[os.readlink(f'/proc/self/fd/{fd}')] += 1
    return {name for name, number in names.items() if name.startswith('socket:') and number > 1}


@pytest.mark.parametrize('end', ['reset', 'close', '__del__', 'begin'])
def test_duplicate_is_closed(end):
    before = duplicates()
    with connection() as client:
        watch = watch_for(client)
        watch.begin(client.fileno())
        assert len(duplicates() - before) == 1
        if end == 'begin':
            watch.begin(-1)
        else:
            getattr(watch, end)()
        assert duplicates() == before


@CLIENTS
def test_duplicate_is_closed_after_the_handshake(start, tmp_path, client):
    keys = make_keys(tmp_path)
    process = start(**server_options('CURVE', keys))
    before = duplicates()
    assert client(process.bound_address, 60, **client_options('good key', keys)) == 1
    wait_until(lambda: duplicates() == before)
