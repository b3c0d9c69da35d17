# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq worker``: runs workers of a pool on another machine."""

import logging
import os
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from pyramid.path import DottedNameResolver
from pyramid.registry import Registry

from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.cli.application import load_application
from pyams_zmq.config.options import OPTIONS
from pyams_zmq.handler.plain import check_handler
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.supervisor import Supervisor
from pyams_zmq.supervisor.notify import ServiceManager

_LIMITS = ('concurrency', 'beat_interval', 'max_calls', 'max_memory', 'overdue_grace')


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'worker',
        help='run workers of a pool on another machine',
        description='Run processes that get their messages from the broker of a pool, until '
        'SIGTERM or SIGINT. SIGHUP replaces each of them when it has finished its calls. '
        'They authenticate with --auth-file (PLAIN), or with --server-key and --key (CURVE).',
    )
    parser.add_argument('address', metavar='ADDRESS', help='worker_address of the pool')
    parser.add_argument('handler', metavar='HANDLER', help='dotted name of the handler, a class')
    parser.add_argument('config_uri', metavar='INI', nargs='?', help='configuration to load first')
    parser.add_argument('--workers', type=int, default=1, metavar='N', help='their number (1)')
    parser.add_argument('--auth-file', type=Path, metavar='FILE', help='file with user:password')
    parser.add_argument('--key', metavar='FILE', help='.key_secret file of the workers')
    parser.add_argument('--server-key', metavar='KEY', help='public key of the broker, or its file')
    for name in _LIMITS:
        option = OPTIONS[name]
        text = f'{option.unit} {option.text} ({getattr(PoolWorker, name):g})'
        parser.add_argument(f'--{name.replace("_", "-")}', metavar='N', help=text)
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: ArgumentParser, args: Namespace) -> int:
    manager = ServiceManager.take(os.environ, os.getpid())
    if args.workers < 1:
        parser.error(f'bad number of workers {args.workers}: write 1 or more')
    if args.config_uri is None:
        logging.basicConfig(level='INFO')
        registry: Any = Registry()
    else:
        registry = load_application(parser, args.config_uri)
    try:
        handler = DottedNameResolver().resolve(args.handler)
    except (ValueError, ImportError, AttributeError) as error:
        parser.error(f'handler {args.handler!r} cannot be imported: {error}')
    make = partial(_make_worker, args, handler, registry)
    try:
        check_handler(handler, make().concurrency)
    except ValueError as error:
        parser.error(str(error))
    supervisor = Supervisor(
        {f'worker {n}': make for n in range(1, args.workers + 1)}, registry=registry
    )
    supervisor.service_manager = manager
    return supervisor.run()


def _make_worker(args: Namespace, handler: Any, registry: Any) -> PoolWorker:
    curve = None
    if args.key is not None or args.server_key is not None:
        curve = CurveClient(args.server_key or '', args.key or '')
    worker = PoolWorker(args.address, handler, args.auth_file, registry, curve=curve)
    for name in _LIMITS:
        value = getattr(args, name)
        if value is not None:
            try:
                setattr(worker, name, OPTIONS[name].read(value))
            except ValueError as error:
                raise ValueError(f'bad {name}: {error}') from None
    return worker
