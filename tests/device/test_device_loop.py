# SPDX-License-Identifier: ZPL-2.1
"""Both kinds of directions of the loop in Python: with libzmq itself, and with pyzmq alone."""

import signal
import threading

import pytest
import zmq

from checks import wait_until
from devices import NOT_SUPPORTED
from pyams_zmq.device import libzmq
from pyams_zmq.device.direction import BURST, Direction
from pyams_zmq.device.proxy import TERMINATE, PythonLoop

KINDS = pytest.mark.parametrize(
    'kind', [Direction, libzmq.DirectDirection, libzmq.KeepingDirection]
)
MESSAGES = [[b'%d' % number * 20] * number for number in (1, 2, 3, 16, 17, 40, 1, 1, 200, 1, 2)]


@pytest.fixture
def link(context):
    """Return two sockets that are connected, by their types."""
    sockets = []

    def connect(near_type, far_type, **options):
        near, far = context.socket(near_type), context.socket(far_type)
        for socket in (near, far):
            for option, value in options.items():
                setattr(socket, option, value)
            socket.rcvtimeo = 5000
        address = f'inproc://{len(sockets)}'
        far.bind(address)
        near.connect(address)
        sockets.extend([near, far])
        return near, far

    yield connect
    for socket in sockets:
        socket.close(0)


def counts_of(direction):
    return direction.messages, direction.frames, direction.bytes


@KINDS
@pytest.mark.parametrize('prefix', ['in', b'', None])
def test_messages_with_a_monitor(link, kind, prefix):
    feed, source = link(zmq.PUSH, zmq.PULL)
    sink, target = link(zmq.PULL, zmq.PUSH)
    monitor, copies = link(zmq.PULL, zmq.PUSH)
    direction = kind(source, target, copies, prefix)
    for message in MESSAGES:
        feed.send_multipart(message)
    direction.forward()
    direction.forward()
    assert [sink.recv_multipart() for _ in MESSAGES] == MESSAGES
    head = [] if prefix is None else [prefix.encode() if isinstance(prefix, str) else prefix]
    assert [monitor.recv_multipart() for _ in MESSAGES] == [head + each for each in MESSAGES]
    frames = [frame for message in MESSAGES for frame in message]
    assert counts_of(direction) == (len(MESSAGES), len(frames), sum(map(len, frames)))
    assert (direction.unroutable, direction.unmonitored, direction.waiting) == (0, 0, False)


@KINDS
@pytest.mark.parametrize('has_monitor', [True, False])
def test_messages_that_wait(link, kind, has_monitor):
    """None is lost, sent twice or overtaken, and each is copied once."""
    feed, source = link(zmq.PUSH, zmq.PULL)
    sink, target = link(zmq.PULL, zmq.PUSH, sndhwm=1, rcvhwm=1)
    monitor, copies = link(zmq.PULL, zmq.PUSH)
    direction = kind(source, target, copies if has_monitor else None, 'x')
    for message in MESSAGES:
        feed.send_multipart(message)
    received = []
    while len(received) < len(MESSAGES):
        zmq.zmq_poll([direction.poll_item], 20)
        direction.forward()
        assert direction.poll_item == (
            (target, zmq.POLLOUT) if direction.waiting else (source, zmq.POLLIN)
        )
        received.append(sink.recv_multipart())
    assert received == MESSAGES
    assert direction.stalls > 0
    assert not direction.waiting
    assert direction.messages == len(MESSAGES)
    if has_monitor:
        assert [monitor.recv_multipart() for _ in MESSAGES] == [[b'x', *each] for each in MESSAGES]


@KINDS
@pytest.mark.parametrize('length', [1, 2, 20])
def test_nothing_waits_after_the_message(link, kind, length):
    """Else the loop would go round until the next message comes in."""
    feed, source = link(zmq.PUSH, zmq.PULL)
    sink, target = link(zmq.PULL, zmq.PUSH, sndhwm=1, rcvhwm=1)
    direction = kind(source, target, None, None)
    for _ in range(4):
        feed.send_multipart([b'x'] * length)
    direction.forward()
    assert direction.waiting
    for _ in range(4):
        sink.recv_multipart()
        zmq.zmq_poll([direction.poll_item], 20)
        direction.forward()
    assert not direction.waiting
    assert direction.messages == 4


@KINDS
def test_monitor_that_does_not_read(link, kind):
    feed, source = link(zmq.PUSH, zmq.PULL)
    sink, target = link(zmq.PULL, zmq.PUSH)
    monitor, copies = link(zmq.PULL, zmq.PUSH, sndhwm=1, rcvhwm=1)
    direction = kind(source, target, copies, 'x')
    for message in MESSAGES:
        feed.send_multipart(message)
    direction.forward()
    direction.forward()
    assert [sink.recv_multipart() for _ in MESSAGES] == MESSAGES
    assert direction.unmonitored == len(MESSAGES) - 2
    assert [monitor.recv_multipart() for _ in range(2)] == [[b'x', *each] for each in MESSAGES[:2]]
    assert copies.poll(5000, zmq.POLLOUT)
    feed.send(b'next')
    direction.forward()
    assert monitor.recv_multipart() == [b'x', b'next']


