# SPDX-License-Identifier: ZPL-2.1
"""Messages that were read and wait, and the turns of the threads that read them."""

from threading import Event, Thread

import pytest

from checks import TIMEOUT
from pyams_zmq.handler.turn import Turn
from pyams_zmq.process.connections import Envelope
from pyams_zmq.process.waiting import MAX_WAITING, MAX_WAITING_SIZE, WaitingMessages


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
