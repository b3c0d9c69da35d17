# SPDX-License-Identifier: ZPL-2.1
"""The statistics of a service, as far as a table shows them, and what has changed since others."""

from collections import Counter
from collections.abc import Mapping
from math import inf
from typing import Annotated, Any

from msgspec import Meta, Struct, ValidationError, convert, field

from pyams_zmq.exceptions import ZMQReplyError

_Count = Annotated[int, Meta(ge=0, le=10**15)]
_Amount = Annotated[float, Meta(ge=0, le=1e15)]


class MethodCounts(Struct):
    """How often a method was called, and how long that took.

    :ivar buckets: pairs of seconds, and the number of calls that did not take longer
    """

    calls: _Count = 0
    max: _Amount = 0.0
    buckets: list[tuple[_Amount, _Count]] = field(default_factory=list)

    @property
    def durations(self) -> 'Counter[float]':
        """Number of calls in each bucket, by its longest duration in seconds."""
        found: Counter[float] = Counter()
        before = 0
        for longest, number in self.buckets:
            found[longest] += number - before
            before = number
        found[inf] += self.calls - before
        return found


class JobNumbers(Struct):
    """Jobs of a service, by state."""

    states: dict[str, _Count] = field(default_factory=dict)


class Snapshot(Struct):
    """The statistics of a service; members that an older service lacks have their defaults."""

    pid: int = 0
    state: str = 'up'
    uptime: _Amount | None = None
    calls: _Count | None = None
    errors: _Count | None = None
    in_flight: _Count | None = None
    queue: _Count | None = None
    oldest: _Amount | None = None
    memory: _Amount | None = None
    methods: dict[str, MethodCounts] = field(default_factory=dict)
    workers: list[Any] | None = None
    jobs: JobNumbers | None = None

    @property
    def durations(self) -> 'Counter[float]':
        """Number of calls of all methods in each bucket."""
        return sum((method.durations for method in self.methods.values()), Counter())


def read_snapshot(payload: Any) -> Snapshot:
    """Return the statistics of a reply.

    :raises ZMQReplyError: if it has others
    """
    try:
        return convert(payload, Snapshot)
    except ValidationError as error:
        raise ZMQReplyError(f'The reply is not what a service says about itself: {error}') from None


class Change:
    """What has happened between two snapshots of a service.

    :param before: the former one, or None for the start of the service
    :param seconds: time between both
    :ivar rate: calls per second, None if that is not known
    """

    def __init__(self, now: Snapshot, before: Snapshot | None, seconds: float):
        self._longest = max((method.max for method in now.methods.values()), default=0.0)
        calls, self._durations = now.calls, now.durations
        if before is not None and before.pid == now.pid and calls is not None:
            calls -= before.calls or 0
            self._durations = self._durations - before.durations
        else:
            seconds = now.uptime or 0.0
        self.rate = calls / seconds if calls is not None and seconds > 0 else None

    def percentile(self, percent: float) -> float | None:
        """Return the seconds that *percent* % of the calls do not exceed, None without calls."""
        return _find_percentile(self._durations, percent, self._longest)


def _find_percentile(
    durations: Mapping[float, int], percent: float, longest: float
) -> float | None:
    rank = sum(durations.values()) * percent / 100
    seen = 0
    for seconds, number in sorted(durations.items()):
        seen += number
        if seen >= rank:
            return min(seconds, longest)
    return None
