# SPDX-License-Identifier: ZPL-2.1
"""Tools for tests: clients that record messages, and real processes for one test."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from typing import Any, NamedTuple

from pyramid.testing import DummyRequest
from zope.interface import implementer

from pyams_zmq.client import PREPARE_TIMEOUT, ZMQClient
from pyams_zmq.client.problem import EncodedMessage, QueuedMessage, check_reply
from pyams_zmq.client.transaction import MessageDataManager
from pyams_zmq.config.request_client import request_zmq
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler.job import JobPolicy, RunningJob
from pyams_zmq.interfaces import IZMQClientFactory
from pyams_zmq.process.base import ReadyProcess
from pyams_zmq.testing.eager import LOCAL, EagerHandler
from pyams_zmq.testing.jobs import JobRecorder, RecordedJob
from pyams_zmq.testing.pending import PendingMessages
from pyams_zmq.wire.body import Reply, decode_body, encode_reply
from pyams_zmq.wire.message import (
    check_boolean,
    check_integer,
    check_timeout,
    decode_reply,
    encode,
    encode_request,
    split_request,
)
from pyams_zmq.wire.multipart import describe, to_frames

__all__ = [
    'JobRecorder',
    'PendingMessages',
    'RecordedJob',
    'RecordingClient',
    'Sent',
    'Testing',
    'running',
]

LOGGER = logging.getLogger('PyAMS (zmq)')

_READY_TIMEOUT = 30.0  # seconds; machines that run tests are busy


class _Sent(NamedTuple):
    name: str
    type: str | None
    args: Any


class Sent(_Sent):
    """A message that was recorded instead of sent, a tuple of name, type and arguments.

    :ivar name: name of the client
    :ivar type: type of the message, None if it is not ``[type, args]``
    :ivar args: its arguments as the service would receive them, or the whole message
    :ivar frames: list of its binary frames; a message with frames is not equal to one without
    """

    frames: Sequence[bytes] = ()

    def __new__(  # noqa: D102, PYI034 - documented above; Python 3.10 has no Self
        cls,
        name: str,
        type: str | None,  # noqa: A002 - the name of the field
        args: Any,
        frames: Iterable[Any] | None = None,
    ) -> 'Sent':
        self = super().__new__(cls, name, type, args)
        if frames is not None:
            self.frames = to_frames(frames)
        return self

    __hash__ = tuple.__hash__

    def __eq__(self, other: object) -> bool:
        frames = getattr(other, 'frames', ())
        return tuple.__eq__(self, other) and list(self.frames) == list(frames)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        text = super().__repr__()
        return f'{text[:-1]}, frames={describe(self.frames)})' if self.frames else text


@contextmanager
def running(process: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Run a real process until the block ends.

    :param process: a ZMQProcess or ZMQPool, or a class or function that makes one from the other
        arguments; a class that gets no address binds a free port
    :return: the process, which is ready: see its `bound_address`
    :raises ZMQStartError: if it cannot start; an exception of the process itself is raised as it is
    :raises ZMQTimeoutError: if it is not ready after 30 seconds
    """
    if not isinstance(process, ReadyProcess):
        address = None if args else signature(process).parameters.get('bind_addr')
        if address is not None and address.default is Parameter.empty:
            kwargs.setdefault('bind_addr', LOCAL)
        process = process(*args, **kwargs)
    process.start()
    try:
        process.wait_ready(_READY_TIMEOUT)
        yield process
    finally:
        process.stop()
        process.join()


