# SPDX-License-Identifier: ZPL-2.1
"""Answers that threads share: one of them asks, the others do not wait for it."""

import threading

import pytest

from checks import in_fork, wait_until
from pyams_zmq.monitor import shared
from pyams_zmq.monitor.shared import MAX_AGE, MAX_WAIT_AGE, SharedAnswers


class Clock:
    """Replaces the clock of the module."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(shared, 'monotonic', lambda: self.now)


class Source:
    """Answers that are asked for; each takes as long as a test wants.

    :ivar count: number of the questions
    :ivar gate: an event for which they wait
    """

    def __init__(self):
        self.count = 0
        self.gate = threading.Event()
        self.gate.set()
        self.answers = SharedAnswers(self._ask)

    def _ask(self):
        self.count += 1
        self.gate.wait()
        return self.count

    def ask_in_thread(self):
        """Ask in a thread that waits for the gate; return it, and the list that gets the answer."""
        found, count = [], self.count
        thread = threading.Thread(target=lambda: found.append(self.answers.get()))
        thread.start()
        wait_until(lambda: self.count > count)
        return thread, found


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def source():
    source = Source()
    yield source
    source.gate.set()


def test_age(clock, source):
    assert [source.answers.get(), source.answers.get()] == [1, 1]
    clock.now += MAX_AGE
    assert source.answers.get() == 2


def test_others_do_not_wait(clock, source):
    source.answers.get()
    clock.now += MAX_AGE
    source.gate.clear()
    thread, found = source.ask_in_thread()
    assert source.answers.get() == 1
    source.gate.set()
    thread.join()
    assert found == [source.answers.get()] == [2]


@pytest.mark.parametrize('age', [None, MAX_WAIT_AGE])
def test_others_wait_for_the_first_answers(clock, source, age):
    """And they share them, without another question."""
    if age is not None:
        source.answers.get()
        clock.now += age
    source.gate.clear()
    first, found = source.ask_in_thread()
    waiting = threading.Thread(target=lambda: found.append(source.answers.get()))
    waiting.start()
    source.gate.set()
    first.join()
    waiting.join()
    assert found == [source.count] * 2


def test_error(clock):
    def fail():
        raise LookupError

    answers = SharedAnswers(fail)
    for _ in range(2):  # the lock is free again
        with pytest.raises(LookupError):
            answers.get()


def test_fork_while_a_thread_asks(source):
    source.gate.clear()
    thread, _found = source.ask_in_thread()

    def check():
        source.gate.set()
        assert source.answers.get() == 2

    assert in_fork(check) == 0
    source.gate.set()
    thread.join()
