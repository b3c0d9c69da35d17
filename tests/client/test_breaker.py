# SPDX-License-Identifier: ZPL-2.1
"""The policy for a service that is down, without any I/O."""

import threading
from math import inf

import pytest

from pyams_zmq.client.breaker import CONNECT_TIMEOUT, GRACE, PAUSE, CircuitBreaker
from pyams_zmq.exceptions import ZMQUnreachableError

URI = 'tcp://10.1.1.1:5555'
PROBLEM = f'No service has answered at {URI} for 2 s'
FAILS = pytest.raises(ZMQUnreachableError, match=f'^No service has answered at {URI}')


@pytest.fixture
def breaker():
    """A breaker whose service was never there."""
    return CircuitBreaker(URI)


@pytest.fixture
def proven(breaker):
    """A breaker whose service was there."""
    breaker.begin(0).succeed(0)
    return breaker


@pytest.fixture
def opened(breaker):
    """A breaker that was opened at 2."""
    breaker.begin(0).fail(2, PROBLEM)
    assert breaker.is_open
    return breaker


def test_closed(breaker):
    attempts = [breaker.begin(0) for _ in range(10)]
    assert breaker.pause(0) == 0
    for attempt in attempts:
        attempt.succeed(0)
    assert not breaker.is_open
    assert breaker.pause(0) == 0


def test_known_down(opened):
    for now in (2, 2.5, 2.999):
        with pytest.raises(ZMQUnreachableError) as raised:
            opened.begin(now)
        assert str(raised.value) == (
            f'{PROBLEM}; it is known to be down for {now:.3g} s: calls fail at once, and one tries '
            'each second'
        )
        assert opened.pause(now) == pytest.approx(3 - now)


def test_half_open(opened):
    """One attempt at a time; it does not wait if it is refused."""
    for second in range(3, 6):
        assert opened.pause(second) == 0
        attempt = opened.begin(second)
        with FAILS:
            opened.begin(second)
        assert opened.pause(second) == PAUSE
        assert attempt.refuse(second) == -inf
        attempt.fail(second, PROBLEM)
        with FAILS:
            opened.begin(second + 0.9)
    opened.begin(6).succeed(6)
    assert not opened.is_open
    for attempt in [opened.begin(6) for _ in range(5)]:
        assert attempt.refuse(6) == 6 + CONNECT_TIMEOUT


def test_half_open_with_little_time(opened):
    """A failure of the one call is enough, however short its time is."""
    opened.begin(3, 0.1).fail(3.1, PROBLEM)
    with FAILS:
        opened.begin(4)


@pytest.mark.parametrize('end', ['abandon', 'forget'])
def test_attempt_without_a_result(opened, end):
    """Another call tries: at once, or when the time of the attempt is over."""
    attempt = opened.begin(3)
    if end == 'abandon':
        attempt.abandon()
        now = 3
    else:
        now = attempt.ends_at
        with FAILS:
            opened.begin(now - 0.001)
    other = opened.begin(now)
    attempt.abandon()  # it is not that of this call
    with FAILS:
        opened.begin(now)
    other.succeed(now)


def test_restart(proven):
    """All calls wait until the service has been missing for their time, and then none does."""
    first = proven.begin(10)
    assert first.refuse(10.01) == 12
    later = proven.begin(11)
    assert later.refuse(11) == 12
    for attempt in (first, later):
        attempt.succeed(11.5)
    assert proven.begin(12).refuse(12.01) == 14


def test_end_of_a_restart(proven):
    attempts = [proven.begin(10), proven.begin(11)]
    for attempt in attempts:
        attempt.refuse(11)
    for attempt in attempts:
        assert attempt.refuse(12) == -inf
        attempt.fail(12, PROBLEM)
        assert proven.is_open


def test_late_failure_when_another_call_has_connected(proven):
    """libzmq pauses between two attempts: the service is up, and this call has not noticed."""
    late, other = proven.begin(10), proven.begin(11)
    assert late.refuse(11) == 12
    other.succeed(11.9)
    assert late.refuse(12) == 13.9
    late.fail(12, PROBLEM)
    assert not proven.is_open
    assert proven.begin(12.1, missing=5).refuse(12.1) == 13.9


def test_late_refusal_when_it_is_known_to_be_down(proven):
    waiting, other = proven.begin(10), proven.begin(10, 60)
    assert other.refuse(10) == 70
    waiting.fail(12, PROBLEM)
    assert other.refuse(12) == -inf


def test_calls_with_little_time(proven):
    """Several failures count together, if they are not far from each other."""
    for tenth in range(100, 120):
        proven.begin(tenth / 10, 2).fail(tenth / 10 + 0.05, PROBLEM)
        assert not proven.is_open
    assert proven.begin(12).refuse(12) == -inf
    proven.begin(12).fail(12.1, PROBLEM)
    assert proven.is_open


