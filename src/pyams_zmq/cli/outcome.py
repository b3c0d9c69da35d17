# SPDX-License-Identifier: ZPL-2.1
"""How a command ends: its exit code, and one line on the standard error."""

import re
import signal
import sys
from argparse import Namespace
from http import HTTPStatus

from pyramid.exceptions import ConfigurationError

from pyams_zmq.cli.printable import printable
from pyams_zmq.exceptions import (
    ZMQBacklogError,
    ZMQBaseError,
    ZMQClosedError,
    ZMQRefusedError,
    ZMQRemoteError,
    ZMQTimeoutError,
    ZMQUnreachableError,
)
from pyams_zmq.process.base import SIGNALLED

OK = 0
ERROR = 1  #: the service, or the program, has answered with an error
USAGE = 2  #: bad arguments, as of argparse
REFUSED = 3  #: the service refuses the connection, or this user may not do that
UNREACHABLE = 4  #: no service is there, or the connection was lost
TIMEOUT = 5  #: no answer in time
INTERRUPTED = SIGNALLED + signal.SIGINT

_MAX_TEXT = 4000

_CLASS = re.compile(r"^<class '[\w.]+'>: ")

_STATUSES: dict[int, int] = {
    HTTPStatus.UNAUTHORIZED: REFUSED,
    HTTPStatus.FORBIDDEN: REFUSED,
    HTTPStatus.GATEWAY_TIMEOUT: TIMEOUT,
}

_CODES: dict[type[ZMQBaseError], int] = {
    ZMQRefusedError: REFUSED,
    ZMQBacklogError: ERROR,
    ZMQUnreachableError: UNREACHABLE,
    ZMQClosedError: UNREACHABLE,
    ZMQTimeoutError: TIMEOUT,
}


def code_of(error: ZMQBaseError) -> int:
    """Return the exit code of a command that ends with an error."""
    if isinstance(error, ZMQUnreachableError) and error.is_accepted:
        return TIMEOUT
    if isinstance(error, ZMQRemoteError):
        return _STATUSES.get(error.status, ERROR)
    return next((_CODES[each] for each in type(error).__mro__ if each in _CODES), ERROR)


def run_command(args: Namespace) -> int:
    """Run a command, and return its exit code; an error of this package becomes one line.

    :param args: its arguments; `run` is its function, which returns an exit code
    """
    try:
        code: int = args.run(args)
    except ZMQBaseError as error:
        report(str(error))
        return code_of(error)
    except ConfigurationError as error:
        # One that an action has raised is "<class ...>: text", and on the next lines its place.
        report(_CLASS.sub('', str(error)))
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def report(text: str) -> None:
    """Write an error to the standard error, in one line.

    A service may have chosen the text.
    """
    line = printable(' '.join(text[:_MAX_TEXT].split()))
    note(f'pyams_zmq: error: {line}{"..." if len(text) > _MAX_TEXT else ""}')


def note(line: str) -> None:
    """Write a line to the standard error, if that is open."""
    if sys.stderr is not None:
        sys.stderr.write(f'{line}\n')
