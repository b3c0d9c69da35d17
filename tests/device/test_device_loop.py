# SPDX-License-Identifier: ZPL-2.1
"""Both kinds of directions of the loop in Python: with libzmq itself, and with pyzmq alone."""

import ctypes
import errno
import os
import runpy
import signal
import sys
import threading
from ctypes import c_size_t
from types import SimpleNamespace

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
DIRECT_KINDS = pytest.mark.parametrize('kind', [libzmq.DirectDirection, libzmq.KeepingDirection])
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


def test_each_socket_is_polled_once(link, context, monkeypatch):
    """A second look at a socket within a poll can take the wake-up, and the poll never ends."""
    feed, in_socket = link(zmq.DEALER, zmq.DEALER)
    control, far_control = link(zmq.PAIR, zmq.PAIR)
    polled, received, poll = [], [], zmq.zmq_poll

    def note(items, timeout):
        polled.append([socket for socket, _events in items])
        return poll(items, timeout)

    with context.socket(zmq.DEALER) as out_socket, context.socket(zmq.DEALER) as sink:
        out_socket.bind('inproc://out')
        loop = PythonLoop(in_socket, out_socket)

        def exchange():
            feed.send(b'x')
            wait_until(lambda: loop.has_message)
            sink.connect('inproc://out')
            received.append(sink.recv())
            control.send(TERMINATE)

        thread = threading.Thread(target=exchange)
        thread.start()
        monkeypatch.setattr(zmq, 'zmq_poll', note)
        loop.run(far_control)
        thread.join()
    assert received == [b'x']
    assert all(len(set(sockets)) == len(sockets) for sockets in polled)


def test_libzmq_that_cannot_be_called():
    """A library that is not linked with it, as a pyzmq that hides the functions."""
    assert libzmq.load(None) is None


class Library:
    """A library whose functions are called through a function of the test.

    :param call: gets the name of the function, the function and its arguments
    """

    def __init__(self, library, call):
        self._library = library
        self._call = call

    def __getattr__(self, name):
        function = getattr(self._library, name)
        return lambda *arguments: self._call(name, function, *arguments)


def wrap_libzmq(monkeypatch, kind, call):
    """Let a direction call libzmq through a function of the test."""
    monkeypatch.setattr(kind, '_zmq', Library(kind._zmq, call))
    monkeypatch.setattr(libzmq, '_releasing', Library(libzmq._releasing, call))


class Disturbance:
    """Changes the number of the error after a call, as signal handlers and finalizers do."""

    def __init__(self, how):
        self._how = how
        self._is_disturbed = False

    def __call__(self, name, function, *arguments):
        is_checked = 'recv' in name or 'send' in name
        self._is_disturbed = is_checked and not self._is_disturbed
        if self._how == 'late' and self._is_disturbed:  # the message comes in afterwards
            ctypes.set_errno(errno.ECHILD)
            return -1
        result = function(*arguments)
        if self._how == 'libc':
            assert not os.path.exists('/nonexistent')
        elif self._is_disturbed and is_checked and result < 0:
            ctypes.set_errno(errno.ECHILD)
        elif is_checked:
            self._is_disturbed = False
        return result


@DIRECT_KINDS
@pytest.mark.parametrize('how', ['libc', 'ctypes', 'late'])
@pytest.mark.parametrize('prefix', ['x', None])
def test_error_number_that_changes(link, monkeypatch, kind, how, prefix):
    """A message that waits, or that has not come yet, does not end the device."""
    wrap_libzmq(monkeypatch, kind, Disturbance(how))
    feed, source = link(zmq.PUSH, zmq.PULL)
    sink, target = link(zmq.PULL, zmq.PUSH, sndhwm=1, rcvhwm=1)
    monitor, copies = link(zmq.PULL, zmq.PUSH, sndhwm=1, rcvhwm=1)
    direction = kind(source, target, copies, prefix)
    direction.forward()
    received, copied = [], 0
    assert not direction.waiting
    for message in MESSAGES:
        feed.send_multipart(message)
    while len(received) < len(MESSAGES):
        zmq.zmq_poll([direction.poll_item], 20)
        direction.forward()
        received.append(sink.recv_multipart())
    direction.forward()
    assert received == MESSAGES
    assert direction.messages == len(MESSAGES)
    while monitor.poll(0):
        monitor.recv_multipart()
        copied += 1
    assert copied + direction.unmonitored == len(MESSAGES)
    assert direction.unmonitored > 0


@DIRECT_KINDS
@pytest.mark.parametrize('prefix', ['x', None])
@pytest.mark.parametrize('failures', [1, 2])
@pytest.mark.parametrize('message', [[b'1'], [b'1', b'2']])
def test_error_number_of_the_monitor_that_changes(
    link, monkeypatch, kind, prefix, failures, message
):
    """One that nobody expects is looked at again, and then raised."""
    feed, source = link(zmq.PUSH, zmq.PULL)
    sink, target = link(zmq.PULL, zmq.PUSH)
    monitor, copies = link(zmq.PULL, zmq.PUSH)
    left = [None] * failures

    def fail(name, function, *arguments):
        if left and any(
            getattr(each, 'value', None) == copies.underlying for each in arguments[:2]
        ):
            left.pop()
            ctypes.set_errno(errno.ECHILD)
            return -1
        return function(*arguments)

    wrap_libzmq(monkeypatch, kind, fail)
    direction = kind(source, target, copies, prefix)
    feed.send_multipart(message)
    if failures == 1:
        direction.forward()
        assert monitor.recv_multipart() == [b'x'] * (prefix is not None) + message
        assert direction.unmonitored == 0
    else:
        with pytest.raises(zmq.ZMQError, match='No child processes'):
            direction.forward()
    assert sink.recv_multipart() == message
    assert direction.messages == 1


