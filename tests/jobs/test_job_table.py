# SPDX-License-Identifier: ZPL-2.1
"""The rules of the jobs: what is accepted, what begins, what ends."""

import json
import sqlite3

import pytest

from journals import BODY, NOW, make_job
from pyams_zmq.jobs.job_messages import describe_job
from pyams_zmq.jobs.job_table import EXPIRED_STEP, MAX_REPLY_SIZE, UNREADABLE
from pyams_zmq.jobs.journal import CLOCK_SLACK
from pyams_zmq.jobs.records import Accepted, JobRecord
from pyams_zmq.jobs.waiting import PROMOTED_STEP
from pyams_zmq.wire.message import encode

REPLY = b'[200, "a.webm"]'


def test_life_of_a_job(bench):
    accepted = bench.accept('a', user='alice', address='10.0.0.1', priority=2, retries=3, timeout=9)
    assert (accepted.id, accepted.is_new, accepted.wait) == ('a', True, 0)
    job = bench.get('a')
    assert (job.state, job.attempt, job.created, job.due) == ('waiting', 0, NOW, None)
    assert (job.user, job.address, job.priority) == ('alice', '10.0.0.1', 2)
    bench.now += 5
    [claimed] = bench.claim(owner='broker 1')
    assert (claimed.state, claimed.attempt, claimed.started) == ('running', 1, NOW + 5)
    assert (claimed.retries, claimed.timeout, claimed.owner) == (3, 9, 'broker 1')
    assert claimed.frames == [b'', BODY]
    assert bench.claim() == []
    bench.now += 5
    assert bench.change('end', claimed.number, 1, 'done', REPLY)
    job = bench.get('a')
    assert (job.state, job.reply, job.ended, job.owner) == ('done', REPLY, NOW + 10, None)
    assert job.revision > claimed.revision > NOW * 1000
    assert bench.states() == {'a': 'done'}


@pytest.mark.parametrize(
    'frames',
    [[], [b''], [b'', b''], [b'x', b'', b'y' * 70_000], [memoryview(b'abc'), bytearray(2)]],
)
def test_frames(bench, frames):
    bench.accept('a', frames=frames)
    assert bench.claim()[0].frames == list(map(bytes, frames))


def test_known_id(bench):
    assert bench.accept('a').is_new
    with bench.journal.transaction(bench.now) as jobs:
        outcomes = [jobs.accept(make_job(job_id)) for job_id in 'abb']
    assert [(each.id, each.is_new) for each in outcomes] == [
        ('a', False),
        ('b', True),
        ('b', False),
    ]
    bench.claim(2)
    bench.change('end', 1, 1, 'done', REPLY)
    assert not bench.accept('a').is_new
    assert bench.states() == {'a': 'done', 'b': 'running'}


def test_key_of_an_unfinished_job(bench):
    assert bench.accept('a', key='clip').is_new
    assert bench.accept('b', key='clip').id == 'a'
    assert bench.accept('c', key='clip', type='thumbnail').is_new  # other work on the same thing
    number, attempt = bench.claim()[0].number, 1
    assert bench.accept('d', key='clip').id == 'a'
    bench.change('end', number, attempt, 'failed', REPLY)
    assert bench.accept('e', key='clip').is_new
    assert bench.refuse('retry', 'a') == 409  # two unfinished ones would have the key
    bench.change('cancel', 'e')
    assert bench.change('retry', 'a') == 'waiting'
    assert bench.states() == {'a': 'waiting', 'c': 'waiting', 'e': 'cancelled'}


def test_key_of_another_user(bench):
    """Nobody keeps the jobs of others away by taking their keys."""
    assert bench.accept('b', key='clip', user='bob', delay=1e8).is_new
    assert bench.accept('a', key='clip', user='alice').is_new
    assert bench.accept('a2', key='clip', user='alice').id == 'a'
    assert bench.accept('b2', key='clip', user='bob').id == 'b'
    assert bench.claim_ids() == ['a']


