# SPDX-License-Identifier: ZPL-2.1
"""Shows calls in the log and in traces while their methods run."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from pyams_zmq.handler.job import RunningJob
from pyams_zmq.wire.log_fields import PresentCall, has_filters, present_call
from pyams_zmq.wire.message import decode_with_options
from pyams_zmq.wire.tracing import Tracing


class Observer:
    """Wraps the calls of a process.

    :param process: the ZMQProcess
    :param tracing: makes spans, or None
    :param is_logged: true if log records of methods show the call
    """

    def __init__(self, process: Any, tracing: Tracing | None, is_logged: bool):
        self._process = process
        self._tracing = tracing
        self._is_logged = is_logged
        self._options: Mapping[str, Any] = {}

    def decode(self, data: bytes) -> tuple[str, Any]:
        """Decode a message as `decode_request` does, and keep its options for `wrap`."""
        name, args, self._options = decode_with_options(data)
        return name, args

    def wrap(
        self, call: Callable[[], Any], method: str, job: RunningJob | None
    ) -> Callable[[], Any]:
        """Return a call that can be observed, for the message that was decoded last.

        :param method: name of the method
        """
        if self._is_logged:
            call = partial(_call_logged, call, PresentCall(method, None if job is None else job.id))
        if self._tracing is not None:
            service = getattr(self._process, 'service_name', None) or self._process.name
            call = partial(self._tracing.run, call, method, job, service, self._options)
        return call


def make_observer(process: Any) -> Observer | None:
    """Return the observer of a process; None if it has nothing to do."""
    tracing = getattr(getattr(process, 'registry', None), 'zmq_tracing', None)
    is_logged = has_filters()
    return None if tracing is None and not is_logged else Observer(process, tracing, is_logged)


def _call_logged(call: Callable[[], Any], present: PresentCall) -> Any:
    token = present_call.set(present)
    try:
        result = call()
    finally:
        present_call.reset(token)
    return _wait_logged(result, present) if isinstance(result, Awaitable) else result


async def _wait_logged(result: Awaitable[Any], present: PresentCall) -> Any:
    present_call.set(present)  # in the context of its task
    return await result
