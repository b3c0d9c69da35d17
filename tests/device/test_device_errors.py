# SPDX-License-Identifier: ZPL-2.1
"""Devices raise their errors in the program that owns them."""

import errno
import threading

import pytest
import zmq

from checks import wait_until
from devices import ALL, NOT_SUPPORTED, make_device, start_failing
from pyams_zmq.device import ThreadDevice
from pyams_zmq.exceptions import ZMQBindError


@pytest.mark.parametrize('factory', ALL)
def test_address_in_use(factory):
    device = make_device(factory)
    with device:
        second = make_device(factory, bind=())
        second.bind_timeout = 0.1
        second.bind_in(device.in_address)
        with pytest.raises(ZMQBindError) as error:
            second.start()
    assert error.value.errno == errno.EADDRINUSE
    assert error.value.filename == device.in_address
    with second:  # now it is free
        assert second.in_address == device.in_address


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
    """The command comes before or after the failure."""

    def disturb():
        for _ in range(100_000):
            getattr(device, command)()
            device.resume()

    device = start_failing(factory, peer, native=native)
    with pytest.raises(zmq.ZMQError, match=NOT_SUPPORTED):
        disturb()
    wait_until(lambda: device.done)


@pytest.mark.parametrize('name', ['pyams_zmq authenticator', 'pyams_zmq ThreadDevice'])
def test_thread_that_cannot_start(monkeypatch, name):
    """The error is raised, and nothing is left open."""

    def start(thread):
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        original(thread)

    device = make_device(ThreadDevice)
    original = threading.Thread.start
    monkeypatch.setattr(threading.Thread, 'start', start)
    with pytest.raises(RuntimeError, match='new thread'):
        device.start()
    monkeypatch.undo()
    with device:
        assert not device.done


@pytest.mark.parametrize('factory', ALL)
def test_error_in_the_with_block(factory):
    device = make_device(factory)
    with pytest.raises(LookupError), device:
        raise LookupError
    assert device.done


def test_failing_device_and_a_signal_handler(peer):
    """The handler interrupts a command, whose lock the device needs to end."""
    device = start_failing(ThreadDevice, peer, paused=True)
    with device.launcher._command():
        device.resume()

        def disturb():
            while True:
                device.pause()
                device.resume()

        for call in (disturb, device.pause, device.resume, device.statistics):
            with pytest.raises(zmq.ZMQError, match=NOT_SUPPORTED):
                call()
    with pytest.raises(zmq.ZMQError, match=NOT_SUPPORTED):
        device.join(10)
    assert device.done
