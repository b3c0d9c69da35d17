# SPDX-License-Identifier: ZPL-2.1
"""Reads the options of a service, from code and from settings ``pyams_zmq.NAME.OPTION``."""

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from difflib import get_close_matches
from ipaddress import ip_address
from typing import Any

from pyramid.exceptions import ConfigurationError

from pyams_zmq.auth import Access
from pyams_zmq.auth.curve import CurveClient, CurveServer, read_keys
from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.config.errors import describe_source, is_set, locate, named, suggest
from pyams_zmq.config.identity import APPLICATION
from pyams_zmq.config.options import FORMS, OPTIONS, PREFIX, Group
from pyams_zmq.config.outbox import OUTBOX_SETTINGS
from pyams_zmq.config.service import POOL_OPTIONS, Service, services_of
from pyams_zmq.handler.plain import check_handler
from pyams_zmq.pool import ZMQPool
from pyams_zmq.pool.worker_access import make_worker_access
from pyams_zmq.wire.endpoint import Endpoint

_NAME = re.compile(r'[A-Za-z0-9_-]+', re.ASCII)

_GENERAL = (APPLICATION, *OUTBOX_SETTINGS)
"""Settings that are not those of one service"""

_ADDRESSES = ('address', 'worker_address')
_FILE_OPTIONS = ('ipc_mode', 'ipc_group')
_OTHER_FORMS: dict[str, set[str]] = {
    **{whole: set(parts) for whole, parts in FORMS.items()},
    **{part: {whole} for whole, parts in FORMS.items() for part in parts},
}


