# SPDX-License-Identifier: ZPL-2.1
"""Celery with redis for messages and results."""

from celery import Celery

from queues.work import FOLDER, run

SOCKET = f'{FOLDER}/redis.sock'

app = Celery('bench', broker=f'redis+socket://{SOCKET}', backend=f'redis+socket://{SOCKET}')
app.conf.broker_connection_retry_on_startup = True
work = app.task(run, name='work')


def open_client():
    """Return a function that submits a job."""
    return work.delay
