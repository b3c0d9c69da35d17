# SPDX-License-Identifier: ZPL-2.1
"""Devices pause, resume and count."""

import os
import signal
import threading
import time
from contextlib import suppress

import pytest
import zmq

from checks import wait_until
from devices import ALL, make_device, start_blocked
from pyams_zmq.device import STREAMER, ProcessDevice, ThreadDevice
from pyams_zmq.device.proxy import PAUSE, STATISTICS, TERMINATE, PythonLoop, decode_counts
from pyams_zmq.exceptions import ZMQTimeoutError


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('factory', ALL)
def test_pause(peer, factory, native):
    with make_device(factory, STREAMER, native=native) as device:
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
    """Pauses do not lose counts."""
    with make_device(factory, STREAMER) as device:
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


def test_commands_while_a_peer_does_not_read(peer):
    device = make_device(ThreadDevice, STREAMER, native=False)
    sink = start_blocked(device, peer)
    frames = device.statistics().in_to_out.frames
    device.pause()
    device.resume()
    for _ in range(frames + 10):  # no waiting message is lost
        sink.recv()
    wait_until(lambda: device.statistics().in_to_out.frames > frames)
    device.stop()


@pytest.mark.parametrize('factory', ALL)
def test_late_answers(peer, factory, monkeypatch):
    device = make_device(factory, STREAMER)
    monkeypatch.setattr('pyams_zmq.device.thread.COMMAND_TIMEOUT', 0.1)
    sink = start_blocked(device, peer)
    for command in (device.statistics, device.pause, device.pause):
        with pytest.raises(ZMQTimeoutError, match='does not read'):
            command()
    device.resume()
    received = []

    def is_drained():
        while sink.poll(100):
            received.append(sink.recv())
        with suppress(ZMQTimeoutError):
            return device.statistics().in_to_out.frames == len(received)

    wait_until(is_drained)
    device.stop()


@pytest.mark.parametrize('factory', ALL)
def test_signals_do_not_disturb_the_count(peer, factory):
    with make_device(factory, STREAMER) as device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        source.send(b'x')
        assert sink.recv() == b'x'
        pid = os.getpid() if factory is ThreadDevice else device.launcher.pid
        former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.kill(pid, signal.SIGHUP)
        signal.signal(signal.SIGHUP, former)
        assert device.statistics().in_to_out.frames == 1


def test_exact_statistics_before_the_end(context):
    """The loop in Python forwards nothing after `PAUSE`."""
    ends = []
    for number in range(3):
        near, far = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        near.rcvtimeo = 5000
        far.bind(f'inproc://{number}')
        near.connect(f'inproc://{number}')
        ends.append((near, far))
    (control, far_control), (source, far_source), (sink, far_sink) = ends
    loop = threading.Thread(target=PythonLoop(far_source, far_sink).run, args=(far_control,))
    loop.start()
    source.send(b'x')
    assert sink.recv() == b'x'
    control.send(PAUSE)
    control.send(STATISTICS)
    assert decode_counts(control.recv_multipart())[:3] == (1, 1, 1)
    source.send(b'y')
    control.send(b'unknown')  # has no effect
    control.send(STATISTICS)
    control.send(TERMINATE)
    loop.join()
    assert decode_counts(control.recv_multipart())[:3] == (1, 1, 1)
    assert far_source.recv() == b'y'
    for socket in (*ends[0], *ends[1], *ends[2]):
        socket.close()
