# SPDX-License-Identifier: ZPL-2.1
"""A device uses no processor while one side cannot send, and then loses and reorders nothing."""

from contextlib import suppress

import pytest
import zmq

from checks import wait_until
from devices import ALL, make_device, start_blocked, wait_until_idle
from pyams_zmq.device import (
    FORWARDER,
    QUEUE,
    STREAMER,
    ProcessDevice,
    ProcessMonitoredQueue,
    ProcessProxy,
    ThreadDevice,
    ThreadMonitoredQueue,
    ThreadProxy,
    spin_watch,
    thread,
)
from pyams_zmq.device.spin_watch import is_spinning

LOW = [(name, option, 10) for name in ('in', 'out') for option in (zmq.SNDHWM, zmq.RCVHWM)]


def fill(source, size=10_000, first=0):
    """Send numbered messages until no more can be sent; return the next number."""
    source.sndtimeo = 500
    number = first
    with suppress(zmq.Again):
        while True:
            source.send(b'%d' % number + b' ' * size)
            number += 1
    return number


def check_numbers(sink, first, end):
    """Check that all messages arrive in the order in which they were sent."""
    numbers = [int(sink.recv_multipart()[-1]) for _ in range(first, end)]
    assert numbers == list(range(first, end))


def start(factory, in_type, out_type, native=True):
    if factory in ALL:
        device = make_device(factory, QUEUE, in_type, out_type, options=LOW, native=native)
    else:
        bind = ('in', 'out', 'mon')
        device = make_device(factory, in_type, out_type, bind=bind, options=LOW, native=native)
    device.start()
    return device


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize(
    'factory',
    [
        *(ThreadDevice, ProcessDevice, ThreadProxy, ProcessProxy),
        *(ThreadMonitoredQueue, ProcessMonitoredQueue),
    ],
)
@pytest.mark.parametrize(
    ('types', 'sender', 'reader', 'backwards'),
    [
        ((zmq.ROUTER, zmq.DEALER), zmq.DEALER, zmq.DEALER, False),
        ((zmq.PULL, zmq.PUSH), zmq.PUSH, zmq.PULL, False),
        ((zmq.DEALER, zmq.DEALER), zmq.DEALER, zmq.DEALER, True),
    ],
    ids=['queue', 'streamer', 'replies'],
)
def test_nobody_to_send_to(peer, factory, types, sender, reader, backwards, native):
    device = start(factory, *types, native=native)
    addresses = [device.in_address, device.out_address]
    if backwards:
        addresses.reverse()
    source = peer(sender, addresses[0], sndhwm=10)
    end = fill(source)
    wait_until_idle(device)
    device.pause()
    device.resume()
    sink = peer(reader, addresses[1])
    check_numbers(sink, 0, end)
    statistics = device.statistics()
    frames = 2 if types[0] == zmq.ROUTER else 1
    assert statistics[backwards].frames == end * frames
    assert statistics[not backwards].frames == 0
    device.stop()


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('factory', ALL)
def test_worker_that_takes_nothing(peer, factory, native):
    device = start(factory, zmq.PULL, zmq.PUSH, native=native)
    sink = peer(zmq.PULL, device.out_address, rcvhwm=10)
    source = peer(zmq.PUSH, device.in_address, sndhwm=10)
    end = fill(source)
    wait_until_idle(device)
    check_numbers(sink, 0, end // 2)  # slow: the rest waits again
    wait_until_idle(device)
    check_numbers(sink, end // 2, end)
    assert device.statistics().in_to_out.frames == end
    device.stop()
    assert device.done


def test_stop_while_a_message_waits(peer):
    device = start(ThreadDevice, zmq.PULL, zmq.PUSH)
    fill(peer(zmq.PUSH, device.in_address, sndhwm=10))
    wait_until(lambda: device.launcher.uses_python)
    wait_until(lambda: device.launcher.python_loop.has_message)
    device.stop()
    assert device.done


@pytest.mark.parametrize('fast', [True, False])
def test_loop_of_libzmq_goes_on(peer, monkeypatch, fast):
    """When no message has had to wait for a time, or at once when messages come fast."""
    monkeypatch.setattr(spin_watch, 'CALM', 3600 if fast else 0.2)
    monkeypatch.setattr(spin_watch, 'FAST', 0 if fast else 1e9)
    monkeypatch.setattr(spin_watch, 'MOST', 1e9)
    device = start(ThreadDevice, zmq.PULL, zmq.PUSH)
    source = peer(zmq.PUSH, device.in_address, sndhwm=10)
    end = fill(source)
    wait_until(lambda: device.launcher.uses_python)
    sink = peer(zmq.PULL, device.out_address)
    check_numbers(sink, 0, end)
    wait_until(lambda: not device.launcher.uses_python)
    for number in range(end, end + 100):
        source.send(b'%d' % number)
    check_numbers(sink, end, end + 100)
    assert device.statistics().in_to_out.frames == end + 100
    device.stop()
    assert device.statistics().in_to_out.frames == end + 100


def test_message_that_waits_is_not_overtaken(peer):
    device = start(ThreadDevice, zmq.PULL, zmq.PUSH)
    source = peer(zmq.PUSH, device.in_address, sndhwm=10)
    end = fill(source)
    wait_until(lambda: device.launcher.python_loop.has_message)
    device.launcher.use_loop(python=False)
    wait_until(lambda: device.launcher.uses_python)
    check_numbers(peer(zmq.PULL, device.out_address), 0, end)
    device.stop()


def test_watch_leaves_a_paused_device_alone():
    with make_device(ThreadDevice) as device:
        device.pause()
        device.launcher.use_loop(python=True)
        assert not device.launcher.uses_python
    device.launcher.use_loop(python=True)
    assert not device.launcher.uses_python


def test_watch_leaves_a_loop_that_forwards_alone(peer, monkeypatch):
    monkeypatch.setattr(spin_watch, 'INTERVAL', 3600)
    monkeypatch.setattr(thread, 'WATCH_TIMEOUT', 10)
    with make_device(ThreadDevice, STREAMER) as device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        for _ in range(300):
            source.send(b'x')
        for _ in range(300):
            sink.recv()
        device.launcher._watch._step(1.0, 1.0, 0.11)
        assert not device.launcher.uses_python


def test_watch_does_not_wait_for_a_loop_that_waits_for_a_peer(peer):
    device = make_device(ThreadDevice, STREAMER)
    sink = start_blocked(device, peer)
    before = device.launcher.count_frames()
    sink.recv()
    assert device.launcher.count_frames() >= before
    device.stop()


@pytest.mark.parametrize(
    ('share', 'rate', 'expected'),
    [
        (1.0, 0, True),
        (1.0, 20_000, True),  # it goes round between the messages of a slow worker
        (1.0, 1_000_000, False),
        (0.3, 0, True),  # other programs use the processors
        (0.3, 20_000, False),  # it wakes up for each message
        (0.05, 0, False),
    ],
)
def test_is_spinning(share, rate, expected):
    assert is_spinning(share, rate) is expected


def test_subscriber_that_blocks_a_forwarder(peer):
    """With XPUB_NODROP the socket reports that it can send, and cannot."""
    device = make_device(
        ThreadDevice, FORWARDER, options=[*LOW, ('out', zmq.XPUB_NODROP, 1), ('in', zmq.RCVHWM, 0)]
    )
    with device:
        subscriber = peer(zmq.SUB, device.out_address, rcvhwm=10)
        publisher = peer(zmq.PUB, device.in_address, sndhwm=0)
        wait_until(lambda: publisher.send(b'0') or subscriber.poll(10))
        for number in range(1, 2000):
            publisher.send(b'%d' % number + b' ' * 10_000)
        wait_until(lambda: device.launcher.python_loop.has_message)
        wait_until_idle(device)
        while int(subscriber.recv()) == 0:
            pass
        check_numbers(subscriber, 2, 2000)
