# SPDX-License-Identifier: ZPL-2.1
"""How many messages are sent before their replies, and the pauses after refusals."""

from math import inf

import pytest

from pyams_zmq.client.pace import (
    DRAINING_DELAY,
    FIRST_DELAY,
    GROWTH,
    MAX_DELAY,
    WINDOW,
    Pace,
)


@pytest.fixture
def pace():
    """Pace of a new connection."""
    return Pace()


def test_window(pace):
    assert pace.may_send(WINDOW - 1, 0)
    assert not pace.may_send(WINDOW, 0)
    assert pace.wakes_at(WINDOW - 1, 7) == 7
    assert pace.wakes_at(WINDOW, 7) == inf


def test_pause_after_a_refusal(pace):
    pace.refuse(1, 10, 100, is_draining=False)
    assert FIRST_DELAY <= pace.resumes_at - 100 <= 1.5 * FIRST_DELAY
    assert not pace.may_send(0, 100)
    assert pace.wakes_at(0, 100) == pace.resumes_at
    assert pace.may_send(0, pace.resumes_at)
    assert not pace.may_send(1, pace.resumes_at)  # one message at first


def test_messages_sent_before_the_pause_do_not_count(pace):
    pace.refuse(1, 10, 100, is_draining=False)
    resumes_at = pace.resumes_at
    pace.refuse(10, 10, 101, is_draining=False)
    pace.accept(9)
    assert (pace.resumes_at, pace.window) == (resumes_at, 1)


def test_pause_of_a_service_that_stops(pace):
    pace.refuse(1, 1, 100, is_draining=True)
    assert DRAINING_DELAY <= pace.resumes_at - 100 <= 1.5 * DRAINING_DELAY


def test_pauses_become_longer(pace):
    longest = [pace.refuse(number, number, 0, is_draining=False) for number in range(1, 20)]
    assert longest.count(True) == 1
    assert MAX_DELAY <= pace.resumes_at <= 1.5 * MAX_DELAY
    pace.accept(20)
    pace.refuse(21, 21, 0, is_draining=False)
    assert pace.resumes_at <= 1.5 * FIRST_DELAY


def test_window_grows_with_good_replies(pace):
    pace.refuse(1, 1, 0, is_draining=False)
    for number in range(2, 12):
        pace.accept(number)
    assert pace.window == WINDOW


def test_window_grows_without_replies(pace):
    """A message that runs for an hour does not hold up the others."""
    pace.refuse(1, 1, 0, is_draining=False)
    now = pace.resumes_at
    assert not pace.may_send(1, now)
    for number in range(10):
        unanswered = min(2**number, WINDOW)
        now = pace.wakes_at(unanswered, now)
        assert now == inf if unanswered == WINDOW else pace.may_send(unanswered, now)
        if unanswered == WINDOW:
            break
    assert pace.window == WINDOW
    assert GROWTH > 0
