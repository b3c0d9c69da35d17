# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq methods``: lists the methods of a service."""

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any

from pyams_zmq.cli.outcome import OK
from pyams_zmq.cli.output import write_json, write_table
from pyams_zmq.cli.target import add_target, fail_extra_words, open_target

_TITLES = ['METHOD', 'KIND', 'TIMEOUT', 'DESCRIPTION']


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'methods',
        help='list the methods of a service',
        description='List the methods of a service, with their parameters and time limits.',
    )
    add_target(parser)
    parser.add_argument('--json', action='store_true', help='write JSON')
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: ArgumentParser, args: Namespace) -> int:
    with open_target(parser, args) as target:
        fail_extra_words(parser, target)
        methods = target.ask_object('pyams_zmq.methods')
    if args.json:
        write_json(methods)
    else:
        write_table([_TITLES, *(_describe(name, methods[name]) for name in sorted(methods))])
    return OK


def _describe(name: str, method: Any) -> list[str]:
    """Return the cells of a method; what another version of the service does not say is empty."""
    about = method if isinstance(method, dict) else {}
    kind = str(about.get('kind', ''))
    timeout = about.get('timeout')
    return [
        f'{name}{about.get("signature", "")}',
        f'{kind}, repeatable' if about.get('repeatable') else kind,
        f'{timeout} s' if isinstance(timeout, int | float) else '',
        str(about.get('doc', '')),
    ]
