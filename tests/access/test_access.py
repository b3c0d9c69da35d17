# SPDX-License-Identifier: ZPL-2.1
"""Access control on real sockets: the matrix of mechanisms, addresses and credentials."""

import itertools
import json
import logging
import os
import signal
import socket as tcp
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import zmq
import zmq.auth
from tornado.ioloop import IOLoop

from access_cases import (
    ADDRESSES,
    CREDENTIALS,
    HALF_OPEN,
    MECHANISMS,
    OLD_GREETINGS,
    SECRET,
    QuickLimits,
    client_options,
    flood,
    make_keys,
    old_peer,
    server_options,
)
from checks import AT_ONCE, TIMEOUT, wait_until
from handlers import MessageHandler, Process
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.socket import zmq_response, zmq_socket


@pytest.fixture
def keys(tmp_path):
    """Folder of keys."""
    return make_keys(tmp_path)


@pytest.mark.parametrize('mechanism', MECHANISMS)
@pytest.mark.parametrize('address', ADDRESSES)
def test_matrix(address, mechanism, keys, start, ask):
    bind_addr, clients, address_is_good = ADDRESSES[address]
    if bind_addr == 'ipc':
        bind_addr = f'ipc://{keys}/zmq'
    process = start(bind_addr, clients=clients, **server_options(mechanism, keys))
    target = process.bound_address.replace('[::]', '127.0.0.1')
    for credentials, good_for in CREDENTIALS.items():
        expected = 200 if address_is_good and good_for == mechanism else 401
        started = time.monotonic()
        reply = ask(target, ['echo', 1], **client_options(credentials, keys))
        assert reply[0] == expected, credentials
        if expected == 401:
            assert 'check user, password' in reply[1]
            assert time.monotonic() - started < AT_ONCE


class NotingHandler:
    """Notes that it was called."""

    def note(self, path):
        with open(path, 'w'):
            return [200, path]


class NotingMessageHandler(ZMQMessageHandler):
    """Serves NotingHandler."""

    handler = NotingHandler


@pytest.mark.parametrize('mechanism', MECHANISMS)
def test_peers_of_old_protocols(mechanism, keys, start, ask):
    """libzmq asks nobody about them: it has to close the connection, also without credentials."""
    process = start('127.0.0.1', NotingMessageHandler, **server_options(mechanism, keys))
    host, port = process.bound_address.removeprefix('tcp://').split(':')
    for number, version in enumerate(OLD_GREETINGS):
        path = keys / f'called-{number}'
        with tcp.create_connection((host, int(port)), timeout=AT_ONCE) as peer:
            peer.sendall(old_peer(version, json.dumps(['note', str(path)]).encode()))
            received = b''
            with suppress(ConnectionResetError):
                while data := peer.recv(4096):
                    received += data
        assert b'200' not in received
        assert len(received) <= 12  # the beginning of a greeting
        assert not path.exists()
    path = keys / 'called'
    credentials = {'NULL': 'none', 'PLAIN': 'good password', 'CURVE': 'good key'}[mechanism]
    reply = ask(process, ['note', str(path)], **client_options(credentials, keys))
    assert reply == [200, str(path)]


def test_missing_server_is_not_a_refusal(ask):
    assert ask('tcp://127.0.0.1:9', ['echo', 1], timeout=0.2) == [503, 'Connection timeout']


def test_identity(keys, start, ask):
    alice = client_options('good key', keys)
    process = start('127.0.0.1', **server_options('CURVE', keys))
    key = alice['curve'].public.decode()
    assert ask(process, ['who', 7], **alice) == [200, [key, '127.0.0.1', 7]]
    assert ask(process, ['async_who', 7], **alice) == [200, [key, '127.0.0.1', 7]]
    assert ask(process, ['echo', 7], **alice) == [200, 7]
    process = start('127.0.0.1', **server_options('PLAIN', keys))
    assert ask(process, ['who', 7], **client_options('good password', keys)) == [
        200,
        ['alice', '127.0.0.1', 7],
    ]
    process = start(f'ipc://{keys}/zmq')
    status, [user, address, _] = ask(process, ['who', 7])
    assert (status, user) == (200, 'anonymous')
    assert address == f'localhost:{os.getuid()}:{os.getgid()}:{os.getpid()}'


class PlainMessageHandler(ZMQMessageHandler):
    """Its methods do not use the peer."""

    class handler:  # noqa: N801 - the name of the attribute
        def echo(self, args):
            return [200, args]


