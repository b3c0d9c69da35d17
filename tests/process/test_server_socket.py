# SPDX-License-Identifier: ZPL-2.1
"""The bound sockets of a server: limits, addresses, and what a fork inherits."""

import errno
import os
import socket as network
import stat
import sys
from contextlib import ExitStack
from multiprocessing import Pipe
from multiprocessing.context import ForkProcess

import pytest
import zmq

from handlers import MessageHandler, Process
from pyams_zmq.auth import Access
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQBindError
from pyams_zmq.process import connections, server_socket
from pyams_zmq.process.ipc_file import NotInGroupError
from pyams_zmq.process.server_socket import (
    SIZE_SLACK,
    SOCKET_LIMITS,
    ServerSockets,
    SocketLimits,
    close_inherited_listeners,
    closed_on_error,
)
from pyams_zmq.testing import running


class Limits(SocketLimits):
    """Limits that differ from the defaults."""

    bind_timeout = 0.2
    receive_hwm = 7
    send_hwm = 8
    backlog = 9
    handshake_timeout = 0.0001
    heartbeat_interval = 1.5
    heartbeat_timeout = 2.5


@pytest.fixture
def router():
    """Return a function that makes ROUTER sockets."""
    with zmq.Context() as context:
        sockets = []

        def make():
            sockets.append(context.socket(zmq.ROUTER))
            return sockets[-1]

        yield make
        for socket in sockets:
            socket.close(0)


class HighLimits(Process):
    """Limits above those of libzmq and Linux, which have no effect."""

    receive_hwm = send_hwm = backlog = 2**40
    handshake_timeout = 1e8
    heartbeat_interval = heartbeat_timeout = 1e8


@pytest.mark.parametrize('address', ['127.0.0.1', 'ipc://{folder}/zmq'])
def test_high_limits(address, tmp_path):
    """With more seconds than Linux can count, libzmq closes each connection."""
    process = HighLimits(address.format(folder=tmp_path), MessageHandler)
    with running(process), ZMQClient(process.bound_address) as client:
        assert client.call('echo', 1) == 1


def test_no_null_device(monkeypatch, tmp_path):
    """Another descriptor takes the place, and none is opened if there is no listener."""
    monkeypatch.setattr(connections.os, 'devnull', str(tmp_path / 'null'))
    with network.create_server(('127.0.0.1', 0)) as listener:
        uri = f'tcp://127.0.0.1:{listener.getsockname()[1]}'
        copy = os.dup(listener.fileno())
        monkeypatch.setattr(server_socket, '_possible_descriptors', lambda: [copy])
        close_inherited_listeners(uris=[uri])
        with network.socket(fileno=copy) as replaced:
            assert replaced.family == network.AF_UNIX
    monkeypatch.setattr(server_socket, 'open_null', None)
    close_inherited_listeners(uris=[uri])
    monkeypatch.undo()
    with open(connections.open_null(), 'rb') as null:
        assert null.read() == b''


def test_limits(router):
    socket = router()
    Limits().apply_limits(socket, 1000)
    assert (socket.maxmsgsize, socket.linger) == (1000, 1000)
    assert (socket.rcvhwm, socket.sndhwm, socket.backlog) == (7, 8, 9)
    assert socket.handshake_ivl == 1  # milliseconds, rounded up: 0 would be no limit
    assert (socket.heartbeat_ivl, socket.tcp_keepalive) == (0, 1)
    assert (socket.tcp_keepalive_idle, socket.tcp_keepalive_cnt) == (2, 3)  # seconds, rounded up
    assert socket.tcp_keepalive_intvl == 1


@pytest.mark.parametrize('socket_type', [zmq.PUB, zmq.XPUB])
def test_size_of_subscriptions(socket_type):
    with zmq.Context() as context, context.socket(socket_type) as socket:
        Limits().apply_limits(socket, 1_000_000)
        assert socket.maxmsgsize == 4096


def test_unlimited_message_size(router):
    """libzmq counts in 63 bits: the slack above `max_message_size` does not fit in."""
    socket = router()
    Limits().apply_limits(socket, sys.maxsize + SIZE_SLACK)
    assert socket.maxmsgsize == sys.maxsize


