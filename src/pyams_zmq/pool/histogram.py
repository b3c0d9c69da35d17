# SPDX-License-Identifier: ZPL-2.1
"""Percentiles of durations, in a fixed amount of memory."""

_EXACT = 16  # microseconds; each shorter duration has a bucket of its own
_HALF = _EXACT // 2  # buckets for each doubling above
_LONGEST = (1 << 40) - 1  # microseconds: 12 days
_BUCKETS = (_LONGEST.bit_length() - 4) * _HALF + _EXACT


class Histogram:
    """Count durations in buckets whose width is an eighth of their values.

    :ivar count: number of durations
    :ivar total: their sum, in seconds
    :ivar longest: the longest one, in seconds
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.longest = 0.0
        self._buckets = [0] * _BUCKETS

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.count += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)
        value = min(max(0, int(seconds * 1e6)), _LONGEST)
        if value >= _EXACT:
            shift = value.bit_length() - 4
            value = shift * _HALF + (value >> shift)
        self._buckets[value] += 1

    def percentile(self, percent: float) -> float:
        """Return the seconds that *percent* % of the durations do not exceed, 0 if there are none.

        The result may be 12.5 % too high.
        """
        rank = max(1.0, self.count * percent / 100)
        seen = 0
        for index, count in enumerate(self._buckets):
            seen += count
            if seen >= rank:
                return min(_upper_bound(index) / 1e6, self.longest)
        return 0.0


def _upper_bound(index: int) -> int:
    if index < _EXACT:
        return index + 1
    shift = index // _HALF - 1
    return (index - shift * _HALF + 1) << shift