@pytest.mark.parametrize('handler', [MessageHandler, PlainMessageHandler])
def test_removed_key_is_refused(keys, start, ask, handler):
    options = server_options('CURVE', keys)
    process = start('127.0.0.1', handler, **options)
    alice = client_options('good key', keys)
    bob = {'curve': CurveClient(keys / 'server.key', keys / 'clients' / 'bob.key_secret')}
    stranger = client_options('unknown key', keys)
    with zmq_socket(process.bound_address, **alice) as kept:
        kept.send_json(['echo', 1])
        assert zmq_response(kept) == [200, 1]
        (keys / 'clients' / 'alice.key').unlink()
        (keys / 'stranger.key').rename(keys / 'clients' / 'stranger.key')
        process.reload()
        wait_until(lambda: ask(process, ['echo', 1], **alice)[0] == 401)
        kept.send_json(['echo', 1])  # this connection was open before
        assert zmq_response(kept) == [401, 'Your access was withdrawn']
        kept.send_json(['echo', 1])
        assert zmq_response(kept) == [401, 'Your access was withdrawn']
    assert ask(process, ['echo', 1], **bob) == [200, 1]
    assert ask(process, ['echo', 1], **stranger) == [200, 1]


def test_users_of_a_file(tmp_path, start, ask):
    users = tmp_path / 'users'
    users.write_text('# users\n\nalice:open:sesame\nbob:builder\n')
    process = start('127.0.0.1', auth=users)
    assert ask(process, ['echo', 1], auth='alice:open:sesame') == [200, 1]
    users.write_text('nonsense')  # the users do not change
    os.kill(process.pid, signal.SIGHUP)
    assert ask(process, ['echo', 1], auth='alice:open:sesame') == [200, 1]
    users.write_text('bob:builder')
    os.kill(process.pid, signal.SIGHUP)
    wait_until(lambda: ask(process, ['echo', 1], auth='alice:open:sesame')[0] == 401)
    assert ask(process, ['echo', 1], auth='bob:builder') == [200, 1]


class FailingPolicy:
    """Raises SystemExit when eve connects."""

    def __init__(self, policy):
        self.policy = policy

    def check(self, address, mechanism, credentials):
        if credentials[0] == b'eve':
            raise SystemExit
        if credentials[0] == b'mallory':
            raise ValueError(credentials)
        return self.policy.check(address, mechanism, credentials)

    def admits(self, user):
        return self.policy.admits(user)


class FailingProcess(Process):
    """Logs to a file, and has an authenticator that fails."""

    log = None

    def setup(self):
        handler = logging.FileHandler(self.log)
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel(logging.DEBUG)
        super().setup()
        self.auth_thread.policy = FailingPolicy(self.auth_thread.policy)


def test_fails_closed(tmp_path, start, ask):
    log = tmp_path / 'log'
    process = start(
        '127.0.0.1', auth='alice:wonder', factory=type('P', (FailingProcess,), {'log': log})
    )
    for user in ('eve', 'mallory', 'eve'):
        assert ask(process, ['echo', 1], auth=f'{user}:hush', timeout=2)[0] in (401, 503)
        assert ask(process, ['echo', 1], auth='alice:wonder') == [200, 1]
    text = log.read_text()
    assert text.count('Access control stopped (SystemExit)') >= 2
    assert 'Access control failed (ValueError)' in text
    for secret in ('hush', 'wonder'):
        assert secret not in text


def test_secrets(tmp_path, keys, start, ask, caplog):
    caplog.set_level(logging.DEBUG)
    secrets = [SECRET, 'sesame']
    for number, mechanism in enumerate(('PLAIN', 'CURVE')):
        log = tmp_path / f'log{number}'
        process = start(
            '127.0.0.1',
            factory=type('P', (LoggingProcess,), {'log': log}),
            **server_options(mechanism, keys),
        )
        for credentials in CREDENTIALS:
            options = client_options(credentials, keys)
            reply = ask(process, ['echo', 1], **options)
            curve = options.get('curve')
            texts = [log.read_text(), str(reply), repr(process), repr(curve), str(vars(process))]
            with open(f'/proc/{process.pid}/cmdline') as cmdline:
                texts.append(cmdline.read())
            known = secrets + ([curve._secret.decode()] if curve else [])
            for text, secret in itertools.product(texts[:4] + texts[5:], known):
                assert secret not in text
        process.reload()
        process.stop()
    assert not any(secret in caplog.text for secret in secrets)


class LoggingProcess(Process):
    """Logs everything to a file."""

    log = None

    def setup(self):
        logging.getLogger().addHandler(logging.FileHandler(self.log))
        logging.getLogger().setLevel(logging.DEBUG)
        super().setup()


