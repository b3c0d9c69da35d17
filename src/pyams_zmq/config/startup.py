# SPDX-License-Identifier: ZPL-2.1
"""Starts the services of an application when it starts to serve requests."""

import logging
import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

from pyramid.exceptions import ConfigurationError

from pyams_zmq.config.errors import locate
from pyams_zmq.config.identity import Application, identify
from pyams_zmq.config.options import PREFIX
from pyams_zmq.config.outbox import check_outbox_settings
from pyams_zmq.config.service import Service, services_of
from pyams_zmq.config.settings import check_settings
from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.interfaces import IZMQClientFactory
from pyams_zmq.process.socket_lock import SocketLock
from pyams_zmq.supervisor.process import SupervisingProcess, SupervisorProcess

LOGGER = logging.getLogger('PyAMS (zmq)')

SUPERVISOR = 'pyams_zmq supervisor'
"""Name of the process that supervises the services of an application"""

STOP_SLACK = 10.0
"""Seconds after the `drain_timeout` of a process that its supervisor has for its own stop"""


def is_server() -> bool:
    """Return True if this program serves requests, False if it only loads the application.

    Scripts load it with `pyramid.paster.bootstrap`, or belong to Pyramid (`pshell`, `proutes`,
    `prequest`) or to PyAMS (`pyams_...`).
    """
    program = os.path.basename(sys.argv[0])
    if program.startswith('pyams_'):
        return False
    frame = sys._getframe()
    while frame is not None:
        # With "python -m", `__name__` is "__main__", and the spec has the real name.
        spec = frame.f_globals.get('__spec__')
        module = frame.f_globals.get('__name__', '') if spec is None else spec.name
        if module.startswith('pyramid.scripts.') and module != 'pyramid.scripts.pserve':
            return False
        if module == 'pyramid.paster' and frame.f_code.co_name == 'bootstrap':
            return False
        frame = frame.f_back  # type: ignore[assignment] # None ends the loop
    return True


def start_services(event: Any) -> None:
    """Start the services whose `start` is `'auto'`; a subscriber to ApplicationCreated.

    :raises ConfigurationError: for settings of a service that is not declared
    :raises ZMQStartError: in a program that cannot fork, see `check_fork`; if only the system
        refuses another process, the application starts, and an error is logged
    """
    registry = event.app.registry
    services = services_of(registry)
    for name in check_settings(registry):
        if name not in services:
            raise ConfigurationError(_describe_missing(registry, name))
    check_outbox_settings(registry)
    application = registry.zmq_clients.application = identify(registry)
    outbox = registry.zmq_outbox = registry.zmq_clients.outbox
    if registry.queryUtility(IZMQClientFactory) is not None:
        return
    _check_owners(registry, application)
    if not is_server():
        return
    own = {name: service for name, service in services.items() if service.start == 'auto'}
    if own:
        try:
            make_supervisor(registry, own, application).start()
        except ZMQStartError as error:
            text = _describe_start_error(own, error)
            if not isinstance(error.__cause__, OSError):
                raise ZMQStartError(text) from None
            LOGGER.error('The application starts without its services: %s', text)
    if outbox is not None:
        outbox.start()  # after the forks, which then have no thread of it


def _describe_missing(registry: Any, name: str) -> str:
    """Return the error for settings of a service that is not declared."""
    prefix = f'{PREFIX}{name}.'
    given = sorted(key for key in registry.settings if key.startswith(prefix))
    text = (
        f'ØMQ process {name!r} has no handler: set {locate(f"{prefix}handler")}, or call '
        f'config.add_zmq_process({name!r}, handler=...); settings name it: {", ".join(given)}'
    )
    similar = get_close_matches(name, services_of(registry), 1)
    return f'{text}; did you mean {similar[0]!r}?' if similar else text


def _check_owners(registry: Any, application: Application) -> None:
    """Let clients check that another application does not serve the address of a service."""
    for name, service in services_of(registry).items():
        if service.start != 'never':
            lock = service.lock_addresses(application, for_client=True)
            if lock is not None:
                registry.zmq_clients.address_locks[name] = lock


def _describe_start_error(services: Mapping[str, Service], error: ZMQStartError) -> str:
    """Return the text of an error of the supervisor, with the way out for all services."""
    names = ', '.join(map(repr, services))
    settings = ', '.join(f'{PREFIX}{name}.start = external' for name in services)
    return (
        f'{error}; for the ØMQ process{"es" * (len(services) > 1)} {names}: set {settings}, and '
        f'run "pyams_zmq serve INI {" ".join(services)}"'
    )


def make_supervisor(
    registry: Any, services: Mapping[str, Service], application: Application
) -> SupervisorProcess:
    """Return the supervisor of all services that a web worker starts, which is not started.

    One web worker has the lock and runs them. Each service has a lock of its own beside that: of
    its addresses, or of its name where the addresses cannot be locked. So two versions of an
    application that run at the same time, or two deployments with different addresses, share what
    they have in common.

    :param registry: registry of the application
    :param services: the services, by name
    :param application: the application
    """
    lock_name = ' '.join([application.name, 'services', *sorted(map(_identify, services.values()))])
    supervisor = SupervisorProcess(
        {name: partial(_make_process, registry, each) for name, each in services.items()},
        registry=registry,
        lock=lock_name,
    )
    supervisor.name = SUPERVISOR
    for name, service in services.items():
        usual = getattr(service.factory, 'drain_timeout', 0.0)
        drain = service.limits.get('drain_timeout', usual)
        supervisor.drain_timeout = max(supervisor.drain_timeout, drain + STOP_SLACK)
        lock = service.lock_addresses(application, for_client=False)
        if lock is None:  # the folder of the locks cannot be used
            supervisor.name_lock = SocketLock(lock_name)
        supervisor.address_locks[name] = lock or SocketLock(
            f'{application.name} {_identify(service)}'
        )
    return supervisor


def _make_process(registry: Any, service: Service) -> Any:
    process = service.make_process(registry)
    if isinstance(process, SupervisingProcess):  # a pool, which serves with those that start
        process.retries_start = True
    return process


def _identify(service: Service) -> str:
    return ' '.join([service.name, *(str(endpoint.bound) for endpoint in service.endpoints)])
