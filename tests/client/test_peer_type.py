# SPDX-License-Identifier: ZPL-2.1
"""The type of a service's socket, which its handshake names."""

import os
import socket as network
import time
from contextlib import contextmanager
from threading import Thread

import pytest
import zmq
from hypothesis import example, given
from hypothesis import strategies as st

from access_cases import GREETING, READY, client_options, make_keys, server_options
from checks import AT_ONCE, freeze
from handlers import Process
from old_service import OldService
from pool_handlers import Pool
from pyams_zmq.client import ZMQClient
from pyams_zmq.client.peer_type import MAX_COMMAND, find_socket_type, read_peer_type, shake_hands
from pyams_zmq.testing import running
from pyams_zmq.wire import names as names_module
from pyams_zmq.wire.endpoint import Endpoint
from raw_peer import frame, greeting, metadata

USERS = {'alice': 'x' * 254}  # the longest password: the command needs the long form
SHORT = 0.2


def find(address, timeout=AT_ONCE, **options):
    """Return what a client says of the service at an address."""
    with ZMQClient(address, **options) as client:
        return client.find_socket_type(timeout=timeout)


@contextmanager
def sending(*parts):
    """Listen, and send these bytes to the first peer, which then hangs up; return the address."""

    def serve():
        connection, _address = listener.accept()
        with connection:
            for part in parts:
                connection.sendall(part)
            try:
                while connection.recv(4096):
                    pass
            except ConnectionError:  # it has not read all
                pass

    with network.create_server(('127.0.0.1', 0)) as listener:
        thread = Thread(target=serve)
        thread.start()
        yield f'127.0.0.1:{listener.getsockname()[1]}'
        thread.join()


# Services


@pytest.mark.parametrize(
    'address', ['127.0.0.1', '[::1]', 'ipc://{folder}/service', 'ipc://@pyams_zmq-type-{pid}']
)
def test_service_of_this_version(start, tmp_path, address):
    process = start(address.format(folder=tmp_path, pid=os.getpid()))
    assert find(process.bound_address) == 'ROUTER'


def test_pool(start):
    assert find(start(factory=Pool, workers=1).bound_address) == 'ROUTER'


@pytest.mark.parametrize('address', ['tcp://127.0.0.1:*', 'ipc://@pyams_zmq-old-type-{pid}'])
def test_old_service(address):
    with OldService(address.format(pid=os.getpid())) as service:
        assert find(service.address) == 'REP'
    assert service.received == []


def test_old_service_with_plain():
    with OldService(users=USERS) as service:
        assert find(service.address, auth=USERS) == 'REP'
        assert find(service.address, auth='alice:wrong') is None
        assert find(service.address) is None  # another mechanism


@pytest.mark.parametrize(
    ('mechanism', 'credentials', 'expected'),
    [
        ('NULL', 'none', 'ROUTER'),
        ('NULL', 'good password', None),
        ('PLAIN', 'none', None),
        ('PLAIN', 'good password', 'ROUTER'),
        ('PLAIN', 'wrong password', None),
        ('PLAIN', 'unknown user', None),
        ('CURVE', 'none', None),
        ('CURVE', 'good password', None),
        ('CURVE', 'good key', 'ROUTER'),
    ],
)
def test_mechanisms(start, tmp_path, mechanism, credentials, expected):
    keys = make_keys(tmp_path)
    process = start(**server_options(mechanism, keys))
    options = client_options(credentials, keys)
    begin = time.monotonic()
    assert find(process.bound_address, 60, **options) == expected
    assert time.monotonic() - begin < AT_ONCE  # a refusal is known at once


def test_address_that_is_not_allowed(start):
    assert find(start(clients='10.0.0.1').bound_address) is None


