# SPDX-License-Identifier: ZPL-2.1
"""The rules of jobs, without sockets and without a disk."""

import os
from functools import partial
from math import inf
from types import SimpleNamespace

import pytest

from job_checks import make_record
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs import watchers as watchers_module
from pyams_zmq.jobs.job_messages import Wait, describe_job
from pyams_zmq.jobs.records import Cancelled, Claim
from pyams_zmq.jobs.watchers import Watcher, Watchers
from pyams_zmq.pool import job_book as book_module
from pyams_zmq.pool.job_book import JobBook
from pyams_zmq.pool.job_owners import ADOPT_TIME, REMOTE_TIME
from pyams_zmq.pool.job_run import JobRun
from pyams_zmq.pool.job_scheduler import JobScheduler
from pyams_zmq.pool.job_service import JobService
from pyams_zmq.pool.job_verdict import DEATH, MAX_BACKOFF, MAX_DEATHS, SHARED_DEATH
from pyams_zmq.pool.protocol import make_job_key
from pyams_zmq.pool.queue import FairQueue
from pyams_zmq.pool.scheduler import LOST_ACCESS, SILENT
from pyams_zmq.process.connections import Connection, Envelope
from pyams_zmq.process.descendants import ProcessInfo
from pyams_zmq.wire.clock import boottime, monotonic, time

OK = b'[200,1]'
ROUTE = b'r' * 16


class Journal:
    """Keeps what it is asked for; the test decides about the outcome."""

    def __init__(self):
        self.calls = []
        self.callbacks = []
        self.revision = 0  # of the last call that has one

    def __getattr__(self, name):
        def call(*args, **options):
            self.revision = options.pop('revision', self.revision)
            callback = next((arg for arg in args if callable(arg)), None)
            self.calls.append((name, *(arg for arg in args if arg is not callback), options))
            if callback is not None:
                self.callbacks.append((name, callback))

        return call

    def take(self, *names):
        """Return what was asked for since the last time."""
        calls, self.calls = self.calls, []
        return [call for call in calls if not names or call[0] in names]

    def answer(self, name, outcome):
        """Call the callbacks of all that has this name and has no outcome yet."""
        found = [callback for each, callback in self.callbacks if each == name]
        self.callbacks = [pair for pair in self.callbacks if pair[0] != name]
        for callback in found:
            callback(outcome)


class Bench:
    """A scheduler with jobs, and what it has sent."""

    def __init__(self, limit=2):
        self.journal = Journal()
        self.log = []
        self.is_reachable = True
        self.scheduler = JobScheduler(
            lambda worker, call: True,
            lambda envelope, reply: None,
            lambda envelope, reply: None,
            queue=FairQueue(10, 10_000, 10_000),
        )
        self.scheduler.is_local = lambda worker: False
        self.book = self.scheduler.book = JobBook(
            self.journal,
            self.scheduler,
            send=self.send,
            acknowledge=partial(self.note, 'ack'),
            cancel=partial(self.note, 'cancel'),
            kill=lambda run: self.log.append(('kill', run.key)),
            on_change=lambda job_id: self.log.append(('changed', job_id)),
            on_late_end=lambda number: self.log.append(('late', number)),
            limit=limit,
            cancel_grace=5,
        )

    def send(self, worker, run):
        self.log.append(('send', run.key))
        return self.is_reachable

    def note(self, name, worker, key):
        self.log.append((name, key))

    def ready(self, route=ROUTE, calls=(), replies=(), slots=1, retries=1, backoff=1, **options):
        """Register a worker."""
        info = {'pid': os.getpid(), 'host': 'h', 'slots': slots, 'interval': 1, 'methods': []}
        keys = {'calls': [key.hex() for key in calls], 'replies': [key.hex() for key in replies]}
        more = {'repeatable': [], 'jobs': {'work': [retries, backoff]}, **options}
        worker = self.scheduler.handle_ready(route, {**info, **keys, **more}, monotonic())
        self.scheduler.assign_queued()
        return worker

    def begin(self, *records):
        """Let a claim return jobs; return their keys."""
        assert self.journal.take('claim')
        return self.begin_claimed(*records)

    def begin_claimed(self, *records):
        self.journal.answer('claim', Claim(list(records), None))
        return [make_job_key(record.number, record.attempt) for record in records]

    def reply(self, key, *frames, route=ROUTE):
        self.scheduler.handle_reply(route, key, list(frames), monotonic())


