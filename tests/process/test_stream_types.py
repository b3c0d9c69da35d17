# SPDX-License-Identifier: ZPL-2.1
"""`ZMQProcess.stream` with each type of socket, bound and connected."""

import time

import pytest
import zmq
from pyramid.registry import Registry

from checks import TIMEOUT
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.process import ZMQProcess

PEERS = {
    zmq.REQ: zmq.REP,
    zmq.REP: zmq.REQ,
    zmq.PUB: zmq.SUB,
    zmq.SUB: zmq.PUB,
    zmq.XPUB: zmq.SUB,
    zmq.XSUB: zmq.PUB,
    zmq.PUSH: zmq.PULL,
    zmq.PULL: zmq.PUSH,
    zmq.DEALER: zmq.DEALER,
    zmq.ROUTER: zmq.DEALER,
    zmq.PAIR: zmq.PAIR,
}
REPLIERS = (zmq.REP, zmq.ROUTER)
RECEIVERS = (*REPLIERS, zmq.SUB, zmq.XSUB, zmq.PULL)
SEND_ONLY = (zmq.PUB, zmq.XPUB, zmq.PUSH)


class StreamHandler:
    """Uses the other stream of its process."""

    def port(self, args):
        return [200, self.process.port]

    def send(self, text):
        self.process.other.send(text.encode())
        return [200, None]

    def received(self, args):
        return [200, self.process.received]


class StreamMessageHandler(ZMQMessageHandler):
    """Serves StreamHandler."""

    handler = StreamHandler


class StreamProcess(ZMQProcess):
    """Has another stream.

    :param other: the first arguments of `stream`
    """

    def __init__(self, *other, **kwargs):
        super().__init__('127.0.0.1', StreamMessageHandler, registry=Registry(), **kwargs)
        self.kind, *_rest = self.arguments = other
        self.received = []

    def setup(self):
        super().setup()
        self.other, self.port = self.stream(*self.arguments)
        if self.kind not in (zmq.PUB, zmq.PUSH):
            self.other.on_recv(self.handle)
        if self.kind == zmq.XSUB:
            self.other.send(b'\1')  # a subscription to everything

    def handle(self, frames):
        self.received.append(frames[-1].decode())
        if self.kind in REPLIERS:
            self.other.send_multipart([*frames[:-1], b'answer'])


@pytest.fixture
def peer():
    """Make sockets of another program."""
    sockets = []
    with zmq.Context() as context:

        def make(kind):
            sockets.append(socket := context.socket(kind))
            socket.linger = 0
            if kind == zmq.SUB:
                socket.subscribe(b'')
            return socket

        yield make
        for socket in sockets:
            socket.close()


def repeat(send, is_done):
    """Send until a condition is met: what is published before the subscription is lost."""
    deadline = time.monotonic() + TIMEOUT
    send()
    while not is_done():
        assert time.monotonic() < deadline, f'not within {TIMEOUT} s'
        send()


def check_exchange(kind, other, ask, process):
    """Send a message in each direction in which the type of the socket allows it."""

    def ask_process(name, args=None):
        status, result = ask(process, [name, args])
        assert status == 200
        return result

    def has_received():
        return 'question' in ask_process('received')

    if kind in RECEIVERS:
        if PEERS[kind] == zmq.PUB:
            repeat(lambda: other.send(b'question'), has_received)
        else:
            other.send(b'question')
            repeat(lambda: None, has_received)
        if kind in REPLIERS:
            assert other.poll(TIMEOUT * 1000)
            assert other.recv() == b'answer'
        return
    if PEERS[kind] == zmq.SUB:
        repeat(lambda: ask_process('send', 'hello'), lambda: other.poll(10))
    else:
        ask_process('send', 'hello')
    assert other.poll(TIMEOUT * 1000)
    assert other.recv() == b'hello'
    if kind not in SEND_ONLY:
        other.send(b'question')
        repeat(lambda: None, has_received)


@pytest.mark.parametrize('is_bound', [True, False], ids=['bound', 'connected'])
@pytest.mark.parametrize('kind', PEERS, ids=lambda kind: kind.name)
def test_type(kind, is_bound, peer, start, ask):
    other = peer(PEERS[kind])
    if is_bound:
        process = start(kind, '127.0.0.1', True, factory=StreamProcess)
        other.connect(f'tcp://127.0.0.1:{ask(process, ["port", None])[1]}')
    else:
        port = other.bind_to_random_port('tcp://127.0.0.1')
        process = start(kind, ('127.0.0.1', port), False, factory=StreamProcess)
    check_exchange(kind, other, ask, process)


@pytest.mark.parametrize('kind', [zmq.REQ, zmq.PAIR], ids=lambda kind: kind.name)
def test_users(kind, peer, start, ask):
    """The users of a bound REQ socket have to present their credentials, too."""
    auth = {'auth': 'me:secret'}
    process = start(kind, '127.0.0.1', True, factory=StreamProcess, **auth)
    port = ask(process, ['port', None], **auth)[1]
    stranger, other = peer(PEERS[kind]), peer(PEERS[kind])
    stranger.connect(f'tcp://127.0.0.1:{port}')
    other.plain_username, other.plain_password = b'me', b'secret'
    other.connect(f'tcp://127.0.0.1:{port}')
    check_exchange(kind, other, lambda *args: ask(*args, **auth), process)
    assert not stranger.poll(0)


def test_keys(peer, start, ask):
    server_public, server_secret = zmq.curve_keypair()
    public, secret = zmq.curve_keypair()
    curve = CurveServer(server_secret.decode(), [public.decode()])
    process = start(zmq.REQ, '127.0.0.1', True, factory=StreamProcess, curve=curve)
    client = {'curve': CurveClient(server_public.decode(), secret.decode())}
    other = peer(zmq.REP)
    client['curve'].apply(other)
    other.connect(f'tcp://127.0.0.1:{ask(process, ["port", None], **client)[1]}')
    check_exchange(zmq.REQ, other, lambda *args: ask(*args, **client), process)


def test_requests_wait_for_the_reply(peer, start, ask):
    """A REQ stream sends them one after another, and handles each reply."""
    process = start(zmq.REQ, '127.0.0.1', True, factory=StreamProcess)
    for number in range(3):
        assert ask(process, ['send', f'request {number}']) == [200, None]
    other = peer(zmq.REP)
    other.connect(f'tcp://127.0.0.1:{ask(process, ["port", None])[1]}')
    for number in range(3):
        assert other.poll(TIMEOUT * 1000)
        assert other.recv() == b'request %d' % number
        assert not other.poll(10)  # milliseconds, for what must not come
        other.send(b'reply %d' % number)
    replies = [f'reply {number}' for number in range(3)]
    repeat(lambda: None, lambda: ask(process, ['received', None]) == [200, replies])
