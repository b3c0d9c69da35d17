# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq top``: shows what all services do, again and again."""

import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

from pyams_zmq.cli.application import load_application
from pyams_zmq.cli.outcome import OK
from pyams_zmq.cli.overview import TITLES, Overview
from pyams_zmq.cli.screen import open_screen, show_once
from pyams_zmq.cli.target import (
    Target,
    add_target,
    fail_extra_words,
    fail_unknown,
    open_target,
)
from pyams_zmq.cli.terminal import is_live
from pyams_zmq.cli.words import split_variables
from pyams_zmq.config.service import services_of
from pyams_zmq.exceptions import ZMQBaseError
from pyams_zmq.monitor.inquiry import Answer, ask_all
from pyams_zmq.wire.clock import monotonic

TIMEOUT = 1.0
"""Seconds in which a service has to answer"""

_STATS = 'pyams_zmq.stats'
_LEAST = 0.1  # seconds of the shortest interval

_Ask = Callable[[], dict[str, Answer]]


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'top',
        help='show what all services do, again and again',
        description='Show a table of all services of an application, or of some, until Ctrl+C. '
        'Calls per second and durations are those since the table before; in the first one, those '
        'since the start of the service. A service that does not answer within --timeout seconds '
        f'({TIMEOUT:g}) does not delay the others. Without a terminal, write one table; the exit '
        'code is that of the first service without statistics.',
    )
    add_target(parser)
    parser.usage = (
        '%(prog)s [OPTION ...] INI [NAME ...]\n       %(prog)s [OPTION ...] --address ADDRESS'
    )
    parser.add_argument('--once', action='store_true', help='write one table, also on a terminal')
    parser.add_argument(
        '--interval',
        type=_read_interval,
        default=2.0,
        metavar='S',
        help='seconds between two tables (2)',
    )
    parser.set_defaults(run=partial(_run, parser))


def _read_interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not isfinite(seconds) or seconds < _LEAST:
        raise ArgumentTypeError(f'bad value {text!r}: write seconds, {_LEAST:g} or more')
    return seconds


def _run(parser: ArgumentParser, args: Namespace) -> int:
    open_services = _open_address if args.address is not None else _open_application
    with open_services(parser, args) as ask:
        overview = Overview()
        if args.once or not is_live():
            _show_next(overview, ask, show_once)
            return overview.code
        try:
            with open_screen() as show:
                while True:
                    due = monotonic() + args.interval
                    _show_next(overview, ask, show)
                    time.sleep(max(0.0, due - monotonic()))
        except KeyboardInterrupt:  # how it is meant to end
            return OK


def _show_next(overview: Overview, ask: _Ask, show: Callable[..., None]) -> None:
    """Ask all services, and show their answers."""
    answers = ask()
    overview.update(answers, monotonic())
    show([TITLES, *overview.rows], overview.problems)


@contextmanager
def _open_address(parser: ArgumentParser, args: Namespace) -> Iterator[_Ask]:
    with open_target(parser, args) as target:
        fail_extra_words(parser, target)
        limited = replace(target, timeout=args.timeout or TIMEOUT)
        yield lambda: {target.name: _ask(limited)}


def _ask(target: Target) -> Answer:
    begin = monotonic()
    try:
        result = target.ask(_STATS)
    except ZMQBaseError as error:
        return Answer(None, str(error), monotonic() - begin, error)
    return Answer(result, None, monotonic() - begin)


@contextmanager
def _open_application(parser: ArgumentParser, args: Namespace) -> Iterator[_Ask]:
    if any(each is not None for each in (args.auth_file, args.key, args.server_key)):
        parser.error('--auth-file, --key and --server-key are for --address')
    words, variables = split_variables(args.words)
    if not words:
        parser.error('write INI, or --address')
    config_uri, *names = words
    registry = load_application(parser, config_uri, variables, logs=False)
    declared = services_of(registry)
    unknown = [name for name in names if name not in declared]
    if unknown or not declared:
        fail_unknown(parser, config_uri, unknown, declared)
    chosen = list(dict.fromkeys(names)) or sorted(declared)
    try:
        yield partial(ask_all, registry, _STATS, args.timeout or TIMEOUT, chosen)
    finally:
        registry.zmq_clients.close()
