# SPDX-License-Identifier: ZPL-2.1
"""Spans of OpenTelemetry: of messages that clients send, and of methods that services run."""

import re
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Any

from msgspec import Raw
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    Span,
    SpanKind,
    TracerProvider,
    get_current_span,
    get_tracer,
    set_span_in_context,
    use_span,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.trace.status import Status, StatusCode

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler.errors import error_reply
from pyams_zmq.wire.body import Reply, encode_reply
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.log_fields import set_trace_source
from pyams_zmq.wire.message import status_of
from pyams_zmq.wire.multipart import Multipart
from pyams_zmq.wire.tracing import (
    CALL,
    CREATE,
    ONE_WAY,
    SEND,
    RequestSpan,
    trace_options,
)

SYSTEM = 'pyams_zmq'
"""Value of `rpc.system` and `messaging.system`, and name of the instrumentation"""

_FAILED = 400  # status of a reply that is an error for its client
_SERVER_ERROR = 500
_STATUS_AT_START = re.compile(rb'\s*\[\s*([1-5]\d\d)\s*,').match
_MEMBER = re.compile(
    r'([a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})='
    r'[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]'
)
_MAX_MEMBERS = 32

_propagator = TraceContextTextMapPropagator()


class OpenTelemetryTracing:
    """Makes spans with the tracer provider of the program, or with another one.

    A call, and the method that it runs, are in the same trace. A message whose sender does not wait
    for the reply, and each attempt of a job, begin a trace of their own, with a link to the span
    that has sent it, as the conventions for messaging say.
    """

    def __init__(self) -> None:
        self._tracer = get_tracer(SYSTEM)
        set_trace_source(_find_trace_id)

    def use(self, provider: TracerProvider) -> None:
        """Make the spans with a tracer provider, in this process, from now on."""
        self._tracer = provider.get_tracer(SYSTEM)

    def request(self, client: Any, message: Any, operation: str = CALL) -> RequestSpan:
        """Return the span of a message, see :class:`~pyams_zmq.wire.tracing.Tracing`."""
        match message:
            case [str(method), _args] | [str(method), _args, None]:
                options: dict[str, Any] = {}
            case [str(method), _args, dict(options)]:
                pass
            case _:
                return RequestSpan(message)
        if method.startswith('pyams_zmq.'):  # a question about the service, or a job
            return RequestSpan(message)
        job = options.get('id')
        if operation == CALL and job is not None:
            operation = SEND
        service = client.service_name or client.address
        attributes = {**_describe(service, method), **_address_of(client.address)}
        if operation != CALL:
            attributes.update(_describe_message(service, method, operation, job))
        span = self._tracer.start_span(
            _name(service, method, operation),
            kind=SpanKind.CLIENT if operation == CALL else SpanKind.PRODUCER,
            attributes=attributes,
        )
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, set_span_in_context(span))
        sent = {**options, **trace_options(carrier)}
        if operation in (SEND, CREATE) and job is None:
            sent[ONE_WAY] = True
        return _SentMessage(span, message, sent)

    def run(
        self,
        call: Callable[[], Any],
        method: str,
        job: Any,
        service: str,
        options: Mapping[str, Any],
    ) -> Any:
        """Call a method in a span, see :class:`~pyams_zmq.wire.tracing.Tracing`."""
        sender = _read_context(options)
        attributes = _describe(service, method)
        if job is None and options.get(ONE_WAY) is not True:
            span = self._tracer.start_span(
                _name(service, method, CALL), sender, SpanKind.SERVER, attributes
            )
        else:
            attributes.update(
                _describe_message(service, method, 'process', None if job is None else job.id)
            )
            if job is not None:
                attributes['pyams_zmq.job.attempt'] = job.attempt
            linked = get_current_span(sender).get_span_context()
            span = self._tracer.start_span(
                _name(service, method, 'process'),
                Context(),
                SpanKind.CONSUMER,
                attributes,
                links=[Link(linked)] if linked.is_valid else [],
            )
        return _RunningMethod(span, method, None if job is None else job.id).run(call)


