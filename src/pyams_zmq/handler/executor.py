# SPDX-License-Identifier: ZPL-2.1
"""The default executor of the loop of a service, and the work of a call in its threads."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec('_P')
_T = TypeVar('_T')

Work = set[Future[Any]]
"""What runs in threads for a call, or waits for one of them"""

present_work: ContextVar[Work | None] = ContextVar('present_work', default=None)
"""The work of the call to which the present task belongs, if the call has a time limit"""


class ServiceExecutor(ThreadPoolExecutor):
    """Runs what coroutines do in threads, with :func:`asyncio.to_thread` for instance.

    A coroutine can be cancelled, its thread cannot. So `present_work` shows what a call has left.
    """

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run a function in a thread; the present task, or one that it has created, calls this."""
        future = super().submit(fn, *args, **kwargs)
        work = present_work.get()
        if work is not None:
            work.add(future)
            future.add_done_callback(work.discard)
        return future


def call_when_done(work: list[Future[Any]], function: Callable[[], None]) -> None:
    """Call a function when all of some work has ended, in any thread.

    :param work: the list is emptied
    """
    while work:
        future = work.pop()
        if not future.done():
            future.add_done_callback(lambda _future: call_when_done(work, function))
            return
    function()
