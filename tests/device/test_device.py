# SPDX-License-Identifier: ZPL-2.1
"""Devices: they forward, are steered, keep others out, and end when they should."""

import errno
import gc
import multiprocessing
import os
import pickle
import signal
import socket as tcp
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from multiprocessing.context import ForkProcess

import pytest
import zmq
import zmq.auth

from checks import open_fds, wait_until
from pyams_zmq.auth import authenticator
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.device import (
    FORWARDER,
    QUEUE,
    STREAMER,
    BackgroundDevice,
    Device,
    MonitoredQueue,
    ProcessDevice,
    ProcessMonitoredQueue,
    ProcessProxy,
    Proxy,
    ThreadDevice,
    ThreadMonitoredQueue,
    ThreadProxy,
    monitored_queue,
    runner,
)
from pyams_zmq.device import proxy as relay
from pyams_zmq.device.proxy import Traffic
from pyams_zmq.exceptions import ZMQBindError, ZMQClosedError, ZMQStartError, ZMQTimeoutError

LOCAL = 'tcp://127.0.0.1'
ALL = [ThreadDevice, ProcessDevice]


@pytest.fixture
def context():
    """Context of the peers."""
    context = zmq.Context()
    yield context
    context.destroy(0)


@pytest.fixture
def peer(context):
    """Make the socket of a peer, connected to an address."""

    sockets = []

    def make(socket_type, address, identity=None, **options):
        socket = context.socket(socket_type)
        sockets.append(socket)
        socket.linger = 0
        socket.rcvtimeo = socket.sndtimeo = 5000
        if identity:
            socket.identity = identity
        for option, value in options.items():
            setattr(socket, option, value)
        if socket_type == zmq.SUB:
            socket.subscribe(b'')
        socket.connect(address)
        return socket

    yield make
    for socket in sockets:
        socket.close(0)


@pytest.fixture(autouse=True)
def _no_descriptor_is_left():
    zmq.Context.instance().socket(zmq.PAIR).close()  # which outlives all tests
    fds = open_fds()
    yield
    wait_until(lambda: gc.collect() >= 0 and open_fds() <= fds)


def make(factory, *args, bind=('in', 'out'), options=(), native=True, **kwargs):
    """Make a device whose sockets are bound to free ports."""
    device = factory(*args, **kwargs)
    device.native = native
    for side, option, value in options:
        getattr(device, f'setsockopt_{side}')(option, value)
    for side in bind:
        getattr(device, f'bind_{side}')(LOCAL)
    return device


def start_stuck(device, peer):
    """Start a streamer, let its loop wait in the middle of a burst; return the peer to wait for."""
    device.setsockopt_out(zmq.SNDHWM, 10)
    device.start()
    sink, source = peer(zmq.PULL, device.out_address, rcvhwm=10), peer(zmq.PUSH, device.in_address)
    device.pause()
    source.sndtimeo = 300
    with suppress(zmq.Again):
        while True:
            source.send(b'x' * 10_000)
    device.resume()
    assert sink.poll(5000)
    return sink


class UselessThread(ThreadProxy):
    """Fails at the first message: its monitor is a socket that cannot send."""

    _is_native = False


class UselessProcess(ProcessProxy):
    """The same in a process."""

    _is_native = False


def start_failing(factory, peer, native=True):
    """Start a device that fails when messages come in."""
    useless = UselessProcess if factory is ProcessDevice else UselessThread
    device = make(useless, zmq.PULL, zmq.PUSH)
    device._mon.type = zmq.PULL
    device._is_native = native
    device.start()
    peer(zmq.PULL, device.out_address)
    device.pause()
    source = peer(zmq.PUSH, device.in_address, sndhwm=1)
    for _ in range(500):
        source.send(b'x')
    device.resume()
    return device


NOT_SUPPORTED = 'not supported'


# Forward


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('factory', ALL)
def test_queue(peer, factory, native):
    with make(factory, native=native) as device:
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
    with make(ThreadDevice, FORWARDER, native=native) as device:
        subscriber = peer(zmq.SUB, device.out_address, rcvtimeo=50)
        publisher = peer(zmq.PUB, device.in_address)

        def has_arrived():
            publisher.send(b'news')
            return subscriber.poll(10)

        wait_until(has_arrived)
        assert subscriber.recv() == b'news'
        assert device.statistics().out_to_in.frames == 1  # the subscription


@pytest.mark.parametrize('native', [True, False])
def test_streamer(peer, native):
    with make(ThreadDevice, STREAMER, native=native) as device:
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
    device = make(ThreadDevice, QUEUE, *types, native=native)
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


def test_turns_of_req_and_rep(peer):
    """The second client waits until the first one has its reply."""
    with make(ThreadDevice, QUEUE, zmq.REP, zmq.REQ) as device:
        worker = peer(zmq.REP, device.out_address)
        clients = [peer(zmq.REQ, device.in_address) for _ in range(3)]
        for client in clients:
            client.send(b'question')
        for _ in clients:
            worker.recv()
            assert not worker.poll(20)
            worker.send(b'answer')
        assert [client.recv() for client in clients] == [b'answer'] * 3


def test_turns_of_req_alone(peer):
    """The second message waits for the reply to the first one, which nobody gets."""
    with make(ThreadDevice, QUEUE, zmq.PULL, zmq.REQ) as device:
        worker, source = peer(zmq.REP, device.out_address), peer(zmq.PUSH, device.in_address)
        for number in (b'1', b'2', b'3'):
            source.send(number)
        for number in (b'1', b'2', b'3'):
            assert worker.recv() == number
            worker.send(b'done')
        wait_until(lambda: device.statistics().unroutable == 3)
        assert device.statistics().in_to_out.messages == 3


