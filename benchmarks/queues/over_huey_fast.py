# SPDX-License-Identifier: ZPL-2.1
"""Huey with sqlite, which does not wait for the disk."""

from huey import SqliteHuey

from queues.work import FOLDER, run

app = SqliteHuey('bench', filename=f'{FOLDER}/huey.db', timeout=30, fsync=False)
work = app.task(retries=3)(run)


def open_client():
    """Return a function that submits a job."""
    return work
