# SPDX-License-Identifier: ZPL-2.1
"""A Pyramid request for each message, with its transaction."""

from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from pyramid.interfaces import IRequestFactory, IRootFactory
from pyramid.request import Request, apply_request_extensions
from pyramid.threadlocal import RequestContext
from pyramid.traversal import DefaultRootFactory

from pyams_zmq.wire.message import encode


class _AbortError(Exception):
    """Aborts the transaction of a method that has returned an error."""


def call_with_request(registry: Any, call: Callable[..., Any]) -> Any:
    """Call a method with the keyword argument `request`.

    The request is made as :func:`pyramid.scripting.prepare` makes one, with the `root` of the
    application. If it has a transaction manager `tm` (of pyramid_tm), its transaction is committed
    when the method succeeds. It is aborted when the method raises, when its result is not JSON, and
    when the status of its result is 400 or above. The reply is sent after the commit.

    :param registry: registry of the application
    :param call: method, plain or `async def`
    :return: its result, or an awaitable of it
    :raises: the exceptions of the method, and of the commit
    """
    with ExitStack() as scope:
        result = call(request=scope.enter_context(_request_of(registry)))
        if isinstance(result, Awaitable):
            return _wait(scope.pop_all(), result)
        _check(result)
    return result


async def _wait(scope: ExitStack, awaitable: Awaitable[Any]) -> Any:
    with scope:
        result = await awaitable
        _check(result)
    return result


def call_plain(call: Callable[..., Any], **options: Any) -> Any:
    """Call a method in the thread that its request belongs to.

    :raises TypeError: if its result is awaitable: the loop runs in another thread
    """
    result = call(**options)
    if isinstance(result, Awaitable):
        if isinstance(result, Coroutine):
            result.close()
        raise TypeError(
            f'{call} takes a request and returns an awaitable, which would run in another '
            'thread than the request: return a result'
        )
    return result


def _check(result: Any) -> None:
    encode(result)  # raises if it is not JSON, which aborts
    match result:
        case [int(status), _] if status >= 400:  # noqa: PLR2004 - as in HTTP
            raise _AbortError


@contextmanager
def _request_of(registry: Any) -> Iterator[Any]:
    # Like `pyramid.scripting.prepare`, but the transaction begins before the root is made: a root
    # factory that reads a database needs it.
    request = registry.queryUtility(IRequestFactory, default=Request).blank('/')
    request.registry = registry
    make_root = registry.queryUtility(IRootFactory, default=DefaultRootFactory)
    with suppress(_AbortError), RequestContext(request):
        try:
            apply_request_extensions(request)
            with _transaction_of(request):
                request.root = request.context = make_root(request)
                yield request
        finally:
            request._process_finished_callbacks()


@contextmanager
def _transaction_of(request: Any) -> Iterator[None]:
    tm = getattr(request, 'tm', None)
    if tm is None:
        yield
        return
    tm.begin()
    # pyramid_tm marks a request whose transaction it manages with these.
    request.environ.update({'tm.active': True, 'tm.manager': tm})
    try:
        try:
            yield
        finally:
            for key in ('tm.active', 'tm.manager'):
                del request.environ[key]
        tm.commit()
    except BaseException:
        tm.abort()  # also after a failed commit: else the next message would use this transaction
        raise
