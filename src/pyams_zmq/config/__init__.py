# SPDX-License-Identifier: ZPL-2.1
"""Services that an application declares, and the clients of its requests.

A service is declared by ``config.add_zmq_process(name, ...)``, by settings `pyams_zmq.NAME.key`, or
by both: a setting overrides what code says.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from ipaddress import ip_address
from math import inf
from typing import Any

from pyramid.exceptions import ConfigurationError
from pyramid.settings import asbool, aslist
from zope.interface import implementer

from pyams_zmq.auth import Users, parse_clients, parse_users
from pyams_zmq.auth.curve import CurveClient, CurveServer
from pyams_zmq.client import ZMQClient
from pyams_zmq.interfaces import IZMQService
from pyams_zmq.pool import ZMQPool
from pyams_zmq.pool.broker import make_worker_access
from pyams_zmq.pool.protocol import check_interval
from pyams_zmq.process import LIMITS, ZMQProcess
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.message import check_concurrency, check_retries, check_timeout

PREFIX = 'pyams_zmq.'

STARTS = ('auto', 'external', 'never')
"""By the application which serves; by ``pyams_zmq serve``; elsewhere, on another machine maybe"""

EARLY, LATE = -100, 100
"""Orders of actions before and after those of applications; the phases of Pyramid are -30 to 0"""

_NAME = re.compile(r'[A-Za-z0-9_-]+', re.ASCII)

# Class attributes of a process that a setting may change; the values say their type.
_LIMITS = {name: type(getattr(ZMQProcess, name)) for name in ('concurrency', *LIMITS)}
# The same of a pool.
_POOL_LIMITS = {
    name: type(getattr(ZMQPool, name))
    for name in ('queue_limit', 'queue_size', 'max_calls', 'max_memory', 'beat_interval')
}
_POOL_OPTIONS = ('workers', 'worker_address', 'worker_auth', 'worker_curve')
_LIMITS_OF_ALL = _LIMITS | _POOL_LIMITS | {'stats_users': tuple}


@implementer(IZMQService)
@dataclass(frozen=True)
class Service:
    """A declared service; see :func:`add_zmq_process` for what each part is."""

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
    retries: int = 0
    send_deadline: bool = False
    workers: int = 0
    worker_address: Any = None
    worker_auth: Users = field(default=None, repr=False)
    worker_curve: CurveServer | None = field(default=None, repr=False)
    limits: Mapping[str, Any] = field(default_factory=dict)

    def make_process(self, registry: Any) -> Any:
        """Make the process of the service, which is not started.

        :param registry: registry of the application
        """
        # As the constructors of siblings take them: by position, and CURVE only where it is used.
        options: dict[str, Any] = {} if self.curve is None else {'curve': self.curve}
        if self.workers:
            options.update({name: getattr(self, name) for name in _POOL_OPTIONS})
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
            self.client_address,
            auth=auth,
            curve=self.client_curve,
            timeout=self.timeout,
            retries=self.retries,
            send_deadline=self.send_deadline,
        )

    @property
    def client_address(self) -> Any:
        """Address that clients on this machine connect to."""
        endpoint = Endpoint.parse(self.address, bind=True)
        hosts = {'*': '127.0.0.1', '0.0.0.0': '127.0.0.1', '[::]': '[::1]'}  # noqa: S104 - to read
        return replace(endpoint, host=hosts.get(endpoint.host, endpoint.host)).uri


_KEYS = {item.name for item in fields(Service)} - {'name', 'limits'} | set(_LIMITS_OF_ALL)
_SETTINGS = _KEYS - {'curve', 'client_curve', 'worker_curve'} | {
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
    :param factory: class of the process, or its dotted name; by default ZMQProcess, or ZMQPool if
        there are *workers*
    :param auth: users that may connect, see :func:`pyams_zmq.auth.parse_users`
    :param clients: addresses that may connect, see :func:`pyams_zmq.auth.parse_clients`
    :param curve: :class:`~pyams_zmq.curve.CurveServer`
    :param client_auth: user that this application connects as; by default the first one of *auth*
    :param client_curve: :class:`~pyams_zmq.curve.CurveClient` of this application
    :param start: `'auto'`: the application starts it when it serves; `'external'`: ``pyams_zmq
        serve`` does; `'never'`: it runs elsewhere
    :param timeout: seconds that a call of a client may take
    :param retries: further attempts of a call, see :class:`~pyams_zmq.client.ZMQClient`
    :param send_deadline: true to tell the service until when a call is waited for
    :param workers: number of workers of a :class:`~pyams_zmq.pool.ZMQPool`; 0 for a ZMQProcess
    :param worker_address: address of the pool for workers of other machines
    :param worker_auth: users that may connect as workers
    :param worker_curve: :class:`~pyams_zmq.curve.CurveServer` for workers of other machines
    :param options: class attributes of the process that are limits, `drain_timeout` for instance
    :raises ConfigurationError: for an option or a value that cannot be, which it names
    """
    _declare(config, name, options)