@pytest.mark.parametrize(
    ('options', 'warning'),
    [
        ({}, 'without authentication'),
        ({'auth': 'alice:wonder'}, 'with passwords in clear'),
        ({'curve': True}, None),
    ],
)
def test_warning_of_exposure(options, warning, tmp_path, keys, start):
    log = tmp_path / 'log'
    if 'curve' in options:
        options = server_options('CURVE', keys)
    start('*', factory=type('P', (LoggingProcess,), {'log': log}), **options)
    text = log.read_text()
    if warning is None:
        assert 'CURVE' not in text
    else:
        assert text.count('use CURVE') == 1
        assert warning in text


@pytest.mark.parametrize(
    ('options', 'culprit'),
    [
        ({'clients': '10.0.0.1 example.com'}, "'example.com'"),
        ({'clients': ['10.0.0.300']}, "'10.0.0.300'"),
        ({'clients': '10.0.0.1/8'}, "'10.0.0.1/8'"),
        ({'clients': 'fe80::1%eth0'}, "'fe80::1%eth0'"),
        ({'auth': 'alice'}, 'Bad credentials'),
        ({'auth': ['alice:a', 'bob']}, 'Bad credentials'),
        ({'auth': {'alice': ''}}, 'Bad credentials'),
    ],
)
def test_bad_rules(options, culprit):
    with pytest.raises(ValueError, match=culprit):
        Process('127.0.0.1', **options)


def test_one_mechanism(keys):
    with pytest.raises(ValueError, match='one mechanism'):
        Process('127.0.0.1', auth='alice:wonder', **server_options('CURVE', keys))
    with pytest.raises(ValueError, match='one user'):
        zmq_socket('127.0.0.1:9', auth='alice:wonder', **client_options('good key', keys))
    with pytest.raises(ValueError, match='one user'):
        zmq_socket('127.0.0.1:9', auth='alice:wonder\nbob:builder')


def test_half_open_peers(start, ask):
    """Those that are not ready, or have begun a message, are disconnected; the others may idle."""
    process = start(factory=QuickLimits)
    host, port = process.bound_address.removeprefix('tcp://').split(':')
    peers = []
    kinds = itertools.islice(itertools.cycle(HALF_OPEN.items()), 400)
    try:
        for name, data in kinds:
            peer = tcp.create_connection((host, int(port)), timeout=TIMEOUT)
            peers.append((name, peer))
            peer.sendall(data)
        for name, peer in peers:
            if name != 'ready, and silent':
                with suppress(ConnectionResetError):
                    while peer.recv(4096):  # the greeting of the server; then the end
                        assert ask(process, ['echo', 1]) == [200, 1]
        for name, peer in peers:
            if name == 'ready, and silent':
                peer.sendall(b'\x01\x00\x00\x0a["echo",1]')
                with peer.makefile('rb') as file:
                    while not (data := file.read1()).endswith(b'[200,1]'):
                        assert data
    finally:
        for _name, peer in peers:
            peer.close()


def test_flood_of_bad_handshakes(start, ask):
    process = start('127.0.0.1', auth='alice:wonder')
    ask(process, ['fds', None], auth='alice:wonder')
    before = ask(process, ['fds', None], auth='alice:wonder')[1]
    with (
        ThreadPoolExecutor() as pool,
        zmq_socket(process.bound_address, auth='alice:wonder') as good,
    ):
        attack = pool.submit(flood, process.bound_address, 2000)
        while not attack.done():
            good.send_json(['echo', 1])
            assert zmq_response(good, timeout=TIMEOUT) == [200, 1]
        attack.result()
    wait_until(lambda: ask(process, ['fds', None], auth='alice:wonder')[1] <= before + 2)


def test_limits_on_sockets():
    class Limited(Process):
        receive_hwm = 7
        send_hwm = 8
        backlog = 9

    process = Limited()
    process.context = zmq.Context()
    process.loop = IOLoop(make_current=False)
    try:
        stream, _port = process.stream(zmq.REP, '127.0.0.1:9', bind=False)
        socket = stream.socket
        assert (socket.rcvhwm, socket.sndhwm, socket.backlog) == (7, 8, 9)
        assert socket.maxmsgsize > process.max_message_size
        assert socket.handshake_ivl == 5000
        assert (socket.heartbeat_ivl, socket.tcp_keepalive, socket.tcp_keepalive_idle) == (0, 1, 5)
    finally:
        process.context.destroy(linger=0)
        process.loop.close()


