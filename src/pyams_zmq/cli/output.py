# SPDX-License-Identifier: ZPL-2.1
"""Output that any text can be written to: a terminal, a pipe or a log file in any encoding."""

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

from pyams_zmq.cli.printable import printable
from pyams_zmq.process.base import SIGNALLED

_ERRORS = 'backslashreplace'  # as of stderr

# JSON escapes those below the blank only; the others are C1, and what changes the direction.
_CONTROLS = re.compile('[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]')


def accept_any_text(*streams: Any) -> None:
    """Write what the encoding of a stream lacks with backslashes, as stderr does.

    That is the first letter of ØMQ in ASCII, and in any encoding the name of a file that is not
    encoded as the system says.

    :param streams: streams of a program; None and those of other kinds stay as they are
    """
    for stream in streams:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def accept_any_record() -> None:
    """Let the files of all loggers accept any text, unless their handlers say how."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, 'handlers', ()):
            if isinstance(handler, logging.FileHandler) and handler.errors is None:
                handler.errors = _ERRORS  # of the next file, after a rotation
                accept_any_text(handler.stream)


def write(text: str) -> None:
    """Write a line of text to the standard output.

    :raises SystemExit: if it cannot be written; without an error if the reader has ended, as `head`
        does
    """
    if sys.stdout is None:  # it was closed when the program began
        return
    try:
        sys.stdout.write(f'{text}\n')
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        sys.exit(SIGNALLED + signal.SIGPIPE)
    except OSError as error:
        _discard_output()
        sys.exit(f'pyams_zmq: error: the output cannot be written: {error.strerror}')


def _discard_output() -> None:
    """Let what is still in the buffer go nowhere, since the interpreter writes it at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def write_json(value: Any, *, indent: int | None = 2) -> None:
    """Write a value to the standard output as JSON.

    It is in ASCII if the encoding of the output lacks a character, or if one controls a terminal.

    :param indent: None writes one line
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(getattr(sys.stdout, 'encoding', None) or 'ascii')
        is_safe = _CONTROLS.search(text) is None
    except UnicodeEncodeError:
        is_safe = False
    write(text if is_safe else json.dumps(value, indent=indent))


def write_table(rows: Sequence[Sequence[str]]) -> None:
    """Write rows of texts in aligned columns; the first row has their titles."""
    rows = [[printable(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        '  '.join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    write('\n'.join(lines))


def format_age(seconds: float) -> str:
    """Return a duration as its largest unit: `40 s`, `5 min`, `3 h` or `12 d`."""
    for unit, size in (('d', 86400), ('h', 3600), ('min', 60)):
        if seconds >= size:
            return f'{seconds // size:.0f} {unit}'
    return f'{seconds // 1:.0f} s'
