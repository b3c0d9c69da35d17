# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq keygen``: makes the keys of CURVE."""

import os
import re
import tempfile
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from pyams_zmq.cli.outcome import ERROR, OK, report
from pyams_zmq.cli.output import write

_NAME = re.compile(r'[^\W_][\w.@+-]*')


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'keygen',
        help='make the keys of CURVE for a service or a client',
        description='Write a new public key to DIR/NAME.key, and both keys to DIR/NAME.key_secret. '
        'Only you can read the files. Copy NAME.key to those that connect to it, or that it '
        'connects to; NAME.key_secret stays on the machine that uses it.',
    )
    parser.add_argument('folder', metavar='DIR', type=Path, help='folder; it is made if necessary')
    parser.add_argument('name', metavar='NAME', help='name of the service or client')
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: ArgumentParser, args: Namespace) -> int:
    if not _NAME.fullmatch(args.name):
        parser.error(f'bad name {args.name!r}: write letters, digits, "_", "-", ".", "@" and "+"')
    try:
        args.folder.mkdir(mode=0o700, exist_ok=True)
        for path in _make_keys(args.folder, args.name):
            write(str(path))
    except FileExistsError as error:
        report(
            f'{error.filename2 or error.filename} exists: choose another name; or move it away, '
            'then the peers need the new public key'
        )
        return ERROR
    except OSError as error:
        report(f'{args.folder}: {error.strerror}: choose a folder in which you can write')
        return ERROR
    return OK


def _make_keys(folder: Path, name: str) -> list[Path]:
    """Write the files of a new pair of keys, both or none; return their paths.

    :raises FileExistsError: if one of them exists
    """
    from zmq.auth import create_certificates  # noqa: PLC0415 - it loads what others do not need

    made: list[Path] = []
    with tempfile.TemporaryDirectory(dir=folder) as hidden:  # others cannot read this folder
        try:
            for source in map(Path, create_certificates(hidden, name)):
                source.chmod(0o600)
                os.link(source, folder / source.name)  # unlike a move, it does not overwrite
                made.append(folder / source.name)
        except BaseException:
            for path in made:
                path.unlink()
            raise
    return made
