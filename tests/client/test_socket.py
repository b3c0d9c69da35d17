# SPDX-License-Identifier: ZPL-2.1
"""The helpers of the clients: what they return, when, and what they leave behind."""

import ctypes
import gc
import inspect
import multiprocessing
import os
import resource
import select
import signal
import socket as sockets
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from checks import open_fds, wait_until
from handlers import Process
from pyams_zmq.auth import ZAP_DOMAIN, AccessPolicy, Authenticator, Verdict, parse_users
from pyams_zmq.client import socket as socket_module
from pyams_zmq.client.socket import (
    PROBE_DELAY,
    TIMEOUT,
    ZMQSocket,
    zmq_response,
    zmq_socket,
)
from pyams_zmq.exceptions import ZMQClosedError, ZMQMessageError, ZMQReplyError
from pyams_zmq.message import MAX_MESSAGE_SIZE
from pyams_zmq.wire import message as message_module

FORK = multiprocessing.get_context('fork')
ECHO = ['echo', {'path': '/this/is/my/path', 'format': 'JPEG'}]
STRICT = (
    *('-X', 'dev', '-W', 'error'),
    # What Pyramid and Paste warn of.
    *('-W', 'ignore:pkg_resources is deprecated', '-W', 'ignore:Deprecated call to'),
)
REPLY = [200, ECHO[1]]
AT_ONCE = 5.0
"""Limit in seconds for what takes milliseconds, but on a loaded machine"""


@pytest.fixture(params=['poll of libzmq', 'poll of the system'])
def poll(request, monkeypatch):
    """Wait as under gevent, too, with the poll of the system, which is not the builtin then."""
    if request.param == 'poll of the system':
        builtin = select.poll
        monkeypatch.setattr(select, 'poll', lambda: builtin())  # noqa: PLW0108 - no builtin


@pytest.fixture
def down():
    """Address where nobody listens."""
    with sockets.socket() as reserved:
        reserved.bind(('127.0.0.1', 0))
        yield f'127.0.0.1:{reserved.getsockname()[1]}'