@pytest.fixture
def bench():
    return Bench()


def test_ready_with_jobs_that_cannot_be_read(bench):
    """Nothing is registered: the worker would have no jobs, and be asked for no other READY."""
    with pytest.raises(ValueError, match=r'jobs of the worker .* on h cannot be read: .*float'):
        bench.ready(backoff=None)
    assert not bench.scheduler.workers


def test_job_is_begun_and_recorded(bench):
    bench.ready()
    [key] = bench.begin(make_record(1))
    assert ('send', key) in bench.log
    bench.log.clear()
    bench.reply(key, OK)
    assert bench.journal.take('end') == [('end', 1, 1, 'done', OK, {})]
    assert bench.log == []  # not before it is on disk
    assert bench.book.unrecorded == 1
    assert bench.book.find('job1')  # until then it runs for those who ask, with its progress
    bench.journal.answer('end', True)
    assert bench.book.find('job1') is None
    assert bench.log == [('ack', key), ('changed', 'job1')]
    assert bench.book.unrecorded == 0


def test_limit_of_jobs_at_a_time(bench):
    bench.ready(slots=5)
    [(_name, count, types, owner, _options)] = bench.journal.take('claim')
    assert (count, types, owner) == (2, {'work'}, 'broker')
    bench.journal.answer('claim', Claim([make_record(1), make_record(2)], None))
    assert bench.journal.take('claim') == []
    assert bench.scheduler.free_slots == 3


def test_limit_without_a_number():
    """One request less than all workers can handle, also those of other machines."""
    bench = Bench(limit=0)
    bench.ready(slots=3)
    assert [call[1] for call in bench.journal.take('claim')] == [2]
    bench.begin_claimed(make_record(1), make_record(2))
    assert bench.journal.take('claim') == []
    bench.ready(b's' * 16, slots=2)
    assert [call[1] for call in bench.journal.take('claim')] == [2]
    small = Bench(limit=0)
    small.ready()
    assert [call[1] for call in small.journal.take('claim')] == [1]


def test_submit_before_the_first_worker(bench):
    """It waits for the disk, not for a worker."""
    submitted = []
    bench.scheduler.submit = submitted.append
    for name in (b'work', b'ping', b'work'):
        bench.scheduler.handle_request([b'client', b''], b'', [b'x'], 1, name, monotonic())
    bench.ready(slots=0)
    assert [call.name for call in submitted] == [b'work', b'work']
    assert bench.scheduler.stats(monotonic())['queue'] == 1


def test_call_that_comes_back_when_its_type_is_that_of_a_job(bench):
    submitted = []
    bench.scheduler.submit = submitted.append
    worker = bench.ready(jobs={})
    bench.scheduler.handle_request([b'client', b''], b'', [b'x'], 1, b'work', monotonic())
    bench.ready(b's' * 16)
    assert submitted == []
    [key] = worker.calls
    bench.scheduler.handle_reject(ROUTE, key)
    assert [call.key for call in submitted] == [key]


@pytest.mark.parametrize('limit', [2, 0])
def test_workers_are_not_counted_while_the_limit_is_reached(monkeypatch, limit):
    """Every submit and every reply asks for a claim."""
    counted = []
    get_slots = JobScheduler.open_slots.fget
    open_slots = property(lambda scheduler: counted.append(1) or get_slots(scheduler))
    monkeypatch.setattr(JobScheduler, 'open_slots', open_slots)
    bench = Bench(limit)
    bench.ready(slots=3)
    bench.begin(make_record(1), make_record(2))
    counted.clear()
    bench.book.expect(0)
    bench.book.claim()
    assert bench.journal.take('claim') == counted == []
    bench.reply(make_job_key(1, 1), OK)
    bench.journal.answer('end', True)
    bench.book.claim()
    assert [call[1] for call in bench.journal.take('claim')] == [1]


