# SPDX-License-Identifier: ZPL-2.1
"""The command line, ``pyams_zmq``."""

import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pyramid.paster import bootstrap, setup_logging
from pyramid.path import DottedNameResolver
from pyramid.registry import Registry
from pyramid.scripts.common import parse_vars
from pyramid.threadlocal import manager

from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.config import services_of
from pyams_zmq.pool.protocol import check_interval
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.supervisor import Supervisor
from pyams_zmq.wire.message import check_concurrency

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
    worker = commands.add_parser(
        'worker',
        help='run workers of a pool that is on another machine',
        description='Run processes which get their messages from the broker of a pool, until '
        'SIGTERM or SIGINT; SIGHUP replaces each of them when it has finished what it has in hand. '
        'They show who they are by --auth-file (PLAIN), or by --server-key and --key (CURVE).',
    )
    worker.add_argument('address', metavar='ADDRESS', help='worker_address of the pool')
    worker.add_argument('handler', metavar='HANDLER', help='dotted name of the message handler')
    worker.add_argument('config_uri', metavar='INI', nargs='?', help='configuration to load first')
    worker.add_argument('--workers', type=int, default=1, metavar='N', help='their number (1)')
    worker.add_argument('--auth-file', type=Path, metavar='FILE', help='file with user:password')
    worker.add_argument('--key', metavar='FILE', help='.key_secret file of the workers')
    worker.add_argument('--server-key', metavar='KEY', help='public key of the broker, or its file')
    for option, kind, text in (
        ('concurrency', int, 'calls that a worker has in hand, at most (1)'),
        ('beat-interval', float, 'seconds between heartbeats (0.5); three missed ones are death'),
        ('max-calls', int, 'calls after which a worker is replaced (0: never)'),
        ('max-memory', float, 'MiB above which a worker is replaced (0: never)'),
    ):
        worker.add_argument(f'--{option}', type=kind, metavar='N', help=text)
    worker.set_defaults(run=partial(_work, worker))
    args = parser.parse_args(argv)
    code: int = args.run(args)
    return code


def _serve(parser: ArgumentParser, args: Namespace) -> int:
    _take_name()
    names = [name for name in args.names if '=' not in name]
    variables = parse_vars(name for name in args.names if '=' in name)
    _check_file(parser, args.config_uri)
    registry = _load(args.config_uri, variables)
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


def _work(parser: ArgumentParser, args: Namespace) -> int:
    _take_name()
    if args.workers < 1:
        parser.error(f'there is nothing to do for {args.workers} workers')
    if args.config_uri is None:
        logging.basicConfig(level='INFO')
        registry: Any = Registry()
    else:
        _check_file(parser, args.config_uri)
        registry = _load(args.config_uri, {})
    try:
        handler = DottedNameResolver().resolve(args.handler)
    except (ValueError, ImportError, AttributeError) as error:
        parser.error(f'there is no handler {args.handler!r}: {error}')
    make = partial(_make_worker, args, handler, registry)
    try:
        make()  # for its errors
    except ValueError as error:
        parser.error(str(error))
    return Supervisor(
        {f'worker {n}': make for n in range(1, args.workers + 1)}, registry=registry
    ).run()


def _make_worker(args: Namespace, handler: Any, registry: Any) -> PoolWorker:
    curve = None
    if args.key is not None or args.server_key is not None:
        curve = CurveClient(args.server_key or '', args.key or '')
    worker = PoolWorker(args.address, handler, args.auth_file, registry, curve=curve)
    for name in ('concurrency', 'beat_interval', 'max_calls', 'max_memory'):
        value = getattr(args, name)
        if value is not None:
            if value < 0:
                raise ValueError(f'{name} is {value}, write 0 or more')
            setattr(worker, name, value)
    check_concurrency(worker.concurrency)
    check_interval(worker.beat_interval)
    return worker


def _take_name() -> None:
    # Packages start their processes in every program whose name does not begin like this.
    if not Path(sys.argv[0]).name.startswith('pyams_'):
        sys.argv[0] = PROGRAM


def _check_file(parser: ArgumentParser, config_uri: str) -> None:
    path = config_uri.partition('#')[0]
    if ':' not in path and not Path(path).is_file():
        parser.error(f'there is no file {path}')


def _load(config_uri: str, variables: dict[str, str]) -> Any:
    """Load an application; return its registry."""
    setup_logging(config_uri, variables)
    # What the application opens for a request, such as a database, is closed before we fork.
    with bootstrap(config_uri, options=variables) as env:
        registry = env['registry']
    manager.push({'registry': registry, 'request': None})
    return registry