@contextmanager
def raw_server(serve):
    """Serve each connection to a TCP port with a function."""

    def run():
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                break
            connections.append(connection)
            serve(connection)

    connections = []
    listener = sockets.create_server(('127.0.0.1', 0))
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f'127.0.0.1:{listener.getsockname()[1]}'
    finally:
        listener.shutdown(sockets.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for connection in connections:
            connection.close()


@contextmanager
def replying(*replies, socket_type=zmq.REP, policy=None, **options):
    """Answer each message with the next reply; bytes, or a function that returns them."""

    def run():
        for reply in replies:
            socket.recv_multipart()
            socket.send(reply() if callable(reply) else reply)
        stop.recv()

    with zmq.Context() as context, context.socket(socket_type) as socket:
        socket.linger = 1000
        for name, value in options.items():
            setattr(socket, name, value)
        authenticator = None
        if policy is not None:
            socket.zap_domain = ZAP_DOMAIN
            authenticator = Authenticator(context, policy)
            authenticator.start()
        port = socket.bind_to_random_port('tcp://127.0.0.1')
        stop, stopping = FORK.Pipe(duplex=False)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f'127.0.0.1:{port}'
        finally:
            stopping.send('stop')
            thread.join(5)
            stop.close()
            stopping.close()
            if authenticator is not None:
                authenticator.stop()


def timed(function, *args, **kwargs):
    """Result of a call, and the seconds that it took."""
    start = time.monotonic()
    result = function(*args, **kwargs)
    return result, time.monotonic() - start


def ask_raw(address, timeout=10, **options):
    """As a user would do it, who drops the socket."""
    socket = zmq_socket(address, **options)
    socket.send_json(ECHO)
    return zmq_response(socket, timeout=timeout)


def run_in_child(function):
    """Run a function in a fork, fail if it does."""
    child = FORK.Process(target=function)
    child.start()
    child.join(20)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    assert code == 0


def run_strictly(program, address):
    """Run a program for which every warning is an error."""
    return subprocess.run(
        [sys.executable, *STRICT, '-c', program, address],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def rss():
    """Resident memory in KiB."""
    with open('/proc/self/status', encoding='ascii') as status:
        return next(int(line.split()[1]) for line in status if line.startswith('VmRSS'))


# The contract


def test_signatures():
    assert str(inspect.signature(zmq_socket)).startswith('(address: Any, socket_type: int = ')
    assert [
        (item.name, item.default, item.kind is item.POSITIONAL_OR_KEYWORD)
        for item in inspect.signature(zmq_socket).parameters.values()
    ] == [
        ('address', inspect.Parameter.empty, True),
        ('socket_type', zmq.REQ, True),
        ('linger', 0, True),
        ('protocol', 'tcp', True),
        ('auth', None, True),
        ('curve', None, False),
    ]
    assert [
        (item.name, item.default, item.kind is item.POSITIONAL_OR_KEYWORD)
        for item in inspect.signature(zmq_response).parameters.values()
    ] == [
        ('socket', inspect.Parameter.empty, True),
        ('flags', zmq.POLLIN, True),
        ('timeout', 10, True),
    ]


def test_positional_arguments(start):
    process = start(auth='user:password')
    address = process.bound_address.removeprefix('tcp://')
    socket = zmq_socket(address, zmq.REQ, 0, 'tcp', 'user:password')
    socket.send_json(ECHO)
    assert zmq_response(socket, zmq.POLLIN, 5) == REPLY


@pytest.mark.usefixtures('poll')
@pytest.mark.parametrize('auth', [None, 'user:pass:wörd'])
def test_reply(start, auth):
    process = start(auth=auth)
    socket = zmq_socket(process.bound_address, auth=auth)
    for number in range(3):
        socket.send_json(['echo', number])
        assert zmq_response(socket) == [200, number]


@pytest.mark.parametrize(
    'convert',
    [
        str,
        lambda uri: uri.removeprefix('tcp://'),
        lambda uri: tuple(uri.removeprefix('tcp://').rsplit(':', 1)),
        lambda uri: ('127.0.0.1', int(uri.rpartition(':')[2])),
        lambda uri: 'localhost:' + uri.rpartition(':')[2],
    ],
)
def test_addresses(start, convert):
    assert ask_raw(convert(start().bound_address)) == REPLY


def test_ipv6(start):
    process = start('[::1]')
    assert ask_raw(process.bound_address) == REPLY
    assert ask_raw(('::1', process.bound_address.rpartition(':')[2])) == REPLY


def test_ipc(start, tmp_path):
    start(f'ipc://{tmp_path}/socket')
    assert ask_raw(f'ipc://{tmp_path}/socket') == REPLY
    assert ask_raw(f'{tmp_path}/socket', protocol='ipc') == REPLY


@pytest.mark.parametrize('address', ['127.0.0.1', '*:5555', '', 'http://host:80', None, 5555])
def test_bad_address(address):
    with pytest.raises(ValueError, match='Bad ØMQ address'):
        zmq_socket(address)


@pytest.mark.parametrize('auth', ['secret', ('user', 'secret'), f'user:secret{"x" * 255}'])
def test_bad_credentials(auth):
    with pytest.raises(ValueError, match='Bad credentials') as caught:
        zmq_socket('127.0.0.1:5555', auth=auth)
    assert 'secret' not in str(caught.value)


def test_bad_socket_type():
    with pytest.raises(zmq.ZMQError, match='Invalid argument'):
        zmq_socket('127.0.0.1:5555', 999)
    gc.collect()  # what is half made does not complain either


def test_longest_credentials(start):
    auth = f'{"u" * 254}:{"é" * 127}'
    process = start(auth=auth)
    assert ask_raw(process.bound_address, auth=auth) == REPLY
    assert ask_raw(process.bound_address, auth=f'{"u" * 254}:{"à" * 127}')[0] == 401


def test_options(down):
    with zmq_socket(down, zmq.DEALER, 17) as socket:
        assert (socket.type, socket.linger) == (zmq.DEALER, 17)
        assert socket.last_endpoint == f'tcp://{down}'.encode()
        assert not socket.ipv6
    with zmq_socket('[::1]:5555') as socket:
        assert (socket.type, socket.linger, socket.ipv6) == (zmq.REQ, 0, 1)


def test_constants():
    assert 0 < PROBE_DELAY < 0.1
    assert Process.max_message_size < MAX_MESSAGE_SIZE


# Nobody answers


@pytest.mark.usefixtures('poll')
@pytest.mark.parametrize('timeout', [-1, 0, 0.001, PROBE_DELAY, 0.05, 0.3])
def test_timeout(down, timeout):
    reply, seconds = timed(ask_raw, down, timeout)
    assert reply == [503, 'Connection timeout']
    assert reply[1] is TIMEOUT
    assert timeout <= seconds < max(0, timeout) + AT_ONCE


def test_timeout_of_ipc(tmp_path):
    assert ask_raw(f'ipc://{tmp_path}/nobody', 0.1) == [503, 'Connection timeout']


def test_silent_server():
    """It is one that hangs, for all we know."""
    with raw_server(lambda connection: None) as address:
        reply, seconds = timed(ask_raw, address, 0.8)
        assert reply == [503, 'Connection timeout']
        assert 0.8 <= seconds < 0.8 + AT_ONCE


def test_stopped_server(start):
    """A process which does not get a processor is not taken for a bad one."""
    process = start()
    os.kill(process.pid, signal.SIGSTOP)
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
    """It starts while somebody waits already."""

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
    """Then libzmq takes the message for ever, unless it takes it for nobody."""
    process = start(**options)
    # By its address a peer is refused in any case, the others are now and then.
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
    """Who does not want to wait gets the error that zmq has for that."""
    with zmq.Context() as context, ZMQSocket(context, zmq.REQ) as socket:
        with pytest.raises(zmq.Again):
            socket.send(b'1', zmq.NOBLOCK)
        assert not socket.is_refused
        socket.connect(f'tcp://{down}')
        socket.send(b'1', zmq.NOBLOCK)


def test_others_wait_to_send():
    """Who has no peer yet, or too many messages, waits as long as its socket says."""
    with zmq.Context() as context, ZMQSocket(context, zmq.PUSH) as socket:
        socket.sndtimeo = 100
        with pytest.raises(zmq.Again):
            socket.send(b'1')
        assert not socket.is_refused


HTTP = b'HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n'


@pytest.mark.usefixtures('poll')
@pytest.mark.parametrize('auth', [None, 'user:password'])
@pytest.mark.parametrize(
    'serve',
    [
        lambda connection: (connection.recv(10), connection.sendall(HTTP), connection.close()),
        lambda connection: connection.sendall(b'SSH-2.0-OpenSSH_9.2p1\r\n'),
        lambda connection: connection.close(),
    ],
    ids=['HTTP', 'SSH', 'hangs up'],
)
def test_no_zmq_server(serve, auth):
    with raw_server(serve) as address:
        reply, seconds = timed(ask_raw, address, auth=auth)
        assert (reply[0], seconds < AT_ONCE) == (401, True)


class QuietHandler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.usefixtures('poll')
@pytest.mark.parametrize('auth', [None, 'user:password'])
def test_http_server(auth):
    """This one says nothing before it has got a line."""
    with ThreadingHTTPServer(('127.0.0.1', 0), QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            reply, seconds = timed(ask_raw, server.server_address, auth=auth)
        finally:
            server.shutdown()
            thread.join()
    assert (reply[0], seconds < AT_ONCE) == (401, True)


# What happens meanwhile


class Policy:
    """Lets everybody in, but who comes second meets `second`."""

    def __init__(self, second):
        self.second = second
        self.count = 0

    def check(self, *args):
        self.count += 1
        if self.count == 2:
            return self.second()
        return Verdict(b'200', b'OK', 'user')


@pytest.mark.usefixtures('poll')
def test_reply_during_the_probe():
    """The handshake of the probe takes a while, the reply does not."""
    probing, end = threading.Event(), threading.Event()

    def second():
        probing.set()
        assert end.wait(5)
        return Verdict(b'400', b'No')

    def reply():
        assert probing.wait(5)
        return b'[200, "OK"]'

    with replying(reply, policy=Policy(second)) as address:
        try:
            reply, seconds = timed(ask_raw, address)
            assert (reply, seconds < AT_ONCE) == ([200, 'OK'], True)
        finally:
            end.set()


def test_reply_and_refusal(monkeypatch):
    """Both are there when we look: the reply wins."""
    probing = threading.Event()

    def second():
        probing.set()
        return Verdict(b'400', b'No')

    def reply():
        assert probing.wait(5)
        return b'[200, "OK"]'

    def wait_for_all(sockets, flags, timeout):
        if len(sockets) == 2:
            wait_until(lambda: len(wait(sockets, flags, 0)) == 2)
        return wait(sockets, flags, timeout)

    wait = socket_module.wait_for
    monkeypatch.setattr(socket_module, 'wait_for', wait_for_all)
    with replying(reply, policy=Policy(second)) as address:
        assert ask_raw(address) == [200, 'OK']


def test_probe_of_a_dealer():
    """The server must not send to the probe what is meant for the socket."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as server:
        server.linger = 0
        monitor = server.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        port = server.bind_to_random_port('tcp://127.0.0.1')
        socket = zmq_socket(f'127.0.0.1:{port}', zmq.DEALER)
        assert zmq_response(socket, timeout=0.3) == [503, 'Connection timeout']
        events = []
        while monitor.poll(0):
            events.append(recv_monitor_message(monitor)['event'])
        server.disable_monitor()
        monitor.close()
    assert events.count(zmq.EVENT_ACCEPTED) > 1
    assert events.count(zmq.EVENT_HANDSHAKE_SUCCEEDED) == 1


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
    """A probe that the server does not like for its type is no verdict."""
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


@pytest.mark.parametrize('is_good', [True, False])
def test_curve(is_good):
    """pyzmq has CURVE, we do not: then a slow reply is awaited, and a refusal is a time-out."""
    public, secret = zmq.curve_keypair()
    called = threading.Event()

    def reply():
        called.wait(0.1)
        return b'[200, "OK"]'

    options = {'curve_server': True, 'curve_secretkey': secret, 'curve_publickey': public}
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = public if is_good else zmq.curve_keypair()[0]
        with replying(*[reply] * is_good, **options) as address:
            socket.connect(f'tcp://{address}')
            socket.send_json(ECHO)
            reply = zmq_response(socket, timeout=5 if is_good else 0.3)
    assert reply == ([200, 'OK'] if is_good else [503, 'Connection timeout'])


def test_plain_socket_of_zmq(start):
    """Any socket will do."""
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


def test_no_socket_left_for_the_probe(start):
    """Then a slow reply is awaited without it."""
    process = start()
    for count in (1, 2):  # of the socket, and of the probe without its monitor
        with zmq.Context() as context:
            context.max_sockets = count
            with context.socket(zmq.REQ) as socket:
                socket.connect(process.bound_address)
                socket.send_json(['sleep', 0.05])
                assert zmq_response(socket) == [200, 0.05]


def test_socket_that_cannot_receive(down):
    with zmq_socket(down, zmq.PUSH) as socket, pytest.raises(zmq.ZMQError) as caught:
        zmq_response(socket, timeout=0.05)
    assert caught.value.errno == zmq.ENOTSUP


def test_interrupted_wait(start):
    """A signal that does no harm does not shorten the wait."""
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
    """One that raises ends the wait at once, and leaves nothing."""

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


# Replies and requests that are none


@pytest.mark.parametrize('data', [b'', b'\xff', b'{', b'nope', b'NaN', b'[200, "OK"] [', b"['x']"])
def test_no_json(data):
    with replying(data) as address, pytest.raises(ZMQReplyError, match='no JSON'):
        ask_raw(address)


@pytest.mark.parametrize('data', ['null', '1', '"text"', '{"a": [1.5, "é"]}', '[503, "mine"]'])
def test_any_json(data):
    with replying(data.encode()) as address:
        assert ask_raw(address) == zmq.utils.jsonapi.loads(data)


def test_last_frame_of_a_router():
    """A DEALER gets the delimiter too."""
    with replying(b'[200, "OK"]', socket_type=zmq.DEALER) as address:
        socket = zmq_socket(address, zmq.DEALER)
        socket.send_multipart([b'', b'[]'])
        assert zmq_response(socket) == [200, 'OK']


@pytest.mark.usefixtures('poll')
@pytest.mark.parametrize('timeout', [0, 0.001, 1])
def test_closed_socket(down, timeout):
    socket = zmq_socket(down)
    socket.send_json(ECHO)
    socket.close()
    with pytest.raises(ZMQClosedError, match='open a new one') as caught:
        zmq_response(socket, timeout=timeout)
    assert caught.value.__suppress_context__


def test_closed_socket_and_standard_input():
    """libzmq would wait for the standard input, which pyzmq gives it in place of the socket."""
    program = (
        'from pyams_zmq.socket import zmq_response, zmq_socket\n'
        'socket = zmq_socket("127.0.0.1:9")\n'
        'socket.close()\n'
        'try:\n'
        '    print(zmq_response(socket, timeout=0.001))\n'
        'except ConnectionError as error:\n'
        '    print(type(error).__name__)\n'
    )
    with subprocess.Popen(
        [sys.executable, '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.read() == 'ZMQClosedError\n'


@pytest.mark.usefixtures('poll')
def test_dead_context(down):
    """The context ends while somebody waits."""
    context = zmq.Context()
    socket = ZMQSocket(context, zmq.REQ)
    socket.linger = 0
    socket.connect(f'tcp://{down}')
    socket.send_json(ECHO)
    timer = threading.Timer(0.1, context.term)  # it waits until all sockets are closed
    timer.start()
    with pytest.raises(ZMQClosedError) as caught:
        zmq_response(socket)
    socket.close()
    timer.join(5)  # also those of the probe, whoever holds the error with its traceback
    assert not timer.is_alive()
    assert caught.value.__suppress_context__
    with pytest.raises(ZMQClosedError):
        zmq_response(socket)


def test_closed_shared_context(start):
    """Somebody closes it, the next socket gets a new one."""
    process = start()
    assert ask_raw(process.bound_address) == REPLY
    first = socket_module._shared_context.get()
    first.destroy(0)
    assert ask_raw(process.bound_address) == REPLY
    assert socket_module._shared_context.get() is not first


def test_no_request(start):
    socket = zmq_socket(start().bound_address)
    for _ in range(2):
        with pytest.raises(zmq.ZMQError, match='no request was sent') as caught:
            zmq_response(socket)
        assert caught.value.errno == zmq.EFSM
        socket.send_json(ECHO)
        assert zmq_response(socket) == REPLY  # no harm was done


def test_second_request(start):
    process = start()
    socket = zmq_socket(process.bound_address)
    socket.send_json(ECHO)
    with pytest.raises(zmq.ZMQError, match='open a new socket') as caught:
        socket.send_json(ECHO)
    assert caught.value.errno == zmq.EFSM
    assert zmq_response(socket) == REPLY


def test_request_after_a_timeout(down):
    socket = zmq_socket(down)
    socket.send_json(ECHO)
    assert zmq_response(socket, timeout=0.05)[0] == 503
    with pytest.raises(zmq.ZMQError, match='after a time-out, open a new socket'):
        socket.send_json(ECHO)


def test_send_to_a_closed_socket(down):
    socket = zmq_socket(down)
    socket.close()
    with pytest.raises(zmq.ZMQError, match=zmq.strerror(zmq.ENOTSOCK)):
        socket.send_json(ECHO)


@pytest.fixture
def limit(monkeypatch):
    monkeypatch.setattr(message_module, 'MAX_MESSAGE_SIZE', 100)


@pytest.mark.usefixtures('limit')
@pytest.mark.parametrize(
    'send',
    [
        lambda socket: socket.send(b'x' * 101),
        lambda socket: socket.send(memoryview(b'x' * 101)),
        lambda socket: socket.send(bytearray(101)),
        lambda socket: socket.send(zmq.Frame(b'x' * 101)),
        lambda socket: socket.send(b'x' * 101, zmq.NOBLOCK, copy=False),
        lambda socket: socket.send_string('é' * 51),
        lambda socket: socket.send_json('x' * 99),
        lambda socket: socket.send_multipart([b'', b'x' * 101]),
        lambda socket: socket.send_multipart(iter([b'x', b'x' * 101, b'x'])),
    ],
)
def test_too_large(down, send):
    socket = zmq_socket(down)
    with pytest.raises(ZMQMessageError, match='bytes, 100 can be sent') as caught:
        send(socket)
    assert caught.value.status == 413
    socket.send(b'x' * 100)  # nothing of the other one was sent


@pytest.mark.parametrize('size', [-1, 0, 1])
def test_limits(start, size):
    """Whatever the client lets through, the server answers."""
    process = start()
    socket = zmq_socket(process.bound_address)
    message = b'["echo","%s"]' % (b'x' * (MAX_MESSAGE_SIZE - 11 + size))
    if size > 0:
        with pytest.raises(ZMQMessageError):
            socket.send(message)
    else:
        socket.send(message)
        assert zmq_response(socket)[0] == 413


@pytest.mark.parametrize(
    ('send', 'replies'),
    [
        (lambda socket: socket.send_multipart([b'1', b'["many", 2]']), 2),
        (lambda socket: socket.send_multipart(iter([b'1', b'2', b'["many", 3]'])), 3),
    ],
)
def test_many_frames(start, send, replies):
    socket = zmq_socket(start().bound_address)
    send(socket)
    assert zmq_response(socket) == [200, replies]


# What is left behind


def cycle(address, count, auth=None):
    for _ in range(count):
        socket = zmq_socket(address, auth=auth)
        socket.send_json(ECHO)
        assert zmq_response(socket) == REPLY


@pytest.mark.parametrize(
    'count', [1000, pytest.param(10_000, marks=pytest.mark.slow)], ids='{} cycles'.format
)
@pytest.mark.parametrize('auth', [None, 'user:password'])
def test_nothing_is_left(start, tmp_path, count, auth):
    """After many times connect, call, drop. (Over ipc: TCP would run out of ports.)"""
    process = start(f'ipc://{tmp_path}/socket', auth=auth)
    cycle(process.bound_address, 200, auth)
    gc.collect()
    fds, threads, memory = open_fds(), threading.active_count(), rss()
    cycle(process.bound_address, count, auth)
    gc.collect()
    wait_until(lambda: open_fds() <= fds)
    assert threading.active_count() == threads
    assert rss() < memory + 2048


def test_nothing_is_left_by_failures(start, down):
    process = start(auth='user:password')
    for _ in range(2):
        gc.collect()
        fds, threads = open_fds(), threading.active_count()
        for _ in range(10):
            assert ask_raw(process.bound_address)[0] == 401
            assert ask_raw(process.bound_address, auth='user:x')[0] == 401
            assert ask_raw(down, 0.02)[0] == 503
    gc.collect()
    wait_until(lambda: open_fds() <= fds)
    assert threading.active_count() == threads


def test_many_sockets_at_once(start):
    """More than libzmq's default for a context, which is 1023."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 8192:
        pytest.skip('this user may not open so many files')
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, before[1]))
    try:
        process = start()
        opened = [zmq_socket(process.bound_address) for _ in range(1200)]
        opened[-1].send_json(ECHO)
        assert zmq_response(opened[-1]) == REPLY
        opened.clear()
    finally:
        wait_until(lambda: open_fds() < before[0] // 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize('is_asked', [False, True])
def test_no_warning(start, is_asked):
    process = start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        socket = zmq_socket(process.bound_address)
        if is_asked:
            socket.send_json(['sleep', 0.05])
            assert zmq_response(socket)[0] == 200
        del socket
        gc.collect()
    assert not [str(item.message) for item in caught]


def test_dropped_is_closed(down):
    fds = open_fds()
    socket = zmq_socket(down)
    assert open_fds() > fds
    with socket:
        pass
    assert socket.closed
    del socket
    wait_until(lambda: open_fds() <= fds)


def test_shadow(down):
    """Whoever shadows a socket does not own it."""
    socket = zmq_socket(down)
    shadow = ZMQSocket(shadow=socket)
    assert shadow.underlying == socket.underlying
    del shadow
    gc.collect()
    assert not socket.closed


def test_program_that_ends(start):
    """With open sockets and a message on its way; it says nothing, and hangs nowhere."""
    process = start()
    program = (
        'import sys\n'
        'from pyams_zmq.socket import zmq_response, zmq_socket\n'
        'kept = [zmq_socket(sys.argv[1]) for _ in range(3)]\n'
        'kept[0].send_json(["echo", 1])\n'
        'print(zmq_response(kept[0]))\n'
        'kept[1].send_json(["sleep", 0.1])\n'
    )
    result = run_strictly(program, process.bound_address)
    assert (result.returncode, result.stdout, result.stderr) == (0, '[200, 1]\n', '')


# Threads


def test_threads_share_one_context(start):
    process = start()
    socket_module._shared_context.get().destroy(0)  # so that all of them want to make one
    barrier = threading.Barrier(30)
    contexts, replies = [], []

    def run():
        barrier.wait(5)
        socket = zmq_socket(process.bound_address)
        contexts.append(socket.context)
        socket.send_json(ECHO)
        replies.append(zmq_response(socket))

    threads = [threading.Thread(target=run) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(set(map(id, contexts))) == 1
    assert replies == [REPLY] * 30


def test_other_contexts_are_left_alone(start):
    """Not even the global one of zmq is ours."""
    process = start()
    assert ask_raw(process.bound_address) == REPLY
    assert socket_module._shared_context.get() is not zmq.Context.instance()
    zmq.Context.instance().term()
    assert ask_raw(process.bound_address) == REPLY


# Forks


def test_fork_while_the_lock_is_held(start):
    process = start()
    assert ask_raw(process.bound_address) == REPLY
    held, release = threading.Event(), threading.Event()

    def hold():
        with socket_module._shared_context._lock:
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(5)

    def run():
        assert ask_raw(process.bound_address) == REPLY

    try:
        run_in_child(run)
    finally:
        release.set()
        thread.join(5)


def test_fork_has_its_own_context(start):
    process = start()
    socket = zmq_socket(process.bound_address)
    parent_context = socket.context

    def run():
        child_socket = zmq_socket(process.bound_address)
        assert child_socket.context is not parent_context
        assert zmq_socket(process.bound_address).context is child_socket.context
        child_socket.send_json(ECHO)
        assert zmq_response(child_socket) == REPLY

        def run_in_grandchild():
            grandchild_socket = zmq_socket(process.bound_address)
            assert grandchild_socket.context not in (child_socket.context, parent_context)
            grandchild_socket.send_json(ECHO)
            assert zmq_response(grandchild_socket) == REPLY

        run_in_child(run_in_grandchild)
        child_socket.send_json(ECHO)
        assert zmq_response(child_socket) == REPLY

    run_in_child(run)
    assert socket_module._shared_context.get() is parent_context
    socket.send_json(ECHO)
    assert zmq_response(socket) == REPLY


def test_fork_drops_what_it_has_inherited(start):
    """The parent's sockets go on: idle ones, and one whose reply is on its way."""
    process = start()
    kept = [zmq_socket(process.bound_address) for _ in range(5)]
    kept[0].send_json(['sleep', 0.2])
    kept[1].send_json(ECHO)
    assert zmq_response(kept[1]) == REPLY

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            kept[2].close()
            kept.clear()
            gc.collect()
        assert ask_raw(process.bound_address) == REPLY

    for _ in range(3):
        run_in_child(run)
    assert zmq_response(kept[0]) == [200, 0.2]
    for socket in kept:
        socket.send_json(ECHO)
        assert zmq_response(socket) == REPLY


def test_fork_while_threads_talk(start):
    process = start()
    end, errors, counts = threading.Event(), [], []

    def talk():
        count = 0
        while not end.is_set():
            if ask_raw(process.bound_address) != REPLY:
                errors.append(count)
            count += 1
        counts.append(count)

    threads = [threading.Thread(target=talk) for _ in range(3)]
    for thread in threads:
        thread.start()

    def run():
        for _ in range(3):
            assert ask_raw(process.bound_address) == REPLY
        gc.collect()

    try:
        for _ in range(5):
            run_in_child(run)
    finally:
        end.set()
        for thread in threads:
            thread.join(10)
    assert not errors
    assert min(counts) > 0


def test_fork_that_ends_as_a_program(start):
    """It runs through its exit handlers, with the sockets of its parent."""
    process = start()
    program = (
        'import os, sys\n'
        'from pyams_zmq.socket import zmq_response, zmq_socket\n'
        'kept = zmq_socket(sys.argv[1])\n'
        'kept.send_json(["sleep", 0.2])\n'
        'if os.fork() == 0:\n'
        '    own = zmq_socket(sys.argv[1])\n'
        '    own.send_json(["echo", "child"])\n'
        '    print(zmq_response(own))\n'
        '    sys.exit(0)\n'
        'status = os.wait()[1]\n'
        'print(zmq_response(kept), status)\n'
    )
    result = run_strictly(program, process.bound_address)
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout == "[200, 'child']\n[200, 0.2] 0\n"


def test_no_zombie_threads_of_libzmq():
    """The context of a child is made when it is wanted, not by the fork."""
    zmq_socket('127.0.0.1:9')

    def run():
        assert len(os.listdir('/proc/self/task')) == 1
        assert ctypes.pythonapi.PyOS_getsig  # the interpreter is whole
        zmq_socket('127.0.0.1:9')
        assert len(os.listdir('/proc/self/task')) > 1

    run_in_child(run)


def test_slow_reply_on_a_socket_that_was_let_in():
    """The server is not asked again for each slow reply."""
    with (
        zmq.Context() as context,
        context.socket(zmq.REP) as server,
        server.get_monitor_socket(zmq.EVENT_ACCEPTED) as monitor,
        ThreadPoolExecutor(1) as pool,
    ):
        port = server.bind_to_random_port('tcp://127.0.0.1')
        with zmq_socket(f'127.0.0.1:{port}') as client:
            client.send_json(ECHO)
            server.send(server.recv())
            assert zmq_response(client) == ECHO
            assert recv_monitor_message(monitor)['event'] == zmq.EVENT_ACCEPTED
            client.send_json(ECHO)
            reply = pool.submit(zmq_response, client)
            message = server.recv()
            assert not monitor.poll(5 * PROBE_DELAY * 1000)
            server.send(message)
            assert reply.result() == ECHO
        server.disable_monitor()


def test_refusal_of_a_socket_that_was_let_in(start, monkeypatch):
    """The server comes back with another password."""
    monkeypatch.setattr(socket_module, 'LATE_PROBE_DELAY', 0.05)
    process = start(auth='admin:admin')
    address = process.bound_address
    with zmq_socket(address, auth='admin:admin') as client:
        client.send_json(ECHO)
        assert zmq_response(client) == REPLY
        process.stop()
        start(address, auth='admin:changed')
        client.send_json(ECHO)
        assert zmq_response(client, timeout=30)[0] == 401


def test_no_room(down):
    """Who does not want to wait hears it."""
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