def _declare(config: Any, name: Any, options: Mapping[str, Any], order: int = 0) -> None:
    _check_name(name)
    for key in set(options) - _KEYS:
        raise ConfigurationError(f'add_zmq_process({name!r}): there is no option {key!r}')
    introspectable = config.introspectable(
        'ZMQ processes', name, f'ZMQ process {name!r}', 'process'
    )

    def register() -> None:
        service = _make_service(config, name, options)
        config.registry.registerUtility(service, IZMQService, name=name)
        shown = ('name', 'address', 'handler', 'factory', 'start', 'workers')
        introspectable.update({key: getattr(service, key) for key in shown})

    config.action(('zmq_process', name), register, introspectables=(introspectable,), order=order)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f'Bad name of a ØMQ process {name!r}: write letters, digits, _ and -'
        )


def check_settings(registry: Any) -> list[str]:
    """Check the names of all settings of services.

    :param registry: registry of the application
    :return: names of the services
    :raises ConfigurationError: for a key that there is not
    """
    names = []
    for key in registry.settings or ():
        if key.startswith(PREFIX):
            name, dot, option = key.removeprefix(PREFIX).partition('.')
            if not dot or option not in _SETTINGS:
                raise ConfigurationError(
                    f'There is no setting {key!r}; write pyams_zmq.NAME.KEY, with one of the keys '
                    + ', '.join(sorted(_SETTINGS))
                )
            _check_name(name)
            names.append(name)
    return names


def declare_from_settings(config: Any) -> None:
    """Declare the services that only settings know.

    Those of which the settings say too little are left for code that declares them later: with
    `autocommit`, or after a `commit`, this runs before it.
    """
    settings = config.registry.settings or {}
    for name in dict.fromkeys(check_settings(config.registry)):
        is_whole = (
            f'{PREFIX}{name}.handler' in settings
            or settings.get(f'{PREFIX}{name}.start') == 'never'
        )
        if is_whole and config.registry.queryUtility(IZMQService, name) is None:
            _declare(config, name, {}, order=LATE)


def check_services(registry: Any) -> None:
    """Check that all settings belong to a service which is declared.

    :raises ConfigurationError: if not
    """
    for name in check_settings(registry):
        if registry.queryUtility(IZMQService, name) is None:
            raise ConfigurationError(
                f'ØMQ process {name!r} has no handler: set {PREFIX}{name}.handler, or call '
                f'config.add_zmq_process({name!r}, handler=...)'
            )


