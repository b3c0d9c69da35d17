# SPDX-License-Identifier: ZPL-2.1
"""When the calls of a connection end, with one timer for all."""

from collections.abc import Callable, Collection
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

SLACK = 100
"""Deadlines of calls that have ended which are kept beside as many as there are calls"""


class Deadlines:
    """Deadlines of calls, most of which end before.

    A timer of the loop for each call takes longer than to send it. Here a call that ends does not
    even say so: its deadline is dropped with others, at a cost that does not grow.

    :param loop: event loop
    :param calls: numbers of the calls under way
    :param expire: called with the number and the time-out of a call that has reached its deadline
    """

    def __init__(self, loop: Any, calls: Collection[bytes], expire: Callable[[bytes, float], None]):
        self._loop = loop
        self._calls = calls
        self._expire = expire
        self._heap: list[tuple[float, bytes, float]] = []
        self._timer: Any = None
        self._when = inf

    def add(self, number: bytes, timeout: float) -> None:
        """Note the deadline of a call.

        :param number: its number
        :param timeout: seconds from now
        """
        if len(self._heap) > 2 * len(self._calls) + SLACK:
            self._heap = [entry for entry in self._heap if entry[1] in self._calls]
            heapify(self._heap)
        when = self._loop.time() + timeout
        heappush(self._heap, (when, number, timeout))
        if self._timer is None or when < self._when:
            self._set_timer()

    def clear(self) -> None:
        """Forget all."""
        self._heap.clear()
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heap:
            self._when = self._heap[0][0]
            self._timer = self._loop.call_at(self._when, self._pass)

    def _pass(self) -> None:
        # A loop may be early, by what its clock cannot tell.
        now = max(self._when, self._loop.time())
        while self._heap and (self._heap[0][0] <= now or self._heap[0][1] not in self._calls):
            _when, number, timeout = heappop(self._heap)
            if number in self._calls:
                self._expire(number, timeout)
        self._set_timer()
