# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq restart``: replaces the workers of a pool one by one, or a process."""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from pyams_zmq.cli import outcome
from pyams_zmq.cli.output import write
from pyams_zmq.cli.target import TIMEOUT, Target, add_target, fail_extra_words, open_target
from pyams_zmq.exceptions import (
    ZMQRefusedError,
    ZMQReplyError,
    ZMQTimeoutError,
    ZMQUnreachableError,
)

_PATIENCE = 60.0
_PAUSE = 0.1  # seconds between two questions

_IN_BETWEEN = (ZMQUnreachableError, ZMQTimeoutError, ZMQRefusedError)
"""Errors of a process that has ended and is not there again"""

_Workers = frozenset[tuple[str, int]]


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'restart',
        help='replace the workers of a pool one by one, or a process',
        description='Replace the workers of a pool one by one, or a process, and wait until that '
        f'is done (--timeout {_PATIENCE:.0f}). They finish their calls first.',
    )
    add_target(parser)
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: ArgumentParser, args: Namespace) -> int:
    with open_target(parser, args) as target:
        fail_extra_words(parser, target)
        patience = target.timeout or _PATIENCE
        return _restart(replace(target, timeout=min(patience, TIMEOUT)), patience)


def _restart(target: Target, patience: float) -> int:
    """Restart a service, and wait until all workers have been replaced.

    :param target: the service; its time-out is that of one question
    :param patience: seconds until the command ends
    """
    deadline = time.monotonic() + patience
    former = present = _workers_of(target)
    target.ask('pyams_zmq.restart')
    while (left := deadline - time.monotonic()) > 0:
        try:
            present = _workers_of(replace(target, timeout=min(left, TIMEOUT)))
        except _IN_BETWEEN:
            present = frozenset()
        if len(present) >= len(former) and not present & former:
            write(f'{target.name}: {_list(former)} replaced by {_list(present)}')
            return outcome.OK
        time.sleep(_PAUSE)
    if present & former:
        problem = f'{_list(present & former)} not replaced within {patience:g} s'
        step = 'they finish their calls first, see "pyams_zmq stats"'
    else:
        problem = f'{_list(former)} ended, but only {_list(present)} there after {patience:g} s'
        step = 'see the log of the service'
    outcome.report(f'{target.name}: {problem}: {step}')
    return outcome.TIMEOUT


def _workers_of(target: Target) -> _Workers:
    """Return host and pid of each worker; a process without workers is its only one."""
    try:
        workers = target.ask_object('pyams_zmq.stats')['workers']
        return frozenset((str(each['host']), int(each['pid'])) for each in workers)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ZMQReplyError):
            raise
        raise ZMQReplyError(f'The statistics of {target.name} do not list workers') from None


def _list(workers: Iterable[tuple[str, int]]) -> str:
    return f'pid {", ".join(str(pid) for _host, pid in sorted(workers)) or "none"}'
