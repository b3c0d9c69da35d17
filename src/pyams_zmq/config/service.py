# SPDX-License-Identifier: ZPL-2.1
"""A declared service: makes its process and its clients."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from zope.interface import implementer

from pyams_zmq.auth import FirstUser, Users, parse_users
from pyams_zmq.auth.curve import CurveClient, CurveServer
from pyams_zmq.client.breaker import CONNECT_TIMEOUT
from pyams_zmq.config.advice import advise
from pyams_zmq.config.identity import Application
from pyams_zmq.config.service_client import ServiceClient
from pyams_zmq.interfaces import IZMQService
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process.address_lock import UNLOCKED, AddressLock
from pyams_zmq.process.lock_folder import describe_folder_error
from pyams_zmq.wire.endpoint import Endpoint

LOGGER = logging.getLogger('PyAMS (zmq)')

POOL_OPTIONS = ('workers', 'worker_address', 'worker_auth', 'worker_curve')
"""Arguments of a ZMQPool that a ZMQProcess does not have"""


@implementer(IZMQService)
@dataclass(frozen=True)
class Service:
    """A declared service; its fields are options, see :doc:`/settings`.

    Files of users are paths, keys are objects.
    """

    name: str
    address: Any = None
    handler: Any = None
    factory: Callable[..., Any] = ZMQProcess
    auth: Users = field(default=None, repr=False)
    clients: Any = None
    curve: CurveServer | None = field(default=None, repr=False)
    client_auth: Users = field(default=None, repr=False)
    client_curve: CurveClient | None = field(default=None, repr=False)
    start: str = 'auto'
    timeout: float = 10.0
    connect_timeout: float = CONNECT_TIMEOUT
    retries: int = 0
    send_deadline: bool = False
    workers: int = 0
    worker_address: Any = None
    worker_auth: Users = field(default=None, repr=False)
    worker_curve: CurveServer | None = field(default=None, repr=False)
    limits: Mapping[str, Any] = field(default_factory=dict)

    def make_process(self, registry: Any) -> Any:
        """Return a new process of the service, not started.

        :param registry: registry of the application
        """
        # The constructors of sibling packages take these by position, and do not know CURVE.
        options: dict[str, Any] = {} if self.curve is None else {'curve': self.curve}
        if self.workers:
            options.update({name: getattr(self, name) for name in POOL_OPTIONS})
        process = self.factory(
            self.address, self.handler, self.auth, self.clients, registry, **options
        )
        process.name = process.service_name = self.name  # for the log
        for name, value in self.limits.items():
            setattr(process, name, value)
        return process

    def make_client(self) -> ServiceClient:
        """Return a new client of the service, whose errors name the service and the next step."""
        auth = self.client_auth
        if auth is None and self.client_curve is None:
            auth = self.auth
        if isinstance(auth, os.PathLike):
            auth = FirstUser(auth)
        elif auth is not None:
            # The application connects as the first user of the server.
            auth = dict(list(parse_users(auth).items())[:1]) or None
        client = ServiceClient(
            self.client_address,
            auth=auth,
            curve=self.client_curve,
            timeout=self.timeout,
            retries=self.retries,
            send_deadline=self.send_deadline,
            connect_timeout=self.connect_timeout,
        )
        client.is_service_expected = self.start == 'auto'  # it is started with this application
        client.service_name = self.name
        client.get_advice = partial(advise, self)
        self.prepare_client(client)
        return client

    def prepare_client(self, client: Any) -> None:
        """Let a client refuse what the service would.

        Of one that runs elsewhere, or is made by a function, only `max_message_size` is known, if
        it is set.
        """
        if self.start != 'never' and isinstance(self.factory, type):
            client.max_message_size = self._limit('max_message_size', client.max_message_size)
            client.keeps_jobs = bool(self._limit('journal', None))
        elif 'max_message_size' in self.limits:
            client.max_message_size = self.limits['max_message_size']

    def _limit(self, name: str, default: Any) -> Any:
        """Return a limit of the process, which settings or its class have."""
        return self.limits.get(name, getattr(self.factory, name, default))

    @property
    def client_address(self) -> Any:
        """Address that clients on this machine connect to."""
        endpoint = Endpoint.parse(self.address, bind=True)
        hosts = {'*': '127.0.0.1', '0.0.0.0': '127.0.0.1', '[::]': '[::1]'}  # noqa: S104 - to read
        return replace(endpoint, host=hosts.get(endpoint.host, endpoint.host)).uri

    def lock_addresses(self, application: Application, *, for_client: bool) -> AddressLock | None:
        """Return the lock by which its addresses are those of an application, not acquired.

        If the folder of the locks cannot be used, log that and return None.

        :param for_client: True for the address of clients only
        """
        client = Endpoint.parse(self.client_address, bind=False)
        description = f'service {self.name} of {application.description}'
        try:
            return AddressLock(
                [client] if for_client else self.endpoints,
                f'{application.name} {self.name}',
                description,
            )
        except OSError as error:
            level = logging.WARNING if for_client else logging.ERROR
            LOGGER.log(level, UNLOCKED, description, describe_folder_error(error))
        return None

    @property
    def endpoints(self) -> list[Endpoint]:
        """Addresses that its process binds on this machine."""
        addresses = [self.address, self.worker_address if self.workers else None]
        return [
            Endpoint.parse(address, bind=True)
            for address in addresses
            if address is not None and self.start != 'never'
        ]


def services_of(registry: Any) -> dict[str, Service]:
    """Return the services that an application declares, by name.

    :param registry: registry of the application
    """
    return dict(registry.getUtilitiesFor(IZMQService))
