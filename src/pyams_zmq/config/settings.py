# SPDX-License-Identifier: ZPL-2.1
"""Reads the options of a service, from code and from settings ``pyams_zmq.NAME.KEY``."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from inspect import get_annotations
from ipaddress import ip_address
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from pyramid.exceptions import ConfigurationError
from pyramid.settings import asbool, aslist, falsey, truthy

from pyams_zmq.auth import Access
from pyams_zmq.auth.curve import CurveClient, CurveServer
from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.config.identity import APPLICATION
from pyams_zmq.config.service import POOL_OPTIONS, Service, services_of
from pyams_zmq.handler.plain import check_handler
from pyams_zmq.pool import ZMQPool
from pyams_zmq.pool.broker import make_worker_access
from pyams_zmq.pool.protocol import MAX_INTERVAL, MIN_INTERVAL
from pyams_zmq.process.ipc_file import check_mode, find_group
from pyams_zmq.process.service import LIMITS
from pyams_zmq.wire.endpoint import Endpoint

PREFIX = 'pyams_zmq.'

_NAME = re.compile(r'[A-Za-z0-9_-]+', re.ASCII)

_POOL_LIMITS = (
    'queue_limit queue_size client_queue_size max_reply_size max_calls max_memory beat_interval '
    'stats_users'
).split()
_LIMITS = ('concurrency', *LIMITS, *_POOL_LIMITS)
_FILE_OPTIONS = ('ipc_mode', 'ipc_group')
_NUMBERS = {int: Annotated[int, Meta(ge=0)], float: Annotated[float, Meta(ge=0, le=1e8)]}

OPTIONS = {item.name for item in fields(Service)} - {'name', 'limits'} | set(_LIMITS)
"""Keyword arguments of the directive"""

# A ZMQPool has the limits of a ZMQProcess, and its own.
_HINTS = {
    name: hint
    for cls in (*reversed(ZMQPool.__mro__), Service)
    for name, hint in get_annotations(cls).items()
}

TYPES: Mapping[str, Any] = {
    **{key: _NUMBERS[_HINTS[key]] for key in OPTIONS if _HINTS[key] in _NUMBERS},
    'beat_interval': Annotated[float, Meta(ge=MIN_INTERVAL, le=MAX_INTERVAL)],
    'concurrency': Annotated[int, Meta(ge=1)],
    'send_deadline': bool,
    'start': Annotated[str, Meta(pattern='^(auto|external|never)$')],
    'stats_users': tuple[str, ...],
    'timeout': Annotated[float, Meta(gt=0)],
}
"""Options that msgspec checks, and converts from the text of a setting"""

_SECRETS = {'client_keys': 'server_key', 'server_public_key': 'client_key'}
"""Settings of public CURVE keys, each with the setting of the secret key that it needs"""

SETTINGS = OPTIONS - {'curve', 'client_curve', 'worker_curve'} | {*_SECRETS, *_SECRETS.values()}
"""Keys of settings"""


def convert(key: str, value: Any) -> Any:
    """Return the value of an option, checked and converted to its type.

    :param key: one of `TYPES`, or of `_FILE_OPTIONS`
    :raises ValueError: if the value is not allowed
    """
    if key == 'ipc_mode':
        return check_mode(value)
    if key == 'ipc_group':
        find_group(value)
        return value
    if key == 'stats_users':
        value = aslist(value)
    elif key == 'send_deadline' and str(value).lower() in truthy | falsey:
        value = asbool(value)
    try:
        return msgspec.convert(value, TYPES[key], strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f'{value!r} is not allowed. {error}') from None


def check_name(name: Any) -> None:
    """Check the name of a service.

    :raises ConfigurationError: if it has other characters than letters, digits, `_` and `-`
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f'Bad name of a ØMQ process {name!r}: write letters, digits, _ and -'
        )


def check_settings(registry: Any) -> list[str]:
    """Return the names of the services that settings name.

    :param registry: registry of the application
    :raises ConfigurationError: for an unknown key
    """
    names = []
    for setting in registry.settings or ():
        if setting.startswith(PREFIX) and setting != APPLICATION:
            name, dot, key = setting.removeprefix(PREFIX).partition('.')
            if not dot or key not in SETTINGS:
                raise ConfigurationError(
                    f'Unknown setting {setting!r}: write {APPLICATION}, or {PREFIX}NAME.KEY '
                    'with one of the keys ' + ', '.join(sorted(SETTINGS))
                )
            check_name(name)
            names.append(name)
    return list(dict.fromkeys(names))


def read_service(config: Any, name: str, options: Mapping[str, Any]) -> Service:
    """Return the service that options and settings describe; a setting overrides an option.

    :param config: configurator of the application
    :param name: name of the service
    :param options: options that code has given
    :raises ConfigurationError: for an unknown setting, and a bad or missing value; its text does
        not repeat a secret
    """
    check_settings(config.registry)
    prefix = f'{PREFIX}{name}.'
    values = dict(options)
    for setting, value in (config.registry.settings or {}).items():
        if setting.startswith(prefix) and value != '':
            values[setting.removeprefix(prefix)] = value
    for key, value in values.items():
        with _named(name, key):
            values[key] = _read(config, key, value)
    if 'handler' in values:
        with _named(name, 'handler'):
            usual = getattr(values.get('factory'), 'concurrency', 1)
            check_handler(values['handler'], values.get('concurrency', usual))
    _read_keys(name, values)
    _check_access(name, values)
    for key in ('address', 'handler'):
        if values.get(key) is None and (key, values.get('start')) != ('handler', 'never'):
            raise ConfigurationError(
                f'ØMQ process {name!r} has no {key}: pass it to add_zmq_process, or set '
                f'{prefix}{key}'
            )
    with _named(name, 'address'):
        _check_address(values['address'], values.get('start') != 'never')
    _check_pool(name, values)
    for key in _FILE_OPTIONS:
        if values.get(key) is not None:
            _check_path(name, key, values)
    limits = {key: values.pop(key) for key in _LIMITS if key in values}
    service = Service(name, limits=limits, **values)
    with _named(name, 'client_curve'):
        ServiceAddress.parse(service.client_address, None, service.client_curve)
    with _named(name, 'client_auth'):
        ServiceAddress.parse(service.client_address, service.client_auth, service.client_curve)
    return service


