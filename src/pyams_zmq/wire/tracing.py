# SPDX-License-Identifier: ZPL-2.1
"""What clients and handlers call to make spans: nothing, unless `pyams_zmq.otel` is included."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

ONE_WAY = 'one_way'
"""Option of a message whose sender does not wait for the reply"""

CALL, SEND, CREATE = 'call', 'send', 'create'
"""What is done with a message: the last one makes it, and a transaction sends it later"""

MAX_TRACE_SIZE = 512
"""Characters of `traceparent` and of `tracestate`, at most; the minimum of W3C Trace Context"""

_NAMES = ('traceparent', 'tracestate')


def trace_options(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the trace context in the options of a message (W3C Trace Context), if it has one."""
    return {
        name: value
        for name in _NAMES
        if isinstance(value := options.get(name), str) and len(value) <= MAX_TRACE_SIZE
    }


class RequestSpan:
    """What is around a message while it is sent; this class has no span.

    :ivar message: the message that is sent
    :ivar options: options that it has got; or None
    :ivar reply: is set to the reply, if the caller waits for it
    """

    options: dict[str, Any] | None = None
    reply: Any = None

    def __init__(self, message: Any):
        self.message = message

    def __enter__(self) -> 'RequestSpan':  # noqa: PYI034 - Python 3.10 has no Self
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """End the span."""


class Tracing(Protocol):
    """Makes spans; see :mod:`pyams_zmq.otel`."""

    def request(self, client: Any, message: Any, operation: str = CALL) -> RequestSpan:
        """Return the span of a message, a context in which it is sent.

        :param client: has `address`, and `service_name`
        :param message: the message; one that is not ``[type, args]`` has no span
        :param operation: `CALL`; `SEND` or `CREATE`, if the sender does not wait for the reply
        """

    def run(
        self,
        call: Callable[[], Any],
        method: str,
        job: Any,
        service: str,
        options: Mapping[str, Any],
    ) -> Any:
        """Call a method in a span; return its encoded result or error, or an awaitable of it.

        :param job: the job that it runs, or None
        :param options: options of the message
        """
