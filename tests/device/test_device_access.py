# SPDX-License-Identifier: ZPL-2.1
"""Devices let in only the peers that their access rules allow."""

import os
import signal
import socket as tcp
from contextlib import suppress

import pytest
import zmq
import zmq.auth
from zmq.utils.monitor import recv_monitor_message

from checks import wait_until
from devices import ALL, make_device
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.device import STREAMER, ProcessDevice, ThreadDevice
from pyams_zmq.exceptions import ZMQClosedError, ZMQStartError

HANDSHAKE_ENDED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


def is_let_in(device, context, **options):
    """Return True if a peer can connect; then its message is forwarded."""
    frames = device.statistics().in_to_out.frames
    with context.socket(zmq.PUSH) as source:
        source.linger = 0
        for option, value in options.items():
            setattr(source, option, value)
        with source.get_monitor_socket(HANDSHAKE_ENDED) as monitor:
            source.connect(device.in_address)
            assert monitor.poll(5000)
            event = recv_monitor_message(monitor)['event']
        source.disable_monitor()
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            source.send(b'x')
            wait_until(lambda: device.statistics().in_to_out.frames > frames)
        return event == zmq.EVENT_HANDSHAKE_SUCCEEDED


@pytest.mark.parametrize('factory', ALL)
def test_users(context, peer, factory):
    with make_device(factory, STREAMER, auth={'editor': 'secret'}) as device:
        good = {'plain_username': b'editor', 'plain_password': b'secret'}
        peer(zmq.PULL, device.out_address, **good)
        assert is_let_in(device, context, **good)
        assert not is_let_in(device, context)
        assert not is_let_in(device, context, plain_username=b'editor', plain_password=b'x')


def test_attributes():
    device = ThreadDevice(auth='editor:secret', clients='localhost 10.0.0.0/8')
    assert device.passwords == {'editor': 'secret'}
    assert device.clients == ('localhost', '10.0.0.0/8')
    device = ThreadDevice()
    assert (device.passwords, device.clients, device.curve) == (None, None, None)


@pytest.mark.parametrize('factory', ALL)
def test_attributes_of_a_running_device(context, factory):
    """They act, or raise an error where the device runs in another process."""
    with make_device(factory, STREAMER, auth='editor:old', clients='localhost') as device:
        if factory is ProcessDevice:
            for name, value in (('passwords', 'editor:new'), ('clients', '192.0.2.1')):
                with pytest.raises(ZMQStartError, match='has started'):
                    setattr(device, name, value)
            with pytest.raises(TypeError, match='does not support item assignment'):
                device.passwords['editor'] = 'new'
            device.stop()
        device.passwords = 'editor:new'
        device.clients = '192.0.2.1'
        if factory is ProcessDevice:
            device.start()
        new = {'plain_username': b'editor', 'plain_password': b'new'}
        assert not is_let_in(device, context, **new)
    device.clients = 'localhost'
    device.start()
    try:
        with context.socket(zmq.PULL) as sink:
            sink.plain_username, sink.plain_password = b'editor', b'new'
            sink.connect(device.out_address)
            assert is_let_in(device, context, **new)
        assert not is_let_in(device, context, plain_username=b'editor', plain_password=b'old')
    finally:
        device.stop()


def test_attributes_of_a_device_with_a_shared_context(context):
    """Nothing would ask the rules."""
    device = ThreadDevice(STREAMER)
    device.context_factory = lambda: context
    device.bind_in('127.0.0.1')
    device.bind_out('127.0.0.1')
    device.start()
    try:
        for name, value in (('passwords', 'editor:new'), ('clients', '192.0.2.1')):
            with pytest.raises(ValueError, match='need a context of the device'):
                setattr(device, name, value)
    finally:
        device.stop()