def check_addresses(registry: Any, service: Service) -> None:
    """Check that no other service binds an address of a service.

    :param registry: registry of the application
    :raises ConfigurationError: if one does
    """
    others = [other for other in services_of(registry).values() if other.name != service.name]
    for number, endpoint in enumerate(service.endpoints):
        for other in (*others, *([service] if number else ())):
            for taken in other.endpoints[: number if other is service else None]:
                if endpoint.overlaps(taken):
                    raise ConfigurationError(
                        f'The ØMQ processes {other.name!r} and {service.name!r} cannot both bind '
                        f'{endpoint}: choose another address for one of them'
                        if other is not service
                        else f'ØMQ process {service.name!r} cannot bind {endpoint} twice: choose '
                        'another worker_address'
                    )


@contextmanager
def _named(name: str, key: str) -> Iterator[None]:
    """Convert an error into a ConfigurationError that names the option."""
    try:
        yield
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        setting = f' (setting {PREFIX}{name}.{key})' if key in SETTINGS else ''
        raise ConfigurationError(f'ØMQ process {name!r}, bad {key}{setting}: {error}') from None


def _read(config: Any, key: str, value: Any) -> Any:
    if key in TYPES or key in _FILE_OPTIONS:
        return convert(key, value)
    if key in ('handler', 'factory'):
        try:
            value = config.maybe_dotted(value)
        except (ImportError, AttributeError) as error:
            raise ImportError(f'{value!r} cannot be imported: {error}') from None
        if key == 'factory' and not callable(value):
            raise TypeError(f'{value!r} is not a class')
    elif key == 'client_keys' and not os.path.isdir(value):
        return aslist(value)
    return value


def _read_keys(name: str, values: dict[str, Any]) -> None:
    """Replace the settings of CURVE keys by objects."""
    for public, secret in _SECRETS.items():
        if public in values and secret not in values:
            raise ConfigurationError(
                f'ØMQ process {name!r} has {public} but no {secret}: set {PREFIX}{name}.{secret}'
            )
    if 'server_key' in values:
        with _named(name, 'server_key'):
            values['curve'] = CurveServer(values.pop('server_key'), values.pop('client_keys', ()))
    if 'client_key' in values:
        with _named(name, 'client_key'):
            public = values.pop('server_public_key', '')
            values['client_curve'] = CurveClient(public, values.pop('client_key'))


def _check_access(name: str, values: Mapping[str, Any]) -> None:
    """Check who may connect to the sockets of a service."""
    for auth, curve in (('auth', 'curve'), ('worker_auth', 'worker_curve')):
        with _named(name, curve):
            Access(curve=values.get(curve))
        with _named(name, auth):
            Access(values.get(auth), curve=values.get(curve))
    with _named(name, 'clients'):
        Access(clients=values.get('clients'))


def _check_address(address: Any, is_bound: bool) -> None:
    """Check that clients can connect to an address.

    :param is_bound: true if a process on this machine binds it
    :raises ValueError: if it has no port, is the name of an interface, which ØMQ binds as well, or
        lets ØMQ choose the path
    """
    endpoint = Endpoint.parse(address, bind=True)
    if endpoint.path == '*':
        raise ValueError(f'{address!r} has no path, which clients need to know')
    if endpoint.protocol != 'tcp':
        return
    if not endpoint.port:
        raise ValueError(f'{address!r} has no port, which clients need to know')
    if is_bound and endpoint.host != '*':
        try:
            ip_address(endpoint.host.strip('[]'))
        except ValueError:
            raise ValueError(
                f'{endpoint.host!r} is not an IP address, which clients need to know'
            ) from None


def _check_path(name: str, key: str, values: Mapping[str, Any]) -> None:
    """Check that a service has an address to which an option of socket files applies."""
    addresses = [values[each] for each in ('address', 'worker_address') if values.get(each)]
    if not any(Endpoint.parse(address, bind=True).path for address in addresses):
        raise ConfigurationError(
            f'ØMQ process {name!r} has {key} (setting {PREFIX}{name}.{key}), which is for an '
            f'address with a file: {addresses[0]!r} is not ipc:///path'
        )


def _check_pool(name: str, values: dict[str, Any]) -> None:
    """Check the options of a pool; a service with `workers` is a pool."""
    if not values.get('workers'):
        for key in (*POOL_OPTIONS, *_POOL_LIMITS):
            if values.get(key):
                raise ConfigurationError(
                    f'ØMQ process {name!r} has {key}, which is for a pool: '
                    f'set {PREFIX}{name}.workers'
                )
        return
    factory = values.setdefault('factory', ZMQPool)
    if not (isinstance(factory, type) and issubclass(factory, ZMQPool)):
        raise ConfigurationError(
            f'ØMQ process {name!r} has workers, but {factory!r} is not a subclass of ZMQPool'
        )
    with _named(name, 'worker_address'):
        make_worker_access(*(values.get(key) for key in POOL_OPTIONS[1:]))
