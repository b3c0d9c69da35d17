# SPDX-License-Identifier: ZPL-2.1
"""The file of the ipc address of a device is removed."""

import os

import pytest
import zmq

from checks import TIMEOUT, wait_until
from devices import make_device, start_blocked
from handlers import Process
from pyams_zmq.device import ProcessDevice, ThreadDevice, thread
from pyams_zmq.exceptions import ZMQTimeoutError
from pyams_zmq.testing import running


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    """Let devices check their files often."""
    monkeypatch.setattr(thread, 'FILE_INTERVAL', 0.05)


def call(peer, address):
    client = peer(zmq.REQ, address)
    client.send_json(['echo', 1])
    return client.recv_json()


@pytest.mark.parametrize('native', [True, False], ids=['native', 'Python'])
@pytest.mark.parametrize('is_paused', [False, True], ids=['forwards', 'paused'])
@pytest.mark.parametrize('factory', [ThreadDevice, ProcessDevice])
def test_file_of_a_device_is_removed(tmp_path, address, factory, is_paused, native, peer):
    device = factory(zmq.QUEUE)
    device.native = native
    device.bind_in(address)
    path = tmp_path / 'zmq.sock'
    with running(Process()) as process:
        device.connect_out(process.bound_address)
        with device:
            assert call(peer, address) == [200, 1]
            if is_paused:
                device.pause()
            path.unlink()
            wait_until(path.exists)
            if is_paused:
                device.resume()
            assert call(peer, address) == [200, 1]
            assert device.statistics().in_to_out.frames == 6
    assert os.listdir(tmp_path) == []


def test_file_of_a_device_whose_peer_does_not_read(tmp_path, address, peer):
    """It is made when the peer reads again."""
    device = make_device(ThreadDevice, zmq.STREAMER, bind=('in', 'out'))
    device.bind_in(address)
    path = tmp_path / 'zmq.sock'
    sink = start_blocked(device, peer)
    path.unlink()
    with pytest.raises(ZMQTimeoutError):
        device.statistics()

    def drain():
        while sink.poll(0):
            sink.recv()
        return path.exists()

    wait_until(drain)
    source = peer(zmq.PUSH, address)
    source.send(b'last')
    while sink.recv() != b'last':
        assert sink.poll(TIMEOUT * 1000)
    device.stop()
