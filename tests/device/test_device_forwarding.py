# SPDX-License-Identifier: ZPL-2.1
"""Devices forward between sockets of all types."""

import socket as tcp
import time
from contextlib import suppress

import pytest
import zmq

from checks import wait_until
from devices import ALL, NOT_SUPPORTED, check_forwarding, make_device
from pyams_zmq.device import FORWARDER, QUEUE, STREAMER, ThreadDevice, proxy
from pyams_zmq.device.proxy import Traffic


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('factory', ALL)
def test_queue(peer, factory, native):
    with make_device(factory, native=native) as device:
        worker = peer(zmq.REP, device.out_address)
        client = peer(zmq.REQ, device.in_address)
        client.send_multipart([b'a', b'bb'])
        assert worker.recv_multipart() == [b'a', b'bb']
        worker.send(b'ccc')
        assert client.recv() == b'ccc'
        statistics = device.statistics()
        assert statistics.in_to_out == Traffic(4, 3 + 5, None if native else 1)  # identity, empty
        assert statistics.out_to_in == Traffic(3, 3 + 5, None if native else 1)
        assert (statistics.unroutable, statistics.unmonitored) == (0, 0)
    assert device.done
    assert device.statistics() == statistics


@pytest.mark.parametrize('native', [True, False])
def test_forwarder(peer, native):
    with make_device(ThreadDevice, FORWARDER, native=native) as device:
        check_forwarding(device, peer)
        assert device.statistics().out_to_in.frames == 1  # the subscription


@pytest.mark.parametrize('native', [True, False])
def test_streamer(peer, native):
    with make_device(ThreadDevice, STREAMER, native=native) as device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        for number in range(1000):
            source.send(b'%d' % number)
        assert [int(sink.recv()) for _ in range(1000)] == list(range(1000))
        assert device.statistics().in_to_out.frames == 1000


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize(
    ('types', 'peers'),
    [
        ((zmq.PULL, zmq.PUB), (zmq.PUSH, zmq.SUB)),
        ((zmq.PULL, zmq.DEALER), (zmq.PUSH, zmq.DEALER)),
        ((zmq.SUB, zmq.PUB), (zmq.PUB, zmq.SUB)),
        ((zmq.SUB, zmq.PUSH), (zmq.PUB, zmq.PULL)),
        ((zmq.PAIR, zmq.PAIR), (zmq.PAIR, zmq.PAIR)),
        ((zmq.PAIR, zmq.XPUB), (zmq.PAIR, zmq.SUB)),
        ((zmq.DEALER, zmq.DEALER), (zmq.DEALER, zmq.DEALER)),
        ((zmq.DEALER, zmq.PUSH), (zmq.DEALER, zmq.PULL)),
        ((zmq.REP, zmq.REQ), (zmq.REQ, zmq.REP)),
        ((zmq.ROUTER, zmq.PUSH), (zmq.DEALER, zmq.PULL)),
    ],
    ids=lambda types: '-'.join(zmq.SocketType(kind).name for kind in types),
)
def test_pairs(peer, types, peers, native):
    device = make_device(ThreadDevice, QUEUE, *types, native=native)
    if types[0] == zmq.SUB:
        device.setsockopt_in(zmq.SUBSCRIBE, '')
    with device:
        sink, source = peer(peers[1], device.out_address), peer(peers[0], device.in_address)

        def has_arrived():
            with suppress(zmq.ZMQError):  # a REQ socket waits for the reply to its first one
                source.send_multipart([b'a', b'bb'])
            return sink.poll(20)

        wait_until(has_arrived)
        assert sink.recv_multipart()[-2:] == [b'a', b'bb']
        if zmq.REQ in types:
            sink.send(b'ccc')
            assert source.recv() == b'ccc'
            statistics = device.statistics()
            assert statistics.in_to_out.bytes == statistics.out_to_in.bytes == 3


def test_lockstep_of_req_and_rep(peer):
    """The second client waits until the first one has its reply."""
    with make_device(ThreadDevice, QUEUE, zmq.REP, zmq.REQ) as device:
        worker = peer(zmq.REP, device.out_address)
        clients = [peer(zmq.REQ, device.in_address) for _ in range(3)]
        for client in clients:
            client.send(b'question')
        for _ in clients:
            worker.recv()
            assert not worker.poll(20)
            worker.send(b'answer')
        assert [client.recv() for client in clients] == [b'answer'] * 3


def test_lockstep_of_req_alone(peer):
    """The second message waits for the reply to the first one, which is dropped."""
    with make_device(ThreadDevice, QUEUE, zmq.PULL, zmq.REQ) as device:
        worker, source = peer(zmq.REP, device.out_address), peer(zmq.PUSH, device.in_address)
        for number in (b'1', b'2', b'3'):
            source.send(number)
        for number in (b'1', b'2', b'3'):
            assert worker.recv() == number
            worker.send(b'done')
        wait_until(lambda: device.statistics().unroutable == 3)
        assert device.statistics().in_to_out.messages == 3


