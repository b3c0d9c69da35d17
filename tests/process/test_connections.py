# SPDX-License-Identifier: ZPL-2.1
"""What a peer can make grow is bounded; a peer that exceeds a bound is disconnected."""

import errno
import logging
import os
import resource
import socket as network
import threading
from contextlib import ExitStack, suppress
from math import inf

import pytest
import zmq
import zmq.auth

from checks import TIMEOUT, Growth, wait_until
from handlers import LoggedProcess
from pyams_zmq.auth import Access, AccessPolicy, Authenticator
from pyams_zmq.client import ZMQClient
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.process.connections import QUIET, UNUSED, USED, Connection, Listener
from pyams_zmq.process.guard import MAX_OVERHEAD, MAX_RATIO, RESERVE, ConnectionGuard
from pyams_zmq.process.server_socket import ServerSockets, SocketLimits
from pyams_zmq.wire.context import MAX_DESCRIPTORS, raise_descriptor_limit
from pyams_zmq.wire.traffic import Traffic
from raw_peer import RawPeer, frame, greeting, header, message, request

MIB = 2**20


class Guarded(LoggedProcess):
    """Has low limits."""

    max_message_size = MIB
    receive_size = 4 * MIB
    send_size = 4 * MIB
    heartbeat_interval = 1.0
    heartbeat_timeout = 1.0


QUICK = {'heartbeat_interval': 0.1, 'heartbeat_timeout': 0.1}


def make_curve(folder):
    """Return options of a server and of its client."""
    zmq.auth.create_certificates(str(folder), 'server')
    (folder / 'clients').mkdir()
    zmq.auth.create_certificates(str(folder / 'clients'), 'alice')
    server = CurveServer(folder / 'server.key_secret', folder / 'clients')
    client = CurveClient(folder / 'server.key', folder / 'clients' / 'alice.key_secret')
    return {'curve': server}, {'curve': client}


def age():
    """Wait until the connections count as idle: the guard compares times, no event tells."""
    threading.Event().wait(QUIET + 0.5)


class Crowded(Guarded):
    """Has few connections."""

    max_connections = 20


@pytest.fixture
def log(tmp_path):
    """Path of the log of a process."""
    return tmp_path / 'log'


@pytest.fixture
def is_logged(log):
    """Return a function that waits until the log has a text."""

    def wait(text):
        return wait_until(lambda: text in log.read_text())

    return wait


def push(peer, data, times):
    """Send data again and again, until the other end closes the connection."""
    rest = b''
    poller = zmq.Poller()
    poller.register(peer.socket, zmq.POLLIN | zmq.POLLOUT)
    peer.socket.setblocking(False)
    with suppress(ConnectionError):
        while times or rest:
            [(_fd, event)] = poller.poll()
            if event & zmq.POLLIN and not peer.socket.recv(65536):
                break
            if event & zmq.POLLOUT:
                if not rest:
                    rest, times = memoryview(data), times - 1
                with suppress(BlockingIOError):
                    rest = rest[peer.socket.send(rest) :]
    peer.socket.settimeout(TIMEOUT)


