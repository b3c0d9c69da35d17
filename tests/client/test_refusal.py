# SPDX-License-Identifier: ZPL-2.1
"""What `zmq_response` returns without a reply: time-outs and refusals."""

import errno
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import inf

import pytest
import zmq

from checks import AT_ONCE, freeze, wait_until
from peers import ECHO, REPLY, ask_raw, raw_server, replying, timed
from pyams_zmq.auth import AccessPolicy, parse_users
from pyams_zmq.client import socket as socket_module
from pyams_zmq.client.socket import SILENCE, TIMEOUT, ZMQSocket, zmq_response, zmq_socket
from pyams_zmq.curve import CurveClient
from pyams_zmq.exceptions import ZMQClosedError
from pyams_zmq.wire.monitor import close_monitor, open_monitor, parse_event

# No reply in time


@pytest.mark.usefixtures('poll')
@pytest.mark.parametrize('timeout', [-1, 0, 0.001, SILENCE, 0.05, 0.3])
def test_timeout(down, timeout):
    reply, seconds = timed(ask_raw, down, timeout)
    assert reply == [503, 'Connection timeout']
    assert reply[1] is TIMEOUT
    assert timeout <= seconds < max(0, timeout) + AT_ONCE


def test_timeout_of_ipc(tmp_path):
    assert ask_raw(f'ipc://{tmp_path}/nobody', 0.1) == [503, 'Connection timeout']


def test_silent_server():
    """The client cannot distinguish it from a server that hangs."""
    with raw_server(lambda connection: None) as address:
        reply, seconds = timed(ask_raw, address, 0.8)
        assert reply == [503, 'Connection timeout']
        assert 0.8 <= seconds < 0.8 + AT_ONCE


def test_stopped_server(start):
    """A server without processor time does not refuse the connection."""
    process = start()
    freeze(process.pid)
    try:
        assert ask_raw(process.bound_address, 0.8) == [503, 'Connection timeout']
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert ask_raw(process.bound_address) == REPLY


def test_server_which_goes_down(start):
    process = start()
    assert ask_raw(process.bound_address) == REPLY
    process.stop()
    assert ask_raw(process.bound_address, 0.3) == [503, 'Connection timeout']


@pytest.mark.usefixtures('poll')
@pytest.mark.parametrize('timeout', [10, 1e12, inf])
def test_late_server(start, tmp_path, timeout):
    """The server starts while the client waits."""

    def ask():
        socket = zmq_socket(address)
        socket.send_json(ECHO)
        waiting.set()
        replies.append(zmq_response(socket, timeout=timeout))

    address = f'ipc://{tmp_path}/socket'
    replies, waiting = [], threading.Event()
    thread = threading.Thread(target=ask)
    thread.start()
    assert waiting.wait(5)
    start(address)
    thread.join(10)
    assert replies == [REPLY]


def test_restarted_server(start):
    process = start()
    socket = zmq_socket(process.bound_address)
    socket.send_json(ECHO)
    assert zmq_response(socket) == REPLY
    process.stop()
    replies = []
    thread = threading.Thread(target=lambda: replies.append(ask_raw(process.bound_address)))
    thread.start()
    start(process.bound_address)
    thread.join(10)
    assert replies == [REPLY]
    socket.send_json(ECHO)
    assert zmq_response(socket) == REPLY


@pytest.mark.parametrize('timeout', [5, 86400 * 365])
@pytest.mark.usefixtures('poll')
def test_slow_handler(start, timeout):
    socket = zmq_socket(start().bound_address)
    socket.send_json(['sleep', 0.3])
    reply, seconds = timed(zmq_response, socket, timeout=timeout)
    assert reply == [200, 0.3]
    assert 0.1 < seconds < 0.3 + AT_ONCE


def test_slow_handler_times_out(start):
    process = start()
    socket = zmq_socket(process.bound_address)
    socket.send_json(['sleep', 0.3])
    assert zmq_response(socket, timeout=0.1) == [503, 'Connection timeout']
    assert zmq_response(socket) == [200, 0.3]  # a second chance is a way to wait longer