def test_host_name(start, monkeypatch):
    """It goes where libzmq does: to an IPv6 address if the name has no other."""
    port = start('[::1]').bound_address.rpartition(':')[2]
    lookup = network.getaddrinfo

    def find_six(_host, port, family=0, *args, **kwargs):
        return lookup('::1', port, family, *args, **kwargs)

    monkeypatch.setattr(network, 'getaddrinfo', find_six)
    assert find(f'six.test:{port}') == 'ROUTER'


@pytest.mark.parametrize('host', ['unknown.invalid', f'{"x" * 64}.test'])
def test_name_that_is_not_found(monkeypatch, host):
    def fail(host, *_args, **_kwargs):
        host.encode('idna')  # as the function of the system
        raise network.gaierror

    monkeypatch.setattr(names_module.network, 'getaddrinfo', fail)
    assert find(f'{host}:5555') is None


def test_nobody_listens(down, tmp_path):
    assert find(down) is None
    assert find(f'ipc://{tmp_path}/none') is None


def test_many_probes(start):
    """They look like clients that leave: the service does not close them, and works on."""
    process = start()
    with ZMQClient(process.bound_address) as client:
        assert {client.find_socket_type() for _ in range(100)} == {'ROUTER'}
        assert client.call('echo', 1) == 1


def test_service_that_hangs():
    with running(Process('127.0.0.1:0')) as process:
        freeze(process.pid)
        try:
            assert find(process.bound_address, SHORT) is None
        finally:
            process.kill()


def test_no_time(start):
    address = start().bound_address
    for timeout in (0, -1):
        assert read_peer_type(Endpoint.parse(address, bind=False), {}, timeout) is None


# Other peers

ANSWER = greeting()
TYPE = metadata(b'REP', b'')


def ready(data=TYPE, name=b'\x05READY'):
    return frame(name + data, command=True)


@pytest.mark.parametrize(
    'parts',
    [
        [],
        [ANSWER[:5]],
        [ANSWER[:30]],
        [ANSWER],
        [ANSWER, b'\4'],
        [ANSWER, ready()[:-1]],
        [ANSWER, b'\6\0\0\0\0'],
    ],
)
def test_peer_that_stops(parts):
    with sending(*parts) as address:
        begin = time.monotonic()
        assert find(address, SHORT) is None
        assert SHORT <= time.monotonic() - begin < SHORT + AT_ONCE


@pytest.mark.parametrize(
    'parts',
    [
        [bytes(64)],
        [b'GET / HTTP/1.1\r\n\r\n' + bytes(100)],
        [b'SSH-2.0-OpenSSH_9.2\r\n'],
        [b'\x01\x00' + bytes(100)],  # ZMTP 1.0
        [ANSWER[:10] + b'\x01' + ANSWER[11:]],  # ZMTP 2.0
        [greeting(b'CURVE')],
        [greeting(b'NULLNULL')],
        [ANSWER, frame(b'\x05READY' + TYPE)],  # not a command
        [ANSWER, frame(b'\x05READY' + TYPE, command=True, more=True)],
        [ANSWER, ready(name=b'\x05ERROR')],
        [ANSWER, ready(name=b'')],
        [ANSWER, ready(b'')],
        [ANSWER, ready(TYPE[:-1])],
        [ANSWER, ready(metadata(b'', b''))],
        [ANSWER, ready(metadata(b'\xff', b''))],
        [ANSWER, b'\4\0'],  # a command without a name
        [ANSWER, b'\6' + (1 << 62).to_bytes(8, 'big') + bytes(100_000)],
        [ANSWER, ready(TYPE + bytes(MAX_COMMAND))],
    ],
)
def test_malformed_answer(parts):
    with sending(*parts) as address:
        begin = time.monotonic()
        assert find(address, 60) is None
        assert time.monotonic() - begin < AT_ONCE


@pytest.mark.parametrize('size', [0, 100, 300, 4000])
def test_answer_in_pieces(size):
    data = metadata(b'REP', bytes(size))
    answer = ANSWER + ready(data)
    with sending(*(answer[start : start + 7] for start in range(0, len(answer), 7))) as address:
        assert find(address) == 'REP'


