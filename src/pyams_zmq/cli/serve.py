# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq serve``: runs services of an application."""

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from functools import partial
from typing import Any

from pyramid.scripts.common import parse_vars

from pyams_zmq.cli.application import load_application
from pyams_zmq.cli.target import fail_unknown
from pyams_zmq.config.service import services_of
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.supervisor import Supervisor
from pyams_zmq.supervisor.notify import ServiceManager
from pyams_zmq.supervisor.policy import Factory


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'serve',
        help='run processes until a signal stops them, and restart them when they crash',
        description='Run processes that an application declares, until SIGTERM or SIGINT. SIGHUP '
        'makes them read their users and keys again. The exit code is 1 when all of them have '
        'ended, and one could not be started.',
    )
    parser.add_argument('config_uri', metavar='INI', help='configuration of the application')
    parser.add_argument(
        'names',
        metavar='NAME',
        nargs='*',
        help='name of a declared process, by default all with start = external; or '
        'VARIABLE=VALUE, which INI uses as %%(VARIABLE)s',
    )
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: ArgumentParser, args: Namespace) -> int:
    manager = ServiceManager.take(os.environ, os.getpid())  # before the application starts programs
    names = [name for name in args.names if '=' not in name]
    variables = parse_vars(name for name in args.names if '=' in name)
    registry = load_application(parser, args.config_uri, variables)
    services = services_of(registry)
    if unknown := [name for name in names if name not in services]:
        fail_unknown(parser, args.config_uri, unknown, services)
    if not names:
        names = [name for name in sorted(services) if services[name].start == 'external']
        if not names:
            others = ', '.join(f'{name} ({services[name].start})' for name in sorted(services))
            parser.error(
                f'{args.config_uri} declares no process with start = external, but: '
                f'{others or "none"}'
            )
    elsewhere = [name for name in names if services[name].handler is None]
    if elsewhere:
        parser.error(f'{", ".join(elsewhere)} has no handler: it runs elsewhere (start = never)')
    factories = {name: partial(services[name].make_process, registry) for name in names}
    outbox = registry.zmq_clients.outbox
    supervisor = (
        Supervisor(factories, registry=registry)
        if outbox is None
        else _OutboxSupervisor(factories, registry, outbox)
    )
    application = registry.zmq_clients.application
    supervisor.address_locks = {
        name: lock
        for name in names
        if services[name].endpoints
        and (lock := services[name].lock_addresses(application, for_client=False)) is not None
    }
    supervisor.service_manager = manager
    try:
        return supervisor.run()
    finally:
        if outbox is not None:
            outbox.close()


class _OutboxSupervisor(Supervisor):
    """Starts the outbox after the first processes: they are forked without its thread.

    Later ones are safe, too: forks wait while the thread uses the database.
    """

    def __init__(self, factories: Mapping[str, Factory], registry: Any, outbox: Outbox):
        super().__init__(factories, registry=registry)
        self._outbox = outbox

    def step(self, now: float) -> float | None:
        """Do everything that is due; see :meth:`.Supervisor.step`."""
        timeout = super().step(now)
        self._outbox.start()  # the first time
        return timeout