def test_a_failure_long_ago(proven):
    proven.begin(10).fail(10.1, PROBLEM)
    attempt = proven.begin(100)
    assert attempt.refuse(100) == 102
    attempt.fail(100.5, PROBLEM)
    assert not proven.is_open


def test_failures_while_it_is_open_count_from_the_first_one(opened):
    opened.begin(1000).fail(1000, PROBLEM)
    with pytest.raises(ZMQUnreachableError, match='known to be down for 1e'):
        opened.begin(1000.5)


def test_idle_connection_has_noticed(proven):
    attempt = proven.begin(100, missing=60)
    assert attempt.refuse(100) == -inf
    attempt.fail(100, PROBLEM)
    with pytest.raises(ZMQUnreachableError, match='for 60.5 s'):
        proven.begin(100.5)


def test_idle_connection_has_noticed_a_restart(proven):
    assert proven.begin(100, missing=0.5).refuse(100) == 101.5


def test_first_start(breaker):
    """One call waits. Others try, and fail when they are refused; later ones do not try."""
    first, second = breaker.begin(0), breaker.begin(0)
    assert first.refuse(0.01) == 2
    assert second.refuse(0.01) == -inf
    second.fail(0.01, PROBLEM)
    assert not breaker.is_open
    with pytest.raises(ZMQUnreachableError) as raised:
        breaker.begin(0.5)
    assert str(raised.value) == (
        f'No service has answered at {URI} for 0.5 s; one call waits for it, and others fail at '
        'once'
    )
    assert first.refuse(0.5) == 2
    first.succeed(0.9)
    assert breaker.begin(1).refuse(1) == 3


def test_first_start_with_little_time(breaker):
    """The next call waits, for what is left of the time."""
    first = breaker.begin(0)
    assert first.refuse(0) == 2
    first.fail(0.2, PROBLEM)
    second = breaker.begin(0.2)
    assert second.refuse(0.2) == 2
    second.abandon()
    third = breaker.begin(0.4)
    assert third.refuse(0.4) == 2
    assert third.refuse(third.ends_at) == -inf
    third.fail(2, PROBLEM)
    assert breaker.is_open


def test_waiting_call_that_is_forgotten(breaker):
    first, other = breaker.begin(0), breaker.begin(0, 10)
    assert first.refuse(0) == 2
    assert other.refuse(1) == -inf
    assert other.refuse(first.ends_at) == 10


def test_expected_service():
    breaker = CircuitBreaker(URI, is_expected=True)
    assert [breaker.begin(0).refuse(0) for _ in range(5)] == [2] * 5


def test_silent_service(proven):
    """It was there, and no connection was refused: each call has its whole time."""
    attempts = [proven.begin(10), proven.begin(11.5)]
    assert [attempt.wait(11.5) for attempt in attempts] == [12, 13.5]
    attempts[0].fail(12, PROBLEM)
    with FAILS:
        proven.begin(12.1)
    assert attempts[1].wait(12.1) == 13.5
    attempts[1].succeed(12.2)
    assert not proven.is_open


def test_service_that_was_never_there_is_silent(breaker):
    """One call waits for its whole time, others for a while, and later ones not at all."""
    attempts = [breaker.begin(0) for _ in range(3)]
    for now in (0.01, 0.02):
        assert [attempt.wait(now) for attempt in attempts] == [2, 0.01 + GRACE, 0.01 + GRACE]
    later = breaker.begin(0.4)
    assert later.wait(0.4) == 0.4 + GRACE
    for attempt in attempts[1:]:
        attempt.fail(0.51, PROBLEM)
        assert not breaker.is_open
    with pytest.raises(ZMQUnreachableError, match='for 0.6 s; one call waits for it, and others'):
        breaker.begin(0.6)
    assert attempts[0].wait(0.6) == 2
    attempts[0].succeed(0.6)
    assert breaker.begin(0.7).wait(0.7) == 2.7


def test_one_that_tries_and_gets_no_answer(opened):
    attempt = opened.begin(3)
    assert attempt.wait(3.1) == 5
    with FAILS:
        opened.begin(3.1)


def test_silent_service_with_little_time(breaker):
    attempts = [breaker.begin(0, 0.2), breaker.begin(0, 0.2)]
    assert [attempt.wait(0.01) for attempt in attempts] == [0.2, 0.2]


def test_threads(opened):
    """Exactly one of many threads tries."""
    barrier, attempts, errors = threading.Barrier(16), [], []

    def begin():
        barrier.wait()
        try:
            attempts.append(opened.begin(3))
        except ZMQUnreachableError as error:
            errors.append(error)

    threads = [threading.Thread(target=begin) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(attempts), len(errors)) == (1, 15)