@pytest.mark.parametrize('native', [True, False])
def test_message_where_the_other_socket_cannot_send(peer, native):
    """It is dropped; neither does it end the device, nor does the loop turn without a rest."""
    with make(ThreadDevice, QUEUE, zmq.PULL, zmq.DEALER, native=native) as device:
        sink, source = peer(zmq.DEALER, device.out_address), peer(zmq.PUSH, device.in_address)
        for _ in range(3):
            sink.send(b'back')
        wait_until(lambda: device.statistics().unroutable == 3)
        cpu = time.process_time()
        assert not sink.poll(300)
        assert time.process_time() - cpu < 0.2
        source.send(b'x')
        assert sink.recv() == b'x'


def test_subscription_where_the_other_socket_cannot_send(peer):
    options = [('in', zmq.SUBSCRIBE, b'')]
    with make(ThreadDevice, QUEUE, zmq.SUB, zmq.XPUB, options=options) as device:
        subscriber, publisher = peer(zmq.SUB, device.out_address), peer(zmq.PUB, device.in_address)

        def has_arrived():
            publisher.send(b'news')
            return subscriber.poll(10)

        wait_until(has_arrived)
        assert device.statistics().unroutable == 1


@pytest.mark.parametrize('native', [True, False])
def test_single_socket(peer, native):
    with make(ThreadDevice, QUEUE, zmq.REP, -1, bind=['in'], native=native) as device:
        client = peer(zmq.REQ, device.in_address)
        for text in (b'a', b'b'):
            client.send(text)
            assert client.recv() == text


def test_connected_sides_and_options(context, peer):
    with context.socket(zmq.ROUTER) as front, context.socket(zmq.ROUTER) as back:
        for socket in (front, back):
            socket.rcvtimeo = 5000
            socket.bind(f'{LOCAL}:*')
        device = ThreadDevice(QUEUE, zmq.DEALER, zmq.DEALER)
        device.connect_in(front.last_endpoint.decode())
        device.connect_out(back.last_endpoint.decode())
        device.setsockopt_in(zmq.IDENTITY, 'left')
        device.setsockopt_out(zmq.IDENTITY, b'right')
        with device:
            assert device.addresses == {'in': [], 'out': []}
            assert device.in_address is None
            wait_until(lambda: reaches(front, b'left'))
            assert back.recv_multipart()[0] == b'right'


def reaches(router, identity):
    router.router_mandatory = True
    try:
        router.send_multipart([identity, b'hello'])
    except zmq.ZMQError:
        return False
    return True


@pytest.mark.parametrize('factory', ALL)
def test_as_in_the_guide_of_pyzmq(context, peer, factory):
    with context.socket(zmq.ROUTER) as broker:
        broker.rcvtimeo = 5000
        port = broker.bind_to_random_port(LOCAL)
        device = factory(zmq.QUEUE, zmq.ROUTER, zmq.DEALER)
        device.bind_in('tcp://*:*')
        device.connect_out(f'{LOCAL}:{port}')
        device.setsockopt_in(zmq.IDENTITY, 'ROUTER')
        device.setsockopt_out(zmq.IDENTITY, 'DEALER')
        device.start()
        client = peer(zmq.ROUTER, device.in_address, router_mandatory=True)
        wait_until(lambda: reaches(client, b'ROUTER'))
        identity, _client, text = broker.recv_multipart()
        assert (identity, text) == (b'DEALER', b'hello')
        device.stop()


def test_in_the_foreground(peer):
    device = make(Device, STREAMER)
    thread = threading.Thread(target=device.start)
    thread.start()
    wait_until(lambda: device.in_address)
    sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
    source.send(b'x')
    assert sink.recv() == b'x'
    device.stop()
    thread.join()


@pytest.mark.parametrize('factory', ALL)
def test_random_port(peer, factory):
    device = factory(STREAMER)
    port = device.bind_in_to_random_port(LOCAL)
    in_range = device.bind_out_to_random_port('tcp://*', 20000, 30000)
    assert 20000 <= in_range < 30000
    source = peer(zmq.PUSH, f'{LOCAL}:{port}')  # before the start
    source.send(b'early')
    with tcp.socket() as other:
        other.setsockopt(tcp.SOL_SOCKET, tcp.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match='in use'):
            other.bind(('127.0.0.1', port))
    with device:
        assert device.in_address == f'{LOCAL}:{port}'
        sink = peer(zmq.PULL, f'{LOCAL}:{in_range}')
        assert sink.recv() == b'early'
        assert device.out_address == f'tcp://0.0.0.0:{in_range}'


def test_random_port_of_ipv6(peer):
    device = ThreadDevice(STREAMER)
    port = device.bind_in_to_random_port('tcp://[::1]')
    with device:
        assert device.in_address == f'tcp://[::1]:{port}'
        peer(zmq.PUSH, device.in_address, ipv6=True).send(b'x')
        wait_until(lambda: device.statistics().in_to_out.frames == 0)


def test_option_of_ipv6(peer):
    """It is no option only of sockets with IPv6 addresses: `*` is both, a name may be either."""
    device = make(ThreadDevice, STREAMER, bind=['out'], options=[('in', zmq.IPV6, 1)])
    device.bind_in('*')
    with device:
        sink = peer(zmq.PULL, device.out_address)
        port = device.in_address.rpartition(':')[2]
        peer(zmq.PUSH, f'tcp://[::1]:{port}', ipv6=True).send(b'x')
        assert sink.recv() == b'x'


