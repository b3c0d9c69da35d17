# SPDX-License-Identifier: ZPL-2.1
"""How many messages a client sends before their replies, and how long it waits after a refusal.

This module does no I/O, and takes the time as an argument.
"""

from math import inf
from random import uniform

WINDOW = 100
"""Messages without a reply, at most: a service that is busy never stops reading so few"""

WINDOW_SIZE = 16 * 1024 * 1024
"""Bytes of the messages without a reply; a larger message is sent alone"""

FIRST_DELAY = 0.05
MAX_DELAY = 5.0
"""Seconds until the next attempt after status 503, at first and at most"""

DRAINING_DELAY = 1.0
"""Seconds until the next attempt, at least, when a service stops: it ends when nothing arrives"""

GROWTH = 1.0
"""Seconds without a refusal after which more messages are sent, although no reply has come"""


class Pace:
    """The pace of one connection.

    After a refusal it sends nothing for a while, then one message, and doubles that with each good
    reply.

    :ivar window: messages without a reply, at most
    :ivar resumes_at: when the next message may be sent, in the seconds of `time.monotonic`
    """

    def __init__(self) -> None:
        self.window = WINDOW
        self.resumes_at = -inf
        self._grows_at = inf
        self._delay = FIRST_DELAY
        self._last = 0

    def refuse(self, serial: int, last: int, now: float, *, is_draining: bool) -> bool:
        """Pause, because a message was refused, unless it was sent before the last pause.

        Return True when the delay has become as long as it can.

        :param serial: serial number of the message
        :param last: serial number of the last message that was sent
        :param is_draining: true if the service stops, false if it is overloaded
        """
        if serial <= self._last:
            return False
        self._last = last
        self.window = 1
        delay = max(self._delay, DRAINING_DELAY) if is_draining else self._delay
        self.resumes_at = now + delay * uniform(1, 1.5)  # noqa: S311 - not a secret
        self._grows_at = self.resumes_at + GROWTH
        is_last = self._delay < MAX_DELAY <= 2 * self._delay
        self._delay = min(2 * self._delay, MAX_DELAY)
        return is_last

    def accept(self, serial: int) -> None:
        """Send more, because a message that was sent after the last pause had another reply."""
        if serial > self._last:
            self.window = min(2 * self.window, WINDOW)
            self._delay = FIRST_DELAY

    def may_send(self, unanswered: int, now: float) -> bool:
        """Return True if a message may be sent now."""
        if now < self.resumes_at:
            return False
        if unanswered >= self.window and now >= self._grows_at and self.window < WINDOW:
            self.window = min(2 * self.window, WINDOW)
            self._grows_at = now + GROWTH
        return unanswered < self.window

    def wakes_at(self, unanswered: int, now: float) -> float:
        """Return when a message may be sent, if no reply comes before."""
        if now < self.resumes_at:
            return self.resumes_at
        if unanswered < self.window:
            return now
        return inf if self.window == WINDOW else self._grows_at
