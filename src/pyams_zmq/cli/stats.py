# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq stats``: shows the statistics of a service."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

from pyams_zmq.cli.outcome import OK
from pyams_zmq.cli.output import format_age, write, write_json, write_table
from pyams_zmq.cli.printable import printable
from pyams_zmq.cli.target import Target, add_target, fail_extra_words, open_target

_TIMES = ('mean', 'p50', 'p90', 'p99', 'max')
_METHOD = ['METHOD', 'CALLS', 'ERRORS', *map(str.upper, _TIMES)]
_WORKER = ['WORKER', 'HOST', 'STATE', 'AGE', 'MEMORY', 'CALLS', 'IN HAND']
_LARGEST = 1e15  # what is larger is not a statistic, and too large for a float perhaps
_COUNTS = ('calls', 'errors', 'refused', 'repeated', 'lost')


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'stats',
        help='show the statistics of a service',
        description='Show what a service does: its calls, what waits, how long its methods take, '
        'its workers, its jobs, and its messages in the outbox of the application.',
    )
    add_target(parser)
    parser.add_argument('--json', action='store_true', help='write JSON, with all numbers')
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: ArgumentParser, args: Namespace) -> int:
    with open_target(parser, args) as target:
        fail_extra_words(parser, target)
        stats = target.ask_object('pyams_zmq.stats')
        stats['outbox'] = None if target.outbox is None else _count_messages(target)
    if args.json:
        write_json(stats)
        return OK
    for line in _summary(target.name, stats):
        write(printable(line))
    methods = _rows_of_methods(stats.get('methods'))
    workers = [_row_of_worker(each) for each in _list(stats.get('workers'))]
    for title, rows in ((_METHOD, methods), (_WORKER, workers)):
        if rows:
            write('')
            write_table([title, *rows])
    return OK


def _summary(name: str, stats: dict[str, Any]) -> Iterator[str]:
    """Yield lines about a service, with "?" for what another version of it does not say."""
    get = stats.get
    yield (
        f'{name}: {get("kind", "service")}, {get("state", "up")}, '
        f'started {_age(get("uptime"))} ago, pid {get("pid", "?")} on {get("host", "?")}, '
        f'pyams_zmq {get("version", "?")}'
    )
    yield ', '.join(f'{_number(get(each))} {each}' for each in _COUNTS)
    limit = get('queue_limit')
    of = '' if limit is None else f' of {_number(limit)}'
    yield (
        f'{_number(get("in_flight"))} in hand, {_number(get("queue"))}{of} waiting '
        f'({_number(get("queue_bytes"))} bytes), the oldest for {_time(get("oldest"))}'
    )
    yield f'{_number(get("memory"))} MiB of memory'
    jobs = get('jobs')
    if jobs is not None:
        states = _object(_object(jobs).get('states'))
        yield f'jobs: {", ".join(f"{_number(states[each])} {each}" for each in states) or "none"}'
        if problem := _object(jobs).get('problem'):
            yield f'the journal of jobs: {problem}'
    outbox = _object(stats['outbox'])
    if 'problem' in outbox:
        yield f'outbox: {outbox["problem"]}'
    elif outbox:
        yield f'outbox: {outbox["waiting"]} waiting, {outbox["dead"]} dead letters'


def _count_messages(target: Target) -> dict[str, Any]:
    """Return how many messages to a service the outbox of the application has."""
    try:
        counts = target.outbox.count_waiting(), target.outbox.count_dead()
    except Exception as error:  # noqa: BLE001 - databases raise errors of any class
        text = str(error).partition('\n')[0]
        return {'problem': f'its database cannot be used: {type(error).__name__}: {text}'}
    waiting, dead = (found.get(target.name, 0) for found in counts)
    return {'waiting': waiting, 'dead': dead}


def _rows_of_methods(methods: Any) -> list[list[str]]:
    found = _object(methods)
    return [_row_of_method(name, _object(found[name])) for name in sorted(found)]


def _row_of_method(name: str, method: dict[str, Any]) -> list[str]:
    counts = [_number(method.get(each)) for each in ('calls', 'errors')]
    return [name, *counts, *(_time(method.get(each)) for each in _TIMES)]


def _row_of_worker(worker: Any) -> list[str]:
    get = _object(worker).get
    return [
        str(get('pid', '?')),
        str(get('host', '?')),
        str(get('state', '?')),
        _age(get('age')),
        f'{_number(get("memory"))} MiB',
        _number(get('calls')),
        f'{_number(get("in_flight"))} of {_number(get("slots"))}',
    ]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < _LARGEST


def _number(value: Any) -> str:
    return f'{value:.0f}' if _is_number(value) else '?'


def _age(value: Any) -> str:
    return format_age(value) if _is_number(value) else '?'


def _time(value: Any) -> str:
    """Return seconds as text: `0.4 ms` or `12.5 s`."""
    if not _is_number(value):
        return '?'
    return f'{value:.1f} s' if value >= 1 else f'{value * 1000:.1f} ms'
