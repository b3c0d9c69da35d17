# SPDX-License-Identifier: ZPL-2.1
"""Dramatiq with redis."""

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from queues.work import FOLDER, run

dramatiq.set_broker(RedisBroker(url=f'unix://{FOLDER}/redis.sock'))


@dramatiq.actor(max_retries=3)
def work(number):
    """Do the work of a job."""
    run(number)


def open_client():
    """Return a function that submits a job."""
    return work.send
