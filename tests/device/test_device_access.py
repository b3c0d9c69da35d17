# SPDX-License-Identifier: ZPL-2.1
"""Devices let in only the peers that their access rules allow."""

import os
import signal
import socket as tcp
from contextlib import suppress

import pytest
import zmq
import zmq.auth

from checks import wait_until
from devices import ALL, make_device
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.device import STREAMER, ProcessDevice, ThreadDevice
from pyams_zmq.exceptions import ZMQClosedError


def try_to_send(device, peer, **options):
    """Return True if a peer is let in."""
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
    with make_device(factory, STREAMER, auth={'editor': 'secret'}) as device:
        good = {'plain_username': b'editor', 'plain_password': b'secret'}
        peer(zmq.PULL, device.out_address, **good)
        assert try_to_send(device, peer, **good)
        assert not try_to_send(device, peer)
        assert not try_to_send(device, peer, plain_username=b'editor', plain_password=b'x')


def test_networks(peer):
    with make_device(ThreadDevice, STREAMER, clients='10.0.0.0/8') as device:
        assert not try_to_send(device, peer)
    with make_device(ThreadDevice, STREAMER, clients='localhost') as device:
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
    with make_device(ThreadDevice, STREAMER, curve=server) as device:
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
    with make_device(factory, STREAMER, auth=path) as device:
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
        device.restart()  # the removed user is not let in again
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
        assert not try_to_send(device, peer, **keys_of('two'))
        device.reload()
        assert try_to_send(device, peer, **keys_of('two'))


def test_reload_without_access_control(context):
    device = make_device(ThreadDevice)
    device.context_factory = lambda: context
    with device:
        device.reload()


def test_garbage(peer):
    with make_device(ThreadDevice) as device:
        port = int(device.in_address.rpartition(':')[2])
        with tcp.create_connection(('127.0.0.1', port)) as client:
            client.settimeout(5)
            client.sendall(b'GET / HTTP/1.0\r\n\r\n' * 10)
            with suppress(ConnectionError):
                while client.recv(100):
                    pass


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