class RecordingClient(ZMQClient):
    """A ZMQClient that records the messages instead of sending them.

    :param name: name of the client in the recorded messages
    :param address: value of the attribute `address`
    :param replies: replies by type of message: a reply such as ``[200, payload]``, or a
        :class:`~pyams_zmq.message.Multipart`; an exception to raise; or a function of the arguments
        that returns the reply; the default is ``[200, None]``
    :param handler: handler that replies in this process, as it does in its own: anything that a
        ZMQProcess takes, or a ZMQProcess or ZMQPool that is not started
    :param outbox: list that gets the messages, by default a new one
    :param recorder: gets the jobs, by default a new one; the *handler* runs them, or their reply is
        that in *replies*; without both they wait
    :param pending: gets the messages of transactions that have not ended, by default a new one
    :raises ValueError, TypeError: for a bad address, and those of *handler*
    """

    def __init__(
        self,
        name: str = '',
        *,
        address: Any = '127.0.0.1:1',
        replies: Mapping[str, Any] | None = None,
        handler: Any = None,
        outbox: list[Sent] | None = None,
        recorder: JobRecorder | None = None,
        pending: PendingMessages | None = None,
    ):
        super().__init__(address)
        self.name = name
        self.replies = {} if replies is None else replies
        self.outbox: list[Sent] = [] if outbox is None else outbox
        self.recorder = JobRecorder() if recorder is None else recorder
        self._pending = PendingMessages() if pending is None else pending
        self._answer = None if handler is None else EagerHandler(handler)

    @property
    def pending(self) -> list[Sent]:
        """Messages of transactions that have not ended, in order; a new list each time.

        A commit moves them to `outbox`; an abort or a rollback to an earlier savepoint drops them.
        """
        return self._pending.read()

    def on_join(self, message: MessageDataManager) -> None:
        """Record a message that waits for the end of its transaction, in `pending`."""
        binary: list[bytes] = []
        match message.encoded:
            case (_, _, frames, *_):
                binary = to_frames(frames)
        self._pending.add(message, self._describe(message.encoded[1], binary))

    def request(
        self,
        message: Any,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        frames: Iterable[Any] | None = None,
    ) -> Any:
        """Record a message, and return its reply; see `ZMQClient.request`."""
        check_timeout(self.timeout if timeout is None else timeout)
        check_integer('retries', self.retries if retries is None else retries, 0)
        self._check_open()
        binary = to_frames(frames)
        data = encode_request(message, max_size=self.max_message_size, frames=binary)
        return decode_body(self._exchange(data, binary))

    def find_socket_type(self, *, timeout: float = PREPARE_TIMEOUT) -> str | None:
        """Return the type that services of this version have; nothing is connected."""
        return 'ROUTER'

    def prepare(self, *, timeout: float = PREPARE_TIMEOUT) -> None:
        """Do nothing: the service is always available; see `ZMQClient.prepare`."""
        self._check_open()

    def reserve_all(
        self, messages: Sequence[EncodedMessage], *, timeout: float = 0, held: int = 0
    ) -> list[Any]:
        """Return objects whose `post` records a message; see `ZMQClient.reserve_all`."""
        self.prepare(timeout=timeout)
        return [_Reservation(partial(self.post, *message)) for message in messages]

    def post(
        self,
        type: str,  # noqa: A002 - the name of the field
        data: bytes,
        frames: Iterable[Any] | None = None,
        is_repeatable: bool = False,
    ) -> None:
        """Record an encoded message; see `ZMQClient.post`."""
        self._check_open()
        try:
            reply = self._exchange(data, to_frames(frames))[-1]
            problem = check_reply(reply, is_repeatable).problem
        except Exception as error:  # noqa: BLE001 - one of `replies`, which `post` does not raise
            problem = str(error)
        if problem is not None:
            LOGGER.error('Message %r to %s: %s', type, self.address, problem)

    def offer(self, message: QueuedMessage) -> bool:
        """Record a message and call its `on_reply`; see `ZMQClient.offer`.

        :return: False if its entry in `replies` is an exception: it is as if it had no room
        """
        self._check_open()
        try:
            reply = self._exchange(message.data, to_frames(message.frames))[-1]
        except Exception:  # noqa: BLE001 - one of `replies`, which `offer` does not raise
            return False
        if message.on_reply is not None:
            message.on_reply(check_reply(reply, message.is_job))
        return True

    def withdraw(self, *, start: float | None = None) -> None:
        """Do nothing: each message has its reply; see `ZMQClient.withdraw`."""

    def _exchange(self, data: bytes, frames: list[bytes]) -> list[bytes]:
        sent = self._describe(data, frames)
        self.outbox.append(sent)
        answer = None if sent.type in self.replies else self._find_answer()
        reply = self._answer_about_jobs(sent, answer, data)
        if reply is not None:
            return [encode(reply)]
        return self._reply_to(sent, answer, data)

    def _describe(self, data: bytes, frames: list[bytes]) -> Sent:
        match message := decode_reply(data):
            case [str(name), args, *_options]:
                return Sent(self.name, name, args, frames)
            case _:
                return Sent(self.name, None, message, frames)

    def _answer_about_jobs(self, sent: Sent, answer: EagerHandler | None, data: bytes) -> Any:
        """Return the reply to a message about jobs, or that submits one; None for others."""
        if sent.type is None:
            return None
        if sent.type not in self.replies:
            reply = self.recorder.answer(self.name, sent.type, sent.args)
            if reply is not None:
                return reply
        try:
            _name, _args, options = split_request(data)
        except ZMQMessageError:
            return None  # a handler says what is wrong
        # A service takes the call of a job as its submission, and the other way round.
        policy = JobPolicy() if 'id' in options else None
        if answer is not None:
            policy = answer.find_policy(sent.type)
        if policy is None:
            return None
        runner = None
        if answer is not None or sent.type in self.replies:
            runner = partial(self._run, sent, data)
        return self.recorder.submit(sent, options, runner, policy)

    def _run(self, sent: Sent, data: bytes, job: RunningJob) -> list[bytes]:
        answer = None if sent.type in self.replies else self._find_answer()
        return self._reply_to(sent, answer, data, job)

    def _reply_to(
        self, sent: Sent, answer: EagerHandler | None, data: bytes, job: RunningJob | None = None
    ) -> list[bytes]:
        if answer is not None:
            return _frames_of(answer([*sent.frames, data], job))
        reply: Any = [200, None]
        if sent.type is not None:
            reply = self.replies.get(sent.type, reply)
        if isinstance(reply, BaseException):
            raise reply
        return _frames_of(encode_reply(reply(sent.args) if callable(reply) else reply))

    def _find_answer(self) -> EagerHandler | None:
        """Return the function that replies to messages without an entry in `replies`, if any."""
        return self._answer

    def close(self) -> None:
        """Refuse further messages, as a closed client does."""
        self._is_closed = True
        self._answer = None  # its handler may have threads


