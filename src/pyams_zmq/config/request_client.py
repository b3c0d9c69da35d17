# SPDX-License-Identifier: ZPL-2.1
"""The clients of an application: ``request.zmq(name)``."""

import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from typing import Any

from pyams_zmq.client.jobs import JobMethods, SubmittedJob
from pyams_zmq.client.transaction import is_under_way, send_on_commit, submit_on_commit
from pyams_zmq.config.advice import advise
from pyams_zmq.config.identity import Application
from pyams_zmq.config.outbox import make_outbox
from pyams_zmq.config.service import Service, services_of
from pyams_zmq.config.service_client import ServiceClient, explained
from pyams_zmq.exceptions import (
    ZMQBaseError,
    ZMQOutboxError,
    ZMQRefusedError,
    ZMQUnreachableError,
)
from pyams_zmq.interfaces import IZMQClientFactory, IZMQService
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.outbox.sender import OutboxSender
from pyams_zmq.process.address_lock import AddressLock
from pyams_zmq.wire.fork import ForkLocal


class RequestClient(JobMethods):
    """Client of a service for one request, the object of ``request.zmq(name)``.

    Its methods `call`, `request`, `job`, `jobs`, `cancel`, `retry`, `watch` and `result` are those
    of :class:`~pyams_zmq.client.ZMQClient`.
    """

    def __init__(self, request: Any, client: Any, sender: Any = None):
        self._request = request
        self._client = client
        self._sender = client if sender is None else sender
        self.call = client.call
        self.request = client.request

    def explain(self, error: ZMQBaseError) -> None:
        """Add the service, how it is started and the next step to the text of an error.

        Errors of the outbox are not about the service.
        """
        if isinstance(self._client, ServiceClient) and not isinstance(error, ZMQOutboxError):
            self._client.explain(error)

    _ask = explained(JobMethods._ask)
    _poll = explained(JobMethods._poll)  # its limit of time is that of the client
    _result_of = explained(JobMethods._result_of)

    @explained
    def send(
        self,
        type: str,  # noqa: A002 - the name of the field
        args: Any = None,
        *,
        frames: Iterable[Any] | None = None,
    ) -> None:
        """Send a message when the transaction of the request is committed.

        Without a transaction it is sent now: if the request has no `tm`, or its transaction has
        not begun or has ended, as in a finished callback. An exception view of pyramid_tm still has
        one, which is aborted.

        With an outbox, see :doc:`/howto/transactions`, the transaction writes it to the database of
        the application, and it is sent at least once after the commit. Without a transaction it is
        sent as without an outbox.

        :param type: type of the message, the name of the method
        :param args: its arguments, any value with a JSON form
        :param frames: binary frames, see :meth:`.ZMQClient.call`
        :raises: the errors of :meth:`pyams_zmq.client.ZMQClient.send` and
            :func:`pyams_zmq.transaction.send_on_commit`
        :raises ZMQOutboxError: if the transaction has no database, or is doomed
        """
        manager = self._find_transaction()
        if manager is None:
            self._client.send(type, args, frames=frames)
        else:
            send_on_commit(self._sender, type, args, manager=manager, frames=frames)

    @explained
    def submit(
        self,
        type: str,  # noqa: A002 - the name of the field
        args: Any = None,
        *,
        id: str | None = None,  # noqa: A002 - the name of the field
        key: str | None = None,
        delay: float | None = None,
        due: datetime | None = None,
        expires: float | None = None,
        priority: int = 0,
        timeout: float | None = None,
        retries: int | None = None,
        frames: Iterable[Any] | None = None,
    ) -> SubmittedJob:
        """Submit a job when the transaction of the request is committed; its id is known at once.

        Without a transaction, see `send`, it is submitted now, and is on disk when this returns.
        The arguments are those of :meth:`.ZMQClient.submit`.

        :return: the job, with its id
        :raises: the errors of :meth:`pyams_zmq.client.ZMQClient.submit` and
            :func:`pyams_zmq.transaction.submit_on_commit`
        """
        submit: Callable[..., SubmittedJob] = self._client.submit
        manager = self._find_transaction()
        if manager is not None:
            submit = partial(submit_on_commit, self._sender, manager=manager)
        return submit(
            type,
            args,
            id=id,
            key=key,
            delay=delay,
            due=due,
            expires=expires,
            priority=priority,
            timeout=timeout,
            retries=retries,
            frames=frames,
        )

    def _find_transaction(self) -> Any:
        """Return the transaction manager of the request, or None if no transaction has begun."""
        manager = getattr(self._request, 'tm', None)
        return manager if manager is not None and is_under_way(manager) else None


