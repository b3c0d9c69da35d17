# SPDX-License-Identifier: ZPL-2.1
"""Questions to all services of an application at once."""

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

from pyams_zmq.config.service import services_of
from pyams_zmq.exceptions import ZMQTimeoutError
from pyams_zmq.wire.clock import monotonic

SLACK = 0.1
"""Seconds after the time-out in which the threads that ask must have ended"""


class Answer(NamedTuple):
    """What a service has answered.

    :ivar result: the payload of the reply; None without a good one
    :ivar error: why there is no result, one line; None if there is one
    :ivar seconds: how long the answer took
    :ivar exception: the exception with that text
    """

    result: Any = None
    error: str | None = None
    seconds: float = 0.0
    exception: Exception | None = None


def ask_all(
    registry: Any,
    type: str,  # noqa: A002 - the name of the field
    timeout: float = 1.0,
    names: Iterable[str] | None = None,
) -> dict[str, Answer]:
    """Call a method without arguments of several services at once; return the answers by name.

    Each service is asked in a thread, by a client that is closed afterwards. A service that hangs
    or is down delays neither the others nor the caller. The threads end at the latest with this
    function; one that does not, because a file system hangs for instance, keeps its service from
    being asked again until it ends.

    :param registry: registry of the application
    :param type: type of the message, `'pyams_zmq.ping'` for instance
    :param timeout: seconds for all of it
    :param names: names of the services, by default of all that are declared
    """
    is_busy = {
        thread.service
        for thread in threading.enumerate()  # a fork does not have those of its parent
        if isinstance(thread, _Question) and thread.is_overdue and thread.registry is registry
    }
    questions = [
        _Question(registry, name, type, timeout)
        for name in (sorted(services_of(registry)) if names is None else names)
    ]
    for question in questions:
        if question.service not in is_busy:
            question.ask()
    return {question.service: question.wait() for question in questions}


class _Question(threading.Thread):
    """Asks one service.

    It is a daemon: the end of the program does not wait for it.
    """

    def __init__(self, registry: Any, service: str, type_: str, timeout: float):
        super().__init__(name=f'pyams_zmq question to {service}', daemon=True)
        self.registry = registry
        self.service = service
        self._type = type_
        self._timeout = timeout
        self._start = monotonic()
        error = ZMQTimeoutError(f'{service!r} has not answered within {timeout:.3g} s')
        self._answer = Answer(None, str(error), timeout, error)

    @property
    def is_overdue(self) -> bool:
        """True after the time in which it should have ended."""
        return self._left <= 0

    @property
    def _left(self) -> float:
        return self._start + self._timeout + SLACK - monotonic()

    def ask(self) -> None:
        """Start the thread."""
        try:
            self.start()
        except RuntimeError as error:  # the limit of threads, or the end of the program
            self._fail(error)

    def run(self) -> None:
        """Ask the service, in the thread."""
        try:
            client = self.registry.zmq_clients.make(self.service)
            try:
                result = client.call(self._type, timeout=self._timeout, retries=0)
            finally:
                client.close()
            self._answer = Answer(result, None, monotonic() - self._start)
        except Exception as error:  # noqa: BLE001 - it is the answer
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        error = error.with_traceback(None)  # its frames keep sockets and arguments
        text = ' '.join(str(error).split()) or type(error).__name__
        self._answer = Answer(None, text, monotonic() - self._start, error)

    def wait(self) -> Answer:
        """Wait for the answer, until it is overdue."""
        if self.ident is not None:
            self.join(max(0, self._left))
        return self._answer
