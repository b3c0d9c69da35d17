# SPDX-License-Identifier: ZPL-2.1
"""A Pyramid request for a message, and its transaction."""

from collections.abc import Awaitable, Callable
from typing import Any

from pyramid.interfaces import IRequestFactory, IRootFactory
from pyramid.request import Request, apply_request_extensions
from pyramid.threadlocal import RequestContext
from pyramid.traversal import DefaultRootFactory

from pyams_zmq.wire.message import encode

_ERRORS = 400
"""First of the statuses that abort a transaction"""


def call_with_request(registry: Any, call: Callable[..., Any]) -> Any:
    """Call a method with the keyword argument `request`.

    The request is like the one that :func:`pyramid.scripting.prepare` makes, with the `root` of
    the application. If it has a transaction manager `tm` (of pyramid_tm), its transaction is
    committed when the method succeeds, and aborted when it raises, when its result is no JSON, and
    when the status of its result is 400 or above. No reply is sent before the commit.

    :param registry: registry of the application
    :param call: method, plain or `async def`
    :return: its result, or an awaitable of it
    :raises: what the method raises, and the commit
    """
    scope = _Scope(registry)
    try:
        result = call(request=scope.request)
        if isinstance(result, Awaitable):
            return scope.wait(result)
    except BaseException:
        scope.leave(is_good=False)
        raise
    return scope.finish(result)


class _Scope:
    """Request of a message, from begin to end."""

    _tm: Any = None

    def __init__(self, registry: Any):
        # As `pyramid.scripting.prepare` does; but a root factory that looks into a database has
        # to find the transaction there.
        make_request = registry.queryUtility(IRequestFactory, default=Request)
        make_root = registry.queryUtility(IRootFactory, default=DefaultRootFactory)
        self.request = request = make_request.blank('/')
        request.registry = registry
        self._context = RequestContext(request)
        self._context.begin()
        try:
            apply_request_extensions(request)
            tm = getattr(request, 'tm', None)
            if tm is not None:
                tm.begin()
                self._tm = tm
                # What pyramid_tm tells of a request whose transaction it manages.
                request.environ.update({'tm.active': True, 'tm.manager': tm})
            request.root = request.context = make_root(request)
        except BaseException:
            self.leave(is_good=False)
            raise

    async def wait(self, result: Awaitable[Any]) -> Any:
        """Wait for the result of an `async def` method."""
        try:
            value = await result
        except BaseException:
            self.leave(is_good=False)
            raise
        return self.finish(value)

    def finish(self, result: Any) -> Any:
        """End the transaction as the result wants it."""
        is_good = False
        try:
            encode(result)  # what cannot be told shall not be done
            match result:
                case [int(status), _] if status >= _ERRORS:
                    pass
                case _:
                    is_good = True
        finally:
            self.leave(is_good)
        return result

    def leave(self, is_good: bool) -> None:
        """Commit or abort, and forget the request."""
        try:
            if self._tm is not None:
                for key in ('tm.active', 'tm.manager'):
                    del self.request.environ[key]
                if is_good:
                    self._tm.commit()
                else:
                    self._tm.abort()
        except BaseException:
            self._tm.abort()  # or it would be joined to the next one
            raise
        finally:
            try:
                self.request._process_finished_callbacks()
            finally:
                self._context.end()
