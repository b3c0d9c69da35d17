# SPDX-License-Identifier: ZPL-2.1
"""Devices start, restart and stop."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import ExitStack, suppress

import pytest
import zmq

from checks import wait_until
from devices import ALL, LOCAL, make_device, start_blocked
from pyams_zmq.device import STREAMER, Device, ThreadDevice
from pyams_zmq.device.spin_watch import SpinWatch
from pyams_zmq.exceptions import ZMQClosedError, ZMQStartError, ZMQTimeoutError


def test_in_the_foreground(peer):
    device = make_device(Device, STREAMER)
    thread = threading.Thread(target=device.start)
    thread.start()
    wait_until(lambda: device.in_address)
    sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
    source.send(b'x')
    assert sink.recv() == b'x'
    device.stop()
    thread.join()


def test_restart_in_the_foreground(peer):
    """A restart does not end the first call of `start`."""
    device = make_device(Device, STREAMER)
    thread = threading.Thread(target=device.start)
    thread.start()
    wait_until(lambda: device.in_address)
    launcher = device.launcher
    device.restart()
    assert device.launcher is not launcher
    thread.join(0.2)
    assert thread.is_alive()
    assert not device.done
    device.stop()
    thread.join()


@pytest.mark.parametrize('factory', ALL)
def test_restart(peer, factory):
    device = make_device(factory, STREAMER)
    assert (device.addresses, device.launcher, device.done) == ({}, None, False)
    device.join()
    device.stop()
    assert device.statistics().in_to_out.frames == 0
    device.start()
    addresses, launcher = device.addresses, device.launcher
    sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
    source.send(b'a')
    assert sink.recv() == b'a'
    device.restart()
    try:
        assert device.addresses == addresses
        assert device.launcher is not launcher
        assert not launcher.is_alive()
        source.send(b'b')
        assert sink.recv() == b'b'
        assert device.statistics().in_to_out.frames == 1
        with pytest.raises(ZMQStartError, match='is already running'):
            device.start()
        device.join(0.01)
        assert not device.done
    finally:
        device.stop()
    device.stop()
    for command in (device.pause, device.resume):
        with pytest.raises(ZMQClosedError, match='is not running'):
            command()


@pytest.mark.parametrize('factory', ALL)
def test_two_starts_at_once(factory):
    """One of them is refused; else one device could not be stopped."""
    for _ in range(5):
        device = make_device(factory)
        errors = []
        barrier = threading.Barrier(2)

        def start(device=device, barrier=barrier, errors=errors):
            barrier.wait()
            try:
                device.start()
            except ZMQStartError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == [f'{device} is already running: stop it first, or restart it']
        device.stop()


@pytest.mark.parametrize('factory', ALL)
def test_stop_while_it_waits_for_a_peer(peer, factory):
    device = make_device(factory, STREAMER, options=[('out', zmq.LINGER, 0)])
    start_blocked(device, peer)
    device.stop()
    assert device.done
    assert factory is ThreadDevice or device.launcher.exitcode == 0  # it was not killed
    device.statistics()


@pytest.mark.parametrize('command', ['stop', 'statistics'])
@pytest.mark.parametrize('factory', ALL)
def test_signal_handler_that_stops_the_device(peer, factory, command):
    """It interrupts a command that holds the lock which the device needs to end."""
    device = make_device(factory, STREAMER, options=[('out', zmq.LINGER, 0)])
    start_blocked(device, peer)
    handled = []

    def stop(num, frame):
        device.stop()
        handled.append(num)

    former = signal.signal(signal.SIGUSR1, stop)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    with suppress(ZMQTimeoutError):
        getattr(device, command)()
    timer.join()
    signal.signal(signal.SIGUSR1, former)
    assert handled == [signal.SIGUSR1]
    assert device.done
    device.stop()


def test_signal_handler_within_a_command(peer):
    with make_device(ThreadDevice) as device:
        with device.launcher._command():  # what a signal handler interrupts
            assert device.statistics().in_to_out.frames == 0
            device.stop()
            assert not device.done
        assert device.done


@pytest.mark.parametrize('holder', ['statistics', 'stop'])
def test_signal_handler_while_another_thread_has_the_lock(monkeypatch, holder):
    """Only the command that was interrupted stops the device: the device may need the other."""
    device = make_device(ThreadDevice)
    device.start()
    launcher, main = device.launcher, threading.get_ident()
    has_lock, handled = threading.Event(), threading.Event()
    stopped_by = []
    stop = launcher.stop
    monkeypatch.setattr(
        launcher, 'stop', lambda: stopped_by.append(threading.get_ident()) or stop()
    )

    def hold():
        with ExitStack() as stack:
            if holder == 'stop':
                stack.enter_context(device._lock)
            with launcher._command():
                has_lock.set()
                wait_until(lambda: main in launcher._threads_in_command)
                os.kill(os.getpid(), signal.SIGUSR1)
                handled.wait(10)

    def handle(num, frame):
        device.stop()
        handled.set()

    former = signal.signal(signal.SIGUSR1, handle)
    thread = threading.Thread(target=hold)
    thread.start()
    has_lock.wait(10)
    device.statistics()
    thread.join()
    signal.signal(signal.SIGUSR1, former)
    assert handled.is_set()
    assert device.done
    assert set(stopped_by) == {main}


def test_watch_that_stops_the_device(monkeypatch):
    """As a finalizer does that runs in its thread: the device does not wait for the watch."""
    with make_device(ThreadDevice) as device:
        monkeypatch.setattr(SpinWatch, '_step', lambda watch, *_: device.stop())
        device.join(10)
        assert device.done


def test_watch_after_the_end():
    with make_device(ThreadDevice) as device:
        watch = device.launcher._watch
    watch._look()


@pytest.mark.parametrize('factory', ALL)
def test_command_after_the_end(factory):
    """The device ends between the check that it is running and the command."""
    device = make_device(factory)
    device.start()
    device.pause()
    device.stop()
    with pytest.raises(ZMQClosedError, match='is not running'):
        device.launcher.resume()


@pytest.mark.parametrize('factory', ALL)
def test_end_of_the_program(context, tmp_path, factory):
    """A device that was not stopped sends what it has received, and removes its files."""
    program = f"""
    import sys, zmq
    from pyams_zmq.device import STREAMER, {factory.__name__}
    device = {factory.__name__}(STREAMER)
    device.bind_in('ipc://{tmp_path}/in')
    device.connect_out(sys.argv[1])
    device.start()
    with zmq.Context() as context, context.socket(zmq.PUSH) as source:
        source.connect(device.in_address)
        source.send(b'x' * 1_000_000)
        while not device.statistics().in_to_out.bytes:
            pass
    """
    with context.socket(zmq.PULL) as sink:
        sink.rcvtimeo = 5000
        sink.bind(f'{LOCAL}:*')
        result = subprocess.run(
            [
                sys.executable,
                '-W',
                'ignore:pkg_resources is deprecated',  # Pyramid 2 imports it
                '-c',
                textwrap.dedent(program),
                sink.last_endpoint,
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert (result.returncode, result.stderr) == (0, '')
        assert len(sink.recv()) == 1_000_000
    assert not list(tmp_path.iterdir())
