# SPDX-License-Identifier: ZPL-2.1
"""What a peer can make a device keep is bounded."""

import socket as network
from contextlib import suppress

import pytest
import zmq

from checks import wait_until
from devices import LOCAL, check_forwarding, make_device
from pyams_zmq.device import FORWARDER, ProcessDevice, ProcessProxy, ThreadDevice
from raw_peer import RawPeer, frame

TOPIC = b'a' * 2**20


def check_refusal(raw_peer, data):
    """Check that a peer that sends this is disconnected."""
    with suppress(ConnectionError):
        raw_peer.send(data)
    raw_peer.wait_end()


SUBSCRIPTIONS = {0: frame(b'\1' + TOPIC), 1: frame(b'\x09SUBSCRIBE' + TOPIC, command=True)}
"""By the minor version of ZMTP: a message, or a command"""


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('minor', [0, 1])
def test_long_topic(peer, native, minor):
    """Formerly the end of such a subscriber, or of the device, was a SIGSEGV."""
    with make_device(ProcessDevice, FORWARDER, native=native) as device:
        with RawPeer(device.out_address, kind=b'SUB', minor=minor) as subscriber:
            check_refusal(subscriber, SUBSCRIPTIONS[minor])
        check_forwarding(device, peer)


@pytest.mark.parametrize('minor', [0, 1])
def test_long_topic_of_a_peer_to_connect_to(peer, minor):
    with network.create_server(('127.0.0.1', 0)) as server:
        server.settimeout(10)
        device = make_device(ProcessDevice, FORWARDER)
        device.connect_out(f'{LOCAL}:{server.getsockname()[1]}')
        with device:
            with RawPeer(None, sock=server.accept()[0], kind=b'SUB', minor=minor) as subscriber:
                check_refusal(subscriber, SUBSCRIPTIONS[minor])
            check_forwarding(device, peer)


def test_long_topic_of_a_monitor(peer):
    with make_device(ProcessProxy, zmq.ROUTER, zmq.DEALER, bind=('in', 'out', 'mon')) as device:
        with RawPeer(device.mon_address, kind=b'SUB') as monitor:
            check_refusal(monitor, frame(b'\1' + TOPIC))
        worker = peer(zmq.REP, device.out_address)
        client = peer(zmq.REQ, device.in_address)
        client.send(b'question')
        assert worker.recv() == b'question'


def test_subscription_from_a_socket_of_another_type(peer):
    """An XSUB socket takes a message that begins with 1 for a subscription."""
    device = make_device(ProcessDevice, in_type=zmq.PULL, out_type=zmq.XSUB)
    with device, RawPeer(device.in_address, kind=b'PUSH') as source:
        check_refusal(source, frame(b'\1' + TOPIC))
        peer(zmq.PUSH, device.in_address).send(b'\1a')
        publisher = peer(zmq.XPUB, device.out_address)
        assert publisher.recv() == b'\1a'


@pytest.mark.parametrize('size', [4096, 10_000])
def test_longest_topic(peer, size):
    device = make_device(ThreadDevice, FORWARDER)
    device.max_subscription_size = size
    with device, RawPeer(device.out_address, kind=b'SUB') as subscriber:
        topic = b'a' * (size - 1)
        subscriber.send(frame(b'\1' + topic))
        wait_until(lambda: device.statistics().out_to_in.bytes == size)
        publisher = peer(zmq.PUB, device.in_address)
        publisher.sndtimeo = 0
        subscriber.socket.settimeout(0.02)

        def has_arrived():
            publisher.send(topic)
            return subscriber.socket.recv(1)

        wait_until(lambda: _ignore_timeout(has_arrived))
        subscriber.socket.settimeout(10)
        check_refusal(subscriber, frame(b'\1' + topic + b'a'))


def _ignore_timeout(function):
    try:
        return function()
    except TimeoutError:
        return None