def test_worker_registers_while_a_claim_is_on_its_way(bench):
    """The claim does not have the type of its jobs."""
    bench.ready(slots=2)
    [(_name, _count, types, *_more)] = bench.journal.take('claim')
    assert types == {'work'}
    bench.ready(b's' * 16, jobs={'other': [1, 1]})
    bench.journal.answer('claim', Claim([], None))
    [(_name, _count, types, *_more)] = bench.journal.take('claim')
    assert types == {'work', 'other'}
    bench.journal.answer('claim', Claim([], None))
    assert bench.journal.take('claim') == []


@pytest.mark.parametrize('limit', [10, 0])
@pytest.mark.parametrize('is_late', [True, False])
def test_free_workers_get_jobs_while_others_leave(limit, is_late):
    bench = Bench(limit)
    bench.ready()
    bench.begin(make_record(1))
    assert bench.journal.take('claim') == []
    if not is_late:
        bench.scheduler.handle_disconnect(ROUTE)
    bench.ready(b's' * 16)
    if is_late:
        bench.scheduler.handle_disconnect(ROUTE)
    [key] = bench.begin(make_record(2))
    assert ('send', key) in bench.log


def test_nothing_is_claimed_without_a_reason(bench):
    bench.ready()
    bench.begin()
    bench.book.check(monotonic())
    assert bench.journal.take('claim') == []
    bench.book.expect(None)
    bench.book.claim()
    assert bench.journal.take('claim') == []
    bench.book.expect(0)
    bench.book.claim()
    assert len(bench.journal.take('claim')) == 1


def test_delayed_job_is_due_while_the_machine_sleeps(bench, monkeypatch):
    bench.ready()
    bench.book.claim()
    bench.journal.answer('claim', Claim([], 3600.0))
    bench.book.check(monotonic())
    assert len(bench.journal.take('claim')) == 1
    monkeypatch.setattr(book_module, 'boottime', lambda: boottime() + 3600)
    bench.book.check(monotonic())
    assert len(bench.journal.take('claim')) == 1


def test_connection_that_is_lost(bench):
    """The job waits for another worker, with the same attempt."""
    bench.ready()
    bench.is_reachable = False
    [key] = bench.begin(make_record(1))
    bench.is_reachable = True
    bench.log.clear()
    bench.ready()
    assert ('send', key) in bench.log
    bench.log.clear()
    bench.ready()  # it has not got the job
    assert ('send', key) in bench.log
    bench.log.clear()
    bench.ready(calls=[key])
    assert bench.log == []
    bench.reply(key, OK)
    assert bench.journal.take('end')


def test_rejected_job(bench):
    bench.ready()
    [key] = bench.begin(make_record(1))
    bench.scheduler.handle_disconnect(ROUTE)
    bench.scheduler.handle_reject(ROUTE, key)
    bench.log.clear()
    bench.ready(b's' * 16)
    assert ('send', key) in bench.log
    bench.book.cancel(Cancelled('running', 1, 1), force=False)
    bench.scheduler.handle_reject(b's' * 16, key)
    assert bench.journal.take('end') == [('end', 1, 1, 'cancelled', None, {})]
    bench.scheduler.handle_reject(b's' * 16, b'\0' * 8)  # of a call


