# SPDX-License-Identifier: ZPL-2.1
"""Any order of changes, compared with a model in memory."""

import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from journals import Bench
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.journal import CLOCK_SLACK
from pyams_zmq.jobs.records import ENDED

KEEP = 1000.0
TYPES = ('convert', 'index', 'removed')
IDS = st.sampled_from('abcdef')
COUNTS = st.none() | st.integers(0, 3)


class Job:
    """A job of the model."""

    def __init__(self, number, job_id, scope, priority, created, due, expires):
        self.number, self.id, (self.type, self.user, self.key) = number, job_id, scope
        self.priority, self.created, self.due, self.expires = priority, created, due, expires
        self.state, self.attempt, self.failures, self.deaths = 'waiting', 0, 0, 0
        self.started = self.ended = self.reply = self.cancel = self.owner = self.orphaned = None
        self.is_ready = due is None

    def finish(self, state, now, reply=None, failures=None, deaths=None):
        self.state, self.ended, self.reply = state, now, reply
        self.count(failures, deaths)

    def count(self, failures, deaths):
        self.owner = self.orphaned = None
        self.failures = self.failures if failures is None else failures
        self.deaths = self.deaths if deaths is None else deaths


class Machine(RuleBasedStateMachine):
    """The journal and the model."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix='t-')
        self.bench = Bench(Path(self.folder.name) / 'jobs', keep=KEEP)
        self.jobs = {}
        self.aliases = {}
        self.number = 0
        self.revisions = {}

    def teardown(self):
        self.bench.close()
        self.folder.cleanup()

    @property
    def now(self):
        """Time of the journal, which nobody sets."""
        return self.bench.now + self.bench.journal.ahead

    def change(self, method, *args, **kwargs):
        try:
            return self.bench.change(method, *args, **kwargs)
        except ZMQMessageError as error:
            return error.status

    def find_running(self, number, attempt):
        job = next((job for job in self.jobs.values() if job.number == number), None)
        return job if job is not None and job.attempt == attempt else None

    # Clients

    @rule(
        job_id=IDS,
        kind=st.sampled_from(TYPES),
        user=st.sampled_from(['', '', 'bob']),
        key=st.sampled_from([None, None, 'k', 'l']),
        priority=st.integers(-1, 1),
        delay=st.sampled_from([0, 0, 5, 50]),
        expires=st.sampled_from([None, None, 0, 20]),
    )
    def accept(self, job_id, kind, user, key, priority, delay, expires):
        options = {'key': key, 'priority': priority, 'delay': delay, 'expires': expires}
        accepted = self.bench.accept(job_id, type=kind, user=user, **options)
        known = self.jobs.get(self.aliases.get(job_id, job_id)) or next(
            (
                job
                for job in self.jobs.values()
                if (job.type, job.user, job.key) == (kind, user, key) and key and not job.ended
            ),
            None,
        )
        if known is not None:
            assert (accepted.id, accepted.is_new) == (known.id, False)
            if known.id != job_id:
                self.aliases[job_id] = known.id
            return
        assert (accepted.id, accepted.is_new, accepted.wait) == (job_id, True, delay)
        due = self.now + delay if delay else None
        end = None if expires is None else self.now + expires
        self.number = max(self.number, self.bench.get(job_id).number - 1) + 1
        scope = kind, user, key
        self.jobs[job_id] = Job(self.number, job_id, scope, priority, self.now, due, end)

    @rule(job_id=IDS)
    def cancel(self, job_id):
        outcome = self.change('cancel', job_id)
        job = self.jobs.get(job_id)
        if job is None:
            assert outcome == 404
        elif job.state in ENDED:
            assert outcome == 409
        elif job.state == 'running':
            assert (outcome.state, outcome.attempt) == ('running', job.attempt)
            job.cancel = job.cancel or self.now
        else:
            assert (outcome.state, outcome.number) == ('cancelled', job.number)
            job.finish('cancelled', self.now)

    @rule(job_id=IDS)
    def retry(self, job_id):
        outcome = self.change('retry', job_id)
        job = self.jobs.get(job_id)
        if job is None:
            assert outcome == 404
        elif job.state in ('waiting', 'running', 'done') or (
            job.key
            and any(
                (other.type, other.user, other.key) == (job.type, job.user, job.key)
                for other in self.jobs.values()
                if not other.ended
            )
        ):
            assert outcome == 409
        else:
            assert outcome == 'waiting'
            job.state, job.is_ready = 'waiting', True
            job.due = job.expires = job.ended = job.reply = None
            job.failures = job.deaths = 0

    # The broker

    @rule(count=st.integers(0, 3), types=st.sets(st.sampled_from(TYPES[:2])))
    def claim(self, count, types):
        claimed = self.change('claim', count, sorted(types), 'me').jobs
        waiting = [job for job in self.jobs.values() if job.state == 'waiting']
        for job in waiting:
            job.is_ready = job.is_ready or job.due <= self.now
        ready = [job for job in waiting if job.is_ready and job.type in types]
        expected = []
        for job in sorted(ready, key=lambda job: (-job.priority, job.number)):
            if len(expected) == count:
                break
            if job.expires is not None and job.expires <= self.now:
                job.finish('expired', self.now)
                assert job.id in self.bench.expired
            else:
                expected.append(job)
                job.state, job.started, job.owner = 'running', self.now, 'me'
                job.attempt += 1
                job.orphaned = job.cancel = None
        assert [job.id for job in claimed] == [job.id for job in expected]
        assert all(len(job.frames) == 2 for job in claimed)

    @rule(
        number=st.integers(1, 6),
        attempt=st.integers(1, 4),
        state=st.sampled_from(['done', 'failed', 'cancelled']),
        failures=COUNTS,
        deaths=COUNTS,
    )
    def end(self, number, attempt, state, failures, deaths):
        outcome = self.change(
            'end', number, attempt, state, b'[]', failures=failures, deaths=deaths
        )
        job = self.find_running(number, attempt)
        counts = job is not None and (
            job.state == 'running' or (job.state == 'waiting' and state == 'done')
        )
        assert outcome is counts
        if counts:
            job.finish(state, self.now, b'[]', failures, deaths)

    @rule(
        number=st.integers(1, 6),
        attempt=st.integers(1, 4),
        delay=st.sampled_from([0, 5]),
        failures=COUNTS,
        deaths=COUNTS,
    )
    def put_back(self, number, attempt, delay, failures, deaths):
        outcome = self.change(
            'change', number, attempt, delay=delay, failures=failures, deaths=deaths
        )
        job = self.find_running(number, attempt)
        if job is None or job.state != 'running':
            assert outcome is None
        elif job.cancel is not None:
            assert outcome == 'cancelled'
            job.finish('cancelled', self.now, None, failures, deaths)
        else:
            assert outcome == 'waiting'
            job.state, job.is_ready = 'waiting', not delay
            job.due = self.now + delay if delay else None
            job.count(failures, deaths)

    @rule(number=st.integers(1, 6), attempt=st.integers(1, 4))
    def assign(self, number, attempt):
        outcome = self.change('assign', number, attempt, 'worker')
        job = self.find_running(number, attempt)
        assert outcome is (job is not None and job.state == 'running')
        if outcome:
            job.owner, job.orphaned, job.expires = 'worker', None, None

    @rule()
    def tidy(self):
        expired, has_more = self.bench.journal.tidy(self.bench.now)
        assert not has_more
        due = [
            job
            for job in self.jobs.values()
            if job.state == 'waiting' and job.expires is not None and job.expires <= self.now
        ]
        assert sorted(expired) == sorted(job.id for job in due)
        for job in due:
            job.finish('expired', self.now)
        for job in list(self.jobs.values()):
            if job.ended is not None and job.ended < self.now - KEEP:
                del self.jobs[job.id]
                del self.revisions[job.id]
        self.aliases = {one: other for one, other in self.aliases.items() if other in self.jobs}

    # What happens to the machine

    @rule(seconds=st.sampled_from([0.5, 7, 30, 2000]))
    def wait(self, seconds):
        self.bench.now += seconds

    @rule(seconds=st.sampled_from([-1, -3600, 2000]))
    def set_clock(self, seconds):
        self.bench.set_clock(seconds)

    @rule(seconds=st.sampled_from([0, 0, -3600]))
    def next_broker(self, seconds):
        self.change('assign', 0, 0, '')  # writes by how much the clock is ahead
        ahead = self.bench.journal.ahead
        last = self.bench.journal.reader.last_time()
        self.bench.now += seconds
        self.bench.reopen(keep=KEEP)
        is_set = last > self.bench.now + ahead + CLOCK_SLACK
        assert self.now == (last if is_set else self.bench.now + ahead)
        for job in self.jobs.values():
            if job.state == 'running' and job.orphaned is None:
                job.orphaned = self.now

    @rule(job_id=IDS)
    def fail(self, job_id):
        """A transaction that cannot be written changes nothing."""
        failed = suppress(ZeroDivisionError, ZMQMessageError)
        with failed, self.bench.journal.transaction(self.bench.now) as jobs:
            jobs.claim(9, TYPES)
            jobs.cancel(job_id)
            jobs.retry(1 / 0)

    # What is compared

    @invariant()
    def same_jobs(self):
        ahead = self.bench.journal.ahead
        for job in self.jobs.values():
            record = self.bench.get(job.id).set_back(-ahead)
            for name, value in vars(job).items():
                if name != 'is_ready':
                    assert getattr(record, name) == value, (name, job.id)
            revision = self.revisions.get(job.id, (0, ''))
            assert record.revision >= revision[0]
            assert record.state == revision[1] or record.revision > revision[0]
            self.revisions[job.id] = record.revision, record.state
        for job_id, known in self.aliases.items():
            assert self.bench.get(job_id).id == known

    @invariant()
    def same_lists(self):
        newest_first = sorted(self.jobs.values(), key=lambda job: -job.number)
        reader = self.bench.journal.reader
        assert [job.id for job in reader.page()] == [job.id for job in newest_first]
        for state in ('waiting', 'failed'):
            found = reader.page(state, 'index')
            assert [job.id for job in found] == [
                job.id for job in newest_first if (job.state, job.type) == (state, 'index')
            ]
        running = [job.id for job in reversed(newest_first) if job.state == 'running']
        assert [job.id for job in reader.running()] == running
        waiting = {job.type for job in newest_first if job.state == 'waiting'}
        assert reader.waiting_types() == sorted(waiting)
        self.bench.states()  # also checks the counts

    @invariant()
    def same_file(self):
        db = self.bench.journal._db
        assert db.execute('pragma integrity_check').fetchone() == ('ok',)
        numbers = 'select number from request order by number'
        assert [row[0] for row in db.execute(numbers)] == sorted(
            job.number for job in self.jobs.values()
        )


TestModel = Machine.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=40)
