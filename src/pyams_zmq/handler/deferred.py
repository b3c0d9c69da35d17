# SPDX-License-Identifier: ZPL-2.1
"""Replies to messages whose method does not answer at once."""

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any
from uuid import uuid4

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler.methods import Method
from pyams_zmq.process.stream import Reply
from pyams_zmq.wire.message import DRAINING_REPLY, encode

LOGGER = logging.getLogger('PyAMS (zmq)')


class DeferredReply:
    """The reply to a message whose method runs beside the loop, or is awaited in it.

    :param stream: stream that has received the message
    :param method: the method
    :param owed: gets a future, until the reply is sent
    """

    def __init__(self, stream: Any, method: Method, owed: 'set[asyncio.Future[Any]]'):
        loop = asyncio.get_running_loop()
        self._method = method
        self._owed = owed
        self._is_sent = loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        if method.timeout is not None:
            self._timer = loop.call_later(method.timeout, self._pass_deadline)
        detach = getattr(stream, 'detach', None)
        self._reply = Reply(stream.send) if detach is None else detach()
        owed.add(self._is_sent)

    def wait_for_result(self, result: Awaitable[Any]) -> None:
        """Wait for what a method has returned."""
        self.wait_for(asyncio.ensure_future(self._await_reply(result)))

    def wait_for(self, future: 'asyncio.Future[Any]') -> None:
        """Wait for the reply, or for what is to be awaited for it."""
        self._future = future
        future.add_done_callback(self._finish)

    def _pass_deadline(self) -> None:
        text = f'{self._method.name!r} has not ended after {self._method.timeout} s'
        self._send(encode([504, text]))
        self._cancel()
        LOGGER.warning('%s', text)

    def _cancel(self) -> None:
        if isinstance(self._future, asyncio.Task):  # nothing can end a thread
            self._future.cancel()

    def _finish(self, future: 'asyncio.Future[Any]') -> None:
        # A task that is cancelled before its first step has not even run the handler.
        result = DRAINING_REPLY if future.cancelled() else future.result()
        if not isinstance(result, bytes):
            self.wait_for_result(result)
            if self._reply.is_sent:
                self._cancel()
            return
        if self._timer is not None:
            self._timer.cancel()
        try:
            self._send(result)
        finally:
            self._reply.end()

    def _send(self, reply: bytes) -> None:
        self._owed.discard(self._is_sent)
        if not self._is_sent.done():
            self._is_sent.set_result(None)
        try:
            self._reply.send(reply)
        except Exception:
            LOGGER.exception('A reply could not be sent')

    async def _await_reply(self, result: Awaitable[Any]) -> bytes:
        try:
            return encode(await result)
        except BaseException as error:  # noqa: BLE001 - a peer waits, whatever it was
            if self._reply.is_sent and isinstance(error, asyncio.CancelledError):
                return b''  # which was the deadline
            return error_reply(error)


class MethodThreads:
    """Threads for methods, as many as there are calls at a time.

    They are not those of :mod:`concurrent.futures`, for which the end of a process waits, which
    break the children that a method forks, and which run a call later when no thread could be
    started for it.

    :param enter: called first in each thread
    """

    def __init__(self, enter: Callable[[], None]):
        self._enter = enter
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._threads: list[Thread] = []
        self._idle = 0
        weakref.finalize(self, _end_threads, self._calls, self._threads).atexit = False

    def run(self, call: Callable[[], Any]) -> 'asyncio.Future[Any]':
        """Call a function, which must not raise, in a thread; to be called in a loop.

        :return: a future of its result, which cannot be cancelled
        :raises RuntimeError: if there is no thread for it; it is not called then
        """
        if self._idle:
            self._idle -= 1
        else:
            thread = Thread(target=_work, args=(self._enter, self._calls), daemon=True)
            thread.name = f'pyams_zmq method {len(self._threads)}'
            thread.start()
            self._threads.append(thread)
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def end(result: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed, nobody waits any more
                loop.call_soon_threadsafe(self._end, future, result)

        self._calls.put((call, end))
        return future

    def _end(self, future: 'asyncio.Future[Any]', result: Any) -> None:
        self._idle += 1
        future.set_result(result)


def _work(enter: Callable[[], None], calls: 'SimpleQueue[Any]') -> None:
    enter()
    while (item := calls.get()) is not None:
        call, end = item
        end(call())
        del item, call, end  # what they hold shall not wait for the next call


def _end_threads(calls: 'SimpleQueue[Any]', threads: list[Thread]) -> None:
    for _thread in threads:
        calls.put(None)


def call_in_thread(call: Callable[[], Any]) -> Any:
    """Call a method; return the reply, or what is to be awaited for it."""
    try:
        result = call()
        return result if isinstance(result, Awaitable) else encode(result)
    except BaseException as error:  # noqa: BLE001 - a peer waits, whatever it was
        return error_reply(error)


def call_plain(call: Callable[..., Any], **options: Any) -> Any:
    """Call a method whose request belongs to this thread.

    :raises TypeError: if its result is to be awaited
    """
    result = call(**options)
    if isinstance(result, Awaitable):
        if isinstance(result, Coroutine):
            result.close()
        raise TypeError(f'{call} takes a request, and cannot be awaited: make it an `async def`')
    return result


def error_reply(error: BaseException) -> bytes:
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