def test_reply_of_a_former_attempt(bench):
    old = make_job_key(7, 1)
    bench.ready(calls=[old])
    assert bench.log == [('cancel', old)]
    bench.log.clear()
    bench.reply(old, b'[500,"x"]')
    assert bench.log == [('ack', old)]
    bench.reply(old, OK)
    assert bench.journal.take('end') == [('end', 7, 1, 'done', OK, {})]
    bench.journal.answer('end', False)
    assert bench.log == [('ack', old), ('ack', old), ('late', 7)]
    bench.reply(old, OK, route=b'unknown')


@pytest.mark.parametrize('is_dead', [False, True])
def test_failure_is_repeated_before_it_is_recorded(bench, is_dead):
    """The worker must keep its reply until the failure is counted on disk."""
    bench.ready(slots=2, retries=1)
    other, key = bench.begin(make_record(2), make_record(1))
    if is_dead:
        bench.scheduler.remove(ROUTE, monotonic())
    else:
        bench.reply(key, b'[500,"x"]')
    bench.ready(calls=[other], replies=[key])
    bench.reply(key, b'[500,"x"]')
    assert ('ack', key) not in bench.log
    bench.journal.answer('change', 'waiting')
    assert bench.log[-2:] == [('ack', key), ('changed', 'job1')]


def test_back_off_is_limited(bench):
    bench.ready(retries=1000)
    [key] = bench.begin(make_record(1, failures=900))
    bench.reply(key, b'[500,"x"]')
    [(_name, _number, _attempt, options)] = bench.journal.take('change')
    assert options['failures'] == 901
    assert options['delay'] <= MAX_BACKOFF * 1.2


def test_end_that_cannot_be_written(bench):
    bench.ready()
    [key] = bench.begin(make_record(1))
    bench.reply(key, OK)
    bench.journal.take()
    bench.journal.answer('end', ZMQMessageError(400, 'bad row'))
    [(_name, _number, _attempt, state, reply, _options)] = bench.journal.take('end')
    assert state == 'failed'
    assert b'bad row' in reply
    bench.journal.answer('end', ZMQMessageError(400, 'bad row'))
    assert ('ack', key) in bench.log


def test_death_of_a_worker(bench):
    bench.ready()
    [key] = bench.begin(make_record(1, deaths=DEATH))
    bench.scheduler.remove(ROUTE, monotonic())
    [(_name, number, _attempt, options)] = bench.journal.take('change')
    assert (number, options['deaths']) == (1, 2 * DEATH)
    bench.journal.answer('change', 'waiting')
    bench.ready()
    [key] = bench.begin(make_record(1, attempt=2, deaths=2 * DEATH))
    bench.scheduler.remove(ROUTE, monotonic())
    [(_name, _number, _attempt, state, reply, options)] = bench.journal.take('end')
    assert (state, options) == ('failed', {'deaths': 3 * DEATH})
    assert b'died' in reply
    assert key not in bench.book.live
    bench.scheduler.remove(ROUTE, monotonic())  # again


def test_worker_that_was_asked_to_leave_is_not_a_death(bench):
    bench.ready()
    bench.begin(make_record(1))
    bench.scheduler.handle_disconnect(ROUTE, was_asked=True)
    bench.scheduler.remove(ROUTE, monotonic())
    assert bench.journal.take('change') == [('change', 1, 1, {'delay': 0.0})]


def test_worker_that_was_asked_to_leave_by_a_former_broker(bench):
    bench.ready()
    [key] = bench.begin(make_record(1))
    bench.ready(calls=[key], slots=0, asked=True)
    bench.scheduler.remove(ROUTE, monotonic())
    assert bench.journal.take('change') == [('change', 1, 1, {'delay': 0.0})]


def test_death_of_a_worker_that_leaves_by_itself(bench):
    """The job may be why it needs much memory, and why the kernel kills it then."""
    bench.ready()
    bench.begin(make_record(1))
    bench.scheduler.handle_disconnect(ROUTE)
    bench.scheduler.remove(ROUTE, monotonic())
    assert bench.journal.take('change') == [('change', 1, 1, {'delay': 1.0, 'deaths': DEATH})]