def test_names_of_limits():
    assert all(hasattr(SocketLimits, name) for name in SOCKET_LIMITS)
    assert {'max_message_size', 'bind_timeout', 'backlog'} < set(SOCKET_LIMITS)


def test_addresses(router, tmp_path, caplog):
    sockets = ServerSockets('The service', Limits())
    path = str(tmp_path / 'socket')
    first, second = router(), router()
    uris = [
        sockets.bind(first, 'tcp://127.0.0.1:*', Access()),
        sockets.bind(first, f'ipc://{path}', Access(), path=path),
        sockets.bind(second, 'inproc://name', Access(), domain=None),
    ]
    assert sockets.uris == uris
    assert uris[1:] == [f'ipc://{path}', 'inproc://name']
    assert (first.zap_domain, second.zap_domain) == (b'pyams_zmq', b'')
    assert not caplog.records
    first.close()
    third = router()
    uris[:2] = []
    uris.append(sockets.bind(third, 'tcp://0.0.0.0:*', Access(), domain=b'workers'))
    assert sockets.uris == uris
    assert third.zap_domain == b'workers'
    assert 'The service serves the network at tcp://0.0.0.0:' in caplog.text
    sockets.release()
    assert not list(tmp_path.iterdir())


def test_file_without_a_guard(router, tmp_path, caplog):
    """It is made again; the former listener is kept while it may have connections."""
    sockets = ServerSockets('The service', Limits())
    path = tmp_path / 'socket'
    uri = sockets.bind(router(), f'ipc://{path}', Access(), path=str(path))
    with network.socket(network.AF_UNIX) as peer:
        peer.connect(str(path))
        assert peer.recv(1)  # the greeting
        for _number in range(3):
            path.unlink()
            assert sockets.restore_files()
            assert not sockets.has_lost_files
            assert sockets.uris == [uri]
            assert set(sockets.local_uris) == {uri, f'ipc://{tmp_path}//socket'}
    assert len(caplog.records) == 3
    sockets.release()
    assert not list(tmp_path.iterdir())


def test_address_in_use(router, tmp_path):
    waits = []
    sockets = ServerSockets('The service', Limits(), before_retry=lambda: waits.append(1))
    uri = sockets.bind(router(), 'tcp://127.0.0.1:*', Access())
    with pytest.raises(ZMQBindError, match='another process serves it'):
        sockets.bind(router(), uri, Access())
    assert waits
    with pytest.raises(ZMQBindError, match='its folder does not exist'):
        sockets.bind(
            router(), f'ipc://{tmp_path}/no/socket', Access(), path=f'{tmp_path}/no/socket'
        )
    assert sockets.uris == [uri]
    sockets.release()


def test_closed_on_error(router):
    with closed_on_error(router()) as socket:
        pass
    assert not socket.closed
    with pytest.raises(KeyboardInterrupt), closed_on_error(socket):
        raise KeyboardInterrupt
    assert socket.closed


# Forks


def inherited(sockets, **options):
    """Close listeners in a fork; return which of some sockets are still sockets there."""

    def run():
        close_inherited_listeners(**options)
        writer.send([stat.S_ISSOCK(os.fstat(each.fileno()).st_mode) for each in sockets])

    reader, writer = Pipe()
    with reader, writer:
        child = ForkProcess(target=run)
        child.start()
        child.join(5)
        assert child.exitcode == 0
        return reader.recv()


