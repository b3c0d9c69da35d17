# SPDX-License-Identifier: ZPL-2.1
"""Ports that accept connections before the service behind them is there, and other servers."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from calls import CLIENTS, ask, call, call_async, prepare
from checks import AT_ONCE, wait_until
from peers import Forwarder, ask_raw, raw_server, timed
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import connection as connection_module
from pyams_zmq.client import socket as socket_module
from pyams_zmq.exceptions import ZMQRefusedError, ZMQUnreachableError

HTTP = b'HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n'


@CLIENTS
@pytest.mark.parametrize(
    'hang_up',
    [
        lambda connection: None,
        lambda connection: connection.recv(10),
        lambda connection: time.sleep(0.5),  # what is tested: an end after half a second
    ],
    ids=['at once', 'after the first bytes', 'later'],
)
@pytest.mark.parametrize('auth', [None, 'user:password'])
def test_service_comes_behind_an_open_port(start, client, hang_up, auth):
    with Forwarder(hang_up) as forwarder, ThreadPoolExecutor(1) as pool:
        result = pool.submit(client, forwarder.address, 60, auth=auth)
        wait_until(lambda: forwarder.hangups >= 4)
        assert not result.done()
        host, _, port = start(auth=auth).bound_address[6:].partition(':')
        forwarder.target = (host, int(port))
        assert result.result() == 1


@CLIENTS
def test_no_service_behind_an_open_port(client):
    """The end of the time-out, and the hint that something is there."""
    with Forwarder() as forwarder:
        reason = (
            'Connection timeout'
            if client is ask
            else 'connections are accepted, but get no further'
        )
        with pytest.raises(ZMQUnreachableError, match=reason):
            client(forwarder.address, 0.5)
        assert forwarder.hangups >= 4


@CLIENTS
def test_refusal_behind_a_forwarder(start, client):
    host, _, port = start(auth='user:password').bound_address[6:].partition(':')
    with Forwarder() as forwarder:
        forwarder.target = (host, int(port))
        for auth in (None, 'user:wrong'):
            with pytest.raises(ZMQRefusedError):
                client(forwarder.address, 60, auth=auth)


def answer_http(connection):
    connection.recv(10)
    connection.sendall(HTTP)
    connection.close()


@CLIENTS
@pytest.mark.parametrize('auth', [None, 'user:password'])
def test_server_of_http(client, auth):
    """Refused at once if libzmq sees that it is not ZMTP, otherwise unreachable, with a hint."""
    with raw_server(answer_http) as address:
        with pytest.raises((ZMQUnreachableError, ZMQRefusedError)) as raised:
            client(address, 0.5, auth=auth)
        assert auth is None or raised.type is ZMQRefusedError
        assert (
            client is ask or 'accepted, but get no further' in str(raised.value) or auth is not None
        )


@CLIENTS
def test_silent_server(client):
    with raw_server(lambda connection: None) as address:
        reason = (
            'Connection timeout'
            if client is ask
            else 'connections are accepted, but get no further'
        )
        with pytest.raises(ZMQUnreachableError, match=reason):
            client(address, 0.5)


@CLIENTS
def test_silent_connection_is_given_up_for_another(start, monkeypatch, client):
    """As when a fork of the forwarder keeps a connection that was ended."""
    monkeypatch.setattr(connection_module, 'HANDSHAKE_IVL', 100)
    monkeypatch.setattr(socket_module, 'HANDSHAKE_IVL', 100)
    silent = []
    with Forwarder(silent.append, closes=False) as forwarder, ThreadPoolExecutor(1) as pool:
        result = pool.submit(client, forwarder.address, 60)
        wait_until(lambda: len(silent) >= 4)
        host, _, port = start().bound_address[6:].partition(':')
        forwarder.target = (host, int(port))
        assert result.result() == 1


# Pauses between the attempts of the sender


def test_attempts_to_connect_become_rare():
    with Forwarder() as forwarder:
        begin = time.monotonic()
        with pytest.raises(ZMQUnreachableError):
            prepare(forwarder.address, 2)
        assert 4 <= forwarder.hangups <= 40 + 2 * (time.monotonic() - begin)


def test_pauses_after_losses_grow_until_a_reply(start):
    """A service that ends each connection after the handshake, for example at its limit."""
    host, _, port = start().bound_address[6:].partition(':')
    with Forwarder() as forwarder, ZMQClient(forwarder.address) as client:
        forwarder.target = (host, int(port))
        client.prepare()
        queue = client._queue.get()
        delays = []
        for _ in range(6):
            wait_until(lambda: queue.is_connected)
            delays.append(queue._delay)
            forwarder.cut()
            wait_until(lambda: queue._delay > delays[-1])
        assert delays == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]
        assert queue._delay == 0.5
        client.send('echo')
        wait_until(lambda: not len(queue))
        assert queue._delay == 0.01


# Nobody listens


@pytest.mark.parametrize('client', [call, call_async])
def test_call_fails_soon_if_nobody_listens(down, client):
    begin = time.monotonic()
    with pytest.raises(ZMQUnreachableError, match=r'No service has answered at .* for 0\.3 s$'):
        client(down, 60, connect_timeout=0.3)
    assert 0.3 <= time.monotonic() - begin < AT_ONCE


@pytest.mark.parametrize('client', [call, call_async])
def test_call_fails_soon_if_the_server_is_silent(client):
    reason = r' for 0\.5 s; connections are accepted'
    with (
        raw_server(lambda connection: None) as address,
        pytest.raises(ZMQUnreachableError, match=reason),
    ):
        client(address, 60, connect_timeout=0.5)


@pytest.mark.parametrize('client', [call, call_async])
def test_call_fails_soon_if_nobody_listens_any_more(client):
    """The port is closed in the middle of the call, which waits as if it had never been open."""
    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        with Forwarder() as forwarder:
            result = pool.submit(client, forwarder.address, 60, connect_timeout=1)
            wait_until(lambda: forwarder.hangups)
        with pytest.raises(ZMQUnreachableError, match=r'No service has answered at .* for 1 s$'):
            result.result()
    assert time.monotonic() - begin < AT_ONCE


def test_zmq_response_waits_for_its_timeout(down):
    reply, seconds = timed(ask_raw, down, 3)
    assert reply == [503, 'Connection timeout']
    assert seconds >= 3