def test_plain_error():
    error = frame(b'\x05ERROR\x0bInvalid key', command=True)
    with sending(greeting(b'PLAIN'), error) as address:
        assert find(address, 60, auth=USERS) is None


# The parser


class Bytes:
    """A connection whose peer sends bytes that do not depend on what it gets."""

    def __init__(self, data):
        self.data = data
        self.sent = b''
        self.taken = 0

    def read(self, size):
        part, self.data = self.data[:size], self.data[size:]
        self.taken += len(part)
        if len(part) < size:
            raise ConnectionError
        return part

    def send(self, data):
        self.sent += data


def parse(data, users):
    """Return the type of a peer that sends bytes, None if it stops; check what was read."""
    stream = Bytes(data)
    try:
        return shake_hands(stream, users)
    except ConnectionError:
        return None
    finally:
        assert stream.taken <= 64 + 2 * (9 + MAX_COMMAND)
        assert all(password.encode() not in stream.sent for password in users.values()) or (
            b'PLAIN' in data[:32]
        )


def test_bytes_of_a_client():
    """They are those of a REQ socket of libzmq."""
    stream = Bytes(GREETING + ready(metadata(b'ROUTER', b'me')))
    assert shake_hands(stream, {}) == 'ROUTER'
    assert stream.sent == GREETING + READY


@given(st.binary(max_size=300), st.sampled_from([{}, {'alice': 'secret'}]))
@example(b'', {})
def test_any_bytes(data, users):
    assert parse(data, users) is None or data[:1] == b'\xff'


@given(st.binary(max_size=300), st.sampled_from([b'NULL', b'PLAIN']))
def test_any_bytes_after_the_greeting(data, mechanism):
    users = {'alice': 'secret'} if mechanism == b'PLAIN' else {}
    found = parse(greeting(mechanism) + data, users)
    assert found is None or found.encode() in data


@given(st.binary(max_size=300))
@example(b'\x0bSOCKET-type\0\0\0\3REP')
@example(b'\x0bSocket-Type\0\0\0\3R\0P')
def test_any_metadata(data):
    found = parse(ANSWER + ready(data), {})
    assert found == find_socket_type(data)
    assert found is None or (found.encode() in data and b'socket-type' in data.lower())


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=50)), max_size=5),
    st.sampled_from(['REP', 'ROUTER', 'DEALER']),
    st.data(),
)
def test_type_between_other_properties(properties, kind, data):
    properties = [pair for pair in properties if pair[0].lower() != b'socket-type']
    position = data.draw(st.integers(0, len(properties)))
    properties.insert(position, (b'socket-TYPE', kind.encode()))
    encoded = b''.join(
        bytes([len(name)]) + name + len(value).to_bytes(4, 'big') + value
        for name, value in properties
    )
    assert find_socket_type(encoded) == kind


@given(st.integers(0, len(ANSWER + ready()) - 1), st.integers(0, 255))
def test_changed_byte(position, value):
    """It never becomes the type of a socket that is not blocked."""
    data = bytearray(ANSWER + ready())
    data[position] = value
    assert parse(bytes(data), {}) != 'ROUTER'


@pytest.mark.parametrize('kind', [zmq.REP, zmq.ROUTER, zmq.DEALER, zmq.PULL, zmq.PUB])
def test_each_type_of_libzmq(kind):
    """Those that a REQ socket cannot talk to do not answer, or say what they are."""
    with zmq.Context() as context, context.socket(kind) as socket:
        port = socket.bind_to_random_port('tcp://127.0.0.1')
        expected = {zmq.REP: 'REP', zmq.ROUTER: 'ROUTER'}.get(kind)
        found = find(f'127.0.0.1:{port}', AT_ONCE)
    assert found in ({expected} if expected else {None, zmq.SocketType(kind).name})