def _make_service(config: Any, name: str, options: Mapping[str, Any]) -> Service:
    prefix = f'{PREFIX}{name}.'
    values = dict(options)
    for key, value in (config.registry.settings or {}).items():
        if key.startswith(prefix) and value != '':
            values[key.removeprefix(prefix)] = value
    for key, value in values.items():
        with _naming(name, key):
            values[key] = _read(config, key, value)
    for key, other in (('client_keys', 'server_key'), ('server_public_key', 'client_key')):
        if key in values and other not in values:
            raise ConfigurationError(f'ØMQ process {name!r} has {key}, and no {other}')
    with _naming(name, 'server_key'):
        if 'server_key' in values:
            values['curve'] = CurveServer(values.pop('server_key'), values.pop('client_keys', ()))
    with _naming(name, 'client_key'):
        if 'client_key' in values:
            public = values.pop('server_public_key', '')
            values['client_curve'] = CurveClient(public, values.pop('client_key'))
    for auth, curve in (('auth', 'curve'), ('client_auth', 'client_curve')):
        if parse_users(values.get(auth)) and values.get(curve) is not None:
            raise ConfigurationError(
                f'ØMQ process {name!r} has {auth} and keys: a socket has one mechanism'
            )
    for key in ('address', 'handler'):
        if values.get(key) is None and (key, values.get('start')) != ('handler', 'never'):
            raise ConfigurationError(
                f'ØMQ process {name!r} has no {key}: give it, or set {prefix}{key}'
            )
    if values.get('start') != 'never':
        with _naming(name, 'address'):
            _check_host(values['address'])
    _check_pool(name, values)
    limits = {key: values.pop(key) for key in _LIMITS_OF_ALL if key in values}
    return Service(name, limits=limits, **values)


def _check_pool(name: str, values: dict[str, Any]) -> None:
    """Check what is for pools, and make it one if there are workers."""
    if not values.get('workers'):
        for key in (*_POOL_OPTIONS, *_POOL_LIMITS, 'stats_users'):
            if values.get(key):
                raise ConfigurationError(
                    f'ØMQ process {name!r} has {key}, which is for a pool: say how many workers'
                )
        return
    factory = values.setdefault('factory', ZMQPool)
    if not (isinstance(factory, type) and issubclass(factory, ZMQPool)):
        raise ConfigurationError(
            f'ØMQ process {name!r} has workers, and {factory!r} is no ZMQPool: derive from that'
        )
    with _naming(name, 'worker_address'):
        make_worker_access(*(values.get(key) for key in _POOL_OPTIONS[1:]))


def _check_host(address: Any) -> None:
    """Check that clients can connect to what a process binds.

    :raises ValueError: for the name of an interface, which ØMQ binds as well
    """
    endpoint = Endpoint.parse(address, bind=True)
    if endpoint.protocol == 'tcp' and endpoint.host != '*':
        try:
            ip_address(endpoint.host.strip('[]'))
        except ValueError:
            raise ValueError(
                f'{endpoint.host!r} is no IP address, which clients need to know'
            ) from None


def _read_limit(kind: type, value: Any) -> Any:
    number = kind(value)
    if not 0 <= number < inf:
        raise ValueError(f'{value!r} is negative, or no number')
    return number


_NUMBERS: dict[str, Callable[[Any], Any]] = {
    **{name: partial(_read_limit, kind) for name, kind in (_LIMITS | _POOL_LIMITS).items()},
    'workers': partial(_read_limit, int),
    'concurrency': lambda value: check_concurrency(int(value)),
    'beat_interval': lambda value: check_interval(float(value)),
    'timeout': lambda value: check_timeout(float(value)),
    'retries': lambda value: check_retries(int(value)),
    'send_deadline': asbool,
}


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
    if key in _NUMBERS:
        return _NUMBERS[key](value)
    match key:
        case 'handler' | 'factory':
            value = config.maybe_dotted(value)
            if not callable(value):
                raise TypeError(f'{value!r} is no class')
        case 'address':
            endpoint = Endpoint.parse(value, bind=True)
            if endpoint.protocol == 'tcp' and not endpoint.port:
                raise ValueError(f'{value!r} has no port, which clients need to know')
        case 'start' if value not in STARTS:
            raise ValueError(f'{value!r} is none of {", ".join(STARTS)}')
        case 'stats_users':
            return tuple(aslist(value))
        case 'auth' | 'client_auth' | 'worker_auth':
            parse_users(value)
        case 'clients':
            parse_clients(value)
        case 'client_keys' if not os.path.isdir(value):
            return aslist(value)
    return value


def services_of(registry: Any) -> dict[str, Service]:
    """Give the services that an application has declared, by name.

    :param registry: its registry
    """
    return dict(registry.getUtilitiesFor(IZMQService))
