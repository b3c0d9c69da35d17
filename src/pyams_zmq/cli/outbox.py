# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq outbox``: shows the messages in the outbox, and sends dead letters again."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any

from pyramid.scripts.common import parse_vars

from pyams_zmq.cli.application import load_application
from pyams_zmq.cli.outcome import ERROR, OK, report
from pyams_zmq.cli.output import write
from pyams_zmq.config.service import services_of
from pyams_zmq.exceptions import ZMQOutboxError
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.outbox.owner import is_alive

_ACTIONS = ('list', 'retry', 'drop')
_PAGE = 100
_OWNERS = {True: 'a running process', False: 'a process that has ended', None: 'another machine'}


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'outbox',
        help='show the messages in the outbox; send dead letters again, or drop them',
        description='Show the messages that wait in the outbox of an application, and its dead '
        'letters: messages that their service has refused. "retry" sends dead letters again, '
        'within five seconds while the application or pyams_zmq serve runs; "drop" removes them.',
    )
    parser.add_argument('config_uri', metavar='INI', help='configuration of the application')
    parser.add_argument(
        'words',
        metavar='WORD',
        nargs='*',
        help='list (the default), retry or drop, and the ids of dead letters; or VARIABLE=VALUE, '
        'which INI uses as %%(VARIABLE)s',
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument('--all', action='store_true', help='retry or drop all dead letters')
    chosen.add_argument(
        '--service',
        metavar='NAME',
        help='drop the messages that wait for a service which is not declared any more',
    )
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: ArgumentParser, args: Namespace) -> int:
    action, *ids = [word for word in args.words if '=' not in word] or ['list']
    if action not in _ACTIONS:
        parser.error(f'unknown action {action!r}: write {", ".join(_ACTIONS)}')
    _check_words(parser, args, action, ids)
    variables = parse_vars(word for word in args.words if '=' in word)
    registry = load_application(parser, args.config_uri, variables)
    outbox = registry.zmq_clients.outbox
    if outbox is None:
        parser.error(f'the application of {args.config_uri} has no outbox: set pyams_zmq.outbox')
    try:
        if action == 'list':
            _show(outbox, services_of(registry))
            return OK
        if args.service is not None:
            if args.service in services_of(registry):
                parser.error(f'{args.service!r} is declared: its messages are sent when it runs')
            return _discard(outbox, args.service)
        change = outbox.retry if action == 'retry' else outbox.drop
        if args.all:
            write(f'{_change_all(outbox, change)} dead letters')
            return OK
        return _report_changed(ids, change(ids))
    except ZMQOutboxError:
        raise
    except Exception as error:  # noqa: BLE001 - databases raise errors of any class
        text = f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'
        report(f'the database of the outbox of {args.config_uri} cannot be used: {text}')
        return ERROR
    finally:
        registry.zmq_clients.close()


def _check_words(parser: ArgumentParser, args: Namespace, action: str, ids: Sequence[str]) -> None:
    """End the program if the arguments do not fit the action."""
    if args.service is not None and (action != 'drop' or ids):
        parser.error('--service is for "drop", without ids')
    is_complete = ids or args.all or args.service is not None
    if action == 'list' and is_complete:
        parser.error('"list" takes no ids, and no option')
    if action != 'list' and not is_complete:
        parser.error(f'"{action}" needs the ids of dead letters, or --all')
    if ids and args.all:
        parser.error('write ids or --all, not both')


def _change_all(outbox: Outbox, change: Any) -> int:
    number, after = 0, None
    while letters := outbox.dead_letters(_PAGE, after=after):
        after = letters[-1].id
        number += change([letter.id for letter in letters])
    return number


def _discard(outbox: Outbox, service: str) -> int:
    number = outbox.discard(service)
    write(f'{number} messages dropped')
    if number:
        return OK
    names = ', '.join(sorted({each.service for each in outbox.waiting()}))
    write(f'No message waits for {service!r}; messages wait for: {names or "none"}')
    return ERROR


def _report_changed(ids: Sequence[str], number: int) -> int:
    write(f'{number} dead letters')
    if number < len(set(ids)):
        write('Some ids are not those of dead letters: see "list"')
        return ERROR
    return OK


def _show(outbox: Outbox, services: Any) -> None:
    waiting = outbox.waiting()
    for each in sorted(waiting, key=lambda each: each.since):
        undeclared = '' if each.service in services else '; the service is not declared'
        write(
            f'{each.count} waiting for {each.service} since {_format(each.since)}, of '
            f'{_OWNERS[is_alive(each.owner)]}{undeclared}'
        )
    if not waiting:
        write('No message is waiting')
    after, has_dead = None, False
    while letters := outbox.dead_letters(_PAGE, after=after):
        after = letters[-1].id
        for letter in letters:
            has_dead = True
            write(
                f'dead letter {letter.id}: {letter.entry.type!r} to {letter.entry.service}, '
                f'{_format(letter.since)}, status {letter.status}: {letter.reason!r}'
            )
    if not has_dead:
        write('No dead letters')
    for name, number in sorted(outbox.others().items()):
        write(f'{number} messages belong to another application, {name!r}')


def _format(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec='seconds')