class Memory:
    """Records which frames are released, and releases none twice."""

    def __init__(self, monkeypatch, fails_at=None):
        self.freed = []
        self.kept = []
        self._fails_at = fails_at
        for name, kept in (('_libc', True), ('_releasing_libc', False)):
            library = getattr(libzmq, name, libzmq._libc)
            self._libc = library
            stand_in = SimpleNamespace(
                pthread_sigmask=library.pthread_sigmask, free=self._free_of(library.free, kept)
            )
            monkeypatch.setattr(libzmq, name, stand_in, raising=False)

    def _free_of(self, function, keeps_gil):
        def free(address):
            if address not in self.freed:
                function(address)
            self.freed.append(address)
            self.kept.append(keeps_gil)
            if len(self.freed) == self._fails_at:
                raise KeyboardInterrupt

        return free


@DIRECT_KINDS
@pytest.mark.parametrize('length', [6, 20])
@pytest.mark.parametrize('waits', [True, False])
def test_exception_while_frames_are_released(link, monkeypatch, kind, length, waits):
    """As of a signal handler: no frame is released twice."""
    memory = Memory(monkeypatch, fails_at=3)
    feed, source = link(zmq.PUSH, zmq.PULL)
    _, target = link(zmq.PULL, zmq.PUSH)
    direction = kind(source, target, None, None)
    feed.send_multipart([b'x'] * length)
    with pytest.raises(KeyboardInterrupt):
        direction.forward() if waits else direction._forward_messages()
    direction._release()
    assert len(memory.freed) == len(set(memory.freed)) == 3


@DIRECT_KINDS
@pytest.mark.parametrize('length', [6, 20, 50])
@pytest.mark.parametrize('number', [0, errno.ENOMEM, zmq.ETERM, errno.ENOTSOCK])
def test_end_while_frames_are_received(link, monkeypatch, kind, length, number):
    """All frames in hand are released when a call fails, or a signal handler after it."""
    memory = Memory(monkeypatch)
    in_hand = []

    def fail(name, function, *arguments):
        if name == 'zmq_recviov' and number == errno.ENOTSOCK:  # before libzmq counts
            ctypes.set_errno(number)
            return -1
        room = name == 'zmq_recviov' and c_size_t.from_address(arguments[2].value).value
        result = function(*arguments)
        if room:
            in_hand.append(result)
            if not number:
                raise KeyboardInterrupt
            if result < room:  # so libzmq counts when it fails at the next frame
                ctypes.set_errno(number)
                return -1
        return result

    wrap_libzmq(monkeypatch, kind, fail)
    feed, source = link(zmq.PUSH, zmq.PULL)
    _, target = link(zmq.PULL, zmq.PUSH)
    feed.send_multipart([b'x'] * length)
    feed.send_multipart([b'x'] * length)
    for _ in range(2):
        direction = kind(source, target, None, None)
        with pytest.raises((zmq.ZMQError, KeyboardInterrupt)) as caught:
            direction._forward_messages()
        assert getattr(caught.value, 'errno', 0) == number
        direction._release()
        while source.getsockopt(zmq.RCVMORE):
            source.recv()
    assert len(memory.freed) == sum(in_hand)


@pytest.mark.parametrize(
    ('message', 'keeps'),
    [([b'x'] * 3, True), ([b'x' * 30_000] * 3, False), ([b''] * 17, False)],
)
def test_large_messages_are_copied_without_the_gil(link, monkeypatch, message, keeps):
    """They would stop all threads of the program, and a peer decides how large they are."""
    calls = []

    def record(name, function, *arguments):
        calls.append(name)
        return function(*arguments)

    memory = Memory(monkeypatch)
    kind = libzmq.KeepingDirection
    monkeypatch.setattr(kind, '_zmq', Library(kind._zmq, record))
    feed, source = link(zmq.PUSH, zmq.PULL)
    sink, target = link(zmq.PULL, zmq.PUSH)
    monitor, copies = link(zmq.PULL, zmq.PUSH)
    direction = kind(source, target, copies, 'x')
    feed.send_multipart(message)
    direction._forward_messages()
    assert sink.recv_multipart() == message
    assert monitor.recv_multipart() == [b'x', *message]
    assert 'zmq_recviov' not in calls
    assert calls.count('zmq_sendiov') == (2 if keeps else 0)
    assert memory.kept == [keeps] * len(message)


@pytest.mark.parametrize('has_file', [True, False])
def test_backend_without_a_library(monkeypatch, has_file):
    """That of cffi is a file of Python; one that is linked into the program has none."""
    backend = SimpleNamespace(__file__=__file__) if has_file else SimpleNamespace()
    monkeypatch.setitem(sys.modules, 'backend_without_a_library', backend)
    socket = type('Socket', (), {'__module__': 'backend_without_a_library'})
    monkeypatch.setattr(zmq.backend, 'Socket', socket)
    assert not runpy.run_path(libzmq.__file__)['IS_AVAILABLE']


def test_set_of_signals_on_a_system_of_32_bits(monkeypatch):
    monkeypatch.setattr(ctypes, 'c_ulong', ctypes.c_uint32)
    assert ctypes.sizeof(runpy.run_path(libzmq.__file__)['_SignalMask']) == 128


def test_signals_that_are_not_blocked():
    """Those of errors of the program itself."""
    former = libzmq._SignalMask()
    libzmq._libc.pthread_sigmask(libzmq._SET, libzmq._SIGNALS, former)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    libzmq._libc.pthread_sigmask(libzmq._SET, former, None)
    errors = {signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV}
    assert blocked == signal.valid_signals() - errors - {signal.SIGKILL, signal.SIGSTOP}
