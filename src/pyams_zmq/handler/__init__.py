# SPDX-License-Identifier: ZPL-2.1
"""Message handlers: call the method that a message names, and reply with its result."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import cached_property, partial
from math import inf
from time import perf_counter
from typing import Any

import zmq
from zope.interface import implementer

from pyams_zmq.auth import ANONYMOUS, Peer
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler.deferred import DeferredReply, make_send
from pyams_zmq.handler.errors import error_reply
from pyams_zmq.handler.job import RunningJob, call_job
from pyams_zmq.handler.methods import Method, methods_of, zmq_method
from pyams_zmq.handler.observer import make_observer
from pyams_zmq.handler.request import call_plain, call_with_request
from pyams_zmq.handler.statistics import CallStatistics
from pyams_zmq.handler.threads import MethodThreads
from pyams_zmq.handler.turn import Turn
from pyams_zmq.interfaces import IZMQMessageHandler
from pyams_zmq.wire.body import Reply, encode_reply, measure_body
from pyams_zmq.wire.log_fields import extra
from pyams_zmq.wire.message import DRAINING, decode_request, encode

__all__ = ['ZMQMessageHandler', 'zmq_method']

LOGGER = logging.getLogger('PyAMS (zmq)')

_RESULTS = frozenset({list, tuple, dict, str, int, type(None)})
"""Types of usual results, which are not awaitable"""


@implementer(IZMQMessageHandler)
class ZMQMessageHandler:
    """Replies to each message of a stream exactly once, with the result of a method.

    The type of the message names a public method of the `handler` class. The method is called with
    the frames of the message; the frame with index *json_load* is replaced by the arguments that
    it contains: ``method(args)`` for the usual message of one frame. Such a message may also have
    the arguments of a method by position, in an array, or by name, in an object, if the method
    requires more than one, and none if it has no parameter. Arguments are converted to the types of
    annotated parameters. A keyword-only parameter `peer` gets the
    :class:`~pyams_zmq.auth.Peer` that sent the message. The method may raise
    :class:`~pyams_zmq.exceptions.ZMQMessageError` to choose its reply. Any other exception is
    logged under an error id, and the peer gets the id only. To send binary frames with its result,
    a method returns a :class:`~pyams_zmq.message.Multipart`.

    A keyword-only parameter `request` gets a new Pyramid request, which is made as
    :func:`pyramid.scripting.prepare` makes one, with the `root` of the application. If it has a
    transaction manager `tm` (of pyramid_tm), its transaction is committed when the method succeeds,
    before the reply is sent. It is aborted when the method raises, when its result is not JSON, and
    when the status of its result is 400 or above.

    An `async def` method runs as a task. A plain one runs in a thread if the `concurrency` of the
    stream is above 1 or the method has a timeout, see
    :func:`~pyams_zmq.handler.zmq_method`; otherwise it runs in the loop of the process.

    :param process: the ZMQProcess
    :param stream: the ZMQStream that sends the replies
    :param stop: callable that stops the process
    :param handler: class (or instance) with the methods; by default the class attribute
    :param int json_load: index of the frame that contains ``[type, args]``
    :raises TypeError: if no handler is given
    :raises ValueError: for a bad declaration of a method
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
        self._send: Any = getattr(stream, 'reply', None) or make_send(stream)
        self.json_load = json_load
        self.rep_handler = factory() if isinstance(factory, type) else factory
        self.rep_handler.process = process
        self._stop = stop
        is_concurrent = getattr(stream, 'concurrency', 1) > 1
        self._turn: Turn = getattr(stream, 'turn', None) or Turn()
        self._observer = observer = make_observer(process)
        self._decode = decode_request if observer is None else observer.decode
        self._statistics = getattr(process, 'statistics', None) or CallStatistics()
        self.methods = methods_of(self.rep_handler)
        for name, declared in self.methods.items():
            method = declared._replace(stats=self._statistics.of_method(name))
            self.methods[name] = method
            if method.is_async and method.wants_request and is_concurrent:
                raise ValueError(
                    f'{type(self.rep_handler).__name__}.{name} is `async def` and takes a request, '
                    'which needs its own thread where messages are handled concurrently: '
                    'make it a plain method, or leave concurrency at 1'
                )
            # A stream without replies has no deadlines either.
            has_deadline = method.timeout is not None and hasattr(stream, 'detach')
            if method.job is not None and not getattr(stream, 'takes_jobs', True):
                raise ValueError(
                    f'{type(self.rep_handler).__name__}.{name} is a job (zmq_job), which only a '
                    'pool with a journal runs: set workers and journal'
                )
            # A job also takes commands of the broker while it runs.
            if not method.is_async and (is_concurrent or has_deadline or method.job is not None):
                self.methods[name] = method._replace(in_thread=True)
        # The process waits for these replies before it stops.
        self._owed: set[asyncio.Future[None]] = getattr(process, 'owed_replies', set())
        self._deadlines = getattr(process, 'call_deadlines', None)
        self._max_size = getattr(process, 'max_message_size', inf)
        # Only frames have the metadata of their peer. Bytes are faster where it is not needed. With
        # credentials it is needed for each message: `reload` may have removed its user.
        self._access = getattr(process, 'access', None)
        self.wants_frames = self._checks_users or any(
            method.wants_peer for method in self.methods.values()
        )

    def __call__(self, frames: list[Any]) -> None:
        """Handle a message."""
        began = perf_counter()
        method = None
        reply: Reply
        try:
            method, call = self._prepare(frames)
            if call is not None and method.in_thread:
                self._defer(method, began).run(self._threads, call)
                return
            turn = self._turn
            try:
                turn.is_free = True  # another thread may read messages while the method runs
                if turn.is_asleep:
                    turn.wake()
                result = method.call(*frames) if call is None else call()
            finally:
                turn.is_free = False
                if turn.is_taken:
                    turn.wait()
            if type(result) in _RESULTS:
                reply = encode(result)
            elif isinstance(result, Awaitable):
                self._defer(method, began).wait_for_result(result)
                return
            else:
                reply = encode_reply(result)
        except BaseException as error:  # noqa: BLE001 - the peer waits for a reply
            reply = error_reply(error, None if method is None else method.name)
            self._turn.wait()  # a signal handler may have raised while this thread waited above
        if method is None:
            self._statistics.refused += 1
        else:
            method.stats.count(perf_counter() - began, reply)
        try:
            self._send(reply)
        except Exception:
            LOGGER.exception(
                'A reply of %s could not be sent',
                type(self.rep_handler).__name__,
                extra=extra(method=None if method is None else method.name),
            )

    @property
    def _checks_users(self) -> bool:
        """True if peers need credentials; they may do so from one message to the next."""
        return bool(getattr(self._access, 'has_credentials', False))

    def _defer(self, method: Method, began: float) -> DeferredReply:
        return DeferredReply(self.rep_stream, method, self._owed, self._deadlines, began)

    @cached_property
    def _threads(self) -> MethodThreads:
        return MethodThreads(getattr(self.process, 'enter_thread', lambda: None))

    def _prepare(self, frames: list[Any]) -> tuple[Method, Callable[[], Any] | None]:
        """Return the method of a message, and put its arguments into the frames.

        :return: the method, and a call of it that is not simply ``method.call(*frames)``, or None
        :raises ZMQMessageError: if the message is refused
        """
        peer = None
        if frames and (self.wants_frames or self._checks_users):
            peer = self._identify(frames[0])
            frames[:] = map(bytes, frames)
        size = len(frames[0]) if len(frames) == 1 else measure_body(frames)
        if size > self._max_size:
            raise ZMQMessageError(413, f'Message is {size} bytes; the limit is {self._max_size}')
        if getattr(self.process, 'draining', False):
            raise ZMQMessageError(*DRAINING)
        try:
            data = frames[self.json_load]
        except IndexError:
            raise ZMQMessageError(400, f'Bad message of {len(frames)} frames') from None
        name, args = self._decode(data)
        method = self.methods.get(name)
        if method is None:
            raise ZMQMessageError(404, f'Unknown message type {name[:80]!r}')
        job = None
        if method.job is not None:
            method, job = self._find_job(method)
        if method.min_frames <= len(frames) <= method.max_frames:
            frames[self.json_load] = args
            if method.frame_arguments is not None and len(frames) > 1:
                call = method.frame_arguments.bind_frames(frames)
            elif (
                job
                or method.wants_peer
                or method.wants_request
                or method.in_thread
                or self._observer is not None
            ):
                call = partial(method.call, *frames)
            else:
                return method, None
        elif len(frames) == 1 and method.arguments is not None:
            call = method.arguments.bind(args)
        else:
            raise ZMQMessageError(400, f'{name!r} does not take a message of {len(frames)} frames')
        return method, self._inject(method, call, peer, job)

    def _find_job(self, method: Method) -> tuple[Method, RunningJob]:
        """Return a method with the time limit of the job that it runs, and this job.

        :raises ZMQMessageError: if the message is not one
        """
        job: RunningJob | None = getattr(self.rep_stream, 'job', None)
        if job is None:
            raise ZMQMessageError(500, f'{method.name!r} is a job, and was sent as a call')
        return (method if job.timeout is None else method._replace(timeout=job.timeout)), job

    def _inject(
        self, method: Method, call: Callable[..., Any], peer: Peer | None, job: RunningJob | None
    ) -> Callable[[], Any]:
        """Return a call with what a method takes from here, not from the message."""
        if method.wants_peer:
            call = partial(call, peer=peer)
        if method.wants_job:
            call = partial(call, job=job)
        if method.wants_request:
            if method.in_thread:
                call = partial(call_plain, call)
            call = partial(call_with_request, self.process.registry, call)
        if job is not None:
            call = partial(call_job, job, call)
        return call if self._observer is None else self._observer.wrap(call, method.name, job)

    def _identify(self, frame: Any) -> Peer:
        """Return the peer that sent a frame, from the metadata that libzmq keeps.

        :raises ZMQMessageError: with status 401, if the user is not allowed any more
        """
        try:
            peer = Peer(frame['User-Id'], frame['Peer-Address'])
        except (TypeError, KeyError, zmq.ZMQError):  # the stream has no access control
            peer = Peer(ANONYMOUS, '')
        authenticator = getattr(self.process, 'auth_thread', None)
        if authenticator is not None and not authenticator.policy.admits(peer.user):
            raise ZMQMessageError(401, 'Your access was withdrawn')
        return peer