@pytest.mark.parametrize(
    ('server', 'clients', 'text'),
    [
        ('nobody.key_secret', 'clients', 'nobody.key_secret.*no such file'),
        ('server.key', 'clients', 'server.key.*does not contain a secret key'),
        ('rubbish.key', 'clients', 'rubbish.key.*does not contain a key'),
        ('binary.key', 'clients', 'binary.key.*does not contain a key'),
        ('clients', 'clients', 'CURVE key .*clients'),
        ('server.key_secret', 'nowhere', 'nowhere.*No such file'),
        ('server.key_secret', 'server.key', 'server.key.*Not a directory'),
        ('server.key_secret', 'empty', 'at least one client'),
        ('server.key_secret', 'spoilt', 'spoilt/rubbish.key.*does not contain a key'),
    ],
)
def test_key_that_cannot_be_read(keys, server, clients, text):
    (keys / 'empty').mkdir()
    (keys / 'spoilt').mkdir()
    for path in (keys / 'rubbish.key', keys / 'spoilt' / 'rubbish.key'):
        path.write_text('curve\n    public-key = "short"\n')
    (keys / 'binary.key').write_bytes(b'\xff\xfe')
    with pytest.raises(ValueError, match=text):
        CurveServer(keys / server, keys / clients)


@pytest.mark.parametrize(
    'key', ['short', 'x' * 41, '"' * 40, 'é' * 40, '\0' * 40, b'\xff' * 40, 40, None, ['x']]
)
def test_bad_text_of_a_key(key):
    public, secret = zmq.curve_keypair()
    for make in (
        lambda: CurveServer(key, [public]),
        lambda: CurveServer(secret, [key]),
        lambda: CurveClient(public, key),
        lambda: CurveClient(key, secret),
    ):
        with pytest.raises(ValueError, match='A CURVE key is 40 characters') as caught:
            make()
        assert secret.decode() not in str(caught.value)
    with pytest.raises(ValueError, match='at least one client'):
        CurveServer(secret, [])


@pytest.mark.parametrize('kind', [bytes.decode, bytes])
def test_keys_of_settings(start, ask, kind):
    server_public, server_secret = map(kind, zmq.curve_keypair())
    client_public, client_secret = map(kind, zmq.curve_keypair())
    process = start(curve=CurveServer(server_secret, [client_public]))
    curve = CurveClient(server_public, client_secret)
    assert ask(process, ['who', 1], curve=curve) == [
        200,
        [curve.public.decode(), '127.0.0.1', 1],
    ]


def test_curve_of_the_class(keys, start, ask):
    factory = type('Secured', (Process,), server_options('CURVE', keys))
    process = start(factory=factory)
    assert ask(process, ['echo', 1], **client_options('good key', keys)) == [200, 1]
    assert ask(process, ['echo', 1])[0] == 401


def test_socket_with_keys_of_its_own(keys, start):
    """It gets the reply, or a time-out: pyzmq cannot read the keys of a socket."""
    process = start(**server_options('CURVE', keys))
    for credentials, reply in (
        ('good key', [200, 1]),
        ('unknown key', [503, 'Connection timeout']),
    ):
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.linger = 0
            client_options(credentials, keys)['curve'].apply(socket)
            socket.connect(process.bound_address)
            socket.send_json(['echo', 1])
            assert zmq_response(socket, timeout=0.3 if reply[0] == 503 else 5) == reply


@pytest.mark.parametrize(
    ('content', 'text'),
    [
        (None, 'No such file'),
        (b'\xff', 'not UTF-8'),
        (b'', "^Bad credentials in '.*/users': it has no user; write user:password, each of 1 to"),
        (b'# nobody\n\n', "^Bad credentials in '.*/users': it has no user; write user:password"),
        (b'# us\n\nbob:x\nalice\n', "^Bad credentials in '.*/users', line 4: write user:password,"),
        (b'bob:hush-hush\r\n\r\nbob:hush-hush\r\n', 'users.*, line 3: a user is listed twice'),
    ],
)
def test_users_that_cannot_be_read(tmp_path, content, text):
    path = tmp_path / 'users'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=text) as error:
        Process(auth=path)
    assert 'hush' not in str(error.value)


def test_reload_without_a_child(start):
    """Before the start and after the end it does nothing."""
    process = Process()
    process.reload()
    assert process.pid is None
    process = start()
    process.stop()
    process.reload()
    assert process.exitcode == 0


class HungUpSetup(Process):
    """Gets a SIGHUP before it has a loop."""

    def setup(self):
        os.kill(os.getpid(), signal.SIGHUP)
        super().setup()


def test_reload_before_it_is_ready(start, ask):
    process = start(factory=HungUpSetup, auth='alice:wonder')
    assert ask(process, ['echo', 1], auth='alice:wonder') == [200, 1]
