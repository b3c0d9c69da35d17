# SPDX-License-Identifier: ZPL-2.1
"""Messages that were read and wait, and the turns of the threads that read them."""

import os
import signal
from contextlib import ExitStack
from threading import Event, Thread, main_thread
from types import SimpleNamespace

import pytest

from checks import TIMEOUT, wait_until
from handlers import Handler
from pyams_zmq.client import ZMQClient
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.handler.turn import Turn
from pyams_zmq.process.connections import Envelope
from pyams_zmq.process.waiting import MAX_WAITING, MAX_WAITING_SIZE, WaitingMessages


class Forking(Handler):
    """Forks while the attendant has the turn."""

    def fork_and_use_the_stream(self):
        stream = self.process.rep_stream
        wait_until(stream.turn.take)  # as the attendant does, which gives it back in between
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)  # ends the fork if it waits for a thread that it does not have
            stream.close()
            os._exit(0)
        stream.turn.give_back()
        return os.waitpid(pid, 0)[1]


@pytest.fixture
def asker():
    """Return a client of a process."""
    with ExitStack() as stack:
        yield lambda process: stack.enter_context(ZMQClient(process.bound_address, timeout=TIMEOUT))


def add(waiting, peer, text, now=0.0):
    waiting.add(Envelope((peer, b'')), [text], now)


def test_peers_take_turns():
    waiting = WaitingMessages()
    for number in range(3):
        add(waiting, b'a', b'a%d' % number, number)
    add(waiting, b'b', b'b', 2.5)
    assert waiting.count == 4
    assert waiting.age(3.0) == 3.0
    assert [waiting.take().body for _ in range(4)] == [[b'a0'], [b'b'], [b'a1'], [b'a2']]
    assert (waiting.count, waiting.size, waiting.age(9.0)) == (0, 0, 0.0)
    with pytest.raises(StopIteration):
        waiting.take()


def test_limits():
    waiting = WaitingMessages()
    for _ in range(MAX_WAITING):
        assert not waiting.is_full
        add(waiting, b'a', b'')
    assert waiting.is_full
    waiting.take()
    assert not waiting.is_full
    waiting = WaitingMessages()
    add(waiting, b'a', bytes(MAX_WAITING_SIZE))
    assert waiting.is_full
    assert waiting.size > MAX_WAITING_SIZE
    assert not waiting.is_overfull
    add(waiting, b'b', bytes(MAX_WAITING_SIZE))
    assert waiting.is_overfull


def test_turn():
    turn = Turn()
    assert not turn.take()
    turn.is_free = True
    assert turn.take()
    assert turn.is_taken
    waits, waited = Event(), Event()

    def end_method():
        waits.set()
        turn.is_free = False
        turn.wait()
        waited.set()

    thread = Thread(target=end_method)
    thread.start()
    assert waits.wait(TIMEOUT)
    assert not waited.is_set()
    turn.give_back()
    thread.join(TIMEOUT)
    assert waited.is_set()
    assert not turn.is_taken


def test_fork_while_the_other_thread_has_the_turn(start, asker):
    client = asker(start(handler=Forking))
    assert client.call('fork_and_use_the_stream') == 0


def test_turn_that_a_method_takes_back():
    turn = Turn()
    turn.is_free = True
    assert turn.take()
    inside = Event()

    def use():
        with turn.taken_back():
            inside.set()
            assert not turn.take()

    thread = Thread(target=use)
    thread.start()
    assert not inside.wait(0.05)  # that it does not happen has no event
    turn.give_back()
    thread.join(TIMEOUT)
    assert inside.is_set()
    assert turn.is_free
    with turn.taken_back():
        assert not turn.is_free


class NotingTurn(Turn):
    """Notes that the loop waits."""

    __slots__ = ('is_awaited',)

    def __init__(self):
        super().__init__()
        self.is_awaited = Event()

    def wait(self):
        self.is_awaited.set()
        super().wait()


def test_signal_while_the_loop_waits_for_its_turn():
    """Its handler raises; the reply waits for the turn all the same."""
    turn = NotingTurn()
    raised = Event()
    replies = []

    def fail(*_args):
        raised.set()
        raise ValueError('signal')

    def use_the_socket():
        taken.append(turn.take())
        has_taken.set()
        turn.is_awaited.wait(TIMEOUT)
        signal.pthread_kill(main_thread().ident, signal.SIGUSR1)
        raised.wait(TIMEOUT)
        assert not replies
        turn.give_back()

    class Method:
        def method(self):
            other.start()
            assert has_taken.wait(TIMEOUT)

    def send(reply):
        replies.append((reply, turn.is_taken))

    taken, has_taken, other = [], Event(), Thread(target=use_the_socket)
    stream = SimpleNamespace(turn=turn, send=send)
    former = signal.signal(signal.SIGUSR1, fail)
    try:
        ZMQMessageHandler(None, stream, None, Method)([b'["method",null]'])
    finally:
        signal.signal(signal.SIGUSR1, former)
    other.join(TIMEOUT)
    assert taken == [True]
    [(reply, is_taken)] = replies
    assert reply.startswith(b'[500,')
    assert not is_taken


def test_method_that_begins_while_the_other_thread_sleeps():
    turn = Turn()
    woken = []
    turn.wake = lambda: woken.append(turn.is_free)
    stream = SimpleNamespace(turn=turn, send=woken.append)

    class Method:
        def method(self):
            return 1

    handle = ZMQMessageHandler(None, stream, None, Method)
    handle([b'["method",null]'])
    turn.is_asleep = True
    handle([b'["method",null]'])
    assert woken == [b'1', True, b'1']
