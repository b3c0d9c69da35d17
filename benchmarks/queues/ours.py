# SPDX-License-Identifier: ZPL-2.1
"""Jobs of a pool."""

import asyncio
import signal
import sys

from pyams_zmq.client import ZMQClient
from pyams_zmq.jobs import zmq_job
from pyams_zmq.pool import ZMQPool
from queues.work import FOLDER, run

ADDRESS = f'ipc://{FOLDER}/ours'


class Work:
    """The jobs, and a call beside them."""

    def echo(self, args):
        """Return the arguments."""
        return [200, args]

    @zmq_job()
    def work(self, number):
        """Do the work of a job."""
        return [200, run(number)]

    @zmq_job()
    async def hold(self, seconds):
        """Take some time."""
        await asyncio.sleep(seconds)
        return [200, None]


def open_client():
    """Return a function that submits a job."""
    client = ZMQClient(ADDRESS)
    return lambda number: client.submit('work', number)


def make_pool(folder, **options):
    """Return a pool with a journal.

    :param options: attributes of the pool
    """
    pool = ZMQPool(f'ipc://{folder}/ours', Work, workers=4)
    for name, value in {'jobs': 4, 'journal': f'{folder}/journal', **options}.items():
        setattr(pool, name, value)
    return pool


def main():
    """Run the workers."""
    pool = make_pool(FOLDER)
    signal.signal(signal.SIGTERM, lambda _num, _frame: sys.exit(0))
    pool.start()
    try:
        pool.join()
    finally:
        pool.stop()


if __name__ == '__main__':
    main()
