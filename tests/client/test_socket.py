# SPDX-License-Identifier: ZPL-2.1
"""The functions of `pyams_zmq.socket`: arguments, replies and errors."""

import gc
import inspect
import subprocess
import sys
import threading

import pytest
import zmq

from handlers import Process
from peers import ECHO, REPLY, ask_raw, replying
from pyams_zmq.client.socket import SILENCE, ZMQSocket, get_context, zmq_response, zmq_socket
from pyams_zmq.exceptions import ZMQClosedError, ZMQMessageError, ZMQReplyError
from pyams_zmq.message import MAX_MESSAGE_SIZE

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
    gc.collect()  # the socket that could not be opened causes no warning


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
    assert 0 < SILENCE < 0.1
    assert Process.max_message_size < MAX_MESSAGE_SIZE


# Replies and requests


@pytest.mark.parametrize('data', [b'', b'\xff', b'{', b'nope', b'NaN', b'[200, "OK"] [', b"['x']"])
def test_no_json(data):
    with replying(data) as address, pytest.raises(ZMQReplyError, match='not JSON'):
        ask_raw(address)


@pytest.mark.parametrize('data', ['null', '1', '"text"', '{"a": [1.5, "é"]}', '[503, "mine"]'])
def test_any_json(data):
    with replying(data.encode()) as address:
        assert ask_raw(address) == zmq.utils.jsonapi.loads(data)


def test_last_frame_of_a_router():
    """A DEALER receives the delimiter too."""
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
    """libzmq would wait for standard input, which pyzmq passes to it instead of the socket."""
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
    """The context is terminated during the wait."""
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
    timer.join(5)  # the error, which holds the traceback, keeps none of them open
    assert not timer.is_alive()
    assert caught.value.__suppress_context__
    with pytest.raises(ZMQClosedError):
        zmq_response(socket)


def test_closed_shared_context(start):
    """After the context was destroyed, the next socket creates another one."""
    process = start()
    assert ask_raw(process.bound_address) == REPLY
    first = get_context()
    first.destroy(0)
    assert ask_raw(process.bound_address) == REPLY
    assert get_context() is not first


def test_no_request(start):
    socket = zmq_socket(start().bound_address)
    for _ in range(2):
        with pytest.raises(zmq.ZMQError, match='no request was sent') as caught:
            zmq_response(socket)
        assert caught.value.errno == zmq.EFSM
        socket.send_json(ECHO)
        assert zmq_response(socket) == REPLY  # the socket can still be used


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
    assert socket.max_message_size == MAX_MESSAGE_SIZE
    socket.max_message_size = 100
    with pytest.raises(ZMQMessageError, match=r'Message is \d+ bytes; the limit is 100') as caught:
        send(socket)
    assert caught.value.status == 413
    socket.send(b'x' * 100)  # nothing of the other one was sent


@pytest.mark.parametrize('size', [-1, 0, 1])
def test_limits(start, size):
    """The server replies to every message that the client can send."""
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
