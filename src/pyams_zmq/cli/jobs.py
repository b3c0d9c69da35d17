# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq jobs``: lists, shows, watches, cancels, retries and removes jobs of a service."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from pyams_zmq.cli.duration import read_duration
from pyams_zmq.cli.job_list import list_jobs, show_job
from pyams_zmq.cli.job_prune import prune_jobs
from pyams_zmq.cli.job_watch import watch_jobs
from pyams_zmq.cli.outcome import OK, code_of, report
from pyams_zmq.cli.output import write
from pyams_zmq.cli.target import TIMEOUT, Target, add_target, open_target
from pyams_zmq.client.job_request import check_ids
from pyams_zmq.exceptions import ZMQJobError
from pyams_zmq.jobs.records import STATES

_OPTIONS = {
    'list': ('state', 'type', 'limit', 'json'),
    'show': ('json',),
    'watch': ('json',),
    'cancel': ('force',),
    'retry': (),
    'prune': ('older_than',),
}
"""Options of each action"""


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'jobs',
        help='list, show, watch, cancel, retry or remove the jobs of a service',
        description='Without an action, list the jobs of a service, the newest one first. "show" '
        'writes all about jobs; "watch" shows their progress until they have ended, its exit code '
        'is 1 if one is not done, and --timeout ends it; "cancel" and "retry" are for each of the '
        'ids; "prune" removes jobs that have ended.',
    )
    add_target(parser, f'[{"|".join(_OPTIONS)}] [ID ...]')
    parser.add_argument('--state', choices=STATES, help='list only jobs in this state')
    parser.add_argument('--type', metavar='TYPE', help='list only jobs of this type')
    parser.add_argument('--limit', type=_read_limit, metavar='N', help='list N jobs at most')
    parser.add_argument(
        '--json', action='store_true', help='write JSON: one line for each job, or each change'
    )
    parser.add_argument('--force', action='store_true', help='cancel: end the worker at once')
    parser.add_argument(
        '--older-than',
        type=read_duration,
        metavar='DURATION',
        help='prune: remove jobs that ended before that: 0, 90s, 5min, 12h, 7d or 2w',
    )
    parser.set_defaults(run=partial(_run, parser))


def _read_limit(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f'bad value {text!r}: write a number of jobs, 1 or more')
    return int(text)


def _run(parser: ArgumentParser, args: Namespace) -> int:
    with open_target(parser, args) as target:
        action, *ids = target.words or ['list']
        _check_arguments(parser, args, action, ids)
        target.check()
        client = target.client
        client.timeout, client.retries = target.timeout or TIMEOUT, 0
        match action:
            case 'list':
                options = {'state': args.state, 'type': args.type}
                list_jobs(client, args.limit, as_json=args.json, **options)
            case 'prune':
                write(f'{prune_jobs(client, args.older_than)} jobs removed')
            case 'watch':
                return _watch(target, ids, as_json=args.json)
            case 'show':
                return _for_each(ids, lambda each: show_job(client.job(each), as_json=args.json))
            case 'cancel':
                return _for_each(ids, partial(_cancel, client, force=args.force))
            case _:
                return _for_each(ids, partial(_retry, client))
    return OK


def _check_arguments(parser: ArgumentParser, args: Namespace, action: str, ids: list[str]) -> None:
    """End the program if the arguments do not fit the action."""
    if action not in _OPTIONS:
        parser.error(f'unknown action {action!r}: write {", ".join(_OPTIONS)}')
    for option in ('state', 'type', 'limit', 'json', 'force', 'older_than'):
        if option not in _OPTIONS[action] and getattr(args, option) not in (None, False):
            actions = [each for each, options in _OPTIONS.items() if option in options]
            parser.error(f'--{option.replace("_", "-")} is for {", ".join(actions)}')
    if action in ('list', 'prune'):
        if ids:
            parser.error(f'"{action}" takes no ids')
        if action == 'prune' and args.older_than is None:
            parser.error('"prune" needs --older-than: 7d for instance, 0 for all that have ended')
        return
    if not ids:
        parser.error(f'"{action}" needs the ids of jobs')
    try:
        ids[:] = check_ids(ids)
    except ValueError as error:
        parser.error(str(error))


def _for_each(ids: list[str], change: Callable[[str], object]) -> int:
    """Call a function for each job; return the exit code of the first error about one."""
    code = OK
    for job_id in ids:
        try:
            change(job_id)
        except ZMQJobError as error:
            report(f'{job_id}: {error}')
            code = code or code_of(error)
    return code


def _cancel(client: Any, job_id: str, *, force: bool) -> None:
    client.cancel(job_id, force=force)
    write(f'{job_id} is cancelled, or will be at its next progress')


def _retry(client: Any, job_id: str) -> None:
    client.retry(job_id)
    write(f'{job_id} waits again')


def _watch(target: Target, ids: list[str], *, as_json: bool) -> int:
    """Watch the jobs that are known; name the others."""
    known: list[str] = []
    code = _for_each(ids, lambda each: known.append(target.client.job(each).id))
    if known:
        found = watch_jobs(target.client, known, timeout=target.timeout, as_json=as_json)
        code = found or code
    return code
