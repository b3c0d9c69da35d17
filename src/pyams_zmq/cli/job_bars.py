# SPDX-License-Identifier: ZPL-2.1
"""Progress bars of jobs; they need rich, the extra ``pyams_zmq[cli]``."""

from collections.abc import Callable

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pyams_zmq.cli.job_list import describe_progress
from pyams_zmq.cli.output import format_age
from pyams_zmq.cli.printable import printable
from pyams_zmq.client.job_info import JobInfo

_WIDTH = 30  # of a bar


class JobBars:
    """One progress bar for each job, in a block that ends with its display."""

    def __init__(self) -> None:
        self._jobs: dict[str, JobInfo] = {}
        self._live = Live(get_renderable=self._render)  # a thread of it calls this, too

    def __enter__(self) -> Callable[[JobInfo], None]:
        self._live.start()
        return self._show

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def _show(self, job: JobInfo) -> None:
        """Show a job as it is now."""
        self._jobs[job.id] = job
        self._live.refresh()

    def _render(self) -> Table:
        table = Table.grid(padding=(0, 1))
        for job in list(self._jobs.values()):
            name, text = f'{job.id} {job.type}', _describe(job)
            table.add_row(Text(printable(name)), _make_bar(job), Text(printable(text)))
        return table


def _describe(job: JobInfo) -> str:
    texts = [job.state, describe_progress(job)]
    if job.progress is not None and not job.is_ended:
        texts.append(job.progress.text or '')
    if job.eta_seconds is not None:
        texts.append(f'{format_age(job.eta_seconds)} left')
    return ', '.join(filter(None, texts))


def _make_bar(job: JobInfo) -> ProgressBar:
    """Return the bar of a job; it moves if it is not known how far the job is."""
    fraction = None if job.progress is None else job.progress.fraction
    if job.state == 'done':
        fraction = 1.0
    is_moving = fraction is None and job.state == 'running'
    return ProgressBar(total=1.0, completed=fraction or 0.0, width=_WIDTH, pulse=is_moving)
