# SPDX-License-Identifier: ZPL-2.1
"""The command line: ``pyams_zmq``."""

import os
import signal
import sys
from argparse import Action, ArgumentParser
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pyams_zmq.cli import (
    call,
    jobs,
    keygen,
    methods,
    outbox,
    ping,
    reload,
    restart,
    serve,
    stats,
    top,
    worker,
)
from pyams_zmq.cli.outcome import run_command
from pyams_zmq.cli.output import accept_any_text, write
from pyams_zmq.cli.words import CommandParser
from pyams_zmq.process.base import SIGNALLED

PROGRAM = 'pyams_zmq'

_COMMANDS = (
    *(serve, worker, ping, call, methods, stats, top, jobs, outbox, reload, restart, keygen),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param argv: arguments, by default those of the program
    :return: exit code of the program, see :mod:`pyams_zmq.cli.outcome`
    :raises SystemExit: for bad arguments (2), and for `--help` (0)
    """
    if os.getpid() == 1:  # the kernel does not end PID 1 by a signal that it does not handle
        signal.signal(signal.SIGTERM, _exit)
    accept_any_text(sys.stdout, sys.stderr)
    args = make_parser().parse_args(argv)
    # Packages start their processes in each program whose name does not begin with this.
    if not Path(sys.argv[0]).name.startswith('pyams_'):
        sys.argv[0] = PROGRAM
    return run_command(args)


def make_parser() -> ArgumentParser:
    """Return the parser of the command line; programs that complete words in a shell use it."""
    parser = ArgumentParser(
        prog=PROGRAM,
        description='Run the ØMQ processes of an application, and ask them.',
        epilog='Exit codes: 0 done, 1 the service has answered with an error, 2 bad arguments, '
        '3 refused, 4 no service there, 5 no answer in time.',
    )
    parser.add_argument('--version', action=_Version, nargs=0, help='write the version')
    commands = parser.add_subparsers(required=True, metavar='COMMAND', parser_class=CommandParser)
    for module in _COMMANDS:
        module.add_command(commands)
    return parser


class _Version(Action):
    """Writes the version, and ends the program."""

    def __call__(self, parser: ArgumentParser, *args: object) -> None:
        """Read the version of what is installed, which takes some milliseconds."""
        write(f'{PROGRAM} {version(PROGRAM)}')
        parser.exit()


def _exit(num: int, _frame: Any) -> None:
    sys.exit(SIGNALLED + num)
