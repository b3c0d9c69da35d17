# SPDX-License-Identifier: ZPL-2.1
"""Test without the service, or with a real one for the test."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, NamedTuple

from pyramid.threadlocal import manager
from zope.interface import implementer

from pyams_zmq.client import PREPARE_TIMEOUT
from pyams_zmq.client.sender import describe_reply
from pyams_zmq.exceptions import ZMQClosedError
from pyams_zmq.interfaces import IZMQClientFactory
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process.base import ReadyProcess
from pyams_zmq.process.stream import Reply
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.message import (
    check_retries,
    check_timeout,
    decode_reply,
    encode,
    encode_message,
    encode_request,
    payload_of,
)

LOGGER = logging.getLogger('PyAMS (zmq)')

LOCAL = '127.0.0.1'
"""Address of a process that is given none; the system chooses the port"""

NOWHERE = '127.0.0.1:1'
"""Address of a client that is given none"""


class Sent(NamedTuple):
    """A message that was recorded instead of sent.

    :ivar name: name of the client
    :ivar type: type of the message, None if it is not ``[type, args]``
    :ivar args: its arguments as the service would get them, or the whole message
    """

    name: str
    type: str | None
    args: Any


@contextmanager
def running(process: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Run a real process, until the block ends.

    :param process: a ZMQProcess or ZMQPool, or a class or function which makes one of the other
        arguments; a class that is given no address serves a free port
    :return: the process, which is ready: see its `bound_address`
    :raises ZMQStartError: if it cannot start; an exception of its own is raised as it was
    """
    if not isinstance(process, ReadyProcess):
        if not args and _needs_address(process, kwargs):
            kwargs['bind_addr'] = LOCAL
        process = process(*args, **kwargs)
    process.start()
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()
        process.join()


def _needs_address(factory: Any, kwargs: Mapping[str, Any]) -> bool:
    address = signature(factory).parameters.get('bind_addr')
    return address is not None and address.default is Parameter.empty and 'bind_addr' not in kwargs


