# SPDX-License-Identifier: ZPL-2.1
"""The services of an application: ``config.add_zmq_process(name, ...)``.

Settings `pyams_zmq.NAME.KEY` override the options of the directive, or declare a service alone.
"""

from collections.abc import Mapping
from typing import Any

from pyramid.exceptions import ConfigurationError

from pyams_zmq.config.request_client import RequestClient
from pyams_zmq.config.service import Service, services_of
from pyams_zmq.config.settings import (
    OPTIONS,
    PREFIX,
    check_addresses,
    check_name,
    check_settings,
    read_service,
)
from pyams_zmq.interfaces import IZMQService

__all__ = ['RequestClient', 'Service', 'add_zmq_process', 'services_of']

LATE = 100
"""Order of actions after those of applications; the phases of Pyramid are -30 to 0"""


def add_zmq_process(config: Any, name: str, **options: Any) -> None:
    """Declare a service; a directive of the configurator.

    :param name: name of the service: letters, digits, `_` and `-`
    :param address: address to bind, with its port
    :param handler: class with the methods, an instance of one, or a subclass of
        :class:`~pyams_zmq.handler.ZMQMessageHandler`; or the dotted name of one of these
    :param factory: class of the process, or its dotted name; by default ZMQProcess, or ZMQPool if
        there are *workers*
    :param auth: users that may connect, see :func:`pyams_zmq.auth.parse_users`
    :param clients: addresses that may connect, see :func:`pyams_zmq.auth.parse_clients`
    :param curve: :class:`~pyams_zmq.curve.CurveServer`
    :param client_auth: user that this application connects as; by default the first one of *auth*
    :param client_curve: :class:`~pyams_zmq.curve.CurveClient` of this application
    :param start: `'auto'`: the application starts it when it serves requests; `'external'`:
        ``pyams_zmq serve`` starts it; `'never'`: it runs elsewhere, for example on another machine
    :param timeout: seconds that a call of a client may take
    :param retries: further attempts of a call, see :class:`~pyams_zmq.client.ZMQClient`
    :param send_deadline: true to send the deadline of each call to the service
    :param workers: number of workers of a :class:`~pyams_zmq.pool.ZMQPool`; 0 for a ZMQProcess
    :param worker_address: address of the pool for workers of other machines
    :param worker_auth: users that may connect as workers
    :param worker_curve: :class:`~pyams_zmq.curve.CurveServer` for workers of other machines
    :param options: limits of the process, class attributes such as `drain_timeout`
    :raises pyramid.exceptions.ConfigurationError: for an unknown option or a bad value, and for an
        address that another service binds, too
    """
    _declare(config, name, options)


def declare_from_settings(config: Any) -> None:
    """Declare the services that settings describe completely, and code does not declare.

    The others are left to code that declares them later: with `autocommit`, or after a `commit`,
    this runs before that code.
    """
    settings = config.registry.settings or {}
    for name in check_settings(config.registry):
        is_complete = (
            f'{PREFIX}{name}.handler' in settings
            or settings.get(f'{PREFIX}{name}.start') == 'never'
        )
        if is_complete and config.registry.queryUtility(IZMQService, name) is None:
            _declare(config, name, {}, order=LATE)


def _declare(config: Any, name: str, options: Mapping[str, Any], order: int = 0) -> None:
    check_name(name)
    unknown = ', '.join(sorted(set(options) - OPTIONS))
    if unknown:
        raise ConfigurationError(
            f'add_zmq_process({name!r}): unknown option {unknown}; write one of '
            + ', '.join(sorted(OPTIONS))
        )
    introspectable = config.introspectable(
        'ZMQ processes', name, f'ZMQ process {name!r}', 'process'
    )

    def register() -> None:
        service = read_service(config, name, options)
        check_addresses(config.registry, service)
        config.registry.registerUtility(service, IZMQService, name=name)
        shown = ('name', 'address', 'handler', 'factory', 'start', 'workers')
        introspectable.update({key: getattr(service, key) for key in shown})

    config.action(('zmq_process', name), register, introspectables=(introspectable,), order=order)