@pytest.mark.parametrize('asked', [False, True])
def test_silent_worker_of_another_machine(bench, asked):
    """It has some seconds to register again, with its job."""
    bench.ready()
    [key] = bench.begin(make_record(1))
    bench.book.live[key].publish(1, 2, 'x')
    for _time in range(3):
        bench.scheduler.remove(ROUTE, monotonic(), SILENT)
        bench.book.check(monotonic() + REMOTE_TIME - 1)
        assert bench.book.find('job1').progress['done'] == 1
        bench.ready(calls=[key], asked=asked)
        bench.book.check(monotonic())
    assert bench.journal.take('change', 'end') == []
    bench.scheduler.remove(ROUTE, monotonic(), SILENT)
    bench.book.check(monotonic() + REMOTE_TIME + 1)
    options = {'delay': 0.0} if asked else {'delay': 1.0, 'deaths': SHARED_DEATH}
    assert bench.journal.take('change') == [('change', 1, 1, options)]


def test_silent_worker_of_a_cancelled_job(bench):
    bench.ready()
    bench.begin(make_record(1))
    bench.book.cancel(Cancelled('running', 1, 1), force=False)
    bench.scheduler.remove(ROUTE, monotonic(), SILENT)
    assert bench.journal.take('end') == [('end', 1, 1, 'cancelled', None, {})]


def test_silent_worker_of_this_machine(bench):
    """The system did not notify the broker of its end."""
    bench.scheduler.is_local = lambda worker: True
    bench.ready()
    bench.begin(make_record(1))
    bench.scheduler.remove(ROUTE, monotonic(), SILENT)
    assert bench.journal.take('change') == [('change', 1, 1, {'delay': 1.0, 'deaths': DEATH})]


def test_worker_that_has_lost_its_access_is_not_a_death(bench):
    bench.ready()
    bench.begin(make_record(1))
    bench.scheduler.remove(ROUTE, monotonic(), LOST_ACCESS)
    assert bench.journal.take('change') == [('change', 1, 1, {'delay': 0.0})]


def test_cancel(bench):
    bench.ready()
    key, waiting = bench.begin(make_record(1), make_record(2))
    bench.log.clear()
    bench.book.cancel(Cancelled('running', 2, 1), force=False)  # no worker has it yet
    assert bench.journal.take('end') == [('end', 2, 1, 'cancelled', None, {})]
    assert waiting not in bench.book.live
    bench.book.cancel(Cancelled('running', 3, 1), force=True)  # nobody has it
    bench.book.cancel(Cancelled('running', 1, 1), force=False)
    bench.book.check(monotonic())
    assert bench.log == [('cancel', key)]
    bench.book.check(monotonic() + 6)
    bench.book.check(monotonic() + 6)
    bench.book.cancel(Cancelled('running', 1, 1), force=True)
    assert bench.log == [('cancel', key), ('kill', key), ('kill', key)]
    bench.scheduler.remove(ROUTE, monotonic())
    assert bench.journal.take('end') == [('end', 1, 1, 'cancelled', None, {})]


def test_adoption(bench):
    records = [make_record(number, owner='broker', orphaned=time()) for number in (1, 2)]
    bench.book.add_orphans(records)
    one, two = (make_job_key(number, 1) for number in (1, 2))
    bench.ready(calls=[one], replies=[two])
    assert {call[1] for call in bench.journal.take('assign')} == {1, 2}
    bench.reply(two, OK)
    assert bench.journal.take('end') == [('end', 2, 1, 'done', OK, {})]
    bench.reply(one, OK)
    assert bench.journal.take('end') == [('end', 1, 1, 'done', OK, {})]


def test_reply_of_an_orphan(bench):
    bench.ready()
    bench.book.add_orphans([make_record(1, orphaned=time())])
    bench.reply(make_job_key(1, 1), OK)
    assert bench.journal.take('end') == [('end', 1, 1, 'done', OK, {})]