def check_name(name: Any) -> None:
    """Check the name of a service.

    :raises ConfigurationError: if it has other characters than letters, digits, `_` and `-`
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(_describe_name(name))


def _describe_name(name: Any) -> str:
    return f'Bad name of a ØMQ process {name!r}: write letters, digits, _ and -'


def check_options(name: str, options: Iterable[str]) -> None:
    """Check the names of the options that code gives to a service.

    :raises ConfigurationError: for an unknown one
    """
    for key in options:
        if key not in OPTIONS:
            raise ConfigurationError(
                f'add_zmq_process({name!r}): unknown option {key}; {suggest(key)}'
            )


def check_settings(registry: Any) -> list[str]:
    """Return the names of the services that settings name.

    :param registry: registry of the application
    :raises ConfigurationError: for an unknown key
    """
    names = []
    for setting in registry.settings or ():
        if setting.startswith(PREFIX) and setting not in _GENERAL:
            name, dot, key = setting.removeprefix(PREFIX).partition('.')
            if not dot or key not in OPTIONS:
                similar = _find_general(name, key)
                if similar:
                    advice = f'did you mean {PREFIX}{similar[0]}?'
                elif dot and _NAME.fullmatch(name):
                    advice = suggest(key, f'{PREFIX}{name}.')
                else:
                    advice = f'write {", ".join(_GENERAL)}, or {PREFIX}NAME.OPTION'
                raise ConfigurationError(f'Unknown setting {locate(repr(setting))}: {advice}')
            if not _NAME.fullmatch(name):
                raise ConfigurationError(
                    f'{_describe_name(name)} (setting {locate(repr(setting))})'
                )
            names.append(name)
    return list(dict.fromkeys(names))


def _find_general(name: str, key: str) -> list[str]:
    """Return the general setting that is most similar, if any, without its prefix.

    :param key: what follows a dot, empty without one; it must be nearly right then
    """
    known = [setting.removeprefix(PREFIX) for setting in _GENERAL]
    return get_close_matches(f'{name}_{key}' if key else name, known, 1, 0.9 if key else 0.6)


def is_complete(settings: Mapping[str, Any], name: str) -> bool:
    """Return True if settings alone describe a service.

    :raises ConfigurationError: for a bad value of `start`
    """
    start = f'{PREFIX}{name}.start'
    with named(settings, name, 'start'):
        is_elsewhere = is_set(settings, start) and OPTIONS['start'].read(settings[start]) == 'never'
    return is_elsewhere or f'{PREFIX}{name}.handler' in settings


def read_service(config: Any, name: str, options: Mapping[str, Any]) -> Service:
    """Return the service that options and settings describe; a setting overrides an option.

    :param config: configurator of the application
    :param name: name of the service
    :param options: options that code has given
    :raises ConfigurationError: for an unknown setting, and a bad or missing value; its text does
        not repeat a secret
    """
    check_settings(config.registry)
    return _Reader(config, name, options).read()


def check_addresses(registry: Any, service: Service) -> None:
    """Check that no other service binds an address of a service.

    :param registry: registry of the application
    :raises ConfigurationError: if one does
    """
    settings = registry.settings or {}
    others = [other for other in services_of(registry).values() if other.name != service.name]
    for number, endpoint in enumerate(service.endpoints):
        for other in (*others, *([service] if number else ())):
            for index, taken in enumerate(other.endpoints[: number if other is service else None]):
                if endpoint.overlaps(taken):
                    sources = [
                        describe_source(settings, each.name, _ADDRESSES[place])
                        for each, place in ((other, index), (service, number))
                    ]
                    raise ConfigurationError(
                        f'The ØMQ processes {other.name!r} and {service.name!r} cannot both bind '
                        f'{endpoint}: choose another address for one of them ({sources[0]}; '
                        f'{sources[1]})'
                        if other is not service
                        else f'ØMQ process {service.name!r} cannot bind {endpoint} twice: choose '
                        f'another worker_address ({sources[1]})'
                    )


class _Reader:
    """Reads the options of one service.

    :ivar values: values by option
    :ivar forms: options that were given in another form, such as `auth_file` for `auth`
    """

    def __init__(self, config: Any, name: str, options: Mapping[str, Any]):
        self.config = config
        self.name = name
        self.settings: Mapping[str, Any] = config.registry.settings or {}
        self.values = self._merge(options)
        self.forms: dict[str, str] = {}

    def read(self) -> Service:
        """Return the service."""
        for key, value in self.values.items():
            with self._named(key):
                self.values[key] = OPTIONS[key].read(value, self.config)
        if self.values.get('handler') is not None:
            with self._named('handler'):
                factory = self.values.get('factory')
                usual = getattr(factory, 'concurrency', 1)
                journal = self.values.get('journal') or getattr(factory, 'journal', None)
                check_handler(
                    self.values['handler'],
                    self.values.get('concurrency', usual),
                    takes_jobs=bool(journal) or self.values.get('start') == 'never',
                )
        self._read_forms()
        self._check_access()
        self._check_presence()
        self._check_pool()
        values = self.values
        for key in _FILE_OPTIONS:
            if values.get(key) is not None:
                self._check_path(key)
        limits = {
            key: values.pop(key) for key in OPTIONS if OPTIONS[key].is_limit and key in values
        }
        service = Service(self.name, limits=limits, **values)
        with self._named('client_curve'):
            ServiceAddress.parse(service.client_address, None, service.client_curve)
        with self._named('client_auth'):
            ServiceAddress.parse(service.client_address, service.client_auth, service.client_curve)
        return service

    def _merge(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that are given; a setting also replaces the other form in code."""
        prefix = f'{PREFIX}{self.name}.'
        given = {
            setting.removeprefix(prefix): value
            for setting, value in self.settings.items()
            if setting.startswith(prefix) and is_set(self.settings, setting)
        }
        values = {
            key: value
            for key, value in options.items()
            if not (key in _OTHER_FORMS and value in (None, ''))
            and not _OTHER_FORMS.get(key, set()) & given.keys()
        }
        values.update(given)
        for whole, parts in FORMS.items():
            for part in parts:
                if whole in values and part in values:
                    raise self._error(f'has {whole} and {part}: remove one of them')
        return values

    def _read_forms(self) -> None:
        """Replace files of users by their paths, and the texts of CURVE keys by objects."""
        values = self.values
        for whole, (first, *public) in FORMS.items():
            given = [part for part in (first, *public) if part in values]
            if given:
                self.forms[whole] = first
                if public:
                    values[whole] = self._make_curve(whole, first, *public)
                else:
                    values[whole] = values.pop(first)

    def _make_curve(self, whole: str, secret: str, public: str) -> CurveServer | CurveClient:
        for key, other in ((secret, public), (public, secret)):
            if key not in self.values:
                raise self._error(f'has {other} but no {key}: set {self._locate(key)}')
        key, others = self.values.pop(secret), self.values.pop(public)
        is_client = whole == 'client_curve'
        with self._named(public):
            read_keys([others] if is_client else others)
        with self._named(secret):
            return CurveClient(others, key) if is_client else CurveServer(key, others)

    def _check_access(self) -> None:
        """Check who may connect to the sockets of a service."""
        values = self.values
        for auth, curve in (('auth', 'curve'), ('worker_auth', 'worker_curve')):
            with self._named(curve):
                Access(curve=values.get(curve))
            with self._named(auth):
                Access(values.get(auth), curve=values.get(curve))
        with self._named('clients'):
            Access(clients=values.get('clients'))

    def _check_presence(self) -> None:
        values = self.values
        is_bound = values.get('start') != 'never'
        for key in ('address', 'handler'):
            if values.get(key) is None and (is_bound or key != 'handler'):
                raise self._error(
                    f'has no {key}: pass it to add_zmq_process, or set {self._locate(key)}'
                )
        with self._named('address'):
            _check_address(values['address'], is_bound)

    def _check_path(self, key: str) -> None:
        """Check that a service has an address to which an option of socket files applies."""
        addresses = [self.values[each] for each in _ADDRESSES if self.values.get(each)]
        if not any(Endpoint.parse(address, bind=True).path for address in addresses):
            raise self._error(
                f'has {key} ({self._describe(key)}), which is for an address with a file: '
                f'{addresses[0]!r} is not ipc:///path'
            )

    def _check_pool(self) -> None:
        """Check the options of a pool; a service with `workers` is a pool."""
        values = self.values
        if not values.get('workers'):
            for option in OPTIONS.values():
                if option.is_for_pools and values.get(option.name):
                    key = self.forms.get(option.name, option.name)
                    raise self._error(
                        f'has {key}, which is for a pool: set {self._locate("workers")}, or remove '
                        f'it ({self._describe(key)})'
                    )
            return
        factory = values.setdefault('factory', ZMQPool)
        if not (isinstance(factory, type) and issubclass(factory, ZMQPool)):
            raise self._error(
                f'has workers, but {factory!r} is not a subclass of ZMQPool: derive it from that, '
                f'or remove workers ({self._describe("factory")})'
            )
        if not (values.get('journal') or factory.journal):
            for option in OPTIONS.values():
                if option.group is Group.JOBS and option.name in values:
                    raise self._error(
                        f'has {option.name}, which is for jobs: set {self._locate("journal")}, or '
                        f'remove it ({self._describe(option.name)})'
                    )
        with self._named('worker_address'):
            make_worker_access(*(values.get(key) for key in POOL_OPTIONS[1:]))

    # Errors

    def _named(self, key: str) -> AbstractContextManager[None]:
        return named(self.settings, self.name, self.forms.get(key, key))

    def _describe(self, key: str) -> str:
        return describe_source(self.settings, self.name, key)

    def _locate(self, key: str) -> str:
        return locate(f'{PREFIX}{self.name}.{key}')

    def _error(self, text: str) -> ConfigurationError:
        return ConfigurationError(f'ØMQ process {self.name!r} {text}')


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
