# SPDX-License-Identifier: ZPL-2.1
"""Settings of gunicorn: each worker notes that it has booted, and handles signals from then on."""

from pathlib import Path

timeout = 8  # seconds; workers check for their master twice in that time


def post_worker_init(worker):
    """Note the pid of a worker that serves; runs in the worker."""
    with Path('workers').open('a', encoding='ascii') as file:
        file.write(f'{worker.pid}\n')
