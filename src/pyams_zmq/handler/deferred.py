# SPDX-License-Identifier: ZPL-2.1
"""Replies to messages whose method does not return its result at once."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any, Protocol

from pyams_zmq.handler.errors import error_reply
from pyams_zmq.handler.executor import Work, call_when_done, present_work
from pyams_zmq.handler.methods import Method
from pyams_zmq.handler.threads import MethodThreads
from pyams_zmq.wire.body import Reply, encode_reply
from pyams_zmq.wire.log_fields import extra
from pyams_zmq.wire.message import DRAINING_REPLY, encode

LOGGER = logging.getLogger('PyAMS (zmq)')

_MEASURE_TIME = 0.2  # seconds in which the watchdog finds out whether the process was suspended
_LATE = 1.0  # seconds after its deadline in which a method may end before others are refused


class Deadlines(Protocol):
    """The deadlines of a process, see :class:`pyams_zmq.process.deadlines.CallDeadlines`."""

    def add(self, call: object, timeout: float) -> None:
        """Add a call that begins now, with the time limit of its method in seconds."""

    def remove(self, call: object) -> None:
        """Remove a call that has ended."""

    def is_current(self) -> bool:
        """Return False if the process may have been suspended a moment ago."""

    def take_postponed(self, call: object) -> float:
        """Return by how many seconds a call was postponed since this was asked last."""


def make_send(stream: Any) -> Callable[[Reply], None]:
    """Return a function that sends an encoded reply on a stream of any class."""

    def send(reply: Reply) -> None:
        if isinstance(reply, list):
            stream.send_multipart(reply)
        else:
            stream.send(reply)

    return send


class DeferredReply:
    """The reply to a message whose method runs in a thread, or returns an awaitable.

    It is sent once: with the result, or with status 504 at the deadline of the method.

    :param stream: stream that has received the message
    :param method: the method
    :param owed: set that contains a future until the reply is sent
    :param deadlines: contains this while the method runs, if it has a time limit; or None
    :param began: when the message came, in the seconds of `time.perf_counter`; by default now
    """

    _is_overdue = False
    _work: Work | tuple[()] = ()  # of its coroutine, in threads of the default executor

    def __init__(
        self,
        stream: Any,
        method: Method,
        owed: 'set[asyncio.Future[None]]',
        deadlines: Deadlines | None = None,
        began: float | None = None,
    ):
        self._began = perf_counter() if began is None else began
        loop = asyncio.get_running_loop()
        self._method = method
        self._job: str | None = None if method.job is None else stream.job.id
        self._owed = owed
        self._deadlines = None if method.timeout is None else deadlines
        self._count_overdue: Any = getattr(stream, 'count_overdue', int)
        self._is_sent = loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        if method.timeout is not None:
            self._due = loop.time() + method.timeout
            self._timer = loop.call_at(self._due, self._pass_deadline)
        detach: Any = getattr(stream, 'detach', None) or (lambda: (make_send(stream), lambda: None))
        self._send, self._end = detach()
        owed.add(self._is_sent)
        if method.timeout is not None and deadlines is not None:
            deadlines.add(self, method.timeout)

    def __str__(self) -> str:
        return repr(self._method.name)

    @property
    def log_fields(self) -> dict[str, str | None]:
        """The fields of a log record about this call."""
        return {'method': self._method.name, 'job': self._job}

    def fail(self, error: BaseException) -> bytes:
        """Log an error of the method; return the encoded reply."""
        return error_reply(error, self._method.name, self._job)

    def run(self, threads: MethodThreads, call: Callable[[], Any]) -> None:
        """Call the method in a thread, and reply with its result."""
        try:
            future = threads.run(call, self.fail)
        except RuntimeError as error:  # it cannot be started
            self._complete(self.fail(error))
        else:
            self.wait_for(future)

    def wait_for_result(self, result: Awaitable[Any]) -> None:
        """Reply with the result of an awaitable that a method has returned."""
        self.wait_for(asyncio.ensure_future(self._await_reply(result)))

    def wait_for(self, future: 'asyncio.Future[Any]') -> None:
        """Reply with the result of a future: an encoded reply, or an awaitable of the result."""
        self._future = future
        future.add_done_callback(self._finish)

    def _pass_deadline(self, is_measured: bool = False) -> None:
        if self._deadlines is not None and self._postpone(self._deadlines, is_measured):
            return
        kind = '' if self._method.job is None else 'The job '
        text = f'{kind}{self._method.name!r} has not ended after {self._method.timeout} s'
        self._reply(encode([504, text]))
        self._cancel()
        self._timer = asyncio.get_running_loop().call_later(_LATE, self._mark_overdue)
        LOGGER.warning('%s', text, extra=extra(**self.log_fields))

    def _postpone(self, deadlines: Deadlines, is_measured: bool) -> bool:
        """Set the timer again if this process was suspended, and return True."""
        loop = asyncio.get_running_loop()
        if not is_measured and not deadlines.is_current():
            self._timer = loop.call_later(_MEASURE_TIME, self._pass_deadline, True)
            return True
        seconds = deadlines.take_postponed(self)
        if seconds:
            self._due += seconds
            self._timer = loop.call_at(self._due, self._pass_deadline)
        return seconds > 0

    def _mark_overdue(self) -> None:
        self._is_overdue = True
        self._count_overdue(1)

    def _cancel(self) -> None:
        if isinstance(self._future, asyncio.Task):  # a thread cannot be cancelled
            self._future.cancel()

    def _finish(self, future: 'asyncio.Future[Any]') -> None:
        # A task that is cancelled before its first step has not called the method.
        result = DRAINING_REPLY if future.cancelled() else future.result()
        if not isinstance(result, (bytes, list)):
            self.wait_for_result(result)
            if self._is_sent.done():
                self._cancel()
        elif self._is_sent.done() and self._work:  # cancelled, but threads cannot be
            complete = partial(self._complete_soon, asyncio.get_running_loop(), result)
            call_when_done(list(self._work), complete)
        else:
            self._complete(result)

    def _complete_soon(self, loop: asyncio.AbstractEventLoop, data: Reply) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._complete, data)

    def _complete(self, data: Reply) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._deadlines is not None:
            self._deadlines.remove(self)
        if self._is_overdue:
            self._count_overdue(-1)
        try:
            self._reply(data)
        finally:
            self._end()

    def _reply(self, data: Reply) -> None:
        if self._is_sent.done():
            return
        self._owed.discard(self._is_sent)
        self._is_sent.set_result(None)
        self._method.stats.count(perf_counter() - self._began, data)
        try:
            self._send(data)
        except Exception:
            LOGGER.exception(
                'A reply of %s could not be sent', self, extra=extra(**self.log_fields)
            )

    async def _await_reply(self, result: Awaitable[Any]) -> Reply:
        if self._method.timeout is not None:
            work: Work = set()
            present_work.set(work)
            self._work = work
        try:
            return encode_reply(await result)
        except BaseException as error:  # noqa: BLE001 - the peer waits for a reply
            if self._is_sent.done() and isinstance(error, asyncio.CancelledError):
                return b''  # cancelled at the deadline
            return self.fail(error)