@KINDS
def test_bursts(link, kind):
    feed, source = link(zmq.PUSH, zmq.PULL)
    sink, target = link(zmq.PULL, zmq.PUSH)
    direction = kind(source, target, None, None)
    for number in range(BURST + 1):
        feed.send_multipart([b'%d' % number] * (1 + (number > BURST // 2)))
    direction.forward()
    assert direction.messages <= 2 * BURST
    direction.forward()
    assert [int(sink.recv_multipart()[0]) for _ in range(BURST + 1)] == [*range(BURST + 1)]


@KINDS
def test_swap(link, kind):
    """The addressee comes first, then the sender; a message of one frame has no addressee."""
    near, source = link(zmq.DEALER, zmq.ROUTER)
    far, target = link(zmq.DEALER, zmq.ROUTER, identity=b'far')
    target.router_mandatory = True
    direction = kind(source, target, None, None)
    for message in ([b'far', b'text'], [b'far'] + [b'y'] * 50, [b'nobody', b'x'], [b'far', b'end']):
        near.send_multipart(message)
    wait_until(lambda: direction.forward() or direction.messages == 3)
    assert [far.recv_multipart()[1:] for _ in range(3)] == [[b'text'], [b'y'] * 50, [b'end']]
    assert direction.unroutable == 1


@KINDS
def test_source_that_has_to_send(link, kind):
    """A REP socket receives nothing before the reply, which is not an error."""
    client, source = link(zmq.REQ, zmq.REP)
    sink, target = link(zmq.PULL, zmq.PUSH)
    direction = kind(source, target, None, None)
    client.send(b'question')
    wait_until(lambda: direction.forward() or direction.messages)
    direction.forward()
    assert sink.recv() == b'question'
    source.send(b'answer')
    assert client.recv() == b'answer'


@KINDS
def test_dead_end(link, kind):
    feed, source = link(zmq.PUSH, zmq.PULL)
    _, target = link(zmq.PUSH, zmq.PULL)
    direction = kind(source, target, None, None)
    for message in MESSAGES:
        feed.send_multipart(message)
    direction.forward()
    assert (direction.unroutable, direction.messages) == (len(MESSAGES), 0)


@KINDS
def test_errors(link, kind):
    """What libzmq does not expect is raised."""
    feed, source = link(zmq.PUSH, zmq.PULL)
    _, target = link(zmq.PULL, zmq.PUSH)
    with pytest.raises(zmq.ZMQError, match=NOT_SUPPORTED):
        kind(target, source, None, None).forward()
    for message in ([b'1'], [b'2', b'3']):
        direction = kind(source, target, source, None)  # the monitor cannot send
        feed.send_multipart(message)
        with pytest.raises(zmq.ZMQError, match=NOT_SUPPORTED):
            direction.forward()
        assert direction.messages == 1


@KINDS
def test_end_of_the_context(kind):
    context = zmq.Context()
    source, target = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    direction = kind(source, target, None, None)
    thread = threading.Thread(target=context.term)
    thread.start()
    with pytest.raises(zmq.ContextTerminated):
        wait_until(direction.forward)
    source.close()
    target.close()
    thread.join()


@pytest.mark.parametrize('is_available', [True, False])
def test_signals_do_not_tear_messages(link, monkeypatch, is_available):
    """They interrupt the loop of the main thread, also in the middle of a message."""
    monkeypatch.setattr(libzmq, 'IS_AVAILABLE', is_available)
    feed, source = link(zmq.PUSH, zmq.PULL, sndhwm=0, rcvhwm=0)
    sink, target = link(zmq.PULL, zmq.PUSH, sndhwm=0, rcvhwm=0)
    monitor, copies = link(zmq.PULL, zmq.PUSH, sndhwm=0, rcvhwm=0)
    control, far_control = link(zmq.PAIR, zmq.PAIR)
    messages = [[b'%d' % number] * (1 + number % 3) for number in range(5000)]
    received, signals = [], []

    def exchange():
        for message in messages:
            feed.send_multipart(message)
        received.extend(sink.recv_multipart() for _ in messages)
        control.send(TERMINATE)

    former = signal.signal(signal.SIGALRM, lambda num, frame: signals.append(num))
    thread = threading.Thread(target=exchange)
    thread.start()
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    PythonLoop(source, target, copies).run(far_control)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)
    thread.join()
    assert received == messages
    assert [monitor.recv_multipart() for _ in messages] == messages
    assert signals


def test_libzmq_that_cannot_be_called():
    """A library that is not linked with it, as a pyzmq that hides the functions."""
    assert libzmq.load(None) is None
