# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq jobs INI NAME list`` and ``show``."""

import json
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Any

from msgspec import to_builtins

from pyams_zmq.cli.output import format_age, write, write_json
from pyams_zmq.cli.printable import printable
from pyams_zmq.client.job_info import JobInfo
from pyams_zmq.exceptions import ZMQJobError
from pyams_zmq.wire.clock import time

_PAGE = 100
_TITLES = ('ID', 'TYPE', 'STATE', 'ATTEMPTS', 'PROGRESS', 'AGE')


def list_jobs(client: Any, limit: int | None, *, as_json: bool, **filters: Any) -> None:
    """Write the jobs of a service, the newest one first.

    Each page is written when it comes: the journal may have millions of jobs.

    :param limit: number of jobs, None for all
    :param as_json: True for one JSON object in each line
    :param filters: `state` and `type`
    """
    rows: list[tuple[str, ...]] = [_TITLES]
    widths = [0] * len(_TITLES)
    for page in _read_pages(client, limit, filters):
        if as_json:
            for job in page:
                write_json(to_builtins(job), indent=None)
            continue
        rows += map(_describe_row, page)
        widths = [max(width, *map(len, cells)) for width, *cells in zip(widths, *rows, strict=True)]
        write('\n'.join(_align(row, widths) for row in rows))
        rows = []


def _align(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (text.ljust(width) for text, width in zip(row, widths, strict=True))
    return '  '.join(cells).rstrip()


def _read_pages(client: Any, limit: int | None, filters: dict[str, Any]) -> Iterator[list[JobInfo]]:
    """Yield the jobs, a page at a time; the first one may be empty."""
    page: list[JobInfo] = client.jobs(limit=_size(limit), **filters)
    while True:
        yield page
        if limit is not None:
            limit -= len(page)
        if len(page) < _PAGE or limit == 0:
            return
        page = _read_next(client, page, limit, filters)
        if not page:
            return


def _read_next(
    client: Any, page: list[JobInfo], limit: int | None, filters: dict[str, Any]
) -> list[JobInfo]:
    """Return the page after another one, of which some jobs may have been removed meanwhile."""
    for job in reversed(page):
        try:
            found: list[JobInfo] = client.jobs(limit=_size(limit), before=job.id, **filters)
        except ZMQJobError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
        else:
            return found
    return []  # jobs are removed faster than they are read


def _size(limit: int | None) -> int:
    return _PAGE if limit is None else min(limit, _PAGE)


def _describe_row(job: JobInfo) -> tuple[str, ...]:
    age = '' if job.created is None else format_age(max(0.0, time() - job.created.timestamp()))
    texts = (job.id, job.type, job.state, str(job.attempt), describe_progress(job), age)
    return tuple(printable(text) for text in texts)


def describe_progress(job: JobInfo) -> str:
    """Return how far a job has come: a percentage, a number if its total is not known, or ''."""
    progress = job.progress
    if progress is None or progress.done is None:
        return ''
    if progress.fraction is None:
        return f'{progress.done:g}'
    return f'{int(progress.fraction * 100)} %'


def show_job(job: JobInfo, *, as_json: bool) -> None:
    """Write all that a service says about a job."""
    if as_json:
        write_json(to_builtins(job))
        return
    text = '' if job.progress is None else job.progress.text
    facts = {
        'id': job.id,
        'type': job.type,
        'state': job.state,
        'attempts': str(job.attempt),
        'failures': str(job.failures),
        'created': _format_time(job.created),
        'due': _format_time(job.due),
        'started': _format_time(job.started),
        'ended': _format_time(job.ended),
        'progress': ', '.join(filter(None, (describe_progress(job), text))),
        'time left': '' if job.eta_seconds is None else format_age(job.eta_seconds),
        'reply': '' if job.reply is None else json.dumps(job.reply, ensure_ascii=False),
    }
    for name, fact in facts.items():
        if fact:
            write(f'{name:<10}{printable(fact)}')


def _format_time(moment: datetime | None) -> str:
    if moment is None:
        return ''
    return moment.astimezone(timezone.utc).isoformat(' ', 'seconds')