def test_random_port_that_is_not_needed():
    device = ThreadDevice()
    port = device.bind_in_to_random_port(LOCAL)
    device.stop()
    with tcp.socket() as other:
        other.bind(('127.0.0.1', port))


def test_no_random_port():
    device = ThreadDevice()
    with tcp.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        port = taken.getsockname()[1]
        with pytest.raises(ZMQBindError) as error:
            device.bind_in_to_random_port(LOCAL, port, port + 1)
    assert error.value.errno == errno.EADDRINUSE
    with pytest.raises(ZMQBindError, match='Cannot assign'):
        device.bind_in_to_random_port('tcp://192.0.2.1')
    with pytest.raises(ValueError, match='has no port'):
        device.bind_in_to_random_port('ipc:///tmp/x')
    with pytest.raises(ValueError, match="'tcp://lo' has no number"):
        device.bind_in_to_random_port('tcp://lo')
    for ports in ((0, 10), (10, 10), (1, 65537)):
        with pytest.raises(ValueError, match='Bad ports'):
            device.bind_in_to_random_port(LOCAL, *ports)


def test_second_try_for_a_random_port():
    with tcp.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        port = taken.getsockname()[1]
        found = set()
        for _ in range(8):
            device = ThreadDevice()
            found.add(device.bind_in_to_random_port(LOCAL, port, port + 40))
            device.stop()
    assert port not in found


def test_ipc(peer, tmp_path):
    address = f'ipc://{tmp_path}/in'
    device = make(ThreadDevice, STREAMER, bind=['out'])
    device.bind_in(address)
    with device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, address)
        source.send(b'x')
        assert sink.recv() == b'x'
        second = ThreadDevice()
        second.bind_timeout = 0
        second.bind_in(address)
        with pytest.raises(ZMQBindError):  # libzmq would take it over
            second.start()
    assert not list(tmp_path.iterdir())


# Contexts


def test_inproc(context):
    device = ThreadDevice(STREAMER)
    device.bind_in('inproc://in')
    device.bind_out('inproc://out')
    with device, zmq.Context.instance().socket(zmq.PUSH) as source:
        source.connect('inproc://in')
        with zmq.Context.instance().socket(zmq.PULL) as sink:
            sink.connect('inproc://out')
            source.send(b'x')
            assert sink.recv() == b'x'


def test_context_factory(context, peer):
    device = make(ThreadDevice, STREAMER)
    device.context_factory = lambda: context
    with device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        source.send(b'x')
        assert sink.recv() == b'x'
    assert not context.closed


def test_end_of_a_foreign_context():
    foreign = zmq.Context()
    device = make(ThreadDevice)
    device.context_factory = lambda: foreign
    device.start()
    foreign.term()
    device.join(5)
    assert device.done
    with pytest.raises(ZMQClosedError):
        device.pause()
    device.stop()


@pytest.mark.parametrize('command', ['pause', 'statistics', 'stop'])
def test_end_of_a_foreign_context_during_a_command(peer, monkeypatch, command):
    monkeypatch.setattr(runner, 'COMMAND_TIMEOUT', 10)
    monkeypatch.setattr(runner, 'STOP_TIMEOUT', 10)
    foreign = zmq.Context()
    device = make(ThreadDevice, STREAMER, options=[('out', zmq.LINGER, 0)])
    device.context_factory = lambda: foreign
    start_stuck(device, peer)
    timer = threading.Timer(0.2, foreign.term)  # by then the command waits
    timer.start()
    if command == 'pause':
        with pytest.raises(ZMQClosedError, match='does not run'):
            device.pause()
    else:
        getattr(device, command)()
    timer.join()
    assert device.done


@pytest.mark.parametrize('factory', ALL)
def test_command_that_comes_too_late(factory):
    """The device ended after it was found running."""
    device = make(factory)
    device.start()
    device.pause()
    device.stop()
    with pytest.raises(ZMQClosedError, match='does not run'):
        device._runner.resume()


def test_context_factory_of_a_process(peer):
    device = make(ProcessDevice, STREAMER, auth='editor:secret')
    device.context_factory = zmq.Context
    with device:
        assert device.statistics().in_to_out.frames == 0


def test_context_of_the_owner_in_a_process(context):
    """Its threads are not there: nothing would come through."""
    context.socket(zmq.PAIR).close()
    device = make(ProcessDevice)
    device.context_factory = lambda: context
    with pytest.raises(ValueError, match='whose threads are in another process'):
        device.start()


def test_inproc_where_it_is_of_no_use():
    device = ProcessDevice()
    device.connect_in('inproc://nobody')
    with pytest.raises(ValueError, match='another process'):
        device.start()
    device = ThreadDevice(clients='localhost')
    device.bind_in('inproc://nobody')
    with pytest.raises(ValueError, match='a context of their own'):
        device.start()


# Monitors


@pytest.mark.parametrize('factory', [ThreadProxy, ProcessProxy])
@pytest.mark.parametrize('mon_type', [zmq.PUB, zmq.XPUB, zmq.PUSH])
def test_proxy(peer, factory, mon_type):
    device = factory(zmq.PULL, zmq.PUSH, mon_type)
    assert device.mon_address is None
    device.bind_in(LOCAL)
    device.bind_out(LOCAL)
    port = device.bind_mon_to_random_port(LOCAL)
    device.setsockopt_mon(zmq.SNDHWM, 10)
    with device:
        assert device.mon_address == f'{LOCAL}:{port}'
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        monitor = peer(zmq.PULL if mon_type == zmq.PUSH else zmq.SUB, device.mon_address)

        def has_arrived():
            source.send_multipart([b'a', b'b'])
            assert sink.recv_multipart() == [b'a', b'b']
            return monitor.poll(10)

        wait_until(has_arrived)
        assert monitor.recv_multipart() == [b'a', b'b']


