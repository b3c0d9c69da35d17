# SPDX-License-Identifier: ZPL-2.1
"""Helpers of the tests of jobs: a client that knows only messages."""

import time

from checks import TIMEOUT, wait_until
from pyams_zmq.client import ZMQClient
from pyams_zmq.jobs.records import JobRecord


class Asker:
    """Sends messages about jobs, as a program in another language would."""

    def __init__(self, pool, **options):
        self.address = pool if isinstance(pool, str) else pool.bound_address
        self.client = ZMQClient(self.address, timeout=TIMEOUT, retries=20, **options)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.client.close()

    def ask(self, name, args=None, **options):
        """Return the reply, `[status, payload]`."""
        return self.client.request([name, args, options] if options else [name, args])

    def submit(self, name, args=None, **options):
        """Submit a job; return its id."""
        status, payload = self.ask(name, args, **options)
        assert status in (200, 202), payload
        return payload['id']

    def job(self, job_id):
        status, job = self.ask('pyams_zmq.job', job_id)
        assert status == 200, job
        return job

    def wait(self, job_id, *states, until=None):
        """Wait until a job has one of some states, by default the end; return it."""
        deadline = time.monotonic() + TIMEOUT
        after = None
        while time.monotonic() < deadline:
            args = {'id': job_id, 'after': after, 'timeout': 5}
            status, job = self.ask('pyams_zmq.job.wait', args)
            assert status == 200, job
            if until is not None:
                if until(job):
                    return job
            elif job['state'] in states or (not states and job['ended']):
                return job
            after = job['revision']
        raise AssertionError(f'still {job}')

    def run(self, name, args=None, **options):
        """Return a job that has ended."""
        return self.wait(self.submit(name, args, **options))


def make_record(number, attempt=1, **options):
    """Return a job as the journal has it."""
    values = {
        'id': f'job{number}',
        'type': 'work',
        'user': '',
        'address': '',
        'key': None,
        'state': 'running',
        'failures': 0,
        'deaths': 0,
        'priority': 0,
        'due': None,
        'expires': None,
        'retries': None,
        'timeout': None,
        'created': 1.0,
        'started': 2.0,
        'ended': None,
        'revision': 1,
        'cancel': None,
        'owner': None,
        'orphaned': None,
        **options,
    }
    return JobRecord(number=number, attempt=attempt, **values)


def lines_of(path, count=1):
    """Wait until a log has some lines; return them as lists of words."""

    def look():
        text = path.read_text() if path.exists() else ''
        lines = [line.split() for line in text.splitlines()]
        return lines if len(lines) >= count else None

    return wait_until(look, TIMEOUT)
