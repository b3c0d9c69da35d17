# SPDX-License-Identifier: ZPL-2.1
"""Replies to messages whose method does not return its result at once."""

import asyncio
import logging
from collections.abc import Awaitable
from typing import Any

from pyams_zmq.handler.errors import error_reply
from pyams_zmq.handler.methods import Method
from pyams_zmq.wire.message import DRAINING_REPLY, encode

LOGGER = logging.getLogger('PyAMS (zmq)')


class DeferredReply:
    """The reply to a message whose method runs in a thread, or returns an awaitable.

    It is sent once: with the result, or with status 504 at the deadline of the method.

    :param stream: stream that has received the message
    :param method: the method
    :param owed: set that contains a future until the reply is sent
    """

    def __init__(self, stream: Any, method: Method, owed: 'set[asyncio.Future[None]]'):
        loop = asyncio.get_running_loop()
        self._method = method
        self._owed = owed
        self._is_sent = loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        if method.timeout is not None:
            self._timer = loop.call_later(method.timeout, self._pass_deadline)
        detach: Any = getattr(stream, 'detach', None) or (lambda: (stream.send, lambda: None))
        self._send, self._end = detach()
        owed.add(self._is_sent)

    def wait_for_result(self, result: Awaitable[Any]) -> None:
        """Reply with the result of an awaitable that a method has returned."""
        self.wait_for(asyncio.ensure_future(self._await_reply(result)))

    def wait_for(self, future: 'asyncio.Future[Any]') -> None:
        """Reply with the result of a future: encoded bytes, or an awaitable of the result."""
        self._future = future
        future.add_done_callback(self._finish)

    def _pass_deadline(self) -> None:
        text = f'{self._method.name!r} has not ended after {self._method.timeout} s'
        self._reply(encode([504, text]))
        self._cancel()
        LOGGER.warning('%s', text)

    def _cancel(self) -> None:
        if isinstance(self._future, asyncio.Task):  # a thread cannot be cancelled
            self._future.cancel()

    def _finish(self, future: 'asyncio.Future[Any]') -> None:
        # A task that is cancelled before its first step has not called the method.
        result = DRAINING_REPLY if future.cancelled() else future.result()
        if not isinstance(result, bytes):
            self.wait_for_result(result)
            if self._is_sent.done():
                self._cancel()
            return
        if self._timer is not None:
            self._timer.cancel()
        try:
            self._reply(result)
        finally:
            self._end()

    def _reply(self, data: bytes) -> None:
        if self._is_sent.done():
            return
        self._owed.discard(self._is_sent)
        self._is_sent.set_result(None)
        try:
            self._send(data)
        except Exception:
            LOGGER.exception('A reply could not be sent')

    async def _await_reply(self, result: Awaitable[Any]) -> bytes:
        try:
            return encode(await result)
        except BaseException as error:  # noqa: BLE001 - the peer waits for a reply
            if self._is_sent.done() and isinstance(error, asyncio.CancelledError):
                return b''  # cancelled at the deadline
            return error_reply(error)
