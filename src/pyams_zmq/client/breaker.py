# SPDX-License-Identifier: ZPL-2.1
"""What the calls of a client know in common about a service that is down: a circuit breaker.

This module does no I/O, and takes the time as an argument. The client for threads and the client
for asyncio use it, and only for calls that find no connection.
"""

import threading
from math import inf

from pyams_zmq.exceptions import ZMQUnreachableError

CONNECT_TIMEOUT = 2.0
"""Seconds until a call fails if the service does not answer the handshake, by default"""

PAUSE = 1.0
"""Seconds in which the calls to a service that is down fail at once; then one of them tries"""

GRACE = 0.5
"""Seconds until only one call waits for a service that was never there, and does not answer"""


class CircuitBreaker:
    """Lets calls fail at once while a service is down, so that they hold no threads.

    *Closed*: each call tries. A service that was there may be back soon, for a restart takes about
    a second: calls that are refused wait, until the service has been missing for their
    `connect_timeout`. If it was never there, only one call waits; the others fail when they are
    refused, or after `GRACE`, and so do later ones, without an attempt.

    *Open*: after that, calls fail at once for a second. Then (*half-open*) one call tries, and does
    not wait if it is refused, while others still fail at once. The first connection closes it.

    :param uri: address of the service, for the text of errors
    :param is_expected: true if all calls may wait for a service that was never there
    """

    def __init__(self, uri: str, *, is_expected: bool = False):
        self._uri = uri
        self._is_expected = is_expected
        self._lock = threading.Lock()
        self._missing_since = inf
        self._noticed_at = -inf
        self._answered_at = -inf
        self._trial: Attempt | None = None
        self._opened_at = inf
        self._problem = ''

    @property
    def is_open(self) -> bool:
        """True from the first call that has failed because the service is down until it is up."""
        return self._opened_at < inf

    def begin(
        self, now: float, connect_timeout: float = CONNECT_TIMEOUT, missing: float = 0.0
    ) -> 'Attempt':
        """Return an attempt to connect, for one call.

        :param now: seconds of a clock that never goes back
        :param connect_timeout: seconds until the service is down, if it does not answer
        :param missing: seconds for which an idle connection has tried in vain to connect again
        :raises ZMQUnreachableError: if the service is known to be down
        """
        with self._lock:
            if self._waits_until(now) > now:
                raise self._describe(now)
            if missing:
                self._note_missing(now - missing, now, connect_timeout)
            attempt = Attempt(self, now, connect_timeout)
            if self.is_open:
                self._trial = attempt
                attempt.blocks_from = now
            return attempt

    def pause(self, now: float) -> float:
        """Return the seconds until a call may try, at most `PAUSE`; 0 if it may do so now."""
        with self._lock:
            return min(PAUSE, max(0.0, self._waits_until(now) - now))

    def succeed(self, now: float) -> None:
        """Close it, because the service has answered.

        An attempt that began before, and has not connected yet, does not open it.
        """
        with self._lock:
            self._is_expected = True
            self._answered_at = now
            self._missing_since = self._opened_at = inf
            self._trial = None

    def _note_missing(self, since: float, now: float, connect_timeout: float) -> None:
        if now > self._noticed_at + connect_timeout + PAUSE and not self.is_open:
            self._missing_since = inf  # calls that had little time have failed, long ago
        self._missing_since = min(self._missing_since, max(since, self._answered_at))
        self._noticed_at = now

    def _waits_until(self, now: float) -> float:
        trial = self._trial
        if trial is not None and trial.blocks_from <= now < trial.ends_at:
            return trial.ends_at
        return self._opened_at + PAUSE if self.is_open else -inf

    def _describe(self, now: float) -> ZMQUnreachableError:
        since = self._missing_since if self._trial is None else self._trial.start
        seconds = f'{now - min(since, self._missing_since):.3g}'
        if not self.is_open:
            return ZMQUnreachableError(
                f'No service has answered at {self._uri} for {seconds} s; one call waits for it, '
                'and others fail at once'
            )
        return ZMQUnreachableError(
            f'{self._problem}; it is known to be down for {seconds} s: calls fail at once, and '
            'one tries each second'
        )

    # Called by attempts

    def _refuse(self, attempt: 'Attempt', now: float) -> float:
        with self._lock:
            self._note_missing(attempt.start, now, attempt.connect_timeout)
            if self.is_open:
                return -inf
            if not self._is_expected:
                if not self._has_trial(attempt, now):
                    return -inf
                attempt.blocks_from = min(attempt.blocks_from, now)
            end = self._missing_since + attempt.connect_timeout
            return end if now < end else -inf

    def _wait(self, attempt: 'Attempt', now: float) -> float:
        with self._lock:
            end = attempt.start + attempt.connect_timeout
            if self._is_expected or self.is_open:
                return end
            attempt.blocks_from = min(attempt.blocks_from, now + GRACE)
            return end if self._has_trial(attempt, now) else min(end, attempt.blocks_from)

    def _has_trial(self, attempt: 'Attempt', now: float) -> bool:
        """Return True if this attempt may wait, because none waits, or it is the one."""
        if self._trial is None or now >= self._trial.ends_at:
            self._trial = attempt
        return self._trial is attempt

    def _fail(self, attempt: 'Attempt', now: float, problem: str) -> None:
        with self._lock:
            self._note_missing(attempt.start, now, attempt.connect_timeout)
            if self.is_open or now >= self._missing_since + attempt.connect_timeout:
                self._opened_at = now
                self._problem = problem
            self._end(attempt)

    def _abandon(self, attempt: 'Attempt') -> None:
        with self._lock:
            self._end(attempt)

    def _end(self, attempt: 'Attempt') -> None:
        if self._trial is attempt:
            self._trial = None


class Attempt:
    """The attempt of one call to connect; call one of `succeed`, `fail` and `abandon` at its end.

    :ivar start: when it began
    :ivar blocks_from: from when on others fail at once, if it is the one that tries
    :ivar ends_at: when it has ended in any case; one that was forgotten must not block others
    """

    def __init__(self, breaker: CircuitBreaker, start: float, connect_timeout: float):
        self._breaker = breaker
        self.start = start
        self.connect_timeout = connect_timeout
        self.blocks_from = inf
        self.ends_at = start + connect_timeout + PAUSE

    def refuse(self, now: float) -> float:
        """Return until when the call may wait, because no service listens; -inf for not at all."""
        return self._breaker._refuse(self, now)

    def wait(self, now: float) -> float:
        """Return until when the call may wait for an answer to the handshake."""
        return self._breaker._wait(self, now)

    def succeed(self, now: float) -> None:
        """End it, because the service has answered."""
        self._breaker.succeed(now)

    def fail(self, now: float, problem: str) -> None:
        """End it, because the service has not answered, or does not listen.

        :param problem: text of the error
        """
        self._breaker._fail(self, now, problem)

    def abandon(self) -> None:
        """End it for another reason."""
        self._breaker._abandon(self)