@pytest.fixture
def listen():
    """Return a function that makes a listener, a connection to it, and the accepted connection."""
    with ExitStack() as stack:

        def make(family, address):
            listener = stack.enter_context(network.socket(family))
            listener.bind(address)
            listener.listen()
            client = stack.enter_context(network.socket(family))
            name = listener.getsockname()
            if isinstance(name, tuple):
                name = ({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(name[0], name[0]), *name[1:])
            client.connect(name)
            accepted, _address = listener.accept()
            stack.enter_context(accepted)
            return listener, accepted, client

        yield make


@pytest.fixture(params=['127.0.0.1', '0.0.0.0', '::', 'path', 'abstract'])
def sockets(request, listen, tmp_path):
    """A listener, the accepted connection, the client, and the address of the listener."""
    host = request.param
    if host == 'path':
        uri = f'ipc://{tmp_path}/socket'
        return *listen(network.AF_UNIX, f'{tmp_path}/socket'), uri
    if host == 'abstract':
        return *listen(network.AF_UNIX, f'\0{tmp_path}'), f'ipc://@{tmp_path}'
    family = network.AF_INET6 if ':' in host else network.AF_INET
    found = listen(family, (host, 0))
    port = found[0].getsockname()[1]
    return *found, f'tcp://[{host}]:{port}' if ':' in host else f'tcp://{host}:{port}'


def test_listeners_of_some_addresses(sockets, listen):
    *sockets, uri = sockets
    others = listen(network.AF_INET, ('127.0.0.1', 0))
    assert inherited([*sockets, *others], uris=[uri]) == [False, False, True, True, True, True]
    assert inherited(sockets, uris=['tcp://127.0.0.1:1', 'ipc:///nowhere']) == [True, True, True]
    sockets[2].sendall(b'x')  # the connection is still there in this process
    assert sockets[1].recv(1) == b'x'


def test_all_listeners(sockets, listen):
    *sockets, _uri = sockets
    others = listen(network.AF_INET, ('127.0.0.1', 0))
    kept = [others[0].fileno()]
    assert inherited([*sockets, *others], kept=kept) == [False, False, True, True, True, True]
    assert inherited([*sockets, *others]) == [False, False, True, False, False, True]


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (PermissionError(errno.EPERM, ''), 'a file of another user is there'),
        (NotInGroupError(errno.EPERM, ''), 'this user is not a member of ipc_group'),
    ],
)
def test_advice_for_a_file(router, monkeypatch, tmp_path, error, text):
    """See also `test_ipc_file`, where another user binds."""

    def fail(*args):
        raise error

    monkeypatch.setattr(server_socket, 'open_listener', fail)
    sockets = ServerSockets('The service', Limits())
    with pytest.raises(ZMQBindError, match=text):
        sockets.bind(router(), f'ipc://{tmp_path}/s', Access(), path=f'{tmp_path}/s')
    sockets.release()


def test_same_port_of_udp(listen):
    listener, *_others = listen(network.AF_INET, ('127.0.0.1', 0))
    with network.socket(type=network.SOCK_DGRAM) as socket:
        socket.bind(listener.getsockname())
        assert inherited([listener, socket]) == [False, True]


def test_listener_of_a_process(listen):
    """A socket that is its attribute stays open."""
    listener, *_others = listen(network.AF_INET, ('127.0.0.1', 0))
    process = Process()
    assert process.kept_listeners() == []
    process.listener = listener
    assert process.kept_listeners() == [listener.fileno()]


def test_zone_of_an_address(listen):
    """libzmq returns the zone of a link-local address, Python does not."""
    sockets = listen(network.AF_INET6, ('::1', 0))
    port = sockets[0].getsockname()[1]
    assert inherited(sockets, uris=[f'tcp://[::1%lo]:{port}']) == [False, False, True]


def test_fork_of_a_server(router):
    sockets = ServerSockets('The service', Limits())
    uri = sockets.bind(router(), 'tcp://127.0.0.1:*', Access())
    host, port = uri.removeprefix('tcp://').split(':')
    with network.create_connection((host, int(port))) as client:
        assert client.recv(1)  # libzmq has accepted it

        def run():
            close_inherited_listeners(uris=sockets.uris)
            names = []
            for fd in map(int, os.listdir('/proc/self/fd')):
                try:
                    with network.socket(fileno=os.dup(fd)) as socket:
                        names.append(socket.getsockname())
                except OSError:
                    continue
            os._exit((host, int(port)) in names)

        child = ForkProcess(target=run)
        child.start()
        child.join(5)
        assert child.exitcode == 0
