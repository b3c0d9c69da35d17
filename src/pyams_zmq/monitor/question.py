# SPDX-License-Identifier: ZPL-2.1
"""A question in a thread of its own, whose answer is awaited for a limited time."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from pyams_zmq.exceptions import ZMQTimeoutError
from pyams_zmq.wire.clock import monotonic

SLACK = 0.1
"""Seconds after its time-out in which a question must have ended"""


class Answer(NamedTuple):
    """The answer to a question.

    :ivar result: what was answered, for a service the payload of its reply; None after an error
    :ivar error: one line that says why the question failed; None if there is a result
    :ivar seconds: how long the answer took
    :ivar exception: the exception with that text
    """

    result: Any = None
    error: str | None = None
    seconds: float = 0.0
    exception: Exception | None = None


class Question(threading.Thread):
    """Asks something, in a thread that the end of the program does not wait for.

    If the thread does not end in time, because a file system hangs for instance, the same question
    is not asked again until it does: threads do not accumulate.

    :param owner: object to which the question belongs
    :param subject: who is asked, for errors; an owner asks each subject for one thing only
    :param ask: returns the answer, within the time-out if it can
    :param timeout: seconds
    """

    def __init__(self, owner: Any, subject: str, ask: Callable[[], Any], timeout: float):
        super().__init__(name=f'pyams_zmq question to {subject}', daemon=True)
        self.key = id(owner), subject
        self._owner = owner  # so that its id is not used again
        self._ask = ask
        self._start = monotonic()
        self._deadline = self._start + timeout + SLACK
        error = ZMQTimeoutError(f'{subject} has not answered within {timeout:.3g} s')
        self._answer = Answer(None, str(error), timeout, error)

    def start(self) -> None:
        """Start the thread, unless an earlier one with the same question is overdue."""
        others = threading.enumerate()  # a fork does not have those of its parent
        if any(isinstance(each, Question) and each._blocks(self) for each in others):
            return
        try:
            super().start()
        except RuntimeError as error:  # the limit of threads, or the end of the program
            self._fail(error)

    def _blocks(self, other: 'Question') -> bool:
        return self.key == other.key and monotonic() >= self._deadline

    def run(self) -> None:
        """Ask, in the thread."""
        try:
            result = self._ask()
            self._answer = Answer(result, None, monotonic() - self._start)
        except Exception as error:  # noqa: BLE001 - it is the answer
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        text = ' '.join(str(error).split()) or type(error).__name__
        # Its frames, and those of others, keep sockets and arguments.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        self._answer = Answer(None, text, monotonic() - self._start, error)

    def wait(self) -> Answer:
        """Wait until the time is over; return the answer, or the error that there is none yet."""
        if self.ident is not None:
            self.join(max(0, self._deadline - monotonic()))
        return self._answer
