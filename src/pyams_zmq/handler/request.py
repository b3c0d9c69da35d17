# SPDX-License-Identifier: ZPL-2.1
"""A Pyramid request for each message, with its transaction."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from msgspec import Raw
from pyramid.interfaces import IRequestFactory, IRootFactory
from pyramid.request import Request, apply_request_extensions
from pyramid.threadlocal import RequestContext
from pyramid.traversal import DefaultRootFactory

from pyams_zmq.wire.message import encode, status_of
from pyams_zmq.wire.multipart import Multipart


def call_with_request(registry: Any, call: Callable[..., Any]) -> Any:
    """Call a method with the keyword argument `request`.

    :class:`~pyams_zmq.handler.ZMQMessageHandler` describes the request and its transaction.

    :param registry: registry of the application
    :param call: method, plain or `async def`
    :return: its encoded result, or an awaitable of it
    :raises: the exceptions of the method, and of the commit
    """
    scope = _RequestScope(registry)
    try:
        result = call(request=scope.request)
        if isinstance(result, Awaitable):
            return scope.wait(result)
    except BaseException:
        scope.leave(commit=False)
        raise
    return scope.finish(result)


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


class _RequestScope:
    """The request of a message, from begin to end."""

    _tm: Any = None
    _is_open = False

    def __init__(self, registry: Any):
        # Like `pyramid.scripting.prepare`, but the transaction begins before the root is made:
        # a root factory that reads a database needs it.
        make_request = registry.queryUtility(IRequestFactory, default=Request)
        make_root = registry.queryUtility(IRootFactory, default=DefaultRootFactory)
        self.request = request = make_request.blank('/')
        request.registry = registry
        self._context = RequestContext(request)
        self._context.begin()
        self._is_open = True
        try:
            apply_request_extensions(request)
            tm = getattr(request, 'tm', None)
            if tm is not None:
                tm.begin()
                self._tm = tm
                # pyramid_tm marks a request whose transaction it manages with these.
                request.environ.update({'tm.active': True, 'tm.manager': tm})
            request.root = request.context = make_root(request)
        except BaseException:
            self.leave(commit=False)
            raise

    async def wait(self, result: Awaitable[Any]) -> Any:
        """Wait for the result of an `async def` method."""
        try:
            value = await result
        except BaseException:
            self.leave(commit=False)
            raise
        return self.finish(value)

    def finish(self, result: Any) -> Raw | Multipart:
        """Commit or abort the transaction, depending on the result; return its JSON."""
        commit = False
        try:
            # Abort if the result is not JSON. Its objects may need the transaction to be encoded.
            if isinstance(result, Multipart):
                data: Raw | Multipart = Multipart(Raw(encode(result.value)), result.frames)
                result = result.value
            else:
                data = Raw(encode(result))
            commit = (status_of(result) or 0) < 400  # noqa: PLR2004 - as in HTTP
        finally:
            self.leave(commit)
        return data

    def leave(self, commit: bool) -> None:
        """Commit or abort the transaction, and end the request."""
        self._is_open = False
        try:
            if self._tm is not None:
                for key in ('tm.active', 'tm.manager'):
                    del self.request.environ[key]
                if commit:
                    self._tm.commit()
                else:
                    self._tm.abort()
        except BaseException:
            self._tm.abort()  # else the next message would use this transaction
            raise
        finally:
            try:
                self.request._process_finished_callbacks()
            finally:
                self._context.end()

    def __del__(self) -> None:
        if self._is_open:  # its task was cancelled before the first step
            self.leave(commit=False)
