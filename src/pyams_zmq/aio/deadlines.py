# SPDX-License-Identifier: ZPL-2.1
"""Deadlines of the calls of a connection, with one timer for all."""

from collections.abc import Callable, Collection
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

SLACK = 100
"""Deadlines of ended calls that may be kept, in addition to one for each call under way"""


class Deadlines:
    """Deadlines of calls, most of which end before.

    A timer of the loop for each call would take longer than sending the call. Here a call that
    ends is not removed; its deadline is dropped later, together with others, at constant cost.

    :param loop: event loop
    :param calls: numbers of the calls under way
    :param expire: called with the number and the time-out of a call that reaches its deadline
    """

    def __init__(self, loop: Any, calls: Collection[bytes], expire: Callable[[bytes, float], None]):
        self._loop = loop
        self._calls = calls
        self._expire = expire
        self._heap: list[tuple[float, bytes, float]] = []
        self._timer: Any = None
        self._when = inf

    def add(self, number: bytes, timeout: float, spent: float = 0.0) -> None:
        """Add the deadline of a call, *timeout* seconds from now, less those that were spent."""
        if len(self._heap) > 2 * len(self._calls) + SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._calls]
            heapify(self._heap)
        when = self._loop.time() + timeout - spent
        heappush(self._heap, (when, number, timeout))
        if self._timer is None or when < self._when:
            self._set_timer()

    def clear(self) -> None:
        """Remove all deadlines."""
        self._heap.clear()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heap:
            self._when = self._heap[0][0]
            self._timer = self._loop.call_at(self._when, self._expire_due)

    def _expire_due(self) -> None:
        # A loop may call a timer early, by up to the resolution of its clock.
        now = max(self._when, self._loop.time())
        while self._heap and (self._heap[0][0] <= now or self._heap[0][1] not in self._calls):
            _when, number, timeout = heappop(self._heap)
            if number in self._calls:
                self._expire(number, timeout)
        self._set_timer()
