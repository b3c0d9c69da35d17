# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq jobs INI NAME watch``: shows jobs until they have ended."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from msgspec import to_builtins

from pyams_zmq.cli.job_list import describe_progress
from pyams_zmq.cli.outcome import ERROR, INTERRUPTED, OK
from pyams_zmq.cli.output import write, write_json
from pyams_zmq.cli.printable import printable
from pyams_zmq.cli.terminal import has_rich, is_live
from pyams_zmq.client.job_info import JobInfo
from pyams_zmq.wire.clock import monotonic

_PAUSE = 1.0  # seconds between two lines of one job in which only the progress has changed


def watch_jobs(client: Any, ids: list[str], *, timeout: float | None, as_json: bool) -> int:
    """Show jobs until they have ended; return the exit code.

    :param timeout: seconds, None for no limit
    :param as_json: True for one JSON object for each change
    """
    is_good = True
    try:
        with _make_display(as_json) as show:
            for job in client.watch(ids, timeout=timeout):
                show(job)
                is_good = is_good and (not job.is_ended or job.state == 'done')
    except KeyboardInterrupt:
        if not as_json:
            write('interrupted; the jobs go on')
        return INTERRUPTED
    return OK if is_good else ERROR


def _make_display(as_json: bool) -> AbstractContextManager[Callable[[JobInfo], None]]:
    if as_json:
        return nullcontext(lambda job: write_json(to_builtins(job), indent=None))
    if is_live() and has_rich():
        from pyams_zmq.cli.job_bars import JobBars  # noqa: PLC0415 - it needs rich

        return JobBars()
    return nullcontext(JobLines())


class JobLines:
    """Writes a line for each job that has changed, but few if only the progress has."""

    def __init__(self) -> None:
        self._written: dict[str, tuple[tuple[str, int], float]] = {}

    def __call__(self, job: JobInfo) -> None:
        """Write a job as it is now."""
        now = monotonic()
        known, before = self._written.get(job.id, (None, now))
        if known == (job.state, job.attempt) and now < before + _PAUSE:
            return
        self._written[job.id] = (job.state, job.attempt), now
        texts = [f'{job.id} {job.type} {job.state}', describe_progress(job)]
        if job.progress is not None and not job.is_ended:
            texts.append(job.progress.text or '')
        write(printable(', '.join(filter(None, texts))))
