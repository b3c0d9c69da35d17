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
