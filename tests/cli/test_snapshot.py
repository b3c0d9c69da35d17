# SPDX-License-Identifier: ZPL-2.1
"""What a table of services computes from two answers of each."""

import pytest

from pyams_zmq.cli.overview import TITLES, Overview
from pyams_zmq.cli.snapshot import Change, read_snapshot
from pyams_zmq.exceptions import ZMQReplyError
from pyams_zmq.monitor.inquiry import Answer


def make(calls, buckets=(), pid=1, longest=9.0, **members):
    method = {'calls': calls, 'max': longest, 'buckets': list(buckets)}
    return read_snapshot({'pid': pid, 'calls': calls, 'methods': {'add': method}, **members})


def test_since_the_start():
    change = Change(make(90, [(0.001, 50), (0.1, 80)], uptime=30.0), None, 0.0)
    assert change.rate == 3.0
    assert [change.percentile(percent) for percent in (1, 50, 80, 99)] == [0.001, 0.001, 0.1, 9.0]


def test_since_the_snapshot_before():
    before = make(90, [(0.001, 90)])
    change = Change(make(100, [(0.001, 90), (0.1, 100)]), before, 2.0)
    assert (change.rate, change.percentile(50)) == (5.0, 0.1)


def test_no_calls_meanwhile():
    before = make(90, [(0.001, 90)])
    change = Change(before, before, 2.0)
    assert (change.rate, change.percentile(50)) == (0.0, None)


def test_service_that_was_started_again():
    """Its numbers begin at 0."""
    before = make(90, [(0.001, 90)])
    change = Change(make(4, [(0.1, 4)], pid=2, uptime=2.0, longest=0.05), before, 2.0)
    assert (change.rate, change.percentile(99)) == (2.0, 0.05)


def test_statistics_without_members():
    change = Change(read_snapshot({}), read_snapshot({}), 2.0)
    assert (change.rate, change.percentile(50)) == (None, None)


@pytest.mark.parametrize(
    'payload',
    [None, 5, {'calls': 'x'}, {'uptime': 1e200}, {'queue': -1}, {'methods': {'add': None}}],
)
def test_other_replies(payload):
    with pytest.raises(ZMQReplyError, match='not what a service says about itself'):
        read_snapshot(payload)


def test_rows_of_two_tables():
    overview = Overview()
    counts = ({'pid': 1, 'calls': 10, 'uptime': 10}, {'pid': 1, 'calls': 16, 'uptime': 12})
    for now, result in enumerate(counts):
        overview.update({'a': Answer(result)}, 2.0 * now)
        expected = '1.0' if now == 0 else '3.0'
        assert overview.rows == [('a', 'up', expected, *['-'] * (len(TITLES) - 3))]
    error = ZMQReplyError('two\nlines')
    overview.update({'a': Answer(None, str(error), 0.1, error)}, 6.0)
    assert (overview.rows[0][1], overview.problems, overview.code) == ('error', ['a: two lines'], 1)
    overview.update({'a': Answer(None, 'x', 0.1, OSError('x'))}, 7.0)
    assert overview.code == 1
    overview.update({'a': Answer(counts[0])}, 8.0)  # as at the start
    assert (overview.rows[0][2], overview.problems, overview.code) == ('1.0', [], 0)