def test_networks(context, peer):
    with make_device(ThreadDevice, STREAMER, clients='10.0.0.0/8') as device:
        assert not is_let_in(device, context)
    with make_device(ThreadDevice, STREAMER, clients='localhost') as device:
        peer(zmq.PULL, device.out_address)
        assert is_let_in(device, context)


def test_keys(context, peer, tmp_path):
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
    with make_device(ThreadDevice, STREAMER, curve=server) as device:
        peer(zmq.PULL, device.out_address, **keys)
        assert is_let_in(device, context, **keys)
        assert not is_let_in(device, context)


@pytest.mark.parametrize(
    ('factory', 'by_signal'),
    [(ThreadDevice, False), (ProcessDevice, False), (ProcessDevice, True)],
)
def test_reload(context, peer, tmp_path, caplog, factory, by_signal):
    path = tmp_path / 'users'
    path.write_text('old:secret')
    old = {'plain_username': b'old', 'plain_password': b'secret'}
    new = {'plain_username': b'new', 'plain_password': b'secret'}
    with make_device(factory, STREAMER, auth=path) as device:
        peer(zmq.PULL, device.out_address, **old)
        assert is_let_in(device, context, **old)
        assert not is_let_in(device, context, **new)

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
        assert is_let_in(device, context, **old)
        path.write_text('new:secret')
        reload()
        wait_until(lambda: is_let_in(device, context, **new))
        assert not is_let_in(device, context, **old)
        device.restart()  # the removed user is not let in again
        peer(zmq.PULL, device.out_address, **new)
        assert is_let_in(device, context, **new)
        assert not is_let_in(device, context, **old)
    with pytest.raises(ZMQClosedError):
        device.reload()


@pytest.mark.parametrize('factory', ALL)
def test_reload_of_keys(context, peer, tmp_path, factory):
    clients = tmp_path / 'clients'
    clients.mkdir()
    zmq.auth.create_certificates(tmp_path, 'server')
    zmq.auth.create_certificates(clients, 'one')
    server = CurveServer(tmp_path / 'server.key_secret', clients)
    with make_device(factory, STREAMER, curve=server) as device:

        def keys_of(name):
            client = CurveClient(tmp_path / 'server.key', clients / f'{name}.key_secret')
            return {
                'curve_serverkey': client.server,
                'curve_publickey': client.public,
                'curve_secretkey': client._secret,
            }

        peer(zmq.PULL, device.out_address, **keys_of('one'))
        zmq.auth.create_certificates(clients, 'two')
        assert not is_let_in(device, context, **keys_of('two'))
        device.reload()
        assert is_let_in(device, context, **keys_of('two'))


def test_reload_without_access_control(context, peer):
    device = make_device(ThreadDevice, STREAMER)
    device.context_factory = lambda: context
    with device:
        device.reload()
        peer(zmq.PULL, device.out_address)
        assert is_let_in(device, context)


def test_garbage(context, peer):
    """The device drops the connection, and serves others."""
    with make_device(ThreadDevice, STREAMER) as device:
        port = int(device.in_address.rpartition(':')[2])
        with tcp.create_connection(('127.0.0.1', port)) as client:
            client.settimeout(5)
            client.sendall(b'GET / HTTP/1.0\r\n\r\n' * 10)
            with suppress(ConnectionError):
                while client.recv(100):
                    pass
        peer(zmq.PULL, device.out_address)
        assert is_let_in(device, context)


def test_message_that_is_too_large(peer):
    device = make_device(ThreadDevice, STREAMER)
    device.max_message_size = 1000
    with device:
        sink = peer(zmq.PULL, device.out_address)
        peer(zmq.PUSH, device.in_address).send(b'x' * 1001)
        peer(zmq.PUSH, device.in_address).send(b'x' * 1000)
        assert len(sink.recv()) == 1000
        assert not sink.poll(100)


def test_network_without_curve_is_logged(caplog):
    device = ThreadDevice()
    device.bind_in('*')
    with device:
        assert 'serves the network' in caplog.text
