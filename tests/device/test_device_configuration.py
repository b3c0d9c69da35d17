# SPDX-License-Identifier: ZPL-2.1
"""Devices bind, connect and set options as configured."""

import errno
import socket as tcp

import pytest
import zmq

from checks import wait_until
from devices import ALL, LOCAL, make_device
from pyams_zmq.device import (
    QUEUE,
    STREAMER,
    BackgroundDevice,
    Device,
    MonitoredQueue,
    ProcessDevice,
    ProcessMonitoredQueue,
    Proxy,
    ThreadDevice,
    ThreadMonitoredQueue,
    ThreadProxy,
)
from pyams_zmq.exceptions import ZMQBindError, ZMQClosedError


def reaches(router, identity):
    router.router_mandatory = True
    try:
        router.send_multipart([identity, b'hello'])
    except zmq.ZMQError:
        return False
    return True


def test_connected_sockets_and_options(context, peer):
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


@pytest.mark.parametrize('factory', ALL)
def test_example_of_pyzmq(context, peer, factory):
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
    device.bind_out(LOCAL)
    with device:
        assert device.in_address == f'tcp://[::1]:{port}'
        peer(zmq.PUSH, device.in_address, ipv6=True).send(b'x')
        assert peer(zmq.PULL, device.out_address).recv() == b'x'


def test_option_of_ipv6(peer):
    """`*` binds both families, and a name can resolve to either."""
    device = make_device(ThreadDevice, STREAMER, bind=['out'], options=[('in', zmq.IPV6, 1)])
    device.bind_in('*')
    with device:
        sink = peer(zmq.PULL, device.out_address)
        port = device.in_address.rpartition(':')[2]
        peer(zmq.PUSH, f'tcp://[::1]:{port}', ipv6=True).send(b'x')
        assert sink.recv() == b'x'


def test_reserved_port_is_released():
    device = ThreadDevice()
    port = device.bind_in_to_random_port(LOCAL)
    device.stop()
    with tcp.socket() as other:
        other.bind(('127.0.0.1', port))


def test_random_port_errors():
    device = ThreadDevice()
    with tcp.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        port = taken.getsockname()[1]
        with pytest.raises(ZMQBindError) as error:
            device.bind_in_to_random_port(LOCAL, port, port + 1)
    assert error.value.errno == errno.EADDRINUSE
    with pytest.raises(ZMQBindError, match='Cannot assign'):
        device.bind_in_to_random_port('tcp://192.0.2.1')
    with pytest.raises(ValueError, match='only tcp addresses have a port'):
        device.bind_in_to_random_port('ipc:///tmp/x')
    with pytest.raises(ValueError, match="'tcp://lo': write a numeric"):
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
    device = make_device(ThreadDevice, STREAMER, bind=['out'])
    device.bind_in(address)
    with device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, address)
        source.send(b'x')
        assert sink.recv() == b'x'
        second = ThreadDevice()
        second.bind_timeout = 0
        second.bind_in(address)
        with pytest.raises(ZMQBindError):  # libzmq alone would take the path over
            second.start()
    assert not list(tmp_path.iterdir())


def test_bad_arguments():
    with pytest.raises(ValueError, match='Bad device 7'):
        ThreadDevice(7)
    with pytest.raises(ValueError, match='Bad client address'):
        ThreadDevice(clients='example.org')
    with pytest.raises(ValueError, match='Bad in_type -1'):
        ThreadDevice(QUEUE, -1, zmq.PUSH)
    for mon_type in (-1, zmq.PULL, zmq.SUB):
        with pytest.raises(
            ValueError, match=f'Bad mon_type {int(mon_type)}: use a type that can send'
        ):
            ThreadProxy(zmq.PULL, zmq.PUSH, int(mon_type))
    device = ThreadProxy(zmq.PULL, zmq.PUSH)
    for configure in (device.bind_in, device.connect_out, device.bind_mon, device.connect_mon):
        for address in ('inproc://', None, 'a b', 'http://host:1'):
            with pytest.raises(ValueError, match='Bad ØMQ address'):
                configure(address)


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


@pytest.mark.parametrize('factory', [*ALL, Device])
def test_attributes_of_pyzmq(factory):
    device = factory(STREAMER, zmq.PULL, -1)
    assert (device.device_type, device.in_type, device.out_type) == (STREAMER, zmq.PULL, -1)
    assert (device.daemon, device.done) == (True, False)
    with pytest.raises(ValueError, match='Bad device 7'):
        device.device_type = 7
    with pytest.raises(ValueError, match='Bad in_type -1'):
        device.in_type = -1
    assert (device.device_type, device.in_type, device.out_type) == (STREAMER, zmq.PULL, -1)


@pytest.mark.parametrize('factory', [ThreadMonitoredQueue, ProcessMonitoredQueue])
def test_types_that_are_assigned(peer, factory):
    """As the attributes of pyzmq's devices: they take effect at the next start."""
    device = make_device(factory, zmq.ROUTER, zmq.DEALER, bind=('in', 'out', 'mon'))
    device.start()
    device.device_type = STREAMER
    device.in_type, device.out_type, device.mon_type = zmq.PULL, zmq.PUSH, zmq.PUSH
    with pytest.raises(ValueError, match='Bad mon_type'):
        device.mon_type = zmq.PULL
    device.restart()
    try:
        assert (device.device_type, device.mon_type) == (STREAMER, zmq.PUSH)
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        monitor = peer(zmq.PULL, device.mon_address)

        def has_arrived():
            source.send(b'x')
            assert sink.recv() == b'x'
            return monitor.poll(10)

        wait_until(has_arrived)
        assert monitor.recv_multipart() == [b'in', b'x']
    finally:
        device.stop()


@pytest.mark.parametrize('factory', [*ALL, Device])
def test_device_ends_with_the_program(caplog, factory):
    """Programs that set the attribute for pyzmq work, and are told once that it has no effect."""
    device = factory(STREAMER)
    device.daemon = True
    assert not caplog.records
    for _ in range(2):
        device.daemon = False
        assert device.daemon
    [record] = caplog.records
    assert record.levelname == 'WARNING'
    assert 'ends with the program, daemon = False has no effect: use join' in record.message


def test_class_hierarchy():
    assert issubclass(ThreadMonitoredQueue, MonitoredQueue)
    assert issubclass(ThreadProxy, Proxy)
    for factory in (ThreadDevice, ProcessDevice, ThreadProxy, ProcessMonitoredQueue):
        assert issubclass(factory, BackgroundDevice)
        assert issubclass(factory, Device)


def test_text_of_a_device():
    device = ThreadProxy(zmq.PULL, zmq.PUSH)
    device.bind_in('127.0.0.1:5555')
    device.connect_in('127.0.0.1:5556')
    device.connect_mon('inproc://mon')
    assert str(device) == (
        'ThreadProxy (in tcp://127.0.0.1:5555 tcp://127.0.0.1:5556, out nowhere, mon inproc://mon)'
    )
