# SPDX-License-Identifier: ZPL-2.1
"""Peers that do not use ZMTP (RFC 23), or stop using it, while good clients are served."""

import random
import socket
import struct
import time
from contextlib import ExitStack

import pytest
import zmq

from checks import wait_until
from messages import Dealer, call
from pyams_zmq.wire.endpoint import port_of


def greeting(mechanism=b'NULL', version=b'\x03\x00', as_server=b'\0'):
    return (
        b'\xff'
        + b'\0' * 8
        + b'\x7f'
        + version
        + mechanism.ljust(20, b'\0')
        + as_server
        + b'\0' * 31
    )


def command(body):
    return bytes([4, len(body)]) + body


def frame(body, more=False):
    return bytes([more, len(body)]) + body


def metadata(name, value):
    return bytes([len(name)]) + name + struct.pack('>I', len(value)) + value


READY = command(b'\x05READY' + metadata(b'Socket-Type', b'DEALER') + metadata(b'Identity', b''))
NOISE = random.Random(20).randbytes(100_000)

# Refused at once: the peer reads the end of the stream.
GARBAGE = {
    'one byte': b'\0',
    'blanks': b' ' * 1000,
    'NULs': b'\0' * 1000,
    'HTTP': b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n',
    'TLS': bytes.fromhex('16030100') + NOISE[:200],
    'JSON': b'["echo",1]',
    'noise': b'\x01' + NOISE,
    'ZMTP 1.0': b'\x01\x00',
    'ZMTP 1.0 and a message': b'\x01\x00\x01\x01\x0b\x00["echo",1]',
    'ZMTP 2.0': b'\xff' + b'\0' * 7 + b'\x01\x7f\x01\x05\x00\x00',
    'another signature': b'\xff' + b'\0' * 8 + b'\x00' + NOISE[:100],
    'no such mechanism': greeting(b'NONE'),
    'a mechanism of noise': greeting(NOISE[:20]),
    'PLAIN, which is not offered': greeting(b'PLAIN'),
    'greeting and noise': greeting() + b'\xff' + NOISE,
    'greeting and HTTP': greeting() + b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n',
    'greeting and a message': greeting() + frame(b'', more=True) + frame(b'["echo",1]'),
    'greeting and no such command': greeting() + command(b'\x05HELLO\x00\x00'),
    'greeting and an empty command': greeting() + command(b''),
    'READY cut short': greeting() + command(b'\x05READY\x0bSocket'),
    'READY of no such socket': greeting()
    + command(b'\x05READY' + metadata(b'Socket-Type', b'NONE')),
    'READY of a socket that does not match': greeting()
    + command(b'\x05READY' + metadata(b'Socket-Type', b'PUB')),
    'READY of a giant': greeting()
    + command(b'\x05READY' + metadata(b'Socket-Type', b'DEALER')[:-6] + b'\x7f' * 10),
}

# The same, after a good handshake.
AFTER_HANDSHAKE = {
    'noise': b'\xff' * 10 + NOISE,
    'a giant frame': b'\x02' + b'\x7f' + b'\xff' * 7,
    'a frame of -1': b'\x02' + b'\xff' * 8,
    'a frame larger than the limit': b'\x02' + struct.pack('>Q', 2**25 + 1),
    'a giant command': b'\x06' + b'\x7f' + b'\xff' * 7,
}

# Harmless after a good handshake: the next message on the connection gets a reply.
IGNORED = {
    'a second READY': READY,
    'an unknown command': command(b'\x04NONE'),
    'a PONG that nobody asked for': command(b'\x04PONG'),
    'reserved flags': b'\xf8\x01x',
    'a message with no delimiter': frame(b'x'),
    'an empty frame': frame(b''),
}

# Valid so far: libzmq waits for the rest of the handshake, for 30 s by default.
SILENT = {
    'nothing': b'',
    'half a signature': greeting()[:5],
    'half a greeting': greeting()[:40],
    'a greeting': greeting(),
}


def connect(process):
    peer = socket.create_connection(('127.0.0.1', port_of(process.bound_address)))
    peer.settimeout(10)
    return peer