@pytest.mark.parametrize('mon_type', [zmq.PUSH, zmq.PUB])
def test_monitor_without_a_peer_does_not_block(peer, mon_type):
    with make(ThreadProxy, zmq.PULL, zmq.PUSH, mon_type, bind=['in', 'out', 'mon']) as device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        for _ in range(3000):
            source.send(b'x')
            sink.recv()
        assert device.statistics().unmonitored == (3000 if mon_type == zmq.PUSH else 0)


@pytest.mark.parametrize('factory', [ThreadMonitoredQueue, ProcessMonitoredQueue])
def test_monitored_queue(context, peer, factory):
    with context.socket(zmq.PULL) as monitor:
        monitor.rcvtimeo = 5000
        monitor.bind(f'{LOCAL}:*')
        device = make(factory, zmq.ROUTER, zmq.DEALER, zmq.PUSH, 'to', b'fro')
        device.connect_mon(monitor.last_endpoint.decode())
        with device:
            client = peer(zmq.REQ, device.in_address, b'client')
            worker = peer(zmq.REP, device.out_address)
            client.send(b'a')
            worker.recv()
            worker.send(b'b')
            assert client.recv() == b'b'
            assert monitor.recv_multipart() == [b'to', b'client', b'', b'a']
            assert monitor.recv_multipart() == [b'fro', b'client', b'', b'b']


def test_monitored_queue_of_ones_own(context, peer):
    sockets = [context.socket(kind) for kind in (zmq.PULL, zmq.PUSH, zmq.PUB)]
    for socket in sockets:
        socket.bind(f'{LOCAL}:*')
    addresses = [socket.last_endpoint for socket in sockets]
    monitor = peer(zmq.SUB, addresses[2].decode(), rcvtimeo=50)
    foreign = zmq.Context()
    ended = []

    def run():
        with pytest.raises(zmq.ContextTerminated):
            monitored_queue(*sockets)
        for socket in sockets:
            socket.close(0)
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    with foreign.socket(zmq.PUSH) as source, foreign.socket(zmq.PULL) as sink:
        source.connect(addresses[0])
        sink.connect(addresses[1])
        seen = []

        def has_arrived():
            source.send(b'x')
            assert sink.recv() == b'x'
            seen.extend([monitor.recv_multipart()] if monitor.poll(20) else [])
            return seen

        wait_until(has_arrived)
        assert seen == [[b'in', b'x']]
    foreign.term()
    monitor.close()
    context.term()
    thread.join()
    assert ended


def test_what_is_wrong_with_a_socket_is_raised(context):
    with context.socket(zmq.PUSH) as source, context.socket(zmq.PUSH) as target:
        way = relay.Direction(source, target, None, None)
        with pytest.raises(zmq.ZMQError, match=NOT_SUPPORTED):
            way.forward()


def test_names():
    assert issubclass(ThreadMonitoredQueue, MonitoredQueue)
    assert issubclass(ThreadProxy, Proxy)
    for factory in (ThreadDevice, ProcessDevice, ThreadProxy, ProcessMonitoredQueue):
        assert issubclass(factory, BackgroundDevice)
        assert issubclass(factory, Device)


# Routers


@pytest.mark.parametrize('factory', ALL)
def test_router_to_router(peer, factory):
    with make(factory, QUEUE, zmq.ROUTER, zmq.ROUTER) as device:
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
    with make(factory, QUEUE, zmq.DEALER, zmq.ROUTER, options=options) as device:
        bob = peer(zmq.DEALER, device.out_address, b'bob')
        sender = peer(zmq.DEALER, device.in_address)
        bob.send(b'here')
        assert sender.recv_multipart() == [b'bob', b'here']
        sender.send_multipart([b'nobody', b'', b'lost'])
        sender.send_multipart([b'bob', b'found'])
        assert bob.recv_multipart() == [b'found']
        if mandatory:  # else libzmq drops it without a word
            assert device.statistics().unroutable == 1
            assert device.statistics().in_to_out == Traffic(2, 8, 1)


def test_peer_that_takes_nothing_does_not_stop_the_others(peer):
    options = [('out', zmq.ROUTER_MANDATORY, 1), ('out', zmq.SNDHWM, 1), ('out', zmq.SNDBUF, 1)]
    with make(ThreadDevice, QUEUE, zmq.DEALER, zmq.ROUTER, options=options) as device:
        lazy = peer(zmq.DEALER, device.out_address, b'lazy', rcvhwm=1, rcvbuf=1)
        busy = peer(zmq.DEALER, device.out_address, b'busy')
        sender = peer(zmq.DEALER, device.in_address)
        for socket in (lazy, busy):
            socket.send(b'here')
            sender.recv_multipart()
        for _ in range(100):
            sender.send_multipart([b'lazy', b'x' * 1_000_000])
        sender.send_multipart([b'busy', b'x'])
        assert busy.recv() == b'x'
        assert device.statistics().unroutable > 0


def test_stream(peer):
    """A TCP peer that is gone is unroutable."""
    with make(ThreadDevice, QUEUE, zmq.STREAM, zmq.DEALER) as device:
        behind = peer(zmq.DEALER, device.out_address)
        port = int(device.in_address.rpartition(':')[2])
        with tcp.create_connection(('127.0.0.1', port)) as client:
            identity, empty = behind.recv_multipart()
            assert empty == b''
            behind.send_multipart([identity, b'hello'])
            assert client.recv(5) == b'hello'
        assert behind.recv_multipart() == [identity, b'']
        behind.send_multipart([identity, b'anybody?'])
        wait_until(lambda: device.statistics().unroutable == 1)


