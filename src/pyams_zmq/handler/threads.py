# SPDX-License-Identifier: ZPL-2.1
"""Threads that run the plain methods of a handler beside the loop."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any

from pyams_zmq.wire.body import encode_reply


class MethodThreads:
    """Threads for methods, one for each call that runs at the same time.

    :mod:`concurrent.futures` is not used: it makes a process wait for its threads at exit, breaks
    children that a method forks, and keeps a call in its queue when it cannot start a thread.

    :param enter: called first in each thread
    """

    def __init__(self, enter: Callable[[], None]):
        self._enter = enter
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._count = 0
        self._idle = 0

    def run(
        self, call: Callable[[], Any], fail: Callable[[BaseException], bytes]
    ) -> 'asyncio.Future[Any]':
        """Call a method in a thread; a loop must be running in this one.

        :param fail: returns the encoded reply for an exception of the method

        :return: future of the encoded reply, or of an awaitable that the method has returned; it
            cannot be cancelled
        :raises RuntimeError: if a thread cannot be started; the method is not called
        """
        if self._idle:
            self._idle -= 1
        else:
            thread = Thread(target=_work, args=(self._enter, self._calls), daemon=True)
            thread.name = f'pyams_zmq method {self._count}'
            thread.start()
            self._count += 1
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def end(result: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed, and the result is not needed
                loop.call_soon_threadsafe(self._end, future, result)

        self._calls.put((call, fail, end))
        return future

    def _end(self, future: 'asyncio.Future[Any]', result: Any) -> None:
        self._idle += 1
        future.set_result(result)

    def __del__(self) -> None:
        for _number in range(self._count):
            self._calls.put(None)


def _work(enter: Callable[[], None], calls: 'SimpleQueue[Any]') -> None:
    enter()
    while (item := calls.get()) is not None:
        call, fail, end = item
        end(_call(call, fail))
        del item, call, fail, end  # else their objects would live until the next call


def _call(call: Callable[[], Any], fail: Callable[[BaseException], bytes]) -> Any:
    try:
        result = call()
        return result if isinstance(result, Awaitable) else encode_reply(result)
    except BaseException as error:  # noqa: BLE001 - the peer waits for a reply
        return fail(error)