def test_id_of_a_submission_with_a_known_key(bench, monkeypatch):
    """It is another name of the job, as long as there is the job."""
    monkeypatch.setattr('pyams_zmq.jobs.job_table.MAX_ALIASES', 2)
    number, attempt = bench.begin('a', key='clip')
    for job_id in 'bcdd':
        assert bench.accept(job_id, key='clip').id == 'a'
    assert [bench.get(job_id) and bench.get(job_id).id for job_id in 'abcd'] == [
        'a',
        None,
        'a',
        'a',
    ]
    bench.change('end', number, attempt, 'done', b'1')
    for key in ('clip', None):  # sent again, because the reply was lost
        assert bench.accept('d', key=key) == Accepted('a', False, 0.0)
    assert bench.accept('b', key='clip').is_new
    bench.now += 8 * 86400
    bench.journal.tidy(bench.now)
    assert bench.get('c') is None
    assert bench.accept('c').is_new


def test_id_counts_before_the_key(bench):
    bench.accept('a', key='one')
    bench.accept('b', key='two')
    assert bench.accept('b', key='one').id == 'b'


def test_order(bench):
    for job_id, priority in zip('abcde', (0, 5, -1, 5, 0), strict=True):
        bench.accept(job_id, priority=priority)
    assert bench.claim_ids(3) == ['b', 'd', 'a']
    assert bench.claim_ids() == ['e', 'c']