def test_bytes_before_the_handshake(log, start, ask, is_logged):
    """A peer without credentials sends a command that never ends."""
    process = start(log, factory=LoggedProcess, auth='user:secret')
    with ExitStack() as stack, Growth(process) as growth:
        peers = [
            stack.enter_context(RawPeer(process.bound_address, handshake=False)) for _ in range(10)
        ]

        def flood(peer):
            peer.send(greeting(b'PLAIN') + header(2_000_000, command=True))
            push(peer, bytes(65536), 28)
            peer.wait_end()

        threads = [threading.Thread(target=flood, args=(peer,)) for peer in peers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ask(process, ['echo', 1], auth='user:secret') == [200, 1]
    assert growth.peak < 64 * MIB
    is_logged('bytes came before the handshake was done')


@pytest.mark.parametrize('auth', [None, 'user:secret'])
def test_messages_that_wait(auth, log, start, tmp_path, is_logged):
    """A peer sends messages while the process works; the one that it works for stays."""
    process = start(log, factory=Guarded, **({'auth': auth} if auth else {}))
    path = tmp_path / 'wait'
    with (
        RawPeer(process.bound_address, auth=auth) as good,
        RawPeer(process.bound_address, auth=auth) as greedy,
    ):
        assert good.ask('echo', 1) == [200, 1]
        good.send(request('wait_for', str(path)))
        wait_until(path.exists)
        push(greedy, request('echo', 'x' * 100_000), 100)
        greedy.wait_end()
        path.unlink()
        assert good.read_reply() == [200, str(path)]
        assert good.ask('echo', 2) == [200, 2]
    is_logged('bytes waited to be read (receive_size)')


def test_message_that_does_not_end(log, start, ask, is_logged):
    process = start(log, factory=Guarded)
    with RawPeer(process.bound_address) as peer:
        push(peer, frame(bytes(MIB), more=True), 100)
        peer.wait_end()
        assert ask(process, ['echo', 1]) == [200, 1]
    is_logged('bytes waited to be read (receive_size)')


def test_replies_that_are_not_read(log, start, ask, is_logged):
    process = start(log, factory=Guarded)
    with RawPeer(process.bound_address, receive_buffer=4096) as peer:
        peer.send(request('big', 200_000) * 200)
        is_logged('bytes waited to be sent (send_size)')
        peer.wait_end()
        assert ask(process, ['echo', 1]) == [200, 1]


class BigReplies(Guarded):
    """Allows messages that are larger than what may wait."""

    max_message_size = 16 * MIB
    send_size = MIB


def test_reply_that_is_larger_than_the_limit(log, start):
    """The last reply does not count: a slow peer gets it."""
    process = start(log, factory=BigReplies)
    with RawPeer(process.bound_address, receive_buffer=4096) as peer:
        peer.send(request('echo', 'x' * 8 * MIB))
        with RawPeer(process.bound_address) as other:  # four checks of the connections
            for _ in range(4):
                other.ask('sleep', 0.6)
        assert len(peer.read_reply()[1]) == 8 * MIB
    assert 'closed' not in log.read_text()


@pytest.mark.parametrize('auth', [None, 'user:secret'])
@pytest.mark.parametrize(
    'rest', [b'\0', header(9), frame(b'', more=True), header(1000) + b'x', header(900) + bytes(500)]
)
def test_rest_of_a_message(rest, auth, log, start, is_logged):
    """A peer that goes on is not disturbed; one that is silent in a message has to go."""
    process = start(log, factory=Guarded, **({'auth': auth} if auth else {}))
    with (
        RawPeer(process.bound_address, auth=auth) as idle,
        RawPeer(process.bound_address, auth=auth) as used,
        RawPeer(process.bound_address, auth=auth) as half,
    ):
        assert used.ask('echo', 1) == [200, 1]
        assert half.ask('echo', 1) == [200, 1]
        half.send(rest)
        half.wait_end()
        assert idle.ask('echo', 2) == [200, 2]
        assert used.ask('echo', 3) == [200, 3]
    is_logged('a part of a message was not continued within 2 s')


def test_rest_of_a_message_while_the_process_works(log, start, tmp_path):
    """What waits to be read is no part of a message."""
    process = start(log, factory=Guarded)
    path = tmp_path / 'wait'
    with (
        RawPeer(process.bound_address) as busy,
        RawPeer(process.bound_address) as waiting,
        RawPeer(process.bound_address) as half,
    ):
        assert half.ask('echo', 1) == [200, 1]
        busy.send(request('wait_for', str(path)))
        wait_until(path.exists)
        waiting.send(request('echo', 1) + request('echo', 2))
        half.send(header(9))
        busy.socket.settimeout(5)  # twice the time after which a part has to be continued
        with suppress(TimeoutError):
            busy.socket.recv(1)
        assert not waiting.has_ended()
        path.unlink()
        assert [waiting.read_reply(), waiting.read_reply()] == [[200, 1], [200, 2]]
        half.wait_end()


def test_silent_peers_with_names(log, start):
    """What they send in their handshakes is unusual; the fourth one with the same size stays.

    Each has its own name: a ROUTER ignores a name until libzmq has removed its former connection.
    """
    process = start(log, factory=Guarded)
    for number in range(3):
        with RawPeer(process.bound_address, identity=b'name %d' % number) as peer:
            peer.wait_end()
    with RawPeer(process.bound_address, identity=b'name 3') as peer:
        assert not zmq.select([peer.socket], [], [], 4)[0]  # twice the time, as above
        assert peer.ask('echo', 1) == [200, 1]


@pytest.mark.parametrize('curve', [False, True])
def test_heartbeats_of_a_peer(curve, log, start, tmp_path):
    """They are no part of a message; the peer waits for longer than two of them."""
    options = make_curve(tmp_path) if curve else ({}, {})
    process = start(log, factory=Guarded, **options[0])
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.heartbeat_ivl = 2500
        if curve:
            options[1]['curve'].apply(socket)
        socket.connect(process.bound_address)
        for seconds in (0, 6):
            socket.send_json(['sleep', seconds])
            assert socket.poll(TIMEOUT * 1000)
            assert socket.recv_json() == [200, seconds]
        assert not socket.poll(6000)
        socket.send_json(['echo', 1])
        assert socket.poll(TIMEOUT * 1000)
    assert 'closed' not in log.read_text()


def test_short_limits(log, start):
    """The time until an acknowledgement does not count while none is due."""
    process = start(log, factory=type('Quick', (Guarded,), QUICK))
    with RawPeer(process.bound_address) as peer:
        for _ in range(10):
            assert peer.ask('sleep', 0.7) == [200, 0.7]


def test_peers_without_credentials_do_not_replace_others(log, start):
    """Neither those that drip their greetings, nor those that come again and again."""
    process = start(log, factory=Crowded, auth='user:secret')
    stop = threading.Event()

    def drip():
        peers = []
        with ExitStack() as stack:
            while not stop.wait(0.02):
                peers = [peer for peer in peers if not peer.has_ended()]
                if len(peers) < 40:
                    peer = RawPeer(process.bound_address, handshake=False)
                    peers.append(stack.enter_context(peer))
                for peer in peers:
                    with suppress(ConnectionError):
                        peer.send(b'\xff')

    with RawPeer(process.bound_address, auth='user:secret') as old:
        assert old.ask('echo', 1) == [200, 1]
        thread = threading.Thread(target=drip)
        thread.start()
        try:
            for _ in range(5):
                stop.wait(1.2)
                with ZMQClient(process.bound_address, auth='user:secret') as client:
                    assert client.call('echo', 2) == 2
            assert old.ask('echo', 3) == [200, 3]
        finally:
            stop.set()
            thread.join()


def test_peers_that_drip_messages(log, start):
    """They do not keep others out."""
    process = start(log, factory=Crowded)
    with ExitStack() as stack:
        peers = [stack.enter_context(RawPeer(process.bound_address)) for _ in range(20)]
        for peer in peers:
            peer.send(header(200))
        for _ in range(8):
            threading.Event().wait(0.5)  # a time is tested: they are never silent for `QUIET`
            for peer in peers:
                with suppress(ConnectionError):
                    peer.send(b'x')
        with ZMQClient(process.bound_address) as client:
            assert client.call('echo', 1) == 1


def test_idle_peers_make_room(log, start):
    """Also those that were used a short time ago."""
    process = start(log, factory=Crowded)
    with ExitStack() as stack:
        for _ in range(20):
            peer = stack.enter_context(RawPeer(process.bound_address))
            assert peer.ask('echo', 1) == [200, 1]
        age()
        for _ in range(5):
            peer = stack.enter_context(RawPeer(process.bound_address))
            assert peer.ask('echo', 2) == [200, 2]


def test_host_that_vanishes(log, start, is_logged):
    """Without a reply on its way the system finds it, with one the guard does."""
    process = start(log, factory=Guarded)
    with RawPeer(process.bound_address) as idle, RawPeer(process.bound_address) as caller:
        before = count_connections(process)
        assert idle.ask('echo', 1) == [200, 1]
        idle.vanish()
        caller.send(request('sleep', 0.5))
        caller.vanish()
        wait_until(lambda: count_connections(process) == before - 2)
    is_logged('the host of the peer does not answer')


def count_connections(process):
    """Return the number of sockets that a process has open."""
    folder = f'/proc/{process.pid}/fd'
    names = []
    for fd in os.listdir(folder):
        with suppress(FileNotFoundError):
            names.append(os.readlink(f'{folder}/{fd}'))
    return sum(name.startswith('socket:') for name in names)


def test_too_many_connections(log, start, ask, is_logged):
    """Connections that were never used go first."""
    process = start(log, factory=Crowded)
    with ExitStack() as stack:
        used = [stack.enter_context(RawPeer(process.bound_address)) for _ in range(5)]
        for peer in used:
            assert peer.ask('echo', 1) == [200, 1]
        idle = [stack.enter_context(RawPeer(process.bound_address)) for _ in range(10)]
        age()
        more = [
            stack.enter_context(RawPeer(process.bound_address, handshake=False)) for _ in range(40)
        ]
        wait_until(lambda: sum(peer.has_ended() for peer in idle + more) >= 35)
        age()
        assert ask(process, ['echo', 1]) == [200, 1]
        for peer in used:
            assert peer.ask('echo', 2) == [200, 2]
    is_logged('there were too many connections (max_connections)')


def test_too_many_connections_while_the_process_works(log, start, tmp_path):
    """The callers that wait keep their connections."""
    process = start(log, factory=Crowded)
    path = tmp_path / 'wait'
    with ExitStack() as stack:
        callers = [stack.enter_context(RawPeer(process.bound_address)) for _ in range(8)]
        for peer in callers:
            assert peer.ask('echo', 1) == [200, 1]
        for peer in callers:
            peer.send(request('wait_for', str(path)))
        wait_until(path.exists)
        for _ in range(3):
            age()
            crowd = [
                stack.enter_context(RawPeer(process.bound_address, handshake=False))
                for _ in range(30)
            ]
            wait_until(lambda crowd=crowd: sum(peer.has_ended() for peer in crowd) >= 10)
        while not all(peer.socket in readable(callers) for peer in callers):
            with suppress(FileNotFoundError):
                path.unlink()
        assert [peer.read_reply() for peer in callers] == [[200, str(path)]] * 8


def readable(peers):
    """Return the sockets that have data."""
    poller = zmq.Poller()
    for peer in peers:
        poller.register(peer.socket, zmq.POLLIN)
    ready = {fd for fd, _event in poller.poll(10)}
    return [peer.socket for peer in peers if peer.socket.fileno() in ready]


class FewDescriptors(LoggedProcess):
    """May have 1024 open files, as a system can demand."""

    handshake_timeout = 60.0

    def setup(self):
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        super().setup()


@pytest.mark.parametrize('protocol', ['tcp', 'ipc'])
def test_descriptors(protocol, log, start, ask, tmp_path):
    """Silent connections do not take the last descriptor, at which libzmq aborts for ipc."""
    address = '127.0.0.1' if protocol == 'tcp' else f'ipc://{tmp_path}/socket'
    process = start(log, bind_addr=address, factory=FewDescriptors)
    family = network.AF_INET if protocol == 'tcp' else network.AF_UNIX
    host, _, port = process.bound_address.removeprefix('tcp://').rpartition(':')
    target = (host, int(port)) if protocol == 'tcp' else f'{tmp_path}/socket'
    with ZMQClient(process.bound_address, timeout=TIMEOUT) as client:
        assert client.call('echo', 1) == 1
        for _ in range(4):
            with ExitStack() as stack:
                for _ in range(700):
                    peer = stack.enter_context(network.socket(family))
                    peer.setblocking(False)
                    peer.connect_ex(target)
                assert client.call('echo', 2) == 2
        assert client.call('pid', 1) == process.pid


def test_curve(log, start, tmp_path):
    """The bytes of encrypted messages are counted too: peers that are used and idle stay."""
    server, client_options = make_curve(tmp_path)
    process = start(log, factory=Guarded, **server)
    with ZMQClient(process.bound_address, timeout=TIMEOUT, **client_options) as client:
        for size in (1, 300, 100_000):
            assert client.call('echo', 'x' * size) == 'x' * size
        connected = count_connections(process)
        threading.Event().wait(4)  # twice the time after which a part of a message has to go
        assert count_connections(process) == connected
        assert client.call('echo', 1) == 1
    assert 'closed' not in log.read_text()


# In one process


@pytest.fixture
def guard():
    """A guard without a thread."""
    guard = ConnectionGuard('The service', SocketLimits())
    yield guard
    guard.close()


@pytest.fixture
def router():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        yield socket


def test_two_addresses(guard, router):
    """The connections of both are bounded."""
    sockets = ServerSockets('The service', SocketLimits(), guard)
    uris = [sockets.bind(router, 'tcp://127.0.0.1:*', Access()) for _ in range(2)]
    [listener] = guard.listeners
    peers = []
    for number, uri in enumerate(uris, 1):
        peers.append(RawPeer(uri, handshake=False))
        wait_until(lambda number=number: guard.step() or len(listener.connections) == number)
    assert len(list(guard._inspect(listener))) == 2
    for peer in peers:
        with peer:
            pass
    router.close()
    wait_until(lambda: guard.step() or not guard.listeners)


@pytest.mark.parametrize('is_reset', [False, True])
def test_end_of_a_connection(guard, router, is_reset):
    """It is noticed at the next step, without a check of all connections."""
    uri = ServerSockets('The service', SocketLimits(), guard).bind(
        router, 'tcp://127.0.0.1:*', Access()
    )
    [listener] = guard.listeners
    peer = RawPeer(uri, handshake=False)
    wait_until(lambda: guard.step() or listener.connections)
    [connection] = listener.connections.values()
    guard._tick = inf
    assert (connection.is_ended, listener.ends) == (False, 0)
    with peer:
        if is_reset:
            peer.reset()
    wait_until(lambda: guard.step() or connection.is_ended)
    assert not listener.connections
    assert listener.ends == 1
    router.close()
    wait_until(lambda: guard.step() or not guard.listeners)


def test_error_while_binding(guard, router):
    with pytest.raises(LookupError), guard.watch(router, Access()):
        raise LookupError
    assert not guard.listeners
    guard.step()
    assert guard.timeout is None


def test_memory_without_proc(guard):
    os.close(guard._statm)
    guard._statm = -1
    assert guard._read_memory() >= MIB


def test_traffic_of_other_sockets():
    left, right = network.socketpair()
    with left, right:
        assert Traffic.read(left) is None


def test_message_without_a_connection(router):
    """inproc has no descriptor."""
    listener = Listener('tcp://127.0.0.1:9', None, Access())
    dealer = router.context.socket(zmq.DEALER)
    dealer.linger = 0
    router.bind('inproc://here')
    dealer.connect('inproc://here')
    dealer.send(b'text')
    frames = router.recv_multipart(copy=False)
    assert listener.count_received(frames[1], 6) is None
    dealer.close()


def test_faults():
    """Of a silent peer: heartbeats are none, nor is an unusual handshake that comes again."""
    listener = Listener('tcp://127.0.0.1:9', None, Access())
    peer = Connection(0.0)
    peer.handshake = 104
    assert listener.is_fault(peer, 10, 1.0)
    assert listener.is_fault(peer, 9 * 200, 1.0)  # more than 1 KiB
    assert not listener.is_fault(peer, 18, 1.0)
    assert peer.handshake == 122
    for number in range(3):
        assert listener.is_fault(Connection(10.0 * number + 1), 119, 10.0 * number + 2)
    stranger = Connection(40.0)
    assert not listener.is_fault(stranger, 119, 50.0)
    assert stranger.handshake == 119
    for size in range(200, 300):
        assert listener.is_fault(Connection(60.0), size, 70.0)
    assert listener.is_fault(Connection(80.0), 119, 90.0)  # forgotten


def test_ranks_of_ipc():
    """Peers that wait are never closed; idle ones after those that were never used."""
    listener = Listener('ipc:///tmp/socket', None, Access())
    waiting, used, unused = Connection(0.0), Connection(0.0), Connection(1.0)
    waiting.received = used.received = 10
    waiting.owed = 1
    assert listener.rank(waiting, None, 9.0) is None
    assert listener.rank(unused, None, 9.0) < listener.rank(used, None, 9.0)
    assert listener.rank(Connection(9.0), None, 9.0) > listener.rank(used, None, 9.0)


def test_ranks_of_a_device():
    """A device does not count messages: whoever has sent something and got nothing waits."""
    listener = Listener('tcp://127.0.0.1:9', None, Access())
    peer = Connection(0.0)
    usual = max(listener._usual_handshakes())
    idle = Traffic(usual, 1000, 9.0, 9.0, 1000, False)
    assert listener.rank(peer, idle, 9.0) == (UNUSED, -9.0)
    assert listener.rank(peer, idle._replace(since_sent=QUIET / 2), 9.0) is None
    assert listener.rank(peer, idle._replace(received=usual + 10, since_received=8.0), 9.0) is None
    peer.received = 10
    assert listener.rank(peer, idle, 9.0) == (USED, -9.0)


def test_ranks_of_a_service():
    """A peer with a message that was not read yet is never closed."""
    listener = Listener('tcp://127.0.0.1:9', None, Access())
    listener.counts = True
    peer = Connection(0.0)
    peer.handshake = usual = max(listener._usual_handshakes())
    unread = Traffic(usual + 50, 1000, 9.0, 9.0, 1000, False)
    assert listener.rank(peer, unread, 9.0) is None
    listener.drained = 20.0  # what it has sent is a part of a message
    assert listener.rank(peer, unread, 21.0) == (UNUSED, 0.0)


def test_connection_that_is_not_known(router):
    """It was accepted a moment ago."""
    listener = Listener('tcp://127.0.0.1:9', None, Access())
    router.bind('tcp://127.0.0.1:*')
    with router.context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(router.last_endpoint)
        dealer.send(b'text')
        frames = router.recv_multipart(copy=False)
    assert listener.count_received(frames[1], 6) is None


def test_number_of_descriptors_without_proc(guard, monkeypatch):
    """Half of the reserve counts as used."""

    def fail(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

    monkeypatch.setattr(os, 'listdir', fail)
    assert guard._count_excess() == RESERVE // 2 - guard._usable_descriptors()


def test_measure():
    listener = Listener('tcp://127.0.0.1:9', None, Access())
    frames = (b'', b'x' * 255, b'x' * 256)
    assert listener.measure(frames) == len(message(*frames))
    listener = Listener('tcp://127.0.0.1:9', None, AccessPolicy({}, (), {'key'}))
    assert listener.measure([b'x' * 222]) == 2 + 33 + 222
    assert listener.measure([b'x' * 223]) == 9 + 33 + 223


@pytest.fixture
def _limits():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures('_limits')
def test_limit_on_open_files():
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    raise_descriptor_limit()
    expected = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (expected, hard)
    raise_descriptor_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (expected, hard)


def test_room_for_all(guard, router):
    """Connections that have ended do not count."""
    uri = ServerSockets('The service', SocketLimits(), guard).bind(
        router, 'tcp://127.0.0.1:*', Access()
    )
    [listener] = guard.listeners
    with RawPeer(uri, handshake=False):
        wait_until(lambda: guard.step() or listener.connections)
        guard._make_room(listener, 0.0)
        [connection] = listener.connections.values()
        assert not connection.is_ended
    router.close()
    wait_until(lambda: guard.step() or not guard.listeners)


def test_memory_that_other_sockets_take(guard, router, monkeypatch):
    """A connection of which few bytes wait is not the reason."""
    uri = ServerSockets('The service', SocketLimits(), guard).bind(
        router, 'tcp://127.0.0.1:*', Access()
    )
    [listener] = guard.listeners
    with RawPeer(uri, handshake=False):
        wait_until(lambda: guard.step() or listener.connections)
        [connection] = listener.connections.values()
        monkeypatch.setattr(
            guard._received_memory, 'measure_overhead', lambda memory, waiting: MAX_OVERHEAD + 1
        )
        connection.unread = MAX_OVERHEAD // MAX_RATIO - 1
        guard._check_overhead(0)
        assert not connection.is_ended
        connection.unread *= 2
        guard._check_overhead(0)
        assert connection.is_ended
    router.close()
    wait_until(lambda: guard.step() or not guard.listeners)


def test_guard_of_an_authenticator_that_does_not_run(guard):
    with zmq.Context() as context:
        authenticator = Authenticator(context, Access(), guard=guard)
        guard.wake()
        assert not authenticator.is_alive()


def test_error_of_the_guard(guard, caplog, monkeypatch):
    """Access control goes on, and the error is in the log."""

    def fail():
        raise OSError(24, 'Too many open files')

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        access = Access()
        authenticator = Authenticator(context, access, guard=guard)
        authenticator.start()
        uri = ServerSockets('The service', SocketLimits(), guard).bind(
            router, 'tcp://127.0.0.1:*', access
        )
        monkeypatch.setattr(guard, 'step', fail)
        with RawPeer(uri) as peer:
            peer.send(request('echo'))
            assert router.poll(TIMEOUT * 1000)
        authenticator.stop()
        guard.close()
    assert 'Connections are not checked' in caplog.text
    assert caplog.records[0].levelno == logging.ERROR
