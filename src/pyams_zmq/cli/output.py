# SPDX-License-Identifier: ZPL-2.1
"""Output that any text can be written to: a terminal, a pipe or a log file in any encoding."""

import logging
import sys
from io import TextIOWrapper
from typing import Any

_ERRORS = 'backslashreplace'  # as of stderr


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
    """Write a line of text to the standard output."""
    sys.stdout.write(f'{text}\n')
