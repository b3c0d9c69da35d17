# SPDX-License-Identifier: ZPL-2.1
"""The monitor of a device gets copies and never blocks."""

import threading

import pytest
import zmq

from checks import wait_until
from devices import LOCAL, make_device
from pyams_zmq.device import (
    ProcessMonitoredQueue,
    ProcessProxy,
    ThreadMonitoredQueue,
    ThreadProxy,
    monitored_queue,
)


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
    with make_device(
        ThreadProxy, zmq.PULL, zmq.PUSH, mon_type, bind=['in', 'out', 'mon']
    ) as device:
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
        device = make_device(factory, zmq.ROUTER, zmq.DEALER, zmq.PUSH, 'to', b'fro')
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


def test_monitored_queue_function(context, peer):
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
