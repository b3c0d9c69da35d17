# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq reload``: a service reads its users and keys again."""

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any

from pyams_zmq.cli.outcome import OK
from pyams_zmq.cli.output import write
from pyams_zmq.cli.target import add_target, fail_extra_words, open_target


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'reload',
        help='let a service read its users and keys again',
        description='Let a service read its files of users and its folders of keys again.',
    )
    add_target(parser)
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: ArgumentParser, args: Namespace) -> int:
    with open_target(parser, args) as target:
        fail_extra_words(parser, target)
        target.ask('pyams_zmq.reload')
    write(f'{target.name} reads its users and keys again')
    return OK