# The server refuses


REFUSALS = pytest.mark.parametrize(
    ('options', 'auth'),
    [
        ({'auth': 'user:password'}, 'user:secret'),
        ({'auth': 'user:password'}, 'nobody:password'),
        ({'auth': 'user:password'}, None),
        ({}, 'user:password'),
        ({'clients': '10.0.0.1'}, None),
        ({'clients': '10.0.0.1'}, 'user:password'),
        ({'clients': '10.0.0.1', 'auth': 'user:password'}, 'user:password'),
    ],
)


@REFUSALS
@pytest.mark.usefixtures('poll')
def test_refused(start, options, auth):
    address = start(**options).bound_address
    for _ in range(2):
        reply, seconds = timed(ask_raw, address, auth=auth)
        assert (reply[0], seconds < AT_ONCE) == (401, True)
        assert reply[1].startswith('Connection refused: check user, password')
        assert 'secret' not in reply[1]


@REFUSALS
@pytest.mark.parametrize('bind_addr', ['[::1]', 'ipc://@pyams_zmq-test-{}'])
def test_refused_elsewhere(start, bind_addr, options, auth):
    process = start(bind_addr.format(os.getpid()), **options)
    reply, seconds = timed(ask_raw, process.bound_address, auth=auth)
    assert (reply[0], seconds < AT_ONCE) == (401, True)


@REFUSALS
def test_refused_before_the_message(start, options, auth):
    """Then a REQ socket has no room for a message, and must not wait for room."""
    process = start(**options)
    # A refusal by address is final; after the others libzmq may try again.
    certain = (options, auth) == ({'clients': '10.0.0.1'}, None)
    refused = 0
    for _ in range(5):
        socket = zmq_socket(process.bound_address, auth=auth)
        deadline = time.monotonic() + (5 if certain and not refused else 0.05)
        while socket.poll(0, zmq.POLLOUT) and time.monotonic() < deadline:
            pass
        refused += not socket.poll(0, zmq.POLLOUT)
        for message in (ECHO, ECHO)[: 1 + socket.is_refused]:
            _result, seconds = timed(socket.send_json, message)
            assert seconds < AT_ONCE
        reply, seconds = timed(zmq_response, socket)
        assert (reply[0], seconds < AT_ONCE) == (401, True)
    assert refused or not certain


def test_refused_before_a_message_of_many_frames(start):
    process = start(clients='10.0.0.1')
    for _ in range(5):
        socket = zmq_socket(process.bound_address)
        deadline = time.monotonic() + 0.05
        while socket.poll(0, zmq.POLLOUT) and time.monotonic() < deadline:
            pass
        socket.send_multipart([b'1', b'2', b'3'])
        assert zmq_response(socket)[0] == 401


def test_nowait_stays_nowait(down):
    """A caller that does not wait gets the error of pyzmq."""
    with zmq.Context() as context, ZMQSocket(context, zmq.REQ) as socket:
        socket.linger = 0  # otherwise the context waits until somebody takes the message
        with pytest.raises(zmq.Again):
            socket.send(b'1', zmq.NOBLOCK)
        assert not socket.is_refused
        socket.connect(f'tcp://{down}')
        socket.send(b'1', zmq.NOBLOCK)


def test_others_wait_to_send():
    """Without a peer, or room for a message, a socket waits for its SNDTIMEO."""
    with zmq.Context() as context, ZMQSocket(context, zmq.PUSH) as socket:
        socket.sndtimeo = 100
        with pytest.raises(zmq.Again):
            socket.send(b'1')
        assert not socket.is_refused


