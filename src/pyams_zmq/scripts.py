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

"""PyAMS_zmq.scripts module: the command line, ``pyams_zmq``."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pyramid.paster import bootstrap, setup_logging
from pyramid.scripts.common import parse_vars
from pyramid.threadlocal import manager

from pyams_zmq.config import services_of
from pyams_zmq.supervisor import Supervisor

__docformat__ = 'restructuredtext'

PROGRAM = 'pyams_zmq'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param argv: its arguments, by default those of the program
    :return: exit code of the program
    :raises SystemExit: the arguments cannot be understood (2), or help was asked for (0)
    """
    parser = ArgumentParser(prog=PROGRAM, description='Run the ØMQ processes of an application.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    serve = commands.add_parser(
        'serve',
        help='run processes until a signal stops them, and start them again when they crash',
        description='Run processes which an application declares, until SIGTERM or SIGINT; SIGHUP '
        'lets them read their users and keys again. The exit code is 1 when all have ended, and '
        'one of them because it crashed again and again.',
    )
    serve.add_argument('config_uri', metavar='INI', help='configuration of the application')
    serve.add_argument(
        'names',
        metavar='NAME',
        nargs='+',
        help='name of a declared process; or VARIABLE=VALUE, which INI uses as %%(VARIABLE)s',
    )
    serve.set_defaults(run=partial(_serve, serve))
    args = parser.parse_args(argv)
    code: int = args.run(args)
    return code


def _serve(parser: ArgumentParser, args: Namespace) -> int:
    # Packages start their processes in every program whose name does not begin like this.
    if not Path(sys.argv[0]).name.startswith('pyams_'):
        sys.argv[0] = PROGRAM
    names = [name for name in args.names if '=' not in name]
    variables = parse_vars(name for name in args.names if '=' in name)
    path = args.config_uri.partition('#')[0]
    if ':' not in path and not Path(path).is_file():
        parser.error(f'there is no file {path}')
    setup_logging(args.config_uri, variables)
    # What the application opens for a request, such as a database, is closed before we fork.
    with bootstrap(args.config_uri, options=variables) as env:
        registry = env['registry']
    manager.push({'registry': registry, 'request': None})
    services = services_of(registry)
    unknown = [name for name in names if name not in services]
    if unknown or not names:
        parser.error(
            f'there is no process {", ".join(unknown) or "to run"}; {args.config_uri} declares: '
            + (', '.join(sorted(services)) or 'none')
        )
    elsewhere = [name for name in names if services[name].handler is None]
    if elsewhere:
        parser.error(f'{", ".join(elsewhere)} has no handler: it runs elsewhere (start = never)')
    factories = {name: partial(services[name].make_process, registry) for name in names}
    return Supervisor(factories, registry=registry).run()
