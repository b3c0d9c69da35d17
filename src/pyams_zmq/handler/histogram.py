# SPDX-License-Identifier: ZPL-2.1
"""Percentiles of durations, in a fixed amount of memory."""

from bisect import bisect_left

_EXACT = 16  # microseconds; each shorter duration has a bucket of its own
_HALF = _EXACT // 2  # buckets for each doubling above
_LONGEST = (1 << 40) - 1  # microseconds: 12 days
_BUCKETS = (_LONGEST.bit_length() - 4) * _HALF + _EXACT

MAX_UNSORTED = 512
"""Durations that are put into their buckets together, at a quarter of the cost"""

_BOUNDS = range(7, 28)
"""Binary logarithms of the upper bounds that `cumulative` returns, in microseconds: from 128 µs to
134 s. These are bounds of buckets, so the numbers are exact"""


class Histogram:
    """Count durations in buckets whose width is an eighth of their values.

    :ivar unsorted: the latest durations; who adds one here calls `sort` at `MAX_UNSORTED`
    """

    __slots__ = ('_buckets', '_count', '_longest', '_total', 'unsorted')

    def __init__(self) -> None:
        self.unsorted: list[float] = []
        self._count = 0
        self._total = 0.0
        self._longest = 0.0
        self._buckets = [0] * _BUCKETS

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.unsorted.append(seconds)
        if len(self.unsorted) >= MAX_UNSORTED:
            self.sort()

    @property
    def count(self) -> int:
        """Number of durations."""
        return self._count + len(self.unsorted)

    @property
    def total(self) -> float:
        """Sum of the durations, in seconds."""
        self.sort()
        return self._total

    @property
    def longest(self) -> float:
        """The longest duration, in seconds."""
        self.sort()
        return self._longest

    def percentile(self, percent: float) -> float:
        """Return the seconds that *percent* % of the durations do not exceed, 0 if there are none.

        The result may be 12.5 % too high.
        """
        self.sort()
        rank = max(1.0, self._count * percent / 100)
        seen = 0
        for index, count in enumerate(self._buckets):
            seen += count
            if seen >= rank:
                return min(_upper_bound(index) / 1e6, self._longest)
        return 0.0

    def cumulative(self) -> list[tuple[float, int]]:
        """Return upper bounds in seconds, each with the number of durations below it."""
        self.sort()
        return [(2**power / 1e6, sum(self._buckets[: (power - 2) * _HALF])) for power in _BOUNDS]

    def sort(self) -> None:
        """Put the latest durations into their buckets."""
        values = sorted(self.unsorted)
        if not values:
            return
        self.unsorted.clear()
        self._count += len(values)
        self._total += sum(values)
        self._longest = max(self._longest, values[-1])
        start = 0
        while start < len(values):
            index = _index_of(values[start])
            end = bisect_left(values, _upper_bound(index) / 1e6, start + 1)
            self._buckets[index] += end - start
            start = end


def _index_of(seconds: float) -> int:
    value = min(max(0, int(seconds * 1e6)), _LONGEST)
    if value < _EXACT:
        return value
    shift = value.bit_length() - 4
    return shift * _HALF + (value >> shift)


def _upper_bound(index: int) -> int:
    """Return the microseconds below which the durations of a bucket are."""
    if index < _EXACT:
        return index + 1
    shift = index // _HALF - 1
    return (index - shift * _HALF + 1) << shift
