# SPDX-License-Identifier: ZPL-2.1
"""Devices use a context of their own, or the one they are given."""

import subprocess
import sys
import textwrap
import threading

import pytest
import zmq

from devices import make_device, start_blocked
from pyams_zmq.device import STREAMER, ProcessDevice, ThreadDevice
from pyams_zmq.exceptions import ZMQClosedError, ZMQTimeoutError


def test_inproc(context):
    device = ThreadDevice(STREAMER)
    device.bind_in('inproc://in')
    device.bind_out('inproc://out')
    with device, zmq.Context.instance().socket(zmq.PUSH) as source:
        source.connect('inproc://in')
        with zmq.Context.instance().socket(zmq.PULL) as sink:
            sink.connect('inproc://out')
            source.send(b'x')
            assert sink.recv() == b'x'


def test_inproc_peer():
    device = ThreadDevice(STREAMER)
    device.bind_in('inproc://in')
    device.connect_out('inproc://sink')
    with zmq.Context.instance().socket(zmq.PULL) as sink:
        sink.bind('inproc://sink')
        with device, zmq.Context.instance().socket(zmq.PUSH) as source:
            source.connect('inproc://in')
            source.send(b'x')
            assert sink.recv() == b'x'


def test_context_factory(context, peer):
    device = make_device(ThreadDevice, STREAMER)
    device.context_factory = lambda: context
    with device:
        sink, source = peer(zmq.PULL, device.out_address), peer(zmq.PUSH, device.in_address)
        source.send(b'x')
        assert sink.recv() == b'x'
    assert not context.closed


def test_end_of_a_foreign_context():
    foreign = zmq.Context()
    device = make_device(ThreadDevice)
    device.context_factory = lambda: foreign
    device.start()
    foreign.term()
    device.join(5)
    assert device.done
    with pytest.raises(ZMQClosedError):
        device.pause()
    device.stop()


@pytest.mark.parametrize('command', ['pause', 'statistics', 'stop'])
def test_end_of_a_foreign_context_during_a_command(peer, monkeypatch, command):
    monkeypatch.setattr('pyams_zmq.device.thread.COMMAND_TIMEOUT', 10)
    monkeypatch.setattr('pyams_zmq.device.thread.STOP_TIMEOUT', 10)
    foreign = zmq.Context()
    device = make_device(ThreadDevice, STREAMER, options=[('out', zmq.LINGER, 0)])
    device.context_factory = lambda: foreign
    start_blocked(device, peer)
    timer = threading.Timer(0.2, foreign.term)  # by then the command waits
    timer.start()
    if command == 'pause':
        with pytest.raises(ZMQClosedError, match='is not running'):
            device.pause()
    else:
        getattr(device, command)()
    timer.join()
    assert device.done


def test_stop_in_a_foreign_context_while_it_waits_for_a_peer(peer, monkeypatch):
    monkeypatch.setattr('pyams_zmq.device.thread.STOP_TIMEOUT', 0.1)
    foreign = zmq.Context()
    device = make_device(ThreadDevice, STREAMER, options=[('out', zmq.LINGER, 0)])
    device.context_factory = lambda: foreign
    start_blocked(device, peer)
    with pytest.raises(ZMQTimeoutError):
        device.stop()
    foreign.term()
    device.stop()
    assert device.done


def test_other_errors_are_unchanged():
    foreign = zmq.Context()
    foreign.set(zmq.MAX_SOCKETS, 2)
    device = make_device(ThreadDevice)
    device.context_factory = lambda: foreign
    with pytest.raises(zmq.ZMQError, match='Too many open files'):
        device.start()
    foreign.term()


def test_context_factory_of_a_process(peer):
    device = make_device(ProcessDevice, STREAMER, auth='editor:secret')
    device.context_factory = zmq.Context
    with device:
        assert device.statistics().in_to_out.frames == 0


def test_context_of_the_owner_in_a_process(context):
    """Its threads are not in the process, so it could not forward anything."""
    context.socket(zmq.PAIR).close()
    device = make_device(ProcessDevice)
    device.context_factory = lambda: context
    with pytest.raises(ValueError, match='whose threads are in another process'):
        device.start()


def test_inproc_is_refused():
    device = ProcessDevice()
    device.connect_in('inproc://nobody')
    with pytest.raises(ValueError, match='another process'):
        device.start()
    device = ThreadDevice(clients='localhost')
    device.bind_in('inproc://nobody')
    with pytest.raises(ValueError, match='a context of the device'):
        device.start()


def test_frames_that_were_sent_without_a_copy():
    """A thread of pyzmq releases them, which needs the GIL; libzmq waits when it has 2000 to do."""
    program = """
    import zmq
    from pyams_zmq.device import STREAMER, ThreadDevice
    device = ThreadDevice(STREAMER)
    device.native = False
    device.bind_in('inproc://in')
    device.bind_out('inproc://out')
    with device:
        context = zmq.Context.instance()
        source, sink = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        source.connect('inproc://in')
        sink.connect('inproc://out')
        for _ in range(5000):
            source.send(zmq.Frame(b'x', copy=False), zmq.SNDMORE)
        source.send(b'')
        assert len(sink.recv_multipart()) == 5001
        source.close()
        sink.close()
    """
    result = subprocess.run(
        [
            *(sys.executable, '-W', 'ignore:pkg_resources is deprecated'),  # Pyramid 2 imports it
            *('-c', textwrap.dedent(program)),
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, '')