@pytest.mark.parametrize('native', [True, False])
def test_message_that_the_other_socket_cannot_send(peer, native):
    """It is dropped; the device goes on, and its loop does not use a whole processor."""
    with make_device(ThreadDevice, QUEUE, zmq.PULL, zmq.DEALER, native=native) as device:
        sink, source = peer(zmq.DEALER, device.out_address), peer(zmq.PUSH, device.in_address)
        for _ in range(3):
            sink.send(b'back')
        wait_until(lambda: device.statistics().unroutable == 3)
        cpu = time.process_time()
        assert not sink.poll(300)
        assert time.process_time() - cpu < 0.2
        source.send(b'x')
        assert sink.recv() == b'x'


def test_subscription_that_the_other_socket_cannot_send(peer):
    options = [('in', zmq.SUBSCRIBE, b'')]
    with make_device(ThreadDevice, QUEUE, zmq.SUB, zmq.XPUB, options=options) as device:
        subscriber, publisher = peer(zmq.SUB, device.out_address), peer(zmq.PUB, device.in_address)

        def has_arrived():
            publisher.send(b'news')
            return subscriber.poll(10)

        wait_until(has_arrived)
        assert device.statistics().unroutable == 1


@pytest.mark.parametrize('native', [True, False])
def test_single_socket(peer, native):
    with make_device(ThreadDevice, QUEUE, zmq.REP, -1, bind=['in'], native=native) as device:
        client = peer(zmq.REQ, device.in_address)
        for text in (b'a', b'b'):
            client.send(text)
            assert client.recv() == text


@pytest.mark.parametrize('factory', ALL)
def test_router_to_router(peer, factory):
    with make_device(factory, QUEUE, zmq.ROUTER, zmq.ROUTER) as device:
        alice = peer(zmq.DEALER, device.in_address, b'alice')
        bob = peer(zmq.DEALER, device.out_address, b'bob', rcvtimeo=50)
        answers = []

        def has_arrived():  # a message to a peer that is not there yet is dropped
            alice.send_multipart([b'bob', b'hello'])
            answers.extend([bob.recv_multipart()] if bob.poll(20) else [])
            return answers

        wait_until(has_arrived)
        assert answers == [[b'alice', b'hello']]
        bob.send_multipart([b'alice', b'there'])
        assert alice.recv_multipart() == [b'bob', b'there']


@pytest.mark.parametrize('mandatory', [0, 1])
@pytest.mark.parametrize('factory', ALL)
def test_unroutable_peer(peer, factory, mandatory):
    options = [('out', zmq.ROUTER_MANDATORY, mandatory)]
    with make_device(factory, QUEUE, zmq.DEALER, zmq.ROUTER, options=options) as device:
        bob = peer(zmq.DEALER, device.out_address, b'bob')
        sender = peer(zmq.DEALER, device.in_address)
        bob.send(b'here')
        assert sender.recv_multipart() == [b'bob', b'here']
        sender.send_multipart([b'nobody', b'', b'lost'])
        sender.send_multipart([b'bob', b'found'])
        assert bob.recv_multipart() == [b'found']
        if mandatory:  # else libzmq drops it silently
            assert device.statistics().unroutable == 1
            assert device.statistics().in_to_out == Traffic(2, 8, 1)


def test_peer_that_does_not_read_does_not_stop_the_others(peer):
    options = [('out', zmq.ROUTER_MANDATORY, 1), ('out', zmq.SNDHWM, 1), ('out', zmq.SNDBUF, 1)]
    with make_device(ThreadDevice, QUEUE, zmq.DEALER, zmq.ROUTER, options=options) as device:
        slow = peer(zmq.DEALER, device.out_address, b'slow', rcvhwm=1, rcvbuf=1)
        busy = peer(zmq.DEALER, device.out_address, b'busy')
        sender = peer(zmq.DEALER, device.in_address)
        for socket in (slow, busy):
            socket.send(b'here')
            sender.recv_multipart()
        for _ in range(100):
            sender.send_multipart([b'slow', b'x' * 1_000_000])
        sender.send_multipart([b'busy', b'x'])
        assert busy.recv() == b'x'
        assert device.statistics().unroutable > 0


def test_stream(peer):
    """A TCP peer that has closed its connection is unroutable."""
    with make_device(ThreadDevice, QUEUE, zmq.STREAM, zmq.DEALER) as device:
        behind = peer(zmq.DEALER, device.out_address)
        port = int(device.in_address.rpartition(':')[2])
        with tcp.create_connection(('127.0.0.1', port)) as client:
            identity, empty = behind.recv_multipart()
            assert empty == b''
            behind.send_multipart([identity, b'hello'])
            assert client.recv(5) == b'hello'
        assert behind.recv_multipart() == [identity, b'']
        behind.send_multipart([identity, b'too late'])
        wait_until(lambda: device.statistics().unroutable == 1)


def test_received_messages_are_sent_before_the_end(peer):
    device = make_device(ThreadDevice, STREAMER)
    with device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        for _ in range(500):
            source.send(b'x' * 1000)
        wait_until(lambda: device.statistics().in_to_out.frames == 500)
    assert [len(sink.recv()) for _ in range(500)] == [1000] * 500


def test_socket_error_is_raised(context):
    with context.socket(zmq.PUSH) as source, context.socket(zmq.PUSH) as target:
        direction = proxy.Direction(source, target, None, None)
        with pytest.raises(zmq.ZMQError, match=NOT_SUPPORTED):
            direction.forward()
