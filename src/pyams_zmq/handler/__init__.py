# SPDX-License-Identifier: ZPL-2.1
"""From a message to a method, and from its result to a reply."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import cached_property, partial
from math import inf
from typing import Any

import zmq
from zope.interface import implementer

from pyams_zmq.auth import ANONYMOUS, Peer
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler.deferred import (
    DeferredReply,
    MethodThreads,
    call_in_thread,
    call_plain,
    error_reply,
)
from pyams_zmq.handler.methods import Method, methods_of, zmq_method
from pyams_zmq.handler.request import call_with_request
from pyams_zmq.interfaces import IZMQMessageHandler
from pyams_zmq.wire.message import DRAINING, decode_request, encode

__all__ = ['ZMQMessageHandler', 'zmq_method']

LOGGER = logging.getLogger('PyAMS (zmq)')

_RESULTS = frozenset({list, tuple, dict, str, int, type(None)})
"""Types of usual results, of which none is to be awaited"""

_QUOTED = 80
"""Characters of a peer's text that an answer or a log line repeats"""


@implementer(IZMQMessageHandler)
class ZMQMessageHandler:
    """Answers every message of a stream with the result of a method, exactly once.

    The type of the message names a public method of the `handler` class. It is called with the
    frames of the message, of which the one with index *json_load* is replaced by the arguments
    that it held: ``method(args)`` for the usual message of one frame. The method may be
    `async def`. If it has a keyword-only parameter `peer`, it is told the
    :class:`~pyams_zmq.auth.Peer` that sent the message; if it has one `request`, it gets a
    Pyramid request of its own, see :func:`~pyams_zmq.handler.request.call_with_request`. It may
    raise :class:`~pyams_zmq.exceptions.ZMQMessageError` to choose its answer; whatever else it
    raises is logged under an error id, which is all that the peer gets.

    An `async def` method runs as a task. A plain one runs in a thread, if the `concurrency` of the
    stream is above 1 or the method has a timeout, see
    :func:`~pyams_zmq.handler.methods.zmq_method`; else it runs in the loop of the process.

    :param process: the ZMQProcess
    :param stream: the ZMQStream that gets the replies
    :param stop: callable which stops the process
    :param handler: class (or instance) whose methods answer; the class attribute by default
    :param int json_load: index of the frame which holds ``[type, args]``
    :raises TypeError: when there is no handler
    :raises ValueError: for declarations of its methods that cannot be
    """

    handler: Any = None

    def __init__(
        self,
        process: Any,
        stream: Any,
        stop: Callable[[], None],
        handler: Any = None,
        json_load: int = -1,
    ):
        factory = handler if handler is not None else self.handler
        if factory is None:
            raise TypeError(
                f'{type(self).__name__} has no handler: set its class attribute `handler`'
            )
        self.process = process
        self.rep_stream = stream
        self._send: Any = getattr(stream, 'reply', getattr(stream, 'send', None))
        self.json_load = json_load
        self.rep_handler = factory() if isinstance(factory, type) else factory
        self.rep_handler.process = process
        self._stop = stop
        self._concurrency: int = getattr(stream, 'concurrency', 1)
        self._methods = methods_of(self.rep_handler)
        for name, method in self._methods.items():
            if method.is_async and method.wants_request and self._concurrency > 1:
                raise ValueError(
                    f'{type(self.rep_handler).__name__}.{name} is `async def` and takes a request, '
                    'which needs a thread of its own where messages are answered at the same time: '
                    'make it a plain method, or leave concurrency at 1'
                )
            # Where nobody waits for a reply, there is no deadline either.
            has_deadline = method.timeout is not None and hasattr(stream, 'detach')
            if not method.is_async and (self._concurrency > 1 or has_deadline):
                self._methods[name] = method._replace(in_thread=True)
        # Replies that are still owed; the process waits for them before it stops.
        self._owed: set[asyncio.Future[Any]] = getattr(process, 'owed_replies', set())
        self._max_size = getattr(process, 'max_message_size', inf)
        # Only frames tell who sent them; bytes, which are faster, do where nobody asks.
        self.wants_frames = getattr(process, 'has_credentials', False) or any(
            method.wants_peer for method in self._methods.values()
        )

    def __call__(self, frames: list[Any]) -> None:
        """Answer a message."""
        try:
            method, call = self._prepare(frames)
            if call is None:
                result = method.call(*frames)
            elif method.in_thread:
                future = self._threads.run(partial(call_in_thread, call))
                DeferredReply(self.rep_stream, method, self._owed).wait_for(future)
                return
            else:
                result = call()
            if type(result) not in _RESULTS and isinstance(result, Awaitable):
                DeferredReply(self.rep_stream, method, self._owed).wait_for_result(result)
                return
            reply = encode(result)
        except BaseException as error:  # noqa: BLE001 - a peer waits, whatever it was
            reply = error_reply(error)
        try:
            self._send(reply)
        except Exception:
            LOGGER.exception('A reply could not be sent')

    @cached_property
    def _threads(self) -> MethodThreads:
        return MethodThreads(getattr(self.process, '_enter_thread', lambda: None))

    def _prepare(self, frames: list[Any]) -> tuple[Method, Callable[[], Any] | None]:
        """Find the method for a message, and put its arguments into the frames.

        :return: the method, and what is to be called, if not the method with all frames
        """
        peer = None
        if self.wants_frames and frames:
            peer = self._identify(frames[0])
            frames[:] = map(bytes, frames)
        size = len(frames[0]) if len(frames) == 1 else sum(map(len, frames))
        if size > self._max_size:
            raise ZMQMessageError(
                413, f'Message of {size} bytes, the service takes {self._max_size}'
            )
        if getattr(self.process, 'draining', False):
            raise ZMQMessageError(*DRAINING)
        try:
            data = frames[self.json_load]
        except IndexError:
            raise ZMQMessageError(400, f'Bad message of {len(frames)} frames') from None
        name, args = decode_request(data)
        method = self._methods.get(name)
        if method is None:
            raise ZMQMessageError(404, f'Unknown message type {name[:_QUOTED]!r}')
        if not method.least <= len(frames) <= method.most:
            raise ZMQMessageError(400, f'{name!r} does not take a message of {len(frames)} frames')
        frames[self.json_load] = args
        if not (method.wants_peer or method.wants_request or method.in_thread):
            return method, None
        call = partial(method.call, *frames)
        if method.wants_peer:
            call = partial(call, peer=peer)
        if method.wants_request:
            if method.in_thread:
                call = partial(call_plain, call)
            call = partial(call_with_request, self.process.registry, call)
        return method, call

    def _identify(self, frame: Any) -> Peer:
        """Say who sent a frame, as libzmq noted when the peer connected.

        :raises ZMQMessageError: with status 401, if that user would not be let in any more
        """
        try:
            peer = Peer(frame['User-Id'], frame['Peer-Address'])
        except (TypeError, KeyError, zmq.ZMQError):  # of a stream without access control
            peer = Peer(ANONYMOUS, '')
        authenticator = getattr(self.process, 'auth_thread', None)
        if authenticator is not None and not authenticator.policy.admits(peer.user):
            raise ZMQMessageError(401, 'Your access was withdrawn')
        return peer