# Pause, resume, statistics


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('factory', ALL)
def test_pause(peer, factory, native):
    with make(factory, STREAMER, native=native) as device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        source.send(b'before')
        assert sink.recv() == b'before'
        device.resume()  # nothing to do
        device.pause()
        device.pause()
        for _ in range(10):
            source.send(b'x')
        cpu = time.process_time()
        assert not sink.poll(300)
        assert factory is ProcessDevice or time.process_time() - cpu < 0.2
        assert device.statistics().in_to_out.frames == 1
        device.resume()
        assert [sink.recv() for _ in range(10)] == [b'x'] * 10
        assert device.statistics().in_to_out.frames == 11
        device.pause()
    assert device.statistics().in_to_out.frames == 11


@pytest.mark.parametrize('factory', ALL)
def test_statistics_while_messages_flow(peer, factory):
    """None is lost from the count by pauses."""
    with make(factory, STREAMER) as device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)

        def send():
            for _ in range(20_000):
                source.send(b'x')

        thread = threading.Thread(target=send)
        thread.start()
        for _ in range(20):
            device.pause()
            device.resume()
            for _ in range(1000):
                sink.recv()
        thread.join()
        assert device.statistics().in_to_out[:2] == (20_000, 20_000)


def test_commands_while_peers_take_nothing(peer):
    device = make(ThreadDevice, STREAMER, native=False)
    sink = start_stuck(device, peer)
    frames = device.statistics().in_to_out.frames
    device.pause()
    device.resume()
    for _ in range(frames + 10):  # what waited was not lost
        sink.recv()
    wait_until(lambda: device.statistics().in_to_out.frames > frames)
    device.stop()


@pytest.mark.parametrize('factory', ALL)
def test_late_answers(peer, factory, monkeypatch):
    device = make(factory, STREAMER)
    monkeypatch.setattr(runner, 'COMMAND_TIMEOUT', 0.1)
    sink = start_stuck(device, peer)
    for command in (device.statistics, device.pause, device.pause):
        with pytest.raises(ZMQTimeoutError, match='takes nothing'):
            command()
    device.resume()
    received = 0
    while sink.poll(300):
        sink.recv()
        received += 1
    assert device.statistics().in_to_out.frames == received
    device.stop()


@pytest.mark.parametrize('factory', ALL)
def test_stop_while_it_waits_for_a_peer(peer, factory):
    device = make(factory, STREAMER, options=[('out', zmq.LINGER, 0)])
    start_stuck(device, peer)
    start = time.monotonic()
    device.stop()
    assert device.done
    assert time.monotonic() - start < 3
    device.statistics()


def test_stop_in_a_foreign_context_while_it_waits_for_a_peer(peer, monkeypatch):
    monkeypatch.setattr(runner, 'STOP_TIMEOUT', 0.1)
    foreign = zmq.Context()
    device = make(ThreadDevice, STREAMER, options=[('out', zmq.LINGER, 0)])
    device.context_factory = lambda: foreign
    start_stuck(device, peer)
    with pytest.raises(ZMQTimeoutError):
        device.stop()
    foreign.term()
    device.stop()
    assert device.done


# Life


@pytest.mark.parametrize('factory', ALL)
def test_restart(peer, factory):
    device = make(factory, STREAMER)
    assert (device.addresses, device.launcher, device.done) == ({}, None, False)
    device.join()
    device.stop()
    assert device.statistics().in_to_out.frames == 0
    device.start()
    addresses, launcher = device.addresses, device.launcher
    sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
    source.send(b'a')
    assert sink.recv() == b'a'
    device.restart()
    try:
        assert device.addresses == addresses
        assert device.launcher is not launcher
        assert not launcher.is_alive()
        source.send(b'b')
        assert sink.recv() == b'b'
        assert device.statistics().in_to_out.frames == 1
        with pytest.raises(ZMQStartError, match='runs already'):
            device.start()
        device.join(0.01)
        assert not device.done
    finally:
        device.stop()
    device.stop()
    for command in (device.pause, device.resume):
        with pytest.raises(ZMQClosedError, match='does not run'):
            command()


def test_what_it_took_is_sent_at_the_end(peer):
    device = make(ThreadDevice, STREAMER)
    with device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        for _ in range(500):
            source.send(b'x' * 1000)
        wait_until(lambda: device.statistics().in_to_out.frames == 500)
    assert [len(sink.recv()) for _ in range(500)] == [1000] * 500


