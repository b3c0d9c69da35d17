#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

"""PyAMS_zmq.config module: services that an application declares, and the clients of its requests.

A service is declared by ``config.add_zmq_process(name, ...)``, by settings `pyams_zmq.NAME.key`, or
by both: a setting overrides what code says.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from pyramid.exceptions import ConfigurationError
from pyramid.settings import aslist
from zope.interface import implementer

from pyams_zmq.auth import Users, parse_clients, parse_users
from pyams_zmq.client import ZMQClient
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.endpoint import Endpoint
from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.interfaces import IZMQClientFactory, IZMQService
from pyams_zmq.process import ZMQProcess
from pyams_zmq.supervisor import SupervisorProcess

__docformat__ = 'restructuredtext'

PREFIX = 'pyams_zmq.'

STARTS = ('auto', 'external', 'never')
"""By the application which serves; by ``pyams_zmq serve``; elsewhere, on another machine maybe"""

STOP_SLACK = 10.0
"""Seconds that a supervisor has beside the `drain_timeout` of its process"""

EARLY, LATE = -100, 100
"""Orders of actions before and after those of applications; the phases of Pyramid are -30 to 0"""

_NAME = re.compile(r'[A-Za-z0-9_-]+', re.ASCII)

# Class attributes of a process that a setting may change; the values say their type.
_LIMITS = {
    name: type(getattr(ZMQProcess, name))
    for name in (
        'max_message_size',
        'drain_timeout',
        'orphan_timeout',
        'bind_timeout',
        'handshake_timeout',
        'heartbeat_interval',
        'heartbeat_timeout',
        'receive_hwm',
        'send_hwm',
        'backlog',
    )
}


@implementer(IZMQService)
@dataclass(frozen=True)
class Service:
    """A declared service; see :func:`add_zmq_process` for what each part is."""

    name: str
    address: Any = None
    handler: Any = None
    factory: Callable[..., ZMQProcess] = ZMQProcess
    auth: Users = field(default=None, repr=False)
    clients: Any = None
    curve: CurveServer | None = field(default=None, repr=False)
    client_auth: Users = field(default=None, repr=False)
    client_curve: CurveClient | None = field(default=None, repr=False)
    start: str = 'auto'
    timeout: float = 10.0
    limits: Mapping[str, Any] = field(default_factory=dict)

    def make_process(self, registry: Any) -> ZMQProcess:
        """Make the process of the service, which is not started.

        :param registry: registry of the application
        """
        # As the constructors of siblings take them: by position, and CURVE only where it is used.
        options = {} if self.curve is None else {'curve': self.curve}
        process = self.factory(
            self.address, self.handler, self.auth, self.clients, registry, **options
        )
        for name, value in self.limits.items():
            setattr(process, name, value)
        return process

    def make_client(self) -> ZMQClient:
        """Make a client of the service."""
        auth = self.client_auth
        if auth is None and self.client_curve is None:
            users = parse_users(self.auth)
            # Of several users of the server, an application is the first one.
            auth = dict(list(users.items())[:1]) or None
        return ZMQClient(
            self.client_address, auth=auth, curve=self.client_curve, timeout=self.timeout
        )

    @property
    def client_address(self) -> Any:
        """Address that clients on this machine connect to."""
        endpoint = Endpoint.parse(self.address, bind=True)
        hosts = {'*': '127.0.0.1', '0.0.0.0': '127.0.0.1', '[::]': '[::1]'}  # noqa: S104 - to read
        return replace(endpoint, host=hosts.get(endpoint.host, endpoint.host)).uri


_KEYS = {item.name for item in fields(Service)} - {'name', 'limits'} | set(_LIMITS)
_SETTINGS = _KEYS - {'curve', 'client_curve'} | {
    'server_key',
    'client_keys',
    'client_key',
    'server_public_key',
}


def add_zmq_process(config: Any, name: Any, **options: Any) -> None:
    """Declare a service; a directive of the configurator.

    :param name: name of the service: letters, digits, `_` and `-`
    :param address: address to bind, with its port
    :param handler: class of the message handler, or its dotted name
    :param factory: class of the process, or its dotted name; by default ZMQProcess
    :param auth: users that may connect, see :func:`pyams_zmq.auth.parse_users`
    :param clients: addresses that may connect, see :func:`pyams_zmq.auth.parse_clients`
    :param curve: :class:`~pyams_zmq.curve.CurveServer`
    :param client_auth: user that this application connects as; by default the first one of *auth*
    :param client_curve: :class:`~pyams_zmq.curve.CurveClient` of this application
    :param start: `'auto'`: the application starts it when it serves; `'external'`: ``pyams_zmq
        serve`` does; `'never'`: it runs elsewhere
    :param timeout: seconds that a call of a client may take
    :param limits: class attributes of the process, `drain_timeout` for instance
    :raises ConfigurationError: for an option or a value that cannot be, which it names
    """
    _declare(config, name, options)


def _declare(config: Any, name: Any, options: Mapping[str, Any], order: int = 0) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f'Bad name of a ØMQ process {name!r}: write letters, digits, _ and -'
        )
    for key in set(options) - _KEYS:
        raise ConfigurationError(f'add_zmq_process({name!r}): there is no option {key!r}')
    introspectable = config.introspectable(
        'ZMQ processes', name, f'ZMQ process {name!r}', 'process'
    )

    def register() -> None:
        service = _make_service(config, name, options)
        config.registry.registerUtility(service, IZMQService, name=name)
        shown = ('name', 'address', 'handler', 'factory', 'start')
        introspectable.update({key: getattr(service, key) for key in shown})

    config.action(('zmq_process', name), register, introspectables=(introspectable,), order=order)


def check_settings(config: Any) -> list[str]:
    """Check the names of all settings of services.

    :return: names of the services
    :raises ConfigurationError: for a key that there is not
    """
    names = []
    for key in config.registry.settings or ():
        if key.startswith(PREFIX):
            name, dot, option = key.removeprefix(PREFIX).partition('.')
            if not dot or option not in _SETTINGS:
                raise ConfigurationError(
                    f'There is no setting {key!r}; write pyams_zmq.NAME.KEY, with one of the keys '
                    + ', '.join(sorted(_SETTINGS))
                )
            names.append(name)
    return names


def declare_from_settings(config: Any) -> None:
    """Declare the services that only settings know."""
    for name in dict.fromkeys(check_settings(config)):
        if config.registry.queryUtility(IZMQService, name) is None:
            _declare(config, name, {}, order=LATE)


def _make_service(config: Any, name: str, options: Mapping[str, Any]) -> Service:
    prefix = f'{PREFIX}{name}.'
    values = dict(options)
    for key, value in (config.registry.settings or {}).items():
        if key.startswith(prefix) and value != '':
            values[key.removeprefix(prefix)] = value
    for key, value in values.items():
        with _naming(name, key):
            values[key] = _read(config, key, value)
    with _naming(name, 'server_key'):
        if 'server_key' in values:
            values['curve'] = CurveServer(values.pop('server_key'), values.pop('client_keys', ()))
    with _naming(name, 'client_key'):
        if 'client_key' in values:
            public = values.pop('server_public_key', '')
            values['client_curve'] = CurveClient(public, values.pop('client_key'))
    for key in ('address', 'handler'):
        if values.get(key) is None and (key, values.get('start')) != ('handler', 'never'):
            raise ConfigurationError(
                f'ØMQ process {name!r} has no {key}: give it, or set {prefix}{key}'
            )
    limits = {key: values.pop(key) for key in _LIMITS if key in values}
    return Service(name, limits=limits, **values)


@contextmanager
def _naming(name: str, key: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise ConfigurationError(
            f'ØMQ process {name!r}, bad {key} (setting {PREFIX}{name}.{key}): {error}'
        ) from None


def _read(config: Any, key: str, value: Any) -> Any:
    """Read an option; of a secret, errors do not repeat the text."""
    match key:
        case 'handler' | 'factory':
            return config.maybe_dotted(value)
        case 'address':
            endpoint = Endpoint.parse(value, bind=True)
            if endpoint.protocol == 'tcp' and not endpoint.port:
                raise ValueError(f'{value!r} has no port, which clients need to know')
        case 'start' if value not in STARTS:
            raise ValueError(f'{value!r} is none of {", ".join(STARTS)}')
        case 'auth' | 'client_auth':
            parse_users(value)
        case 'clients':
            parse_clients(value)
        case 'timeout':
            return float(value)
        case 'client_keys' if not os.path.isdir(value):
            return aslist(value)
    return _LIMITS[key](value) if key in _LIMITS else value


def services_of(registry: Any) -> dict[str, Service]:
    """Give the services that an application has declared, by name.

    :param registry: its registry
    """
    return dict(registry.getUtilitiesFor(IZMQService))


# Clients of requests


class RequestClient:
    """Client of a service for one request, see :func:`request_zmq`."""

    def __init__(self, request: Any, client: Any):
        self._request = request
        self._client = client
        self.call = client.call
        self.request = client.request

    def send(self, type: str, args: Any = None) -> None:  # noqa: A002 - the name of the field
        """Send a message when the transaction of the request is committed, or now if it has none.

        :param type: type of the message, the name of the method
        :param args: its arguments, anything that JSON can say
        :raises: what :meth:`ZMQClient.send` and :func:`send_on_commit` do
        """
        manager = getattr(self._request, 'tm', None)
        if manager is None:
            self._client.send(type, args)
        else:
            from pyams_zmq.transaction import send_on_commit  # noqa: PLC0415 - only if it is there

            send_on_commit(self._client, type, args, manager=manager)


class Clients:
    """Clients of the application, one for each service, made when somebody asks for it."""

    def __init__(self, registry: Any):
        self._registry = registry
        self._clients: dict[str, Any] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Any:
        """Give the client of a service.

        :raises LookupError: if there is no such service
        """
        client = self._clients.get(name)
        if client is None:
            service = self._registry.queryUtility(IZMQService, name)
            if service is None:
                names = ', '.join(sorted(services_of(self._registry))) or 'none'
                raise LookupError(f'There is no ØMQ service {name!r}; declared: {names}')
            make = self._registry.queryUtility(IZMQClientFactory) or Service.make_client
            with self._lock:
                client = self._clients.get(name)
                if client is None:
                    client = self._clients[name] = make(service)
        return client

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()


def request_zmq(request: Any, name: str) -> RequestClient:
    """Give the client of a declared service; the method `zmq` of requests.

    :param name: name of the service
    :raises LookupError: if there is no such service
    """
    return RequestClient(request, request.registry.zmq_clients.get(name))


# Processes of the application


def is_server() -> bool:
    """Tell if this program serves requests, and does not just load the application.

    Scripts load it with `pyramid.paster.bootstrap`, or belong to Pyramid (`pshell`, `proutes`,
    `prequest`), or to PyAMS (`pyams_...`).
    """
    program = os.path.basename(sys.argv[0])
    if program.startswith('pyams_'):
        return False
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get('__name__', '')
        if module.startswith('pyramid.scripts.') and module != 'pyramid.scripts.pserve':
            return False
        if module == 'pyramid.paster' and frame.f_code.co_name == 'bootstrap':
            return False
        frame = frame.f_back  # type: ignore[assignment] # None ends the loop
    return True


def start_services(event: Any) -> None:
    """Start the services whose `start` is `'auto'`; a subscriber to ApplicationCreated."""
    registry = event.app.registry
    if not is_server() or registry.queryUtility(IZMQClientFactory) is not None:
        return
    for name, service in services_of(registry).items():
        if service.start == 'auto':
            supervisor = SupervisorProcess(
                {name: partial(service.make_process, registry)},
                registry=registry,
                lock=Endpoint.parse(service.address, bind=True).uri,
            )
            usual = getattr(service.factory, 'drain_timeout', 0.0)
            drain = service.limits.get('drain_timeout', usual)
            supervisor.drain_timeout = max(supervisor.drain_timeout, drain + STOP_SLACK)
            try:
                supervisor.start()
            except ZMQStartError as error:
                raise ZMQStartError(
                    f'{error}; for the ØMQ process {name!r}: set {PREFIX}{name}.start = external, '
                    f'and run "pyams_zmq serve INI {name}"'
                ) from None
