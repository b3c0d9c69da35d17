# SPDX-License-Identifier: ZPL-2.1
"""Answers that requests share: many requests do not ask many questions."""

from collections.abc import Callable
from math import inf
from threading import Lock
from typing import Generic, TypeVar

from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.fork import ForkLocal

MAX_AGE = 0.5
"""Seconds for which answers are used"""

MAX_WAIT_AGE = 3.0
"""Seconds for which they are used while one thread asks again, so that the others do not wait"""

Answers = TypeVar('Answers')


class SharedAnswers(Generic[Answers]):
    """The last answers of one process, which one thread at a time asks for.

    A service that hangs takes the time of the question. Without this, a load balancer and a flood
    of requests would occupy all threads of a web server meanwhile.

    :param ask: returns the answers
    """

    def __init__(self, ask: Callable[[], Answers]):
        self._ask = ask
        self._state: ForkLocal[_State[Answers]] = ForkLocal(_State)

    def get(self) -> Answers:
        """Return answers that are not older than half a second, or three while others ask."""
        state = self._state.get()
        if (found := state.find(MAX_AGE)) is not None:
            return found
        if not state.lock.acquire(blocking=False):
            if (found := state.find(MAX_WAIT_AGE)) is not None:
                return found
            state.lock.acquire()
        try:
            found = state.find(MAX_AGE)
            if found is None:
                found = self._ask()
                state.last = found, monotonic()
            return found
        finally:
            state.lock.release()


class _State(Generic[Answers]):
    """The last answers, and when they came."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.last: tuple[Answers | None, float] = None, -inf

    def find(self, age: float) -> Answers | None:
        """Return the last answers, None if they are older."""
        answers, time = self.last
        return answers if monotonic() - time < age else None
