# SPDX-License-Identifier: ZPL-2.1
"""The handler of a service, which replies in the process of the test."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyramid.threadlocal import manager

from pyams_zmq.handler.job import JobPolicy, RunningJob
from pyams_zmq.handler.plain import make_handler
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.wire.body import Reply

LOCAL = '127.0.0.1'
"""Default address of a process; the system chooses the port"""


class _ReplyRecorder:
    """A stream that records the reply."""

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.job: RunningJob | None = None
        self.replies: list[Reply] = []

    def detach(self) -> tuple[Callable[[Reply], None], Callable[[], None]]:
        return self.reply, lambda: None

    def reply(self, reply: Reply) -> None:
        self.replies.append(reply)


class EagerHandler:
    """Replies to encoded messages as a process with this handler does.

    :param handler: what a ZMQProcess takes, or a ZMQProcess or ZMQPool that is not started
    :raises ZMQHandlerError: if it cannot be made
    """

    def __init__(self, handler: Any):
        if isinstance(handler, ZMQPool):
            handler = handler.make_worker(f'{LOCAL}:1')
        self._process = handler if isinstance(handler, ZMQProcess) else ZMQProcess(LOCAL, handler)
        self._stream = _ReplyRecorder(self._process.concurrency)
        self._answer = make_handler(self._process.handler, self._process, self._stream)

    def __call__(self, frames: list[bytes], job: RunningJob | None = None) -> Reply:
        """Return the reply to the frames of a message.

        :param job: what a method that is a job gets as its `job`
        """
        # A new thread has its own transaction, and no running loop.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self._reply_in_loop, frames, job).result()

    def find_policy(self, name: str | None) -> JobPolicy | None:
        """Return how often the method of this name is tried; None if it is not a job."""
        method = getattr(self._answer, 'methods', {}).get(name)
        return getattr(method, 'job', None)

    def _reply_in_loop(self, frames: list[bytes], job: RunningJob | None) -> Reply:
        manager.push({'registry': self._process.registry, 'request': None})
        return asyncio.run(self._reply_to(frames, job))

    async def _reply_to(self, frames: list[bytes], job: RunningJob | None) -> Reply:
        self._stream.job = job  # it is read before this method waits
        self._answer(frames)
        while not self._stream.replies:
            await asyncio.wait(self._process.owed_replies)
        return self._stream.replies.pop()
