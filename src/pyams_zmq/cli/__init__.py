# SPDX-License-Identifier: ZPL-2.1
"""The command line: ``pyams_zmq``."""

import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyams_zmq.cli import outbox, ping, serve, worker
from pyams_zmq.cli.outcome import run_command
from pyams_zmq.cli.output import accept_any_text
from pyams_zmq.cli.words import CommandParser
from pyams_zmq.process.base import SIGNALLED

PROGRAM = 'pyams_zmq'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    :param argv: arguments, by default those of the program
    :return: exit code of the program
    :raises SystemExit: for bad arguments (2), and for `--help` (0)
    """
    if os.getpid() == 1:  # the kernel does not end PID 1 by a signal that it does not handle
        signal.signal(signal.SIGTERM, _exit)
    accept_any_text(sys.stdout, sys.stderr)
    parser = ArgumentParser(prog=PROGRAM, description='Run the ØMQ processes of an application.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND', parser_class=CommandParser)
    serve.add_command(commands)
    worker.add_command(commands)
    ping.add_command(commands)
    outbox.add_command(commands)
    args = parser.parse_args(argv)
    # Packages start their processes in each program whose name does not begin with this.
    if not Path(sys.argv[0]).name.startswith('pyams_'):
        sys.argv[0] = PROGRAM
    return run_command(args)


def _exit(num: int, _frame: Any) -> None:
    sys.exit(SIGNALLED + num)