@pytest.mark.parametrize('auth', [None, 'user:password'])
def test_silent_server_receives_a_greeting_only(auth):
    """A server of another protocol receives only bytes of ZMTP."""
    received = []

    def serve(connection):
        connection.settimeout(5)
        while data := connection.recv(1000):
            received.append(data)

    with raw_server(serve) as address:
        socket = zmq_socket(address, auth=auth)
        socket.send_json(ECHO)
        assert zmq_response(socket, timeout=0.3) == [503, 'Connection timeout']
        socket.close()
        wait_until(lambda: received)
    # The signature of RFC 23/ZMTP; a client sends the rest after that of the server.
    assert b''.join(received) == b'\xff\0\0\0\0\0\0\0\1\x7f'


@pytest.mark.usefixtures('poll')
def test_slow_calls_open_one_connection_each():
    """Ten calls of a slow handler, each on a new socket, open ten connections."""

    def serve():
        for _ in range(10):
            message = server.recv()
            time.sleep(3 * SILENCE)  # the handler
            server.send(message)

    with (
        zmq.Context() as context,
        context.socket(zmq.REP) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        monitor = open_monitor(server, zmq.EVENT_ACCEPTED)
        port = server.bind_to_random_port('tcp://127.0.0.1')
        served = pool.submit(serve)
        for _ in range(10):
            assert ask_raw(f'127.0.0.1:{port}') == ECHO
        served.result()
        for _ in range(10):
            assert parse_event(monitor.recv_multipart())[0] == zmq.EVENT_ACCEPTED
        assert not monitor.poll(100)
        close_monitor(server, monitor)


def test_server_of_another_protocol_that_sends_first():
    """libzmq treats its data as ZMTP 1.0, which has no credentials."""
    with raw_server(lambda connection: connection.sendall(b'SSH-2.0-OpenSSH_9.2p1\r\n')) as address:
        assert ask_raw(address, timeout=0.3) == [503, 'Connection timeout']
        assert ask_raw(address, auth='user:password')[0] == 401


# Sockets without a monitor, because the service has just replied


def has_monitor(socket):
    return socket._monitor is not None


@pytest.fixture
def just_replied(monkeypatch):
    """Function that makes an address one whose service has just replied."""
    monkeypatch.setattr(socket_module, 'RECENT', 3600)
    monkeypatch.setattr(socket_module, '_replies', {})

    def mark(address, **options):
        with zmq_socket(address, **options) as socket:
            assert has_monitor(socket)
            socket_module._remember_reply(socket._service)
        with zmq_socket(address, **options) as socket:
            assert not has_monitor(socket)

    return mark


def test_monitor_is_opened_unless_the_service_has_just_replied(start, monkeypatch):
    monkeypatch.setattr(socket_module, 'RECENT', 3600)
    monkeypatch.setattr(socket_module, '_replies', {})
    process = start()
    with zmq_socket(process.bound_address) as first:
        assert has_monitor(first)
        first.send_json(ECHO)
        assert zmq_response(first) == REPLY
    with zmq_socket(process.bound_address) as second:
        assert not has_monitor(second)
        second.send_json(['sleep', 3 * SILENCE])
        assert zmq_response(second) == [200, 3 * SILENCE]
        assert has_monitor(second)
        monitor = second._monitor
        second.send_json(['sleep', 3 * SILENCE])
        assert zmq_response(second) == [200, 3 * SILENCE]
        assert second._monitor is monitor
    with zmq_socket(process.bound_address, auth='user:password') as other:
        assert has_monitor(other)
    with zmq_socket(process.bound_address, zmq.DEALER) as dealer:
        assert has_monitor(dealer)


def test_a_reply_is_recent_for_a_moment_only(start, monkeypatch):
    monkeypatch.setattr(socket_module, 'RECENT', 0)
    process = start()
    assert ask_raw(process.bound_address) == REPLY
    with zmq_socket(process.bound_address) as socket:
        assert has_monitor(socket)


def test_service_that_has_just_replied_is_known_by_the_values_of_the_keys(just_replied):
    server = zmq.curve_keypair()[0]
    secrets = [zmq.curve_keypair()[1] for _ in range(2)]
    just_replied('127.0.0.1:1', curve=CurveClient(server, secrets[0]))
    for secret, expected in zip(secrets, [False, True], strict=True):
        for _ in range(10):  # objects that have, one after the other, the same identity
            with zmq_socket('127.0.0.1:1', curve=CurveClient(server, secret)) as socket:
                assert has_monitor(socket) is expected


@pytest.mark.usefixtures('poll')
@REFUSALS
def test_refused_although_the_service_has_just_replied(start, just_replied, options, auth):
    address = start(**options).bound_address
    just_replied(address, auth=auth)
    # Now and then libzmq keeps the pipe of a socket that was refused before it had a monitor.
    wait_until(lambda: ask_raw(address, 0.2, auth=auth)[0] == 401)


def test_refused_just_before_the_monitor(start, just_replied, monkeypatch):
    """Its event is lost, and libzmq has not yet removed the pipe."""
    has_no_pipe = socket_module._has_no_pipe
    looks = []

    def look(socket):
        looks.append(has_no_pipe(socket))
        return looks[-1] and len(looks) > 1

    monkeypatch.setattr(socket_module, '_has_no_pipe', look)
    address = start(auth='user:password').bound_address
    just_replied(address, auth='user:wrong')

    def is_found_late():
        looks.clear()
        return ask_raw(address, 0.5, auth='user:wrong')[0] == 401 and looks == [True, True]

    wait_until(is_found_late)  # as above, not each time


def test_loss_is_not_a_refusal(just_replied):
    """The service dies during a call on a socket whose monitor was opened late."""

    def die():
        assert server.poll(5000)
        time.sleep(5 * SILENCE)  # until the client has opened its monitor, which no event announces
        server.close(0)

    with zmq.Context() as context, context.socket(zmq.REP) as server:
        port = server.bind_to_random_port('tcp://127.0.0.1')
        just_replied(f'127.0.0.1:{port}')
        thread = threading.Thread(target=die)
        thread.start()
        assert ask_raw(f'127.0.0.1:{port}', 0.5) == [503, 'Connection timeout']
        thread.join()


def test_user_may_relax_a_socket(start, just_replied):
    """The wait does not change REQ_RELAXED."""
    address = start().bound_address
    just_replied(address)
    for is_relaxed in (False, True):
        with zmq_socket(address) as socket:
            socket.req_relaxed = is_relaxed
            socket.send_json(['sleep', 0.3])
            assert zmq_response(socket, timeout=2 * SILENCE)[0] == 503
            assert bool(socket.get(zmq.EVENTS) & zmq.POLLOUT) is is_relaxed


@pytest.mark.parametrize(
    ('error', 'result'),
    [(errno.EMFILE, REPLY), (zmq.ETERM, ZMQClosedError)],
    ids=['EMFILE', 'ETERM'],
)
def test_no_monitor_can_be_opened(just_replied, monkeypatch, error, result):
    """The reply comes in without a monitor, too."""

    def fail(self, endpoint):
        silent.set()
        raise zmq.ZMQError(error)

    def reply():
        assert silent.wait(5)
        return b'[200, %s]' % json.dumps(ECHO[1]).encode()

    silent = threading.Event()
    with replying(reply) as address:
        just_replied(address)
        monkeypatch.setattr(ZMQSocket, '_open_monitor', fail)
        if result is ZMQClosedError:
            with pytest.raises(ZMQClosedError):
                ask_raw(address)
        else:
            assert ask_raw(address) == result


def test_number_of_remembered_services_is_limited(monkeypatch):
    monkeypatch.setattr(socket_module, '_replies', {})
    monkeypatch.setattr(socket_module, '_MAX_SERVICES', 3)
    for number in range(10):
        socket_module._remember_reply(number)
        assert len(socket_module._replies) <= 3
        assert number in socket_module._replies


# Sockets of other types, and other sockets


@pytest.mark.parametrize(
    ('server_type', 'client_type'),
    [
        (zmq.PUB, zmq.SUB),
        (zmq.PUSH, zmq.PULL),
        (zmq.PAIR, zmq.PAIR),
        (zmq.ROUTER, zmq.DEALER),
        (zmq.DEALER, zmq.DEALER),
    ],
)
@pytest.mark.parametrize('auth', [None, 'user:password'])
def test_other_types(server_type, client_type, auth):
    """Sockets of other types than REQ detect a refusal, too."""
    policy = AccessPolicy(parse_users(auth), ())
    options = {'socket_type': server_type, 'plain_server': auth is not None}
    with replying(policy=policy, **options) as address:
        for _ in range(5):
            socket = zmq_socket(address, client_type, auth=auth)
            assert zmq_response(socket, timeout=0.05) == [503, 'Connection timeout']
        if auth:
            socket = zmq_socket(address, client_type, auth='user:x')
            assert zmq_response(socket)[0] == 401


def test_push_and_pull():
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        port = push.bind_to_random_port('tcp://127.0.0.1')
        pull = zmq_socket(f'127.0.0.1:{port}', zmq.PULL)
        timer = threading.Timer(0.1, push.send, [b'[200, "OK"]'])
        timer.start()
        assert zmq_response(pull) == [200, 'OK']
        timer.join()


def test_plain_socket_of_zmq(start):
    """zmq_response accepts a socket of pyzmq."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(start().bound_address)
        socket.send_json(['sleep', 0.05])
        assert zmq_response(socket) == [200, 0.05]


def test_inproc():
    with (
        zmq.Context() as context,
        context.socket(zmq.REP) as server,
        context.socket(zmq.REQ) as socket,
    ):
        server.bind('inproc://server')
        socket.connect('inproc://server')
        socket.send_json(ECHO)
        assert zmq_response(socket, timeout=0.1) == [503, 'Connection timeout']
        server.recv()
        server.send(b'[200, "OK"]')
        assert zmq_response(socket) == [200, 'OK']


def test_socket_without_an_address():
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        assert zmq_response(socket, timeout=0.05) == [503, 'Connection timeout']


def test_socket_that_cannot_receive(down):
    with zmq_socket(down, zmq.PUSH) as socket, pytest.raises(zmq.ZMQError) as caught:
        zmq_response(socket, timeout=0.05)
    assert caught.value.errno == zmq.ENOTSUP


def test_interrupted_wait(start):
    """A signal whose handler returns does not shorten the wait."""
    process = start()
    before = signal.signal(signal.SIGALRM, lambda *args: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        socket = zmq_socket(process.bound_address)
        socket.send_json(['sleep', 0.3])
        assert zmq_response(socket, timeout=5) == [200, 0.3]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures('poll')
def test_interrupting_signal(down):
    """A signal whose handler raises ends the wait at once."""

    def interrupt(*args):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask_raw(down)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_refusal_after_a_reply(start):
    """The server restarts with another password."""
    process = start(auth='admin:admin')
    address = process.bound_address
    with zmq_socket(address, auth='admin:admin') as client:
        client.send_json(ECHO)
        assert zmq_response(client) == REPLY
        process.stop()
        start(address, auth='admin:changed')
        client.send_json(ECHO)
        assert zmq_response(client, timeout=30)[0] == 401


def test_no_room_for_a_message(down):
    """A caller that does not wait gets the error."""
    with zmq_socket(down, zmq.DEALER) as socket:
        while socket.poll(0, zmq.POLLOUT):
            socket.send(b'x', zmq.NOBLOCK)
        with pytest.raises(zmq.Again):
            socket.send(b'x', zmq.NOBLOCK)


def test_socket_that_does_not_send(down):
    with zmq_socket(down, zmq.PULL) as socket:
        with pytest.raises(zmq.ZMQError) as raised:
            socket.send(b'x')
        assert raised.value.errno == zmq.ENOTSUP
