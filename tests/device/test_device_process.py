# SPDX-License-Identifier: ZPL-2.1
"""A device in a process ends with its owner and reports its end."""

import errno
import multiprocessing
import os
import pickle
import signal
import socket as tcp
import threading
import time
from multiprocessing.context import ForkProcess

import pytest
import zmq

from checks import freeze, wait_until
from devices import ALL, LOCAL, make_device
from pyams_zmq.device import STREAMER, ProcessDevice, ThreadDevice
from pyams_zmq.exceptions import ZMQClosedError, ZMQStartError, ZMQTimeoutError
from pyams_zmq.process.channel import open_channel


@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_process(num):
    device = make_device(ProcessDevice)
    device.start()
    os.kill(device.launcher.pid, num)
    device.join(5)
    assert device.launcher.exitcode == 0
    with pytest.raises(ZMQClosedError):
        device.pause()


def test_killed_process():
    device = make_device(ProcessDevice)
    device.start()
    device.launcher.kill()
    with pytest.raises(ZMQClosedError, match='exit code -9'):
        device.join(5)
    with pytest.raises(ZMQClosedError, match='exit code -9'):
        device.statistics()
    device.restart()
    device.stop()


def test_process_killed_during_a_command():
    device = make_device(ProcessDevice)
    device.start()
    freeze(device.launcher.pid)
    timer = threading.Timer(0.2, device.launcher.kill)  # by then the command waits
    timer.start()
    with pytest.raises(ZMQClosedError, match='exit code -9'):
        device.pause()
    timer.join()


def test_process_that_does_not_answer(monkeypatch):
    monkeypatch.setattr('pyams_zmq.device.process.COMMAND_TIMEOUT', -0.9)
    with make_device(ProcessDevice) as device:
        freeze(device.launcher.pid)
        with pytest.raises(ZMQTimeoutError, match='does not answer'):
            device.statistics()
        os.kill(device.launcher.pid, signal.SIGCONT)


def test_killed_process_whose_channel_another_fork_holds_open(monkeypatch):
    """A fork during the start inherits the end of the channel, which is not closed then."""
    others = []

    def open_and_fork():
        channel = open_channel()
        others.append(ForkProcess(target=time.sleep, args=(3600,)))
        others[-1].start()
        return channel

    monkeypatch.setattr('pyams_zmq.process.base.open_channel', open_and_fork)
    device = make_device(ProcessDevice)
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
    monkeypatch.setattr('pyams_zmq.device.process.START_TIMEOUT', 0.2)
    first = make_device(ThreadDevice)
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
    device = make_device(ProcessDevice)
    device.start()
    pipe.send(device.in_address)
    time.sleep(3600)  # until the test kills this process


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

    wait_until(is_free)
    reader.close()
    writer.close()


def use_the_device_of_the_parent(device):
    device.stop()
    assert device.statistics().in_to_out.frames == 0
    with pytest.raises(ZMQClosedError):
        device.pause()


@pytest.mark.parametrize('factory', ALL)
def test_fork_of_the_owner_cannot_control_the_device(peer, factory):
    with make_device(factory, STREAMER) as device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        child = ForkProcess(target=use_the_device_of_the_parent, args=(device,))
        child.start()
        child.join()
        assert child.exitcode == 0
        source.send(b'x')
        assert sink.recv() == b'x'
        assert device.statistics().in_to_out.frames == 1


def test_process_closes_the_sockets_of_its_owner(tmp_path):
    one = make_device(ThreadDevice)
    one.bind_in(f'ipc://{tmp_path}/in')
    one.start()
    other = make_device(ProcessDevice)
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
    """Can be pickled, but not unpickled."""

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
