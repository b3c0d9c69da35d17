# SPDX-License-Identifier: ZPL-2.1
"""How often the methods of a service were called, with which result, and how long that took."""

from typing import Any

from pyams_zmq.handler.histogram import MAX_UNSORTED, Histogram
from pyams_zmq.wire.body import Reply
from pyams_zmq.wire.message import is_error

MAX_METHODS = 1000
"""Methods that are counted by name"""


class MethodStats:
    """Statistics of the calls of one method.

    :ivar repeatable: true if a call may be sent to another worker after the death of the first one
    """

    __slots__ = ('_unsorted', 'errors', 'latency', 'repeatable')

    def __init__(self) -> None:
        self.repeatable = False
        self.errors = 0
        self.latency = Histogram()
        self._unsorted = self.latency.unsorted

    def count(self, seconds: float, reply: Reply) -> None:
        """Count a call.

        :param seconds: its duration
        :param reply: its encoded reply
        """
        unsorted = self._unsorted  # here, not by a call of `add`: this runs for each message
        unsorted.append(seconds)
        if len(unsorted) >= MAX_UNSORTED:
            self.latency.sort()
        data = reply[-1] if isinstance(reply, list) else reply
        # The second one is fast, and true for few replies; a large one may be a zmq.Frame.
        if (type(data) is not bytes or data[1:2] in b'45') and is_error(data):
            self.errors += 1

    def stats(self) -> dict[str, Any]:
        """Return the statistics; durations are seconds."""
        latency = self.latency
        count = latency.count
        return {
            'calls': count,
            'errors': self.errors,
            'mean': latency.total / count if count else 0.0,
            'p50': latency.percentile(50),
            'p90': latency.percentile(90),
            'p99': latency.percentile(99),
            'max': latency.longest,
            'buckets': latency.cumulative(),
        }


class CallStatistics:
    """Statistics of the calls of a process.

    :ivar refused: messages that did not get to a method
    """

    def __init__(self) -> None:
        self.refused = 0
        self._methods: dict[str, MethodStats] = {}

    def of_method(self, name: str) -> MethodStats:
        """Return the statistics of a method; those above a limit have them together."""
        if name not in self._methods and len(self._methods) >= MAX_METHODS:
            name = '(others)'
        return self._methods.setdefault(name, MethodStats())

    def stats(self) -> dict[str, Any]:
        """Return the statistics, as JSON types."""
        methods = {
            name: method.stats() for name, method in self._methods.items() if method.latency.count
        }
        return {**sum_up(methods), 'refused': self.refused, 'methods': methods}


def sum_up(methods: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Return the calls and errors of some methods together."""
    return {name: sum(method[name] for method in methods.values()) for name in ('calls', 'errors')}