@pytest.mark.parametrize('factory', ALL)
def test_end_of_the_program(context, tmp_path, factory):
    """A device that nobody has stopped sends what it has taken, and leaves no file."""
    program = f"""
    import sys, zmq
    from pyams_zmq.device import STREAMER, {factory.__name__}
    device = {factory.__name__}(STREAMER)
    device.bind_in('ipc://{tmp_path}/in')
    device.connect_out(sys.argv[1])
    device.start()
    with zmq.Context() as context, context.socket(zmq.PUSH) as source:
        source.connect(device.in_address)
        source.send(b'x' * 1_000_000)
        while not device.statistics().in_to_out.bytes:
            pass
    """
    with context.socket(zmq.PULL) as sink:
        sink.rcvtimeo = 5000
        sink.bind(f'{LOCAL}:*')
        result = subprocess.run(
            [
                sys.executable,
                '-W',
                'ignore:pkg_resources is deprecated',  # Pyramid 2 imports it
                '-c',
                textwrap.dedent(program),
                sink.last_endpoint,
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, '')
        assert len(sink.recv()) == 1_000_000
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('factory', ALL)
def test_address_in_use(factory):
    device = make(factory)
    with device:
        second = make(factory, bind=())
        second.bind_timeout = 0.1
        second.bind_in(device.in_address)
        with pytest.raises(ZMQBindError) as error:
            second.start()
    assert error.value.errno == errno.EADDRINUSE
    assert error.value.filename == device.in_address
    with second:  # now it is free
        assert second.in_address == device.in_address


@pytest.mark.parametrize('factory', ALL)
def test_bad_option(factory):
    device = factory()
    device.setsockopt_in(zmq.RCVHWM, -5)
    with pytest.raises(zmq.ZMQError, match='Invalid argument: option RCVHWM of the in socket'):
        device.start()
    with pytest.raises(ZMQClosedError):
        device.pause()
    device = factory()
    device.setsockopt_out(123_456, 7)
    with pytest.raises(zmq.ZMQError, match='Invalid argument: option 123456 of the out') as error:
        device.start()
    assert error.value.errno == errno.EINVAL
    with pytest.raises(zmq.ZMQError, match='Invalid argument: type 99 of the out socket'):
        factory(QUEUE, zmq.PULL, 99).start()


def test_errors_that_keep_their_type():
    foreign = zmq.Context()
    foreign.set(zmq.MAX_SOCKETS, 2)
    device = make(ThreadDevice)
    device.context_factory = lambda: foreign
    with pytest.raises(zmq.ZMQError, match='Too many open files'):
        device.start()
    foreign.term()


def test_bad_arguments():
    with pytest.raises(ValueError, match='Bad device 7'):
        ThreadDevice(7)
    with pytest.raises(ValueError, match='Bad client address'):
        ThreadDevice(clients='example.org')
    with pytest.raises(ValueError, match='Bad in_type -1'):
        ThreadDevice(QUEUE, -1, zmq.PUSH)
    for mon_type in (-1, zmq.PULL, zmq.SUB):
        with pytest.raises(ValueError, match=f'Bad mon_type {int(mon_type)}: a monitor sends'):
            ThreadProxy(zmq.PULL, zmq.PUSH, int(mon_type))
    device = ThreadProxy(zmq.PULL, zmq.PUSH)
    for configure in (device.bind_in, device.connect_out, device.bind_mon, device.connect_mon):
        for address in ('inproc://', None, 'a b', 'http://host:1'):
            with pytest.raises(ValueError, match='Bad ØMQ address'):
                configure(address)


@pytest.mark.parametrize('factory', ALL)
def test_failing_device(peer, factory):
    device = start_failing(factory, peer)
    with pytest.raises(zmq.ZMQError, match=NOT_SUPPORTED):
        device.join(10)
    assert device.done
    for call in (device.stop, device.pause, device.resume, device.statistics):
        with pytest.raises(zmq.ZMQError, match=NOT_SUPPORTED):
            call()
    device.restart()
    device.stop()


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('command', ['pause', 'resume', 'statistics'])
@pytest.mark.parametrize('factory', ALL)
def test_failing_device_and_a_command(peer, factory, command, native):
    """The command may come before or after the failure."""

    def disturb():
        for _ in range(100_000):
            getattr(device, command)()
            device.resume()

    device = start_failing(factory, peer, native=native)
    with pytest.raises(zmq.ZMQError, match=NOT_SUPPORTED):
        disturb()
    wait_until(lambda: device.done)


@pytest.mark.parametrize('factory', ALL)
def test_two_starts_at_once(factory):
    """One of them is refused; else nobody could stop the device of the other one."""
    for _ in range(5):
        device = make(factory)
        errors = []
        barrier = threading.Barrier(2)

        def start(device=device, barrier=barrier, errors=errors):
            barrier.wait()
            try:
                device.start()
            except ZMQStartError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == [f'{device} runs already: stop it first, or restart it']
        device.stop()


@pytest.mark.parametrize('module', [authenticator, runner])
def test_no_thread(monkeypatch, module):
    """A device that cannot have its threads says so, and leaves nothing."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    device = make(ThreadDevice)
    monkeypatch.setattr(module, 'Thread', type('Refused', (threading.Thread,), {'start': refuse}))
    with pytest.raises(RuntimeError, match='new thread'):
        device.start()
    monkeypatch.undo()
    with device:
        assert not device.done


def test_name_of_a_device():
    device = ThreadProxy(zmq.PULL, zmq.PUSH)
    device.bind_in('127.0.0.1:5555')
    device.connect_in('127.0.0.1:5556')
    device.connect_mon('inproc://mon')
    assert str(device) == (
        'ThreadProxy (in tcp://127.0.0.1:5555 tcp://127.0.0.1:5556, out nowhere, mon inproc://mon)'
    )


@pytest.mark.parametrize('command', ['stop', 'statistics'])
@pytest.mark.parametrize('factory', ALL)
def test_signal_handler_that_stops_the_device(peer, factory, command):
    """It interrupts a command, which has the lock that the end of the device needs."""
    device = make(factory, STREAMER, options=[('out', zmq.LINGER, 0)])
    start_stuck(device, peer)
    handled = []

    def stop(num, frame):
        device.stop()
        handled.append(num)

    former = signal.signal(signal.SIGUSR1, stop)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    with suppress(ZMQTimeoutError):
        getattr(device, command)()
    timer.join()
    signal.signal(signal.SIGUSR1, former)
    assert handled == [signal.SIGUSR1]
    assert device.done
    device.stop()


def test_signal_handler_within_a_command(peer):
    with make(ThreadDevice) as device:
        with device._runner._command():  # what a signal handler interrupts
            assert device.statistics().in_to_out.frames == 0
            device.stop()
            assert not device.done
        assert device.done


def test_restart_in_the_foreground(peer):
    """The first start waits for the end of the device, which a restart is not."""
    device = make(Device, STREAMER)
    thread = threading.Thread(target=device.start)
    thread.start()
    wait_until(lambda: device.in_address)
    launcher = device.launcher
    device.restart()
    assert device.launcher is not launcher
    thread.join(0.2)
    assert thread.is_alive()
    assert not device.done
    device.stop()
    thread.join()


@pytest.mark.parametrize('factory', ALL)
def test_error_in_the_block(factory):
    device = make(factory)
    with pytest.raises(LookupError), device:
        raise LookupError
    assert device.done


@pytest.mark.parametrize('factory', ALL)
def test_signals_do_not_disturb_the_count(peer, factory):
    with make(factory, STREAMER) as device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        source.send(b'x')
        assert sink.recv() == b'x'
        pid = os.getpid() if factory is ThreadDevice else device.launcher.pid
        former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.kill(pid, signal.SIGHUP)
        signal.signal(signal.SIGHUP, former)
        assert device.statistics().in_to_out.frames == 1


# Processes


@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT])
def test_process_that_is_told_to_end(num):
    device = make(ProcessDevice)
    device.start()
    os.kill(device.launcher.pid, num)
    device.join(5)
    assert device.launcher.exitcode == 0
    with pytest.raises(ZMQClosedError):
        device.pause()


def test_process_that_is_killed():
    device = make(ProcessDevice)
    device.start()
    device.launcher.kill()
    with pytest.raises(ZMQClosedError, match='exit code -9'):
        device.join(5)
    with pytest.raises(ZMQClosedError, match='exit code -9'):
        device.statistics()
    device.restart()
    device.stop()


def test_process_that_is_killed_during_a_command():
    device = make(ProcessDevice)
    device.start()
    os.kill(device.launcher.pid, signal.SIGSTOP)
    timer = threading.Timer(0.2, device.launcher.kill)  # by then the command waits
    timer.start()
    with pytest.raises(ZMQClosedError, match='exit code -9'):
        device.pause()
    timer.join()


def test_process_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(runner, 'COMMAND_TIMEOUT', -0.9)
    with make(ProcessDevice) as device:
        os.kill(device.launcher.pid, signal.SIGSTOP)
        with pytest.raises(ZMQTimeoutError, match='does not answer'):
            device.statistics()
        os.kill(device.launcher.pid, signal.SIGCONT)


def test_process_whose_end_another_fork_hides(monkeypatch):
    """A fork at the time of the start has the end of the pipe: nobody reads that it is closed."""
    others = []

    def start(process):
        other = ForkProcess(target=time.sleep, args=(3600,))
        other.start()
        others.append(other)
        original(process)

    original = runner._DeviceProcess.start
    monkeypatch.setattr(runner._DeviceProcess, 'start', start)
    device = make(ProcessDevice)
    device.start()
    device.launcher.kill()
    try:
        for call in (lambda: device.join(5), device.statistics, device.stop):
            with pytest.raises(ZMQClosedError, match='exit code -9'):
                call()
    finally:
        for other in others:
            other.kill()
            other.join()


def test_process_that_waits_for_its_address(monkeypatch):
    monkeypatch.setattr(runner, 'START_TIMEOUT', 0.2)
    first = make(ThreadDevice)
    first.start()
    device = ProcessDevice()
    device.bind_timeout = 5
    device.bind_in(first.in_address)
    timer = threading.Timer(0.5, first.stop)
    timer.start()
    with device:
        assert device.in_address == first.in_address
    timer.join()


def own_a_device(pipe):
    device = make(ProcessDevice)
    device.start()
    pipe.send(device.in_address)
    time.sleep(3600)


def test_process_ends_with_its_owner():
    reader, writer = multiprocessing.Pipe(duplex=False)
    owner = ForkProcess(target=own_a_device, args=(writer,))
    owner.start()
    address = reader.recv()
    owner.kill()
    owner.join()
    port = int(address.rpartition(':')[2])

    def is_free():
        with tcp.socket() as probe:
            return probe.connect_ex(('127.0.0.1', port)) == errno.ECONNREFUSED

    wait_until(is_free, 1)
    reader.close()
    writer.close()


def use_the_device_of_another(device):
    device.stop()
    assert device.statistics().in_to_out.frames == 0
    with pytest.raises(ZMQClosedError):
        device.pause()


@pytest.mark.parametrize('factory', ALL)
def test_fork_has_no_power_over_the_device(peer, factory):
    with make(factory, STREAMER) as device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        child = ForkProcess(target=use_the_device_of_another, args=(device,))
        child.start()
        child.join()
        assert child.exitcode == 0
        source.send(b'x')
        assert sink.recv() == b'x'
        assert device.statistics().in_to_out.frames == 1


def test_process_holds_nothing_of_its_owner(tmp_path):
    one = make(ThreadDevice)
    one.bind_in(f'ipc://{tmp_path}/in')
    one.start()
    other = make(ProcessDevice)
    port = int(one.in_address.rpartition(':')[2])
    with tcp.create_connection(('127.0.0.1', port), 5) as client:
        assert client.recv(100)  # the greeting
        with other:
            one.stop()
            while client.recv(100):
                pass
            one.bind_timeout = 0
            one.restart()
            one.stop()
        other.bind_in_to_random_port(LOCAL)
        with other:
            assert len(other.addresses['in']) == 2


class Unpicklable(Exception):
    """Does not come back from a pickle."""

    def __init__(self, one, two):
        super().__init__(f'{one} {two}')


def fail():
    raise Unpicklable('no', 'context')


def test_error_that_cannot_be_pickled():
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(Unpicklable('no', 'context')))
    device = ProcessDevice()
    device.context_factory = fail
    with pytest.raises(ZMQStartError, match='Unpicklable: no context'):
        device.start()


# Access


def try_to_send(device, peer, **options):
    """Tell if a peer is let in."""
    frames = device.statistics().in_to_out.frames
    source = peer(zmq.PUSH, device.in_address, immediate=True, sndtimeo=300, **options)
    try:
        source.send(b'x')
    except zmq.Again:
        return False
    wait_until(lambda: device.statistics().in_to_out.frames > frames)
    return True


@pytest.mark.parametrize('factory', ALL)
def test_users(peer, factory):
    with make(factory, STREAMER, auth={'editor': 'secret'}) as device:
        good = {'plain_username': b'editor', 'plain_password': b'secret'}
        peer(zmq.PULL, device.out_address, **good)
        assert try_to_send(device, peer, **good)
        assert not try_to_send(device, peer)
        assert not try_to_send(device, peer, plain_username=b'editor', plain_password=b'x')


def test_networks(peer):
    with make(ThreadDevice, STREAMER, clients='10.0.0.0/8') as device:
        assert not try_to_send(device, peer)
    with make(ThreadDevice, STREAMER, clients='localhost') as device:
        peer(zmq.PULL, device.out_address)
        assert try_to_send(device, peer)


def test_keys(peer, tmp_path):
    for name in ('server', 'client'):
        zmq.auth.create_certificates(tmp_path, name)
    server = CurveServer(tmp_path / 'server.key_secret', [tmp_path / 'client.key'])
    client = CurveClient(tmp_path / 'server.key', tmp_path / 'client.key_secret')
    keys = {
        'curve_serverkey': client.server,
        'curve_publickey': client.public,
        'curve_secretkey': client._secret,
    }
    with pytest.raises(ValueError, match='one mechanism'):
        ThreadDevice(auth='a:b', curve=server)
    with make(ThreadDevice, STREAMER, curve=server) as device:
        peer(zmq.PULL, device.out_address, **keys)
        assert try_to_send(device, peer, **keys)
        assert not try_to_send(device, peer)


@pytest.mark.parametrize(
    ('factory', 'by_signal'),
    [(ThreadDevice, False), (ProcessDevice, False), (ProcessDevice, True)],
)
def test_reload(peer, tmp_path, caplog, factory, by_signal):
    path = tmp_path / 'users'
    path.write_text('old:secret')
    old = {'plain_username': b'old', 'plain_password': b'secret'}
    new = {'plain_username': b'new', 'plain_password': b'secret'}
    with make(factory, STREAMER, auth=path) as device:
        peer(zmq.PULL, device.out_address, **old)
        assert try_to_send(device, peer, **old)
        assert not try_to_send(device, peer, **new)

        def reload():
            if by_signal:
                os.kill(device.launcher.pid, signal.SIGHUP)
            else:
                device.reload()

        path.write_text('nonsense')
        if by_signal:
            reload()
        else:
            with pytest.raises(ValueError, match='Bad credentials'):
                device.reload()
        with pytest.raises(ValueError, match='Bad credentials'):
            device.restart()
        assert try_to_send(device, peer, **old)
        path.write_text('new:secret')
        reload()
        wait_until(lambda: try_to_send(device, peer, **new))
        assert not try_to_send(device, peer, **old)
        device.restart()  # nobody comes back
        peer(zmq.PULL, device.out_address, **new)
        assert try_to_send(device, peer, **new)
        assert not try_to_send(device, peer, **old)
    with pytest.raises(ZMQClosedError):
        device.reload()


@pytest.mark.parametrize('factory', ALL)
def test_reload_of_keys(peer, tmp_path, factory):
    clients = tmp_path / 'clients'
    clients.mkdir()
    zmq.auth.create_certificates(tmp_path, 'server')
    zmq.auth.create_certificates(clients, 'one')
    server = CurveServer(tmp_path / 'server.key_secret', clients)
    with make(factory, STREAMER, curve=server) as device:

        def keys_of(name):
            client = CurveClient(tmp_path / 'server.key', clients / f'{name}.key_secret')
            return {
                'curve_serverkey': client.server,
                'curve_publickey': client.public,
                'curve_secretkey': client._secret,
            }

        peer(zmq.PULL, device.out_address, **keys_of('one'))
        zmq.auth.create_certificates(clients, 'two')
        assert not try_to_send(device, peer, **keys_of('two'))
        device.reload()
        assert try_to_send(device, peer, **keys_of('two'))


def test_reload_without_access_control(context):
    device = make(ThreadDevice)
    device.context_factory = lambda: context
    with device:
        device.reload()


def test_garbage(peer):
    with make(ThreadDevice) as device:
        port = int(device.in_address.rpartition(':')[2])
        with tcp.create_connection(('127.0.0.1', port)) as client:
            client.settimeout(5)
            client.sendall(b'GET / HTTP/1.0\r\n\r\n' * 10)
            with suppress(ConnectionError):
                while client.recv(100):
                    pass


def test_message_that_is_too_large(peer):
    device = make(ThreadDevice, STREAMER)
    device.max_message_size = 1000
    with device:
        sink = peer(zmq.PULL, device.out_address)
        peer(zmq.PUSH, device.in_address).send(b'x' * 1001)
        peer(zmq.PUSH, device.in_address).send(b'x' * 1000)
        assert len(sink.recv()) == 1000
        assert not sink.poll(100)


def test_network_without_curve_is_noted(caplog):
    device = ThreadDevice()
    device.bind_in('*')
    with device:
        assert 'serves the network' in caplog.text
