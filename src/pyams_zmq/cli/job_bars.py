# SPDX-License-Identifier: ZPL-2.1
"""Progress bars of jobs; they need rich, the extra ``pyams_zmq[cli]``."""

from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pyams_zmq.cli.job_list import describe_progress
from pyams_zmq.cli.output import format_age
from pyams_zmq.cli.printable import printable
from pyams_zmq.client.job_info import JobInfo


class JobBars:
    """One progress bar for each job, in a block that ends with its display."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn('{task.description}', markup=False),
            BarColumn(),
            TextColumn('{task.fields[text]}', markup=False),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Callable[[JobInfo], None]:
        self._progress.start()
        return self._show

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def _show(self, job: JobInfo) -> None:
        """Show a job as it is now."""
        if job.id not in self._tasks:
            self._tasks[job.id] = self._progress.add_task('')
        texts = [job.state, describe_progress(job)]
        if job.progress is not None and job.progress.text and not job.is_ended:
            texts.append(job.progress.text)
        if job.eta_seconds is not None:
            texts.append(f'{format_age(job.eta_seconds)} left')
        self._progress.update(
            self._tasks[job.id],
            description=printable(f'{job.id} {job.type}'),
            text=printable(', '.join(filter(None, texts))),
            **_bar(job),
        )


def _bar(job: JobInfo) -> dict[str, Any]:
    """Return the length of a bar and its total; without a total it moves."""
    fraction = None if job.progress is None else job.progress.fraction
    if job.state == 'done':
        fraction = 1.0
    if fraction is None and job.state == 'running':
        return {'total': None}
    return {'total': 1.0, 'completed': fraction or 0.0}
