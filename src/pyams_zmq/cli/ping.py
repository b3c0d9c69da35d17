# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq ping``: says if a service answers, and how fast."""

import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any

from pyams_zmq.cli.outcome import OK
from pyams_zmq.cli.output import format_age, write
from pyams_zmq.cli.printable import printable
from pyams_zmq.cli.target import Target, add_target, fail_extra_words, open_target
from pyams_zmq.exceptions import ZMQRemoteError, ZMQVersionError

_OLD = 'answers as a server older than 3.0'

_OLDER = {HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.INTERNAL_SERVER_ERROR}
"""Status of the answers of servers that do not know the question"""


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'ping',
        help='say if a service answers, and how fast',
        description='Say if a service answers, how long that takes, and since when it runs.',
    )
    add_target(parser)
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: ArgumentParser, args: Namespace) -> int:
    with open_target(parser, args) as target:
        fail_extra_words(parser, target)
        start = time.perf_counter()
        try:
            _ask(target)  # it connects, which takes longer
            start = time.perf_counter()
            text = _describe(_ask(replace(target, may_be_old=False)))
        except ZMQVersionError:
            text = _OLD
        milliseconds = (time.perf_counter() - start) * 1000
    write(f'{milliseconds:.1f} ms, {text}')
    return OK


def _ask(target: Target) -> Any:
    """Return the answer of a service, None from one that does not know the question."""
    try:
        return target.ask('pyams_zmq.ping')
    except ZMQRemoteError as error:
        if error.status in _OLDER:
            return None
        raise


def _describe(answer: Any) -> str:
    try:
        number = int(answer['workers'])
        parts = [
            f'up {format_age(answer["uptime"])}',
            f'{number} worker{"" if number == 1 else "s"}',
        ]
        if answer['state'] != 'up':
            parts.append(printable(str(answer['state'])))
    except (TypeError, KeyError, ValueError):
        return _OLD
    return ', '.join(parts)
