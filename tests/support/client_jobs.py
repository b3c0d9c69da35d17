# SPDX-License-Identifier: ZPL-2.1
"""Jobs for the tests of clients; :mod:`job_service` has a stand-in of each."""

import time
from pathlib import Path

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs import zmq_job
from pyams_zmq.pool import ZMQPool


class ClientJobs:
    """Jobs that end at once, or when a file says so."""

    @zmq_job()
    def echo(self, args=None):
        return [200, args]

    @zmq_job()
    def measure(self, *frames):
        return [200, [len(frame) for frame in frames[:-1]]]

    @zmq_job()
    def fail(self, args):
        raise ZMQMessageError(args, 'it has failed')

    @zmq_job()
    def follow(self, args, *, job):
        """Follow a file: each line is a progress, the last one is `end`."""
        known = 0
        while True:
            lines = Path(args).read_text().splitlines() if Path(args).exists() else []
            if 'end' in lines:
                return [200, len(lines) - 1]
            if job.is_cancelled or len(lines) > known:
                known = len(lines)
                job.progress(known, 4, lines[-1] if lines else '')
            time.sleep(0.005)  # no event announces the next line


class ClientPool(ZMQPool):
    """Pool with short times."""

    beat_interval = 0.1
    jobs = 2


def make_pool(address, folder):
    """Return a pool with a journal in a folder."""
    pool = type('OwnPool', (ClientPool,), {'journal': folder / 'client.jobs'})
    return pool(address, ClientJobs, workers=2)