def test_cancelled_orphan(bench):
    key = make_job_key(1, 1)
    bench.book.add_orphans([make_record(1, cancel=1.0, owner='broker', orphaned=time())])
    bench.ready(calls=[key])
    assert bench.log == [('cancel', key)]
    bench.book.check(monotonic() + 6)
    assert bench.log[-1] == ('kill', key)


@pytest.mark.parametrize('force', [False, True])
def test_orphan_is_cancelled(bench, force):
    """Its worker registers later at this broker."""
    key = make_job_key(1, 1)
    bench.book.add_orphans([make_record(1, owner='broker', orphaned=time())])
    bench.book.cancel(Cancelled('running', 1, 1), force=force)
    bench.book.cancel(Cancelled('running', 1, 1), force=False)
    assert bench.log == []
    bench.ready(calls=[key])
    assert bench.log == [('cancel', key)]
    bench.book.check(monotonic())
    assert bench.log[1:] == [('kill', key)] * force
    bench.book.check(monotonic() + 6)
    assert bench.log[1:] == [('kill', key)]


def test_cancelled_orphan_whose_worker_does_not_come(bench):
    bench.book.add_orphans([make_record(1, owner='broker', orphaned=time())])
    bench.book.cancel(Cancelled('running', 1, 1), force=False)
    bench.book.check(monotonic() + ADOPT_TIME + 1)
    assert bench.journal.take('end') == [('end', 1, 1, 'cancelled', None, {})]


def test_message_to_end_a_worker_is_lost(bench):
    """It comes again when the worker of another machine has registered again."""
    bench.ready()
    [key] = bench.begin(make_record(1))
    bench.book.cancel(Cancelled('running', 1, 1), force=True)
    bench.log.clear()
    bench.book.check(monotonic())
    assert bench.log == []
    bench.ready(calls=[key])
    bench.book.check(monotonic())
    assert bench.log == [('cancel', key), ('kill', key)]


@pytest.mark.parametrize('prefix', ['', 'stopping '])
def test_orphan_that_its_worker_does_not_have(bench, prefix):
    owner = f'{prefix}remote {ROUTE.hex()}'
    bench.book.add_orphans([make_record(1, owner=owner, orphaned=time())])
    bench.ready()
    assert bench.journal.take('change') == [('change', 1, 1, {'delay': 0.0})]


@pytest.mark.parametrize(
    ('owner', 'age', 'cancel', 'expected'),
    [
        ('broker', 0, None, None),
        ('broker', 4, None, ('change', {'delay': 0.0})),
        (None, 4, None, ('change', {'delay': 0.0})),
        ('remote 00', 4, None, None),
        ('remote 00', 11, None, ('change', {'delay': 1.0, 'deaths': SHARED_DEATH})),
        ('stopping remote 00', 11, None, ('change', {'delay': 0.0})),
        ('local own', 50, None, None),
        ('local own', 61, None, ('change', {'delay': 0.0})),
        ('local 1 0', 0, None, ('change', {'delay': 1.0, 'deaths': SHARED_DEATH})),
        ('local 1 0', 0, 1.0, ('end', {})),
        ('stopping local 1 0', 0, None, ('change', {'delay': 0.0})),
        ('something later', 4, None, ('change', {'delay': 0.0})),
    ],
)
def test_when_an_orphan_is_given_up(bench, owner, age, cancel, expected):
    if owner is not None:
        own = f'{os.getpid()} {ProcessInfo.read(os.getpid()).started}'
        owner = owner.replace('own', own)
    bench.book.add_orphans([make_record(1, owner=owner, cancel=cancel, orphaned=time() - age)])
    bench.book.check(monotonic())
    found = bench.journal.take('change', 'end')
    assert [(call[0], call[-1]) for call in found] == ([] if expected is None else [expected])
    assert not bench.book.live