def test_order_of_several_types(bench):
    for number, job_id in enumerate('abcdef'):
        bench.accept(job_id, type=f'type{number % 3}', priority=number // 4)
    claim = bench.change('claim', 4, ['type1', 'type0', 'other'])
    assert ([job.id for job in claim.jobs], claim.wait) == (['e', 'a', 'b', 'd'], 0)
    assert bench.states() == dict.fromkeys('abde', 'running') | dict.fromkeys('cf', 'waiting')
    assert bench.journal.reader.waiting_types() == ['type2']


def test_jobs_of_other_types_are_not_read(bench):
    with bench.journal.transaction(bench.now) as jobs:
        for number in range(2000):
            jobs.accept(make_job(f'old{number}', type='removed'))
    bench.accept('new')
    steps = []
    bench.journal._db.set_progress_handler(lambda: steps.append(1), 100)
    assert bench.claim_ids() == ['new']
    assert len(steps) < 10


def test_delay(bench):
    assert bench.accept('a', delay=60).wait == 60
    bench.accept('b', delay=90, priority=9)
    assert bench.get('a').due == NOW + 60
    claim = bench.change('claim', 5, ['convert'])
    assert (claim.jobs, claim.wait) == ([], 60)
    bench.now += 60
    claim = bench.change('claim', 5, ['convert'])
    assert ([job.id for job in claim.jobs], claim.wait) == (['a'], 30)
    bench.now += 60
    assert bench.claim_ids() == ['b']
    assert bench.change('claim', 5, ['convert']).wait is None


def test_many_jobs_become_due(bench):
    with bench.journal.transaction(bench.now) as jobs:
        for number in range(PROMOTED_STEP + 1):
            jobs.accept(make_job(str(number), delay=1))
    bench.now += 5
    claim = bench.change('claim', PROMOTED_STEP + 5, ['convert'])
    assert (len(claim.jobs), claim.wait) == (PROMOTED_STEP, 0)
    assert len(bench.claim()) == 1


def test_expired_jobs_do_not_begin(bench):
    bench.accept('a', expires=10)
    bench.accept('b', expires=20)
    bench.accept('c', expires=10, delay=30)
    bench.now += 10
    assert bench.claim_ids(1) == ['b']
    assert bench.expired == ['a']
    bench.now += 10  # it does not end a job that runs
    assert bench.change('expire') is False
    assert bench.expired == ['c']
    assert bench.states() == {'a': 'expired', 'b': 'running', 'c': 'expired'}
    assert bench.get('c').ended == bench.now
    assert bench.change('retry', 'a') == 'waiting'
    assert bench.claim_ids() == ['a']


def test_job_that_has_begun_does_not_expire(bench):
    """Neither before another attempt, nor after a retry."""
    number, attempt = bench.begin('a', expires=10)
    bench.change('assign', number, attempt, 'worker')
    assert bench.get('a').expires is None
    bench.now += 20
    assert bench.change('change', number, attempt) == 'waiting'
    assert bench.journal.tidy(bench.now) == ([], False)
    [job] = bench.claim()
    assert job.attempt == 2
    bench.change('end', number, 2, 'failed', REPLY)
    bench.change('retry', 'a')
    assert bench.claim_ids() == ['a']


def test_job_that_has_not_reached_a_worker_expires(bench):
    """The broker had it ready for the next free one, and gives it back."""
    number, attempt = bench.begin('a', expires=10)
    bench.change('change', number, attempt)
    bench.now += 20
    assert bench.claim_ids() == []
    assert bench.states() == {'a': 'expired'}


@pytest.mark.parametrize(
    'damage',
    [
        'delete from request where number = 2',
        "update request set frames = x'0000' where number = 2",
        "update request set frames = x'0000000301' where number = 2",
        "update request set frames = 'text' where number = 2",
    ],
)
def test_job_that_cannot_be_read_fails_alone(bench, damage, caplog):
    for job_id in 'abc':
        bench.accept(job_id)
    bench.journal._db.execute(damage)
    assert bench.claim_ids() == ['a', 'c']
    assert bench.expired == ['b']
    assert bench.states() == {'a': 'running', 'b': 'failed', 'c': 'running'}
    assert json.loads(bench.get('b').reply) == [500, UNREADABLE]
    assert bench.get('b').attempt == 0
    assert 'The message of the job b in the journal is damaged' in caplog.text
    bench.journal.tidy(bench.now + 1e9)
    assert bench.states() == {'a': 'running', 'c': 'running'}


@pytest.mark.parametrize('column', ['id', 'user', 'address', 'key', 'owner', 'reply'])
def test_text_that_is_damaged(bench, column):
    """The job begins, and so do the others; clients can read them all."""
    for job_id in 'abc':
        bench.accept(job_id)
    bench.journal._db.execute(f"update job set {column} = cast(x'ff41' as text) where number = 2")
    assert [job.number for job in bench.claim(9)] == [1, 2, 3]
    assert len(bench.states()) == 3
    for job in filter(None, map(bench.get, 'abc')):  # without the one whose id is damaged
        assert json.loads(encode(describe_job(job, bench.now)))['state'] == 'running'


@pytest.mark.skipif(  # the limit is 1 GB, and Python 3.10 has no `setlimit` to lower it
    not hasattr(sqlite3.Connection, 'setlimit'), reason='Python 3.10 cannot lower the limit'
)
def test_message_that_is_too_long_for_sqlite(bench):
    """The change leaves the transaction as it was."""
    bench.journal._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
    with bench.journal.transaction(bench.now) as jobs:
        jobs.accept(make_job('a'))
        with pytest.raises(sqlite3.DataError):
            jobs.accept(make_job('b', frames=[bytes(100_000)]))
        jobs.accept(make_job('c'))
    assert bench.states() == {'a': 'waiting', 'c': 'waiting'}
    assert bench.claim_ids() == ['a', 'c']


def test_many_jobs_expire(bench):
    with bench.journal.transaction(bench.now) as jobs:
        for number in range(2 * EXPIRED_STEP + 1):
            jobs.accept(make_job(str(number), expires=1))
        jobs.accept(make_job('good'))
    bench.now += 5
    claim = bench.change('claim', EXPIRED_STEP, ['convert'])
    assert (claim.jobs, claim.wait) == ([], 0)
    assert len(bench.expired) == EXPIRED_STEP
    assert bench.change('expire') is True
    claim = bench.change('claim', 5, ['convert'])
    assert ([job.id for job in claim.jobs], len(bench.expired)) == (['good'], 1)


def test_another_attempt(bench):
    number, attempt = bench.begin('a')
    assert bench.change('change', number, attempt, delay=30, failures=1) == 'waiting'
    job = bench.get('a')
    assert (job.state, job.attempt, job.failures, job.due) == ('waiting', 1, 1, bench.now + 30)
    assert bench.claim() == []
    assert bench.change('change', number, attempt) is None  # it does not run
    bench.now += 30
    [job] = bench.claim()
    assert (job.number, job.attempt, job.failures) == (number, 2, 1)
    assert bench.change('change', number, 1, failures=9) is None
    assert bench.change('change', number, 2, deaths=1) == 'waiting'
    [job] = bench.claim()
    assert (job.attempt, job.failures, job.deaths) == (3, 1, 1)


def test_end_of_an_old_attempt(bench):
    number, first = bench.begin('a')
    bench.change('change', number, first)
    assert not bench.change('end', number, first, 'failed', REPLY)  # it was counted already
    bench.claim()
    assert not bench.change('end', number, first, 'done', REPLY)
    assert not bench.change('end', number, 9, 'done', REPLY)
    assert not bench.change('end', 9, first, 'done', REPLY)
    assert bench.states() == {'a': 'running'}
    assert bench.change('end', number, 2, 'failed', REPLY, failures=2, deaths=1)
    assert not bench.change('end', number, 2, 'done', b'[200, 2]')
    job = bench.get('a')
    assert (job.state, job.reply, job.failures, job.deaths) == ('failed', REPLY, 2, 1)


def test_late_success_of_an_attempt_that_was_given_up(bench):
    number, attempt = bench.begin('a')
    bench.change('change', number, attempt, delay=60)
    assert bench.change('end', number, attempt, 'done', REPLY)
    bench.now += 60
    assert bench.claim() == []
    assert bench.states() == {'a': 'done'}


def test_large_result(bench):
    number, attempt = bench.begin('a')
    assert bench.change('end', number, attempt, 'done', bytes(MAX_REPLY_SIZE + 1))
    job = bench.get('a')
    [status, text] = json.loads(job.reply)
    assert (job.state, status) == ('failed', 413)
    assert 'store it in a file' in text
    number, attempt = bench.begin('b')
    bench.change('end', number, attempt, 'done', bytes(MAX_REPLY_SIZE))
    assert bench.get('b').state == 'done'


def test_cancel(bench):
    bench.accept('a')
    cancelled = bench.change('cancel', 'a')
    assert (cancelled.state, cancelled.attempt) == ('cancelled', 0)
    assert bench.claim() == []
    assert bench.refuse('cancel', 'a') == 409
    assert bench.refuse('cancel', 'none') == 404
    number, attempt = bench.begin('b')
    cancelled = bench.change('cancel', 'b')
    assert (cancelled.state, cancelled.number, cancelled.attempt) == ('running', number, attempt)
    at = bench.now
    bench.now += 5
    bench.change('cancel', 'b')
    assert bench.get('b').cancel == at  # the first request counts
    assert bench.change('end', number, attempt, 'cancelled', None)
    assert bench.states() == {'a': 'cancelled', 'b': 'cancelled'}


def test_cancelled_job_gets_no_other_attempt(bench):
    number, attempt = bench.begin('a')
    bench.change('cancel', 'a')
    assert bench.change('change', number, attempt, deaths=1) == 'cancelled'
    job = bench.get('a')
    assert (job.state, job.deaths, job.ended) == ('cancelled', 1, bench.now)
    assert bench.change('retry', 'a') == 'waiting'
    [job] = bench.claim()
    assert job.cancel is None


def test_retry(bench):
    number, attempt = bench.begin('a')
    assert bench.refuse('retry', 'a') == 409
    assert bench.refuse('retry', 'none') == 404
    bench.change('end', number, attempt, 'failed', REPLY, failures=4, deaths=3)
    revision = bench.get('a').revision
    assert bench.change('retry', 'a') == 'waiting'
    job = bench.get('a')
    assert (job.attempt, job.failures, job.deaths, job.reply, job.ended) == (1, 0, 0, None, None)
    assert job.revision > revision
    assert bench.refuse('retry', 'a') == 409
    [job] = bench.claim()
    assert job.attempt == 2
    bench.change('end', number, 2, 'done', REPLY)
    assert bench.refuse('retry', 'a') == 409


@pytest.mark.parametrize('method', ['end', 'change', 'cancelled'])
def test_revision_of_the_progress(bench, method):
    """Clients have seen it, and the end has a higher one, also after the clock was set back."""
    bench.accept('a')
    [claimed] = bench.claim()
    seen = claimed.revision + 10**6
    if method == 'end':
        bench.change('end', 1, 1, 'done', REPLY, revision=seen)
    else:
        if method == 'cancelled':
            bench.change('cancel', 'a')
        bench.change('change', 1, 1, revision=seen)
    assert bench.get('a').revision == seen + 1


def test_revision_grows_even_if_the_clock_does_not(bench):
    number, attempt = bench.begin('a')
    revisions = [bench.get('a').revision]
    for _ in range(5):
        bench.now -= 1
        bench.change('change', number, attempt)
        revisions.append(bench.get('a').revision)
        [job] = bench.claim()
        attempt = job.attempt
        revisions.append(job.revision)
    assert revisions == sorted(set(revisions))


def test_owner(bench):
    number, attempt = bench.begin('a')
    assert bench.change('assign', number, attempt, 'worker 7')
    assert not bench.change('assign', number, attempt + 1, 'worker 8')
    assert bench.get('a').owner == 'worker 7'
    bench.now += 5
    bench.reopen()
    [job] = bench.journal.reader.running()
    assert (job.id, job.owner, job.orphaned) == ('a', 'worker 7', bench.now)
    since = bench.now
    bench.now += 5
    bench.reopen()  # the time for which nobody has it counts from the first broker on
    assert bench.get('a').orphaned == since
    bench.now -= 3600
    bench.reopen()  # a clock that is set back between two brokers does not change that
    assert bench.get('a').orphaned == bench.now
    assert bench.change('assign', number, attempt, 'worker 9')
    assert bench.get('a').orphaned is None


def test_numbers_are_not_used_again(bench):
    number, attempt = bench.begin('a')
    bench.change('end', number, attempt, 'done', REPLY)
    bench.journal.tidy(bench.now + 1e9)
    assert bench.states() == {}
    assert bench.begin('b') == (number + 1, 1)


@pytest.mark.parametrize('job', [make_job('a', key='secret'), JobRecord(*['secret'] * 24)])
def test_no_arguments_in_texts(job):
    text = repr(job)
    assert type(job).__name__ in text
    assert 'a.mov' not in text
    assert 'frames' not in text
    assert 'key' not in text


# The clock


@pytest.mark.parametrize('seconds', [-3600, 3600])
def test_clock_that_is_set(bench, seconds):
    bench.accept('now')
    bench.accept('later', delay=60)
    bench.accept('short', expires=60)
    number, attempt = bench.begin('again', priority=1)
    bench.change('change', number, attempt, delay=60)
    due = bench.get('later').due
    bench.set_clock(seconds)
    assert bench.get('later').due == due + seconds
    assert bench.claim_ids(1) == ['now']
    assert bench.change('claim', 0, ()).wait == 0.0
    assert bench.change('claim', 9, ['other']).wait == 60
    bench.now += 60
    assert sorted(bench.claim_ids()) == ['again', 'later']
    assert bench.expired == ['short']


@pytest.mark.parametrize('event', ['accepted', 'running', 'ended'])
def test_clock_set_back_while_nothing_runs(bench, event):
    """The journal knows the time of its last event."""
    bench.now -= 60
    bench.accept('later', delay=120)
    bench.now += 60
    if event != 'accepted':
        bench.now -= 60
        number, attempt = bench.begin('a')
        bench.now += 60
        bench.change('change', number, attempt)
        bench.claim()
        if event == 'ended':
            bench.change('end', number, 2, 'done', REPLY)
    else:
        bench.accept('a')
    bench.now -= 3600
    bench.reopen()
    assert bench.change('claim', 9, ['other']).wait == 60


def test_clock_set_back_once_counts_once(bench):
    """The next brokers go on from there, also with jobs that were submitted meanwhile."""
    bench.change('end', *bench.begin('old'), 'done', REPLY)
    bench.now -= 3600
    bench.reopen()
    bench.accept('new', delay=1800, expires=2700)
    for _ in range(3):
        bench.now += 60
        bench.reopen()
    assert bench.get('new').due == bench.now + 1620
    assert bench.get('new').expires == bench.now + 2520
    bench.now += 1620
    bench.journal.tidy(bench.now)
    assert bench.claim_ids() == ['new']


def test_clock_that_is_slightly_behind(bench):
    """It was not set: clocks are corrected by so much all the time."""
    bench.accept('a', delay=60)
    bench.now -= CLOCK_SLACK
    bench.reopen()
    assert bench.get('a').due == NOW + 60
    bench.now -= CLOCK_SLACK / 2
    bench.reopen()
    assert bench.get('a').due == bench.now + 60


def test_clock_that_was_in_another_century(bench):
    """Jobs that ended at that time are removed, too."""
    bench.set_clock(73 * 365 * 86400)
    bench.change('end', *bench.begin('old'), 'done', REPLY)
    bench.close()
    bench.now = NOW
    bench.reopen()
    assert bench.get('old').ended == bench.get('old').created == NOW
    bench.reopen()
    bench.accept('new', delay=60)
    bench.now += 8 * 86400
    bench.journal.tidy(bench.now)
    assert bench.states() == {'new': 'waiting'}


def test_clock_that_is_set_while_the_journal_cannot_be_written(bench):
    """The next transaction writes it."""
    bench.accept('a', delay=60)
    bench.set_clock(3600)
    assert bench.refuse('cancel', 'none') == 404
    bench.claim()
    bench.reopen()
    assert bench.get('a').due == bench.now + 60
