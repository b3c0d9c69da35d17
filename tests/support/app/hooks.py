# SPDX-License-Identifier: ZPL-2.1
"""Settings of gunicorn: it notes its workers, which lose the signals they get while they boot."""

from pathlib import Path

timeout = 8  # seconds; workers look for their master twice in that time


def post_worker_init(worker):
    """Note the pid of a worker which serves; runs in the worker."""
    with Path('workers').open('a', encoding='ascii') as file:
        file.write(f'{worker.pid}\n')
