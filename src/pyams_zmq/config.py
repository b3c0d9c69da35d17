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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pyramid.config import PHASE3_CONFIG
from pyramid.events import ApplicationCreated
from pyramid.exceptions import ConfigurationError
from pyramid.settings import aslist

from pyams_zmq.auth import Users, parse_clients, parse_users
from pyams_zmq.client import ZMQClient
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.endpoint import Endpoint
from pyams_zmq.interfaces import IZMQClientFactory, IZMQService
from pyams_zmq.process import ZMQProcess
from zope.interface import implementer

__docformat__ = 'restructuredtext'

PREFIX = 'pyams_zmq.'

STARTS = ('auto', 'external', 'never')
"""By the application which serves; by ``pyams_zmq serve``; elsewhere, on another machine maybe"""

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
        return ZMQClient(self.client_address, auth=auth, curve=self.client_curve, timeout=self.timeout)

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


def add_zmq_process(config: Any, name: str, **options: Any) -> None:
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
    name = _check_name(name)
    for key in set(options) - _KEYS:
        raise ConfigurationError(f'add_zmq_process({name!r}): there is no option {key!r}')
    introspectable = config.introspectable('ZMQ processes', name, f'ZMQ process {name!r}', 'process')
    introspectable.update({'name': name})

    def register() -> None:
        _register(config, _make_service(config, name, options), introspectable)

    config.action(('zmq_process', name), register, introspectables=(introspectable,))


def declare_from_settings(config: Any) -> None:
    """Declare the services that only settings know, and check the names of all settings."""
    registry = config.registry
    names = {}
    for key in registry.settings or ():
        if key.startswith(PREFIX):
            name, dot, option = key.removeprefix(PREFIX).partition('.')
            if not dot or option not in _SETTINGS:
                raise ConfigurationError(
                    f'There is no setting {key!r}; write pyams_zmq.NAME.KEY, with one of the keys '
                    + ', '.join(sorted(_SETTINGS))
                )
            names[_check_name(name)] = None
    for name in names:
        if registry.queryUtility(IZMQService, name) is None:
            introspectable = config.introspectable(
                'ZMQ processes', name, f'ZMQ process {name!r}', 'process'
            )
            _register(config, _make_service(config, name, {}), introspectable)
            introspectable.register(config.introspector, None)


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f'Bad name of a ØMQ process {name!r}: write letters, digits, _ and -'
        )
    return name


def _register(config: Any, service: Service, introspectable: Any) -> None:
    config.registry.registerUtility(service, IZMQService, name=service.name)
    introspectable.update(
        address=service.address,
        handler=service.handler,
        factory=service.factory,
        start=service.start,
    )


def _make_service(config: Any, name: str, options: Mapping[str, Any]) -> Service:
    prefix = f'{PREFIX}{name}.'
    settings = {
        key.removeprefix(prefix): value
        for key, value in (config.registry.settings or {}).items()
        if key.startswith(prefix) and value != ''
    }
    values = dict(options) | {
        key: value for key, value in settings.items() if key in _KEYS and key in _SETTINGS
    }
    key = ''
    try:
        for key in ('handler', 'factory'):
            values[key] = config.maybe_dotted(values.get(key))
        values['factory'] = values['factory'] or ZMQProcess
        for key in ('timeout', *_LIMITS):
            if key in values:
                values[key] = _LIMITS.get(key, float)(values[key])
        key = 'start'
        if values.get(key, 'auto') not in STARTS:
            raise ValueError(f'write one of {", ".join(STARTS)}')
        key = 'server_key'
        if key in settings:
            keys = settings.get('client_keys', '')
            values['curve'] = CurveServer(
                settings[key], keys if os.path.isdir(keys) else aslist(keys)
            )
        key = 'client_key'
        if key in settings:
            values['client_curve'] = CurveClient(
                settings.get('server_public_key', ''), settings[key]
            )
        key = 'address'
        if not Endpoint.parse(values.get(key), bind=True).port and ':' in str(values.get(key)):
            pass
        key = 'auth'
        parse_users(values.get(key))
        key = 'client_auth'
        parse_users(values.get(key))
        key = 'clients'
        parse_clients(values.get(key))
        limits = {key: values.pop(key) for key in _LIMITS if key in values}
        return Service(name, **values, limits=limits)
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigurationError(
            f'ØMQ process {name!r}, {key} (setting {prefix}{key}): {error}'
        ) from None
