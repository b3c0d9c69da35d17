# SPDX-License-Identifier: ZPL-2.1
"""Journals of jobs, and their writers without a loop."""

from collections import Counter
from contextlib import contextmanager
from queue import SimpleQueue

from checks import TIMEOUT
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.journal import Journal
from pyams_zmq.jobs.records import STATES, Submission
from pyams_zmq.jobs.writer import JournalWriter

BODY = b'["convert",{"path":"a.mov"}]'
NOW = 1_800_000_000.0
"""A time, in seconds since the epoch"""


def make_job(job_id, **options):
    """Return a submitted job."""
    frames = options.pop('frames', [b'', BODY])
    return Submission(id=job_id, type=options.pop('type', 'convert'), frames=frames, **options)


class Bench:
    """A journal, and a clock; each change is a transaction."""

    def __init__(self, path, **options):
        self.now = NOW
        self.path = path
        self.journal = Journal(str(path), now=self.now, **options)

    def close(self):
        self.journal.close()

    def reopen(self, **options):
        """Close the journal and open it again, as the next broker does."""
        self.close()
        self.journal = Journal(str(self.path), now=self.now, **options)

    def set_clock(self, seconds):
        """Set the clock of the system, as a writer notices it."""
        self.now += seconds
        self.journal.ahead -= seconds

    def change(self, method, *args, **kwargs):
        """Call a method of the jobs in a transaction."""
        with self.journal.transaction(self.now) as jobs:
            result = getattr(jobs, method)(*args, **kwargs)
        self.expired = list(jobs.expired)
        return result

    def accept(self, job_id, **options):
        return self.change('accept', make_job(job_id, **options))

    def claim(self, count=1, types=('convert',), owner=None):
        return self.change('claim', count, types, owner).jobs

    def claim_ids(self, count=10, types=('convert',)):
        return [job.id for job in self.claim(count, types)]

    def begin(self, job_id, **options):
        """Accept a job and let it begin; return its number and attempt."""
        self.accept(job_id, **options)
        [job] = self.claim()
        assert job.id == job_id
        return job.number, job.attempt

    def refuse(self, method, *args):
        """Return the status of a change that is refused."""
        try:
            self.change(method, *args)
        except ZMQMessageError as error:
            return error.status
        raise AssertionError('it was not refused')

    def get(self, job_id):
        return self.journal.reader.get(job_id)

    def states(self):
        """Return the states by id, and check that the counts are right."""
        jobs = self.journal.reader.page()
        states, types = dict.fromkeys(STATES, 0), {}
        for job in jobs:
            states[job.state] += 1
            types.setdefault(job.type, Counter())[job.state] += 1
        assert (states, types) == (self.journal.counts.states, self.journal.counts.types)
        return {job.id: job.state for job in reversed(jobs)}


class Loop:
    """The thread of a test, which runs what a writer posts."""

    def __init__(self):
        self.posted = SimpleQueue()

    def turn(self):
        """Wait for a posted function and call it."""
        self.posted.get(timeout=TIMEOUT)()

    def wait(self, method, *args, **kwargs):
        """Call a method of the writer; return its outcome."""
        outcomes = []
        method(*args, callback=outcomes.append, **kwargs)
        while not outcomes:
            self.turn()
        return outcomes[0]


@contextmanager
def writing(path, factory=JournalWriter, size=0, **options):
    """Open a journal with a writer; close both."""
    loop = Loop()
    now = options['clock']() if 'clock' in options else None
    journal = Journal(str(path), size=size, now=now)
    writer = factory(journal, loop.posted.put, **options)
    try:
        yield journal, writer, loop
    finally:
        assert writer.close()
        journal.close()