class ClientRegistry:
    """The clients of an application, one for each service, made at its first use.

    :ivar application: the application, once it was made
    :ivar address_locks: locks of the services of this machine, by name
    """

    application: Application | None = None

    def __init__(self, registry: Any):
        self.address_locks: dict[str, AddressLock] = {}
        self._registry = registry
        self._clients: dict[str, Any] = {}
        self._lock = ForkLocal(threading.Lock)
        self._outbox: Outbox | None = None

    @property
    def outbox(self) -> Outbox | None:
        """The outbox of the application; None without one, and where messages are recorded."""
        if self._registry.queryUtility(IZMQClientFactory) is not None:
            return None
        with self._lock.get():
            if self._outbox is None:
                self._outbox = make_outbox(self._registry, self.application, self.get)
            return self._outbox

    def get(self, name: str) -> Any:
        """Return the client of a service.

        :raises LookupError: if the service is not declared
        :raises ZMQUnreachableError: if another application serves its address
        :raises ZMQRefusedError: if the file of its user cannot be read; the next use tries again
        """
        self._check_owner(name)
        with self._lock.get():
            if name not in self._clients:
                self._clients[name] = self._make(name)
            return self._clients[name]

    def make(self, name: str) -> Any:
        """Return a new client of a service, which the caller closes.

        :raises: the errors of `get`
        """
        self._check_owner(name)
        return self._make(name)

    def _check_owner(self, name: str) -> None:
        lock = self.address_locks.get(name)
        if lock is not None and (owner := lock.find_other_owner()) is not None:
            raise ZMQUnreachableError(
                f'{name!r} is not running: another application serves {lock.address} ({owner}): '
                f'stop that one, or choose another address, pyams_zmq.{name}.address'
            )

    def _make(self, name: str) -> Any:
        service = self._registry.queryUtility(IZMQService, name)
        if service is None:
            names = ', '.join(sorted(services_of(self._registry))) or 'none'
            raise LookupError(
                f'Unknown ØMQ service {name!r}; declared: {names}. Correct the name, or '
                f'declare it: config.add_zmq_process({name!r}, ...)'
            )
        make = self._registry.queryUtility(IZMQClientFactory) or Service.make_client
        try:
            client = make(service)
        except ValueError as problem:  # its file of users cannot be read now
            error = ZMQRefusedError(f'A client of {name!r} cannot be made: {problem}')
            error.advice = self._advise(service, error)
            raise error from None
        if isinstance(client, ServiceClient):
            client.get_advice = partial(self._advise, service)
            client.tracing = getattr(self._registry, 'zmq_tracing', None)
        return client

    def _advise(self, service: Service, error: ZMQBaseError) -> str:
        lock = self.address_locks.get(service.name)
        return advise(
            service,
            error,
            ini='' if self.application is None else self.application.ini,
            problem='' if lock is None else lock.find_problem(),
        )

    def close(self) -> None:
        """Close the outbox and all clients; the next use opens it again, and makes new ones."""
        if self._outbox is not None:
            self._outbox.close()
        with self._lock.get():
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()


def request_zmq(request: Any, name: str) -> RequestClient:
    """Return the client of a declared service; the method `zmq` of requests.

    :param name: name of the service
    :raises LookupError: if the service is not declared
    :raises ZMQUnreachableError: if another application serves its address
    :raises ZMQRefusedError: if the file of its user cannot be read
    """
    clients = request.registry.zmq_clients
    client, outbox = clients.get(name), clients.outbox
    sender = None if outbox is None else OutboxSender(outbox, name, client, request)
    return RequestClient(request, client, sender)