class _SentMessage(RequestSpan):
    """A message with a span, which ends with the context."""

    def __init__(self, span: Span, message: Any, options: dict[str, Any]):
        super().__init__([*message[:2], options] if options else message)
        self.options = options or None
        self._span = span

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        reply = self.reply.value if isinstance(self.reply, Multipart) else self.reply
        if error is not None:
            _note_error(self._span, error)
        else:
            _note_status(self._span, status_of(reply), _FAILED)
        self._span.end()


class _RunningMethod:
    """A method with a span, which ends when its reply is encoded."""

    def __init__(self, span: Span, method: str, job: str | None):
        self._span = span
        self._method = method
        self._job = job

    def run(self, call: Callable[[], Any]) -> Any:
        """Call the method; return its encoded result or error, or an awaitable of it."""
        with _present(self._span):
            try:
                result = call()
                if isinstance(result, Awaitable):
                    return self._wait(result)
                reply = encode_reply(result)
            except BaseException as error:  # noqa: BLE001 - the peer waits for a reply
                reply = self._fail(error)
        return self._end(reply)

    async def _wait(self, result: Awaitable[Any]) -> Any:
        with _present(self._span):
            try:
                reply = encode_reply(await result)
            except CancelledError as error:
                _note_error(self._span, error)
                self._span.end()
                raise
            except BaseException as error:  # noqa: BLE001 - as above
                reply = self._fail(error)
        return self._end(reply)

    def _fail(self, error: BaseException) -> bytes:
        if not isinstance(error, ZMQMessageError):
            _note_error(self._span, error)
            if isinstance(error, Exception):
                self._span.record_exception(error)
        return error_reply(error, self._method, self._job)

    def _end(self, reply: Reply) -> Raw | Multipart:
        *frames, data = reply if isinstance(reply, list) else [reply]
        match = _STATUS_AT_START(data)
        _note_status(self._span, None if match is None else int(match[1]), _SERVER_ERROR)
        self._span.end()
        return Multipart(Raw(data), frames) if frames else Raw(data)


def _present(span: Span) -> Any:
    """Return a context in which a span is the present one."""
    return use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False)


def _find_trace_id() -> str | None:
    context = get_current_span().get_span_context()
    return f'{context.trace_id:032x}' if context.is_valid else None


def _name(service: str, method: str, operation: str) -> str:
    return f'{service}/{method}' if operation == CALL else f'{operation} {service}/{method}'


def _describe(service: str, method: str) -> dict[str, Any]:
    return {'rpc.system': SYSTEM, 'rpc.service': service, 'rpc.method': method}


def _describe_message(service: str, method: str, operation: str, job: str | None) -> dict[str, Any]:
    found = {
        'messaging.system': SYSTEM,
        'messaging.destination.name': f'{service}/{method}',
        'messaging.operation.name': operation,
        'messaging.operation.type': operation,
    }
    return found if job is None else {**found, 'messaging.message.id': job}


@lru_cache
def _address_of(uri: str) -> Mapping[str, Any]:
    endpoint = Endpoint.parse(uri, bind=False)
    port = {} if endpoint.port is None else {'server.port': endpoint.port}
    return {'server.address': endpoint.host.strip('[]'), **port}


def _note_error(span: Span, error: BaseException) -> None:
    span.set_attribute('error.type', type(error).__qualname__)
    span.set_status(Status(StatusCode.ERROR, type(error).__qualname__))


def _note_status(span: Span, status: int | None, least: int) -> None:
    if status is None:
        return
    span.set_attribute('pyams_zmq.status', status)
    if status >= least:
        span.set_status(Status(StatusCode.ERROR))


def _read_context(options: Mapping[str, Any]) -> Context:
    """Return the context in the options of a message; an empty one if it is malformed."""
    carrier = trace_options(options)
    state = carrier.get('tracestate', '')
    members = [member for each in state.split(',') if (member := each.strip(' \t'))]
    is_valid = len(members) <= _MAX_MEMBERS and all(map(_MEMBER.fullmatch, members))
    if not is_valid:  # the propagator would log a warning for each such message
        del carrier['tracestate']
    return _propagator.extract(carrier, Context())
