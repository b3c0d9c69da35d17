# SPDX-License-Identifier: ZPL-2.1
"""Deadlines of many calls, with a clock that the test moves."""

from math import inf

import pytest

from pyams_zmq.aio.deadlines import SLACK, Deadlines


class Clock:
    """The part of an event loop that deadlines use: its time and at most one timer."""

    def __init__(self):
        self.now = 1000.0
        self.timer = None
        self.timers = 0

    def time(self):
        return self.now

    def call_at(self, when, callback):
        assert self.timer is None
        self.timer = when, callback
        self.timers += 1
        return self

    def cancel(self):
        self.timer = None

    def go_to(self, now, early=0.0):
        """Move the clock and call due timers, each *early* seconds before its time."""
        while self.timer is not None and self.timer[0] <= now:
            when, callback = self.timer
            self.timer = None
            self.now = when - early
            callback()
        self.now = now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def calls():
    return {}


@pytest.fixture
def expired():
    return []


@pytest.fixture
def deadlines(clock, calls, expired):
    def expire(number, timeout):
        expired.append((number, timeout))
        del calls[number]

    deadlines = Deadlines(clock, calls, expire)

    def begin(number, timeout):
        calls[number] = None
        deadlines.add(number, timeout)

    deadlines.begin = begin
    return deadlines


def test_order(clock, expired, deadlines):
    for number, timeout in ((b'1', 10), (b'2', 5), (b'3', inf), (b'4', 10), (b'5', 1)):
        deadlines.begin(number, timeout)
    clock.go_to(1004)
    assert expired == [(b'5', 1)]
    clock.go_to(1009)
    assert expired == [(b'5', 1), (b'2', 5)]
    clock.go_to(1010)
    assert expired == [(b'5', 1), (b'2', 5), (b'1', 10), (b'4', 10)]
    assert clock.timer[0] == inf


def test_early_timer(clock, expired, deadlines):
    """A loop whose clock counts milliseconds may call a timer early."""
    deadlines.begin(b'1', 1)
    clock.go_to(1001, early=0.0005)
    assert expired == [(b'1', 1)]
    assert clock.timers == 1


def test_ended_calls(clock, calls, expired, deadlines):
    """They need no timer each, and are removed."""
    for number in range(10 * SLACK):
        deadlines.begin(b'%d' % number, 10)
        del calls[b'%d' % number]
    assert len(deadlines._heap) <= SLACK + 1
    assert clock.timers == 1
    deadlines.begin(b'last', 10)
    clock.go_to(1010)
    assert expired == [(b'last', 10)]
    assert clock.timer is None
    assert clock.timers == 1


def test_timer_of_an_ended_call(clock, calls, expired, deadlines):
    deadlines.begin(b'1', 1)
    deadlines.begin(b'2', 2)
    deadlines.begin(b'3', 3)
    del calls[b'1'], calls[b'2']
    clock.go_to(1001)
    assert expired == []
    assert clock.timer[0] == 1003
    clock.go_to(1003)
    assert expired == [(b'3', 3)]


def test_compaction_keeps_the_order(clock, calls, expired, deadlines):
    kept = [b'%d' % number for number in range(0, 10 * SLACK, 7)]
    for number in range(10 * SLACK):
        deadlines.begin(b'%d' % number, 1 + (number * 37) % 101)
        if number % 7:
            del calls[b'%d' % number]
    clock.go_to(1200)
    assert sorted(number for number, _timeout in expired) == sorted(kept)
    timeouts = [timeout for _number, timeout in expired]
    assert timeouts == sorted(timeouts)


def test_clear(clock, expired, deadlines):
    deadlines.clear()
    deadlines.begin(b'1', 1)
    deadlines.clear()
    assert clock.timer is None
    deadlines.begin(b'2', 2)
    clock.go_to(1010)
    assert expired == [(b'2', 2)]