def _frames_of(reply: Reply) -> list[bytes]:
    return reply if isinstance(reply, list) else [reply]


class _Reservation:
    """Room for a message, of which there is enough."""

    def __init__(self, post: Callable[[], None]):
        self.post = post

    def check(self) -> None:
        """Do nothing: the service is always available."""

    def cancel(self) -> None:
        """Record nothing."""


class _Replies(dict[str, dict[str, Any]]):
    """Replies by service; assignment updates the dictionary of a service, which its client has."""

    def __missing__(self, name: str) -> dict[str, Any]:
        super().__setitem__(name, {})
        return self[name]

    def __setitem__(self, name: str, replies: Mapping[str, Any]) -> None:
        own = self[name]
        own.clear()
        own.update(replies)


@implementer(IZMQClientFactory)
class Testing:
    """The recorded messages of an application, `registry.zmq_testing`, and the replies to them.

    :ivar outbox: recorded messages of all services, in order
    :ivar replies: for each name of a service, replies by type; see :class:`RecordingClient`
    :ivar recorder: records the jobs; its `on_progress` is called while one runs
    """

    def __init__(self, registry: Any):
        self.outbox: list[Sent] = []
        self.replies = _Replies()
        self.recorder = JobRecorder()
        self._pending = PendingMessages()
        self.eager = False
        self._registry = registry
        self._answers: dict[str, EagerHandler] = {}

    @property
    def pending(self) -> list[Sent]:
        """Messages of all services whose transactions have not ended, in order; a new list.

        See `pending` of :class:`RecordingClient`.
        """
        return self._pending.read()

    @property
    def jobs(self) -> list[RecordedJob]:
        """Submitted jobs of all services, in order."""
        return self.recorder.jobs

    @property
    def eager(self) -> bool:
        """True if the handlers of the services reply to messages without an entry in `replies`.

        It can be set at any time.
        """
        return self._eager

    @eager.setter
    def eager(self, eager: bool) -> None:
        self._eager = check_boolean('eager', eager)

    def __call__(self, service: Any) -> RecordingClient:
        """Make a client of a declared service."""
        client = RecordingClient(
            service.name,
            address=service.client_address,
            replies=self.replies[service.name],
            outbox=self.outbox,
            recorder=self.recorder,
            pending=self._pending,
        )
        service.prepare_client(client)
        client._find_answer = partial(self.find_answer, service)  # type: ignore[method-assign]
        return client

    def reset(self) -> None:
        """Start again for the next test: no messages, no replies, no handlers, and not eager.

        The messages of transactions that have not ended are not sent later, either.
        """
        self._pending.reset()
        self.outbox.clear()
        self.recorder.reset()
        for replies in self.replies.values():
            replies.clear()
        self._answers.clear()
        self.eager = False

    def find_answer(self, service: Any) -> EagerHandler | None:
        """Return the function by which the handler of a service replies; None if it does not.

        :param service: a declared service; one that runs elsewhere may have no handler
        """
        if not self.eager or service.handler is None:
            return None
        if service.name not in self._answers:
            self._answers[service.name] = EagerHandler(service.make_process(self._registry))
        return self._answers[service.name]


class _DummyZMQ:
    """The method `zmq` of a DummyRequest, which has no extensions; its registry must have clients.

    A test may still assign another one to a request.
    """

    def __get__(self, request: Any, owner: type) -> Any:
        if request is None:
            return self
        if getattr(request.registry, 'zmq_clients', None) is None:
            raise AttributeError('zmq: call config.include("pyams_zmq.testing") in the test')
        return partial(request_zmq, request)


def includeme(config: Any) -> None:
    """Record the messages of an application: ``config.include('pyams_zmq.testing')``.

    Services are not started. A :class:`pyramid.testing.DummyRequest` has `zmq`, as requests have.
    """
    config.include('pyams_zmq')
    DummyRequest.zmq = _DummyZMQ()
    if config.registry.queryUtility(IZMQClientFactory) is None:
        config.registry.zmq_testing = Testing(config.registry)
        config.registry.registerUtility(config.registry.zmq_testing, IZMQClientFactory)
        config.registry.zmq_clients.close()  # real clients; the next use makes new ones
