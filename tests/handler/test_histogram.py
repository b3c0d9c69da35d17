# SPDX-License-Identifier: ZPL-2.1
"""The histogram of durations."""

import pytest

from pyams_zmq.handler.histogram import Histogram


def test_histogram():
    histogram = Histogram()
    assert histogram.percentile(99) == 0
    for milliseconds in range(1, 1001):
        histogram.add(milliseconds / 1000)
    for percent in (1, 50, 90, 99):
        assert histogram.percentile(percent) == pytest.approx(percent / 100, rel=0.13)
    assert histogram.percentile(100) == 1
    assert histogram.total == pytest.approx(500.5)


@pytest.mark.parametrize('seconds', [-1, 0, 1e-6, 1.5e-5, 1.6e-5, 3.1e-5, 1, 1e6, 1e30])
def test_histogram_of_one(seconds):
    histogram = Histogram()
    histogram.add(seconds)
    assert histogram.percentile(50) <= max(0, seconds)
    assert histogram.count == sum(histogram._buckets) == 1


def test_cumulative():
    histogram = Histogram()
    durations = [0.0001, 0.000127, 0.000129, 0.5, 1.0, 100.0, 200.0] * 100
    for seconds in durations:
        histogram.add(seconds)
    buckets = histogram.cumulative()
    assert [bound for bound, _count in buckets] == sorted(bound for bound, _count in buckets)
    for bound, count in buckets:
        assert count == sum(seconds < bound for seconds in durations)
    assert buckets[0] == (0.000128, 200)
    assert buckets[-1][1] == 600
    assert histogram.count == 700
    assert histogram.longest == 200.0
