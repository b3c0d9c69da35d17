# SPDX-License-Identifier: ZPL-2.1
"""Devices for tests: on free ports, blocked by a peer, or failing."""

import os
import time
from contextlib import suppress

import zmq

from checks import wait_until
from pyams_zmq.device import ProcessDevice, ProcessProxy, ThreadDevice, ThreadProxy

LOCAL = 'tcp://127.0.0.1'
ALL = [ThreadDevice, ProcessDevice]
NOT_SUPPORTED = 'not supported'


def make_device(factory, *args, bind=('in', 'out'), options=(), native=True, **kwargs):
    """Make a device whose sockets are bound to free ports."""
    device = factory(*args, **kwargs)
    device.native = native
    for name, option, value in options:
        getattr(device, f'setsockopt_{name}')(option, value)
    for name in bind:
        getattr(device, f'bind_{name}')(LOCAL)
    return device


def wait_until_idle(device):
    """Wait until a device, or the process of the tests in which it runs, uses no processor."""
    pid = getattr(device.launcher, 'pid', os.getpid())
    wait_until(lambda: _use_in(pid, 0.5) < 0.05)


def _use_in(pid, seconds):
    before = _processor_time(pid)
    time.sleep(seconds)  # the time in which it is measured
    return _processor_time(pid) - before


def _processor_time(pid):
    with open(f'/proc/{pid}/stat', encoding='ascii') as file:
        numbers = file.read().rpartition(')')[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf('SC_CLK_TCK')


def start_blocked(device, peer):
    """Start a streamer whose loop blocks during a burst; return the peer that does not read."""
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


class FailingThreadProxy(ThreadProxy):
    """Fails at the first message because its monitor is a socket that cannot send."""

    _is_native = False


class FailingProcessProxy(ProcessProxy):
    """Fails at the first message, in a process."""

    _is_native = False


def start_failing(factory, peer, native=True, paused=False):
    """Start a device that fails when messages come in; if it is paused, when it goes on."""
    proxy = FailingProcessProxy if factory is ProcessDevice else FailingThreadProxy
    device = make_device(proxy, zmq.PULL, zmq.PUSH)
    device._mon.type = zmq.PULL
    device._is_native = native
    device.start()
    peer(zmq.PULL, device.out_address)
    device.pause()
    source = peer(zmq.PUSH, device.in_address, sndhwm=1)
    for _ in range(500):
        source.send(b'x')
    if not paused:
        device.resume()
    return device


def check_forwarding(device, peer):
    """Check that a forwarder serves a new subscriber."""
    subscriber = peer(zmq.SUB, device.out_address)
    publisher = peer(zmq.PUB, device.in_address)

    def has_arrived():
        publisher.send(b'news')
        return subscriber.poll(10)

    wait_until(has_arrived)
    assert subscriber.recv() == b'news'
