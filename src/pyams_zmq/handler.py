#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

"""PyAMS_zmq.handler module: from a message to a method, and from its result to a reply."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial, partialmethod, singledispatchmethod
from inspect import Parameter, signature
from math import inf
from typing import Any, NamedTuple
from uuid import uuid4

import zmq
from zope.interface import implementer

from pyams_zmq.auth import ANONYMOUS, Peer
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.interfaces import IZMQMessageHandler
from pyams_zmq.message import DRAINING, DRAINING_REPLY, decode_request, encode
from pyams_zmq.request import call_with_request

__docformat__ = 'restructuredtext'

LOGGER = logging.getLogger('PyAMS (zmq)')

_METHOD_TYPES = (staticmethod, classmethod, partialmethod, singledispatchmethod)
_QUOTED = 80
"""Characters of a peer's text that an answer or a log line repeats"""


class _Method(NamedTuple):
    """A method of a handler, and how many frames it takes."""

    call: Callable[..., Any]
    least: int
    most: float
    wants_peer: bool = False
    wants_request: bool = False

    @classmethod
    def inspect(cls, call: Callable[..., Any]) -> '_Method':
        """Read the signature of a method."""
        try:
            parameters = signature(call).parameters.values()
        except ValueError:  # some builtins have none
            return cls(call, 0, inf)
        positional = [
            item
            for item in parameters
            if item.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        ]
        least = sum(item.default is Parameter.empty for item in positional)
        varies = any(item.kind is Parameter.VAR_POSITIONAL for item in parameters)
        keywords = {item.name for item in parameters if item.kind is Parameter.KEYWORD_ONLY}
        most = inf if varies else len(positional)
        return cls(call, least, most, 'peer' in keywords, 'request' in keywords)


@implementer(IZMQMessageHandler)
class ZMQMessageHandler:
    """Answers every message of a stream with the result of a method, exactly once.

    The type of the message names a public method of the `handler` class. It is called with the
    frames of the message, of which the one with index *json_load* is replaced by the arguments
    that it held: ``method(args)`` for the usual message of one frame. The method may be
    `async def`. If it has a keyword-only parameter `peer`, it is told the
    :class:`~pyams_zmq.auth.Peer` that sent the message; if it has one `request`, it gets a
    Pyramid request of its own, see :func:`~pyams_zmq.request.call_with_request`. It may raise
    :class:`~pyams_zmq.exceptions.ZMQMessageError` to choose its answer; whatever else it raises is
    logged under an error id, which is all that the peer gets.

    :param process: the ZMQProcess
    :param stream: the ZMQStream that gets the replies
    :param stop: callable which stops the process
    :param handler: class (or instance) whose methods answer; the class attribute by default
    :param int json_load: index of the frame which holds ``[type, args]``
    :raises TypeError: when there is no handler
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
        self.json_load = json_load
        self.rep_handler = factory() if isinstance(factory, type) else factory
        self.rep_handler.process = process
        self._stop = stop
        self._methods = _methods_of(self.rep_handler)
        # Replies that are still owed; the process waits for them before it stops.
        self._tasks: set[asyncio.Task[bytes]] = getattr(process, 'owed_replies', set())
        self._max_size = getattr(process, 'max_message_size', inf)
        # Only frames tell who sent them; bytes, which are faster, do where nobody asks.
        self.wants_frames = getattr(process, 'has_credentials', False) or any(
            method.wants_peer for method in self._methods.values()
        )

    def __call__(self, frames: list[Any]) -> None:
        """Answer a message."""
        try:
            result = self._call_method(frames)
            if isinstance(result, Awaitable):
                task = asyncio.ensure_future(_await_reply(result))
                self._tasks.add(task)
                task.add_done_callback(self._reply_later)
                return
            reply = encode(result)
        except BaseException as error:  # noqa: BLE001 - a peer waits, whatever it was
            reply = _error_reply(error)
        self._reply(reply)

    def _reply_later(self, task: asyncio.Task[bytes]) -> None:
        self._tasks.discard(task)
        # A task that is cancelled before its first step has not even run the handler.
        self._reply(DRAINING_REPLY if task.cancelled() else task.result())

    def _reply(self, reply: bytes) -> None:
        try:
            self.rep_stream.send(reply)
        except Exception:
            LOGGER.exception('A reply could not be sent')

    def _call_method(self, frames: list[Any]) -> Any:
        peer = None
        if self.wants_frames and frames:
            peer = self._identify(frames[0])
            frames = list(map(bytes, frames))
        size = sum(map(len, frames))
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
        if not (method.wants_peer or method.wants_request):
            return method.call(*frames)
        call = partial(method.call, *frames)
        if method.wants_peer:
            call = partial(call, peer=peer)
        return call_with_request(self.process.registry, call) if method.wants_request else call()

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


def _methods_of(handler: Any) -> dict[str, _Method]:
    """Find the methods that a peer may name.

    They are looked up on the class, statically: no property runs, nothing that an instance holds
    can be reached, and a private name does not differ from one that does not exist.
    """
    attributes: dict[str, Any] = {}
    for base in reversed(type(handler).__mro__):
        attributes.update(vars(base))
    methods = {}
    for name, attribute in attributes.items():
        if (
            not name.startswith('_')
            and not isinstance(attribute, type)
            and (callable(attribute) or isinstance(attribute, _METHOD_TYPES))
        ):
            call = getattr(handler, name)
            if isinstance(attribute, singledispatchmethod):
                methods[name] = _Method(call, 0, inf)  # each of its functions has a signature
            elif callable(call):
                methods[name] = _Method.inspect(call)
    return methods


async def _await_reply(result: Awaitable[Any]) -> bytes:
    try:
        return encode(await result)
    except BaseException as error:  # noqa: BLE001 - a peer waits, whatever it was
        return _error_reply(error)


def _error_reply(error: BaseException) -> bytes:
    """Turn an exception into an answer; nothing it holds can prevent that."""
    try:
        if isinstance(error, ZMQMessageError):
            LOGGER.debug('Message refused: %s', error)
            return encode([error.status, error.text])
    except Exception as nested:  # noqa: BLE001 - a text which is no JSON: the handler's mistake
        error = nested
    error_id = uuid4().hex[:12]
    try:
        LOGGER.error('Message handler failed, error id %s', error_id, exc_info=error)
    except BaseException as nested:  # noqa: BLE001 - the traceback itself could not be printed
        with suppress(BaseException):
            LOGGER.error(
                'Message handler failed, error id %s, with an unprintable %s (%s)',
                error_id,
                type(error).__name__,
                type(nested).__name__,
            )
    return encode([500, f'Internal error, see the log of the service under id {error_id}'])