def test_deaths_of_whole_services(bench):
    """Each of them is rarely the fault of a job; but it may be what ends them all."""
    ends = []
    for deaths in range(0, MAX_DEATHS * DEATH, SHARED_DEATH):
        bench.book.add_orphans([make_record(1, owner='local 1 0', deaths=deaths)])
        bench.book.check(monotonic())
        ends += [call[0] for call in bench.journal.take('change', 'end')]
    assert ends == ['change'] * (MAX_DEATHS * DEATH // SHARED_DEATH - 1) + ['end']


@pytest.mark.parametrize('ahead', [None, 3600])
def test_orphan_without_a_time_or_of_the_future(bench, ahead):
    """On a full disk the time is not noted; the clock may have been set back. It waits from now."""
    orphaned = None if ahead is None else time() + ahead
    bench.book.add_orphans([make_record(1, owner='broker', orphaned=orphaned)])
    bench.book.check(monotonic())
    assert not bench.journal.take('change')
    bench.book.check(monotonic() + ADOPT_TIME + 1)
    assert bench.journal.take('change')


def test_clock_is_set_back_while_an_orphan_waits(bench, monkeypatch):
    bench.book.add_orphans([make_record(1, owner='broker', orphaned=time())])
    monkeypatch.setattr(book_module, 'time', lambda: time() - 3600)
    bench.book.check(monotonic() + ADOPT_TIME + 1)
    assert bench.journal.take('change')


def test_end_of_a_broker(bench):
    """The next one finds the jobs that run, and begins those that wait."""
    bench.ready()
    bench.begin(make_record(1), make_record(2))
    bench.journal.take()
    bench.book.claim()
    bench.book.drain()
    owner = f'stopping remote {ROUTE.hex()}'
    assert bench.journal.take() == [
        ('assign', 1, 1, owner, {}),
        ('change', 2, 1, {'delay': 0.0}),
    ]
    bench.scheduler.remove(ROUTE, monotonic(), 'was stopped')
    assert bench.journal.take() == []
    assert not bench.book.live


def test_rejected_job_at_the_end_of_a_broker(bench):
    bench.ready()
    bench.ready(b's' * 16)
    [key] = bench.begin(make_record(1))
    bench.book.drain()
    bench.log.clear()
    bench.journal.take()
    bench.scheduler.handle_reject(ROUTE, key)
    assert bench.log == []
    assert bench.journal.take() == [('change', 1, 1, {'delay': 0.0})]


def test_claim_that_ends_after_the_broker(bench):
    bench.ready()
    bench.book.drain()
    bench.journal.answer('claim', Claim([make_record(1)], inf))
    assert bench.journal.take('change') == [('change', 1, 1, {})]


def test_two_attempts_have_keys_of_their_own():
    keys = {make_job_key(number, attempt) for number in (1, 2**39) for attempt in (1, 2, 65535)}
    assert len(keys) == 6
    assert {key[0] for key in keys} == {255}


def test_progress_of_a_job_that_has_ended():
    service = SimpleNamespace(book=SimpleNamespace(live={}))
    assert JobService.handle_progress(service, make_job_key(1, 1), b'[1,2,""]') is None


def test_disk_that_does_not_answer_at_the_end():
    """The thread that writes still uses the journal."""
    service = SimpleNamespace(_writer=SimpleNamespace(close=lambda timeout: False))
    assert JobService.close(service) is None


def test_warning_for_unknown_types(caplog):
    """Once until a worker knows the type again."""
    reader = SimpleNamespace(waiting_types=lambda: ['one', 'two'])
    scheduler = SimpleNamespace(job_types=set())
    journal = SimpleNamespace(path='x.jobs')
    service = SimpleNamespace(_warned=set(), _reader=reader, _scheduler=scheduler, _journal=journal)
    expected = []
    for known, warned in [
        ('', ['one', 'two']),
        ('', []),
        ('two', []),
        ('two', []),
        ('', ['two']),
        ('', []),
    ]:
        scheduler.job_types = {known}
        JobService.warn_of_unknown_types(service)
        expected += warned
        found = [name for record in caplog.records for name in record.args if name != 'x.jobs']
        assert found == expected


@pytest.mark.parametrize(
    ('progress', 'eta'),
    [
        (None, None),
        ((1, None, ''), None),
        ((0, 10, ''), None),
        ((11, 10, ''), None),
        ((4, 10, ''), 3.0),
        ((10, 10, ''), 0.0),
    ],
)
def test_estimate(progress, eta):
    run = JobRun(make_record(1, started=10.0))
    if progress is not None:
        run.publish(*progress)
    job = describe_job(run.record, 12.0, run)
    assert job['eta'] == eta
    assert job['started'] == '1970-01-01T00:00:10.000Z'


@pytest.mark.parametrize('reply', [OK, b'[500,"x"]'])
def test_clients_know_a_revision_of_the_progress(bench, reply):
    """The journal has not seen it, and must have a higher one at the end."""
    bench.ready()
    [key] = bench.begin(make_record(1))
    run = bench.book.live[key]
    run.publish(1, 2, 'x')
    bench.reply(key, reply)
    assert bench.journal.revision == run.revision > 1
    if reply == OK:
        bench.journal.answer('end', ZMQMessageError(400, 'bad row'))
        assert bench.journal.revision == run.revision


def make_watcher(connection, until=9.0, ids=('x',), envelope=(b'route', b'')):
    envelope = Envelope(envelope)
    envelope.connection = connection
    return Watcher(Wait({'ids': list(ids)}), {name: name for name in ids}, envelope, until)


def test_watchers():
    watchers = Watchers()
    one, two = (make_watcher(None, until) for until in (1.0, 2.0))
    both = make_watcher(None, 3.0, 'xy')
    for watcher in (one, two, both):
        assert watchers.add(watcher) == []
    assert set(watchers.watchers_of('x')) == {one, two, both}
    assert watchers.take_late(1.5) == [one]
    watchers.remove(two)
    assert watchers.watchers_of('x') == [both]
    assert len(watchers) == 1
    assert watchers.take_all() == [both]
    assert watchers.watchers_of('y') == []


def test_watchers_have_a_limit_of_bytes(monkeypatch):
    sizes = [
        make_watcher(None, ids=['x', *more], envelope=[b'route', *tags, b'']).size
        for more, tags in [((), ()), (map(str, range(99)), ()), ((), [b't' * 1000])]
    ]
    assert sizes[1] > 10 * sizes[0]
    assert sizes[2] > sizes[0] + 1000
    monkeypatch.setattr(watchers_module, 'MAX_SIZE', sizes[1])
    watchers = Watchers()
    large = make_watcher(None, ids=['x', *map(str, range(99))])
    assert watchers.add(large) == []
    watcher = make_watcher(None)
    assert watchers.add(watcher) == [watcher]
    watchers.remove(large)
    assert watchers.add(watcher) == []


def test_connections_share_the_limit_for_watchers(monkeypatch):
    monkeypatch.setattr(watchers_module, 'MAX_SIZE', 6 * make_watcher(None).size)
    watchers = Watchers()
    greedy, modest, third = (Connection(0.0) for _number in range(3))
    first = [make_watcher(greedy) for _number in range(7)]
    assert [watchers.add(watcher) for watcher in first] == [[]] * 6 + [[first[6]]]
    others = [make_watcher(modest) for _number in range(4)]
    refused = [watchers.add(watcher) for watcher in others]
    assert refused == [[first[5]], [first[4]], [first[3]], [others[3]]]
    assert watchers.add(make_watcher(third)) == [first[2]]
    assert len(watchers) == 6
    assert set(watchers.watchers_of('x')) > {*first[:2], *others[:3]}
    greedy.is_ended = True
    assert watchers.add(others[3]) == []
    assert set(watchers.watchers_of('x')) > set(others)
    assert len(watchers) == 5
    modest.is_ended = True
    assert watchers.take_late(0.0) == []
    assert len(watchers) == 1
