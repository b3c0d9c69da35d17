# SPDX-License-Identifier: ZPL-2.1
"""RQ with redis; a job whose process dies is tried three times more, as those of the others."""

from redis import Redis
from rq import Queue, Retry

from queues.work import FOLDER, run

SOCKET = f'{FOLDER}/redis.sock'


def open_client():
    """Return a function that submits a job."""
    queue = Queue(connection=Redis(unix_socket_path=SOCKET))
    return lambda number: queue.enqueue(run, number, retry=Retry(max=3))