class RecordingClient:
    """Stands for a ZMQClient, and records the messages instead of sending them.

    :param name: what the messages are recorded under
    :param address: address that it pretends to have
    :param replies: for each type of message what `request` returns, ``[200, payload]`` for
        instance, an exception to raise, or a function of the arguments which returns the reply;
        ``[200, None]`` for the others
    :param handler: message handler that answers in this process, just as it would in its own; a
        class, or a ZMQProcess that is not started
    :param outbox: list for the messages, by default one of its own
    :raises ValueError: for an address that cannot be understood
    """

    timeout: float = 10
    retries: int = 0
    send_deadline: bool = False

    def __init__(
        self,
        name: str = '',
        *,
        address: Any = NOWHERE,
        replies: Mapping[str, Any] | None = None,
        handler: Any = None,
        outbox: list[Sent] | None = None,
    ):
        self.name = name
        self.address = Endpoint.parse(address, bind=False).uri
        self.replies = {} if replies is None else replies
        self.outbox: list[Sent] = [] if outbox is None else outbox
        self._answer = None if handler is None else _serve(handler)
        self._is_closed = False

    def call(
        self,
        type: str,  # noqa: A002 - the name of the field
        args: Any = None,
        *,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> Any:
        """Record a message, and return the payload of its reply; see `ZMQClient.call`."""
        return payload_of(self.request([type, args], timeout=timeout, retries=retries))

    def request(
        self, message: Any, *, timeout: float | None = None, retries: int | None = None
    ) -> Any:
        """Record a message, and return its reply; see `ZMQClient.request`."""
        check_timeout(self.timeout if timeout is None else timeout)
        check_retries(self.retries if retries is None else retries)
        self._check_open()
        return decode_reply(self._exchange(encode_request(message)))

    def send(self, type: str, args: Any = None) -> None:  # noqa: A002 - as above
        """Record a message; see `ZMQClient.send`."""
        data = encode_message(type, args)
        self.prepare()
        self.post(type, data)

    def prepare(self, *, timeout: float = PREPARE_TIMEOUT) -> None:
        """Let a transaction vote; the service is always there."""
        self._check_open()

    def post(self, type: str, data: bytes) -> None:  # noqa: A002 - as above
        """Record an encoded message; see `ZMQClient.post`."""
        self._check_open()
        try:
            problem = describe_reply(self._exchange(data))
        except Exception as error:  # noqa: BLE001 - a given one; whoever posts does not see it
            problem = str(error)
        if problem is not None:
            LOGGER.error('Message %r to %s: %s', type, self.address, problem)

    def _exchange(self, data: bytes) -> bytes:
        match message := decode_reply(data):
            case [str(name), args, *_options]:
                sent = Sent(self.name, name, args)
            case _:
                sent = Sent(self.name, None, message)
        self.outbox.append(sent)
        if self._answer is not None and sent.type not in self.replies:
            return self._answer(data)
        reply: Any = [200, None]
        if sent.type is not None:
            reply = self.replies.get(sent.type, reply)
        if isinstance(reply, BaseException):
            raise reply
        return encode(reply(sent.args) if callable(reply) else reply)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ZMQClosedError(f'The client of {self.address} was closed')

    def close(self) -> None:
        """Take no more messages, as a client which was closed."""
        self._is_closed = True

    def __enter__(self) -> 'RecordingClient':  # noqa: PYI034 - Python 3.10 has no Self
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f'<{type(self).__name__} of {self.address}>'


class _Catcher:
    """A stream that keeps the reply."""

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.replies: list[bytes] = []

    def detach(self) -> Reply:
        return Reply(self.send)

    def send(self, reply: bytes) -> None:
        self.replies.append(reply)


def _serve(handler: Any) -> Callable[[bytes], bytes]:
    """Make a function that answers as the process of a message handler would."""
    process = handler if isinstance(handler, ZMQProcess) else ZMQProcess(LOCAL, handler)
    stream = _Catcher(process.concurrency)
    answer = process.handler(process, stream, process.stop)

    async def reply_to(data: bytes) -> bytes:
        answer([data])
        while not stream.replies:
            await asyncio.wait(process.owed_replies)
        return stream.replies.pop()

    def reply_as_there(data: bytes) -> bytes:
        manager.push({'registry': process.registry, 'request': None})
        return asyncio.run(reply_to(data))

    def reply_elsewhere(data: bytes) -> bytes:
        # A thread has a transaction of its own, and no loop that runs already.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(reply_as_there, data).result()

    return reply_elsewhere


class _Replies(dict[str, dict[str, Any]]):
    """Replies by service. The dictionary of a service stays the same, for its client has it."""

    def __missing__(self, name: str) -> dict[str, Any]:
        super().__setitem__(name, {})
        return self[name]

    def __setitem__(self, name: str, replies: Mapping[str, Any]) -> None:
        own = self[name]
        own.clear()
        own.update(replies)


@implementer(IZMQClientFactory)
class Testing:
    """What the tests of an application see of its messages: `registry.zmq_testing`.

    :ivar outbox: messages that were recorded, of all services, in their order
    :ivar replies: replies by type of message, by name of the service; see :class:`RecordingClient`
    """

    def __init__(self, registry: Any):
        self.outbox: list[Sent] = []
        self.replies = _Replies()
        self._eager = False
        self._is_used = False
        self._registry = registry

    @property
    def eager(self) -> bool:
        """True to have messages without such a reply answered by their handler, here.

        :raises RuntimeError: if there was a message before it is set
        """
        return self._eager

    @eager.setter
    def eager(self, eager: bool) -> None:
        if self._is_used:
            raise RuntimeError('There were messages: set eager before the first one')
        self._eager = eager

    def __call__(self, service: Any) -> RecordingClient:
        """Make a client of a declared service."""
        self._is_used = True
        return RecordingClient(
            service.name,
            address=service.client_address,
            replies=self.replies[service.name],
            handler=service.make_process(self._registry) if self.eager else None,
            outbox=self.outbox,
        )


def includeme(config: Any) -> None:
    """Record the messages of an application: ``config.include('pyams_zmq.testing')``.

    No service is started, none is needed.
    """
    config.include('pyams_zmq')
    if config.registry.queryUtility(IZMQClientFactory) is None:
        config.registry.zmq_testing = Testing(config.registry)
        config.registry.registerUtility(config.registry.zmq_testing, IZMQClientFactory)
        config.registry.zmq_clients.close()  # real ones, which are made anew