def shake_hands(peer):
    peer.sendall(greeting() + READY)
    received = b''
    while b'READY' not in received:
        received += peer.recv(1000)


def send(peer, data):
    try:
        peer.sendall(data)
    except OSError:  # the peer has closed the connection
        return


def hung_up(peer):
    """Return True if the other side ends the connection."""
    try:
        while peer.recv(65_536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.fixture
def process(start):
    """The process that gets the garbage."""
    return start()


@pytest.fixture
def good(process):
    """Return a check that an old and a new good client are served."""
    with zmq.Context() as context:
        kept = Dealer(context, process.bound_address)

        def check():
            new = Dealer(context, process.bound_address)
            for dealer in (kept, new):
                assert dealer.ask(call('echo')) == [([b''], [200, None])]
            new.socket.close(0)

        yield check
        kept.socket.close(0)


@pytest.fixture
def fds(ask, process):
    """Return a function that counts the descriptors of the process."""

    def count():
        status, number = ask(process, ['fds', None])
        assert status == 200
        return number

    return count


def settled(count):
    """Wait until the number of descriptors is stable, and return it."""
    numbers = [count()]
    while len(numbers) < 3 or len(set(numbers[-3:])) > 1:
        time.sleep(0.02)  # no event is sent
        numbers.append(count())
    return numbers[-1]


@pytest.mark.parametrize('data', GARBAGE.values(), ids=GARBAGE)
def test_garbage(process, good, data):
    with connect(process) as peer:
        send(peer, data)
        assert hung_up(peer)
    good()


@pytest.mark.parametrize('data', AFTER_HANDSHAKE.values(), ids=AFTER_HANDSHAKE)
def test_garbage_after_the_handshake(process, good, data):
    with connect(process) as peer:
        shake_hands(peer)
        send(peer, data)
        assert hung_up(peer)
    good()


@pytest.mark.parametrize('data', [b'', *IGNORED.values()], ids=['nothing', *IGNORED])
def test_ignored(process, data):
    with connect(process) as peer:
        shake_hands(peer)
        send(peer, data + frame(b'', more=True) + frame(b'["echo",1]'))
        reply = frame(b'', more=True) + frame(b'[200,1]')
        received = b''
        while not received.endswith(reply):
            received += peer.recv(1000)


def test_garbage_byte_by_byte(process, good):
    with connect(process) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in greeting() + b'\xff' * 20:
            send(peer, bytes([byte]))
        assert hung_up(peer)
    good()


def test_many_peers_that_send_garbage(process, good, fds):
    """Ten of each kind; none leaves a descriptor."""
    good()
    before = settled(fds)
    with ExitStack() as stack:
        peers = []
        for number in range(10):
            for data in GARBAGE.values():
                peers.append(stack.enter_context(connect(process)))
                send(peers[-1], data)
            for data in AFTER_HANDSHAKE.values():
                peers.append(stack.enter_context(connect(process)))
                shake_hands(peers[-1])
                send(peers[-1], data)
            if number % 3 == 0:
                good()
        wait_until(lambda: fds() <= before)  # although no client closes its connection
        assert all(map(hung_up, peers))
    good()
    wait_until(lambda: fds() <= before)


def test_silent_peers(process, good, fds):
    """Each holds a descriptor while it is connected; others are served."""
    good()
    before = settled(fds)
    with ExitStack() as stack:
        for _ in range(25):
            for data in SILENT.values():
                send(stack.enter_context(connect(process)), data)
            good()
        wait_until(lambda: fds() == before + 25 * len(SILENT))
    wait_until(lambda: fds() <= before)
    good()


def test_peers_that_disconnect_early(process, good, fds):
    """At any byte of a valid conversation."""
    good()
    before = settled(fds)
    conversation = frame(b'hop', more=True) + frame(b'', more=True) + frame(b'["echo",1]')
    for length in range(len(greeting() + READY)):
        with connect(process) as peer:
            send(peer, (greeting() + READY)[:length])
    for length in range(len(conversation)):
        with connect(process) as peer:
            shake_hands(peer)
            send(peer, conversation[:length])
            if length % 5 == 0:
                good()
    wait_until(lambda: fds() <= before)
    good()
