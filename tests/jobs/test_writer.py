# SPDX-License-Identifier: ZPL-2.1
"""The thread that writes: one transaction for all that waits, and what cannot be written."""

import asyncio
import logging
import os
import sqlite3
import threading
from contextlib import closing, suppress
from threading import Event

import pytest

from checks import TIMEOUT, wait_until
from journals import NOW, Bench, Loop, make_job, writing
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs import writer as writer_module
from pyams_zmq.jobs.journal import Journal
from pyams_zmq.jobs.writer import JournalWriter
from pyams_zmq.wire.clock import boottime

LOGGER = 'PyAMS (zmq)'
REPLY = b'[200, null]'


class SlowWriter(JournalWriter):
    """A writer that waits before a transaction until a test lets it go on.

    :ivar reached: set when it waits
    :ivar go: set by the test
    """

    def __init__(self, *args, **kwargs):
        self.reached, self.go = Event(), Event()
        self.transactions = 0
        super().__init__(*args, **kwargs)

    def _reach(self, step):
        if step == 'before begin':
            self.reached.set()
            assert self.go.wait(TIMEOUT)
        elif step == 'committed':
            self.transactions += 1


def trace(journal):
    """Return a list to which the statements of the writer are added."""
    statements = []
    journal._db.set_trace_callback(lambda text: statements.append(text.split('(')[0].lower()))
    return statements


def test_changes_without_an_answer(path):
    """What has become of jobs does not count: a full disk keeps it."""
    with writing(path, SlowWriter) as (_journal, writer, loop):
        outcomes = []
        writer.accept(make_job('a'), outcomes.append)
        writer.cancel('a', outcomes.append)
        writer.retry('b', outcomes.append)
        writer.end(1, 1, 'done', REPLY, outcomes.append)
        assert writer.unanswered == 3
        writer.go.set()
        while len(outcomes) < 4:
            loop.turn()
        assert writer.unanswered == 0


def test_life_of_a_job(path):
    with writing(path) as (journal, writer, loop):
        accepted = loop.wait(writer.accept, make_job('a'))
        assert (accepted.id, accepted.is_new) == ('a', True)
        [job] = loop.wait(writer.claim, 3, ['convert'], owner='broker').jobs
        writer.assign(job.number, job.attempt, 'worker')
        assert loop.wait(writer.change, job.number, job.attempt, failures=1) == 'waiting'
        [job] = loop.wait(writer.claim, 3, ['convert']).jobs
        assert loop.wait(writer.cancel, 'a').state == 'running'
        assert loop.wait(writer.end, job.number, 2, 'cancelled', None, deaths=1)
        assert loop.wait(writer.cancel, 'a').status == 409
        assert loop.wait(writer.retry, 'a') == 'waiting'
        assert loop.wait(writer.cancel, 'none').status == 404
        assert journal.counts.states['waiting'] == 1
        assert journal.reader.get('a').state == 'waiting'
        assert writer.problem == ''


def test_loop_of_asyncio(path):
    async def run():
        loop = asyncio.get_running_loop()
        journal = Journal(str(path))
        writer = JournalWriter(journal, loop.call_soon_threadsafe)
        futures = [loop.create_future() for _ in range(50)]
        for number, future in enumerate(futures):
            writer.accept(make_job(str(number)), future.set_result)
        assert [(await future).id for future in futures] == [str(number) for number in range(50)]
        assert await asyncio.to_thread(writer.close)
        journal.close()

    asyncio.run(run())


def test_one_transaction_for_all_that_waits(path):
    with writing(path, SlowWriter) as (journal, writer, loop):
        statements = trace(journal)
        outcomes = []
        writer.accept(make_job('first'), outcomes.append)
        writer.reached.wait()
        for number in range(100):
            writer.accept(make_job(str(number)), outcomes.append)
        writer.go.set()
        loop.turn()
        assert [accepted.id for accepted in outcomes] == ['first']
        loop.turn()
        assert [accepted.id for accepted in outcomes[1:]] == [str(number) for number in range(100)]
        assert statements.count('begin immediate') == writer.transactions == 2


def test_order_in_a_transaction(path):
    """Changes keep their order; claims come last, so that they find what has been freed."""
    with writing(path, SlowWriter) as (_journal, writer, loop):
        outcomes = []
        writer.claim(9, ['convert'], lambda claim: outcomes.append([job.id for job in claim.jobs]))
        writer.reached.wait()
        writer.go.set()
        loop.turn()
        writer.go.clear()
        writer.reached.clear()
        writer.cancel('none', outcomes.append)
        writer.reached.wait()
        writer.claim(9, ['convert'], lambda claim: outcomes.append([job.id for job in claim.jobs]))
        for job_id in 'abc':
            writer.accept(make_job(job_id), outcomes.append)
        writer.cancel('b', outcomes.append)
        writer.go.set()
        loop.turn()
        loop.turn()
        assert outcomes[0] == []
        assert [accepted.id for accepted in outcomes[2:5]] == ['a', 'b', 'c']
        assert outcomes[5].state == 'cancelled'
        assert outcomes[6] == ['a', 'c']


def test_what_waits_for_the_disk(path):
    """Only what a client was told has to survive a power failure."""
    with writing(path) as (journal, writer, loop):
        statements = trace(journal)
        loop.wait(writer.accept, make_job('a'))
        [job] = loop.wait(writer.claim, 1, ['convert']).jobs
        loop.wait(writer.change, job.number, job.attempt)
        [job] = loop.wait(writer.claim, 1, ['convert']).jobs
        loop.wait(writer.end, job.number, job.attempt, 'failed', REPLY)
        loop.wait(writer.retry, 'a')
        loop.wait(writer.cancel, 'a')
        levels = [text for text in statements if text.startswith('pragma synchronous')]
        assert [level.split()[-1] for level in levels] == ['full', 'normal', 'full']


def test_large_batches_are_divided(path, monkeypatch):
    monkeypatch.setattr(writer_module, '_BATCH', 10)
    with writing(path, SlowWriter) as (_journal, writer, loop):
        outcomes = []
        for number in range(25):
            writer.accept(make_job(str(number)), outcomes.append)
        writer.go.set()
        while len(outcomes) < 25:
            loop.turn()
        assert writer.transactions >= 3


def test_backlog_is_bounded(path, monkeypatch):
    monkeypatch.setattr(writer_module, 'MAX_BACKLOG', 100_000)
    with writing(path, SlowWriter) as (_journal, writer, loop):
        outcomes = []
        large = make_job('large', frames=[bytes(200_000)])
        writer.accept(large, outcomes.append)  # alone, it may be larger
        for method, what in (
            (writer.accept, make_job('a')),
            (writer.cancel, 'a'),
            (writer.retry, 'a'),
        ):
            with pytest.raises(ZMQMessageError, match='503 The disk of the journal is too slow'):
                method(what, outcomes.append)
        writer.assign(1, 1, 'worker')  # what has happened is not refused
        writer.go.set()
        loop.turn()
        assert loop.wait(writer.accept, make_job('a')).is_new
        assert len(outcomes) == 1


@pytest.mark.parametrize('method', ['accept', 'cancel', 'retry'])
def test_client_that_has_much_in_the_backlog(path, monkeypatch, method):
    """It leaves as much to others as it has."""
    monkeypatch.setattr(writer_module, 'MAX_BACKLOG', 100_000)
    what = make_job('a') if method == 'accept' else 'none'
    with writing(path, SlowWriter) as (_journal, writer, loop):
        outcomes = []
        for _turn in range(2):  # all that was written counts no more
            count = 0
            with suppress(ZMQMessageError):
                while count < 100:
                    getattr(writer, method)(what, outcomes.append, client='greedy')
                    count += 1
            assert 40 < count <= 50
            for each in 'accept', 'cancel', 'retry':
                other = make_job('b') if each == 'accept' else 'none'
                getattr(writer, each)(other, outcomes.append, client='modest')
            writer.go.set()
            while len(outcomes) < count + 3:
                loop.turn()
            outcomes.clear()
            writer.go.clear()


@pytest.mark.parametrize(
    'options',
    [
        {'job_id': 'a\ud800'},
        {'job_id': None},
        {'job_id': 'a', 'priority': 1 << 70},
        {'job_id': 'a', 'key': ['x']},
        {'job_id': 'a', 'frames': ['text']},
        {'job_id': 'a', 'delay': 'long'},
    ],
)
def test_bad_job_fails_alone(path, options, caplog):
    with writing(path, SlowWriter) as (journal, writer, loop):
        outcomes = []
        bad = make_job(**options)
        for job in (make_job('first'), bad, make_job('last')):
            writer.accept(job, outcomes.append)
        writer.go.set()
        while len(outcomes) < 3:
            loop.turn()
        first, error, last = outcomes
        assert first.is_new
        assert last.is_new
        assert (error.status, error.text[:27]) == (400, 'The job cannot be written: ')
        assert [job.id for job in journal.reader.page()] == ['last', 'first']
        assert journal.counts.states['waiting'] == 2
    assert caplog.messages[0].startswith('A job cannot be written')


def test_bad_callback(path, caplog):
    with writing(path) as (_journal, writer, loop):
        writer.accept(make_job('a'), lambda _outcome: 1 / 0)
        assert loop.wait(writer.accept, make_job('b')).is_new
    assert 'An outcome of the journal could not be handled' in caplog.text


def test_expired_jobs_are_reported(path):
    expired = []
    with writing(path, on_expired=expired.extend) as (_journal, writer, loop):
        loop.wait(writer.accept, make_job('a', expires=0))
        assert loop.wait(writer.claim, 1, ['convert']).jobs == []
        loop.wait(writer.accept, make_job('b', expires=0, type='other'))
        while expired != ['a', 'b']:  # nobody claims it
            loop.turn()


def test_nobody_asks_for_expired_jobs(path):
    with writing(path) as (journal, writer, loop):
        loop.wait(writer.accept, make_job('a', expires=0))
        assert loop.wait(writer.claim, 1, ['convert']).jobs == []
        assert journal.counts.states['expired'] == 1


def test_old_jobs_are_removed(path, monkeypatch):
    monkeypatch.setattr(writer_module, '_TIDY_INTERVAL', 0.02)
    monkeypatch.setattr(writer_module, '_TIDY_PAUSE', 0.0)
    bench = Bench(path)
    with bench.journal.transaction(bench.now) as jobs:
        for number in range(250):
            jobs.accept(make_job(str(number)))
        for job in jobs.claim(250, ['convert']).jobs:
            jobs.end(job.number, job.attempt, 'done', REPLY)
    bench.close()
    clock = bench.now
    with writing(path, clock=lambda: clock, steady=lambda: clock) as (journal, writer, loop):
        assert loop.wait(writer.claim, 1, ['convert']).jobs == []
        assert journal.counts.states['done'] == 250
        clock += 8 * 86400
        wait_until(lambda: journal.counts.states['done'] == 0)


def test_error_of_the_upkeep_is_harmless(path, caplog, monkeypatch):
    monkeypatch.setattr(writer_module, '_TIDY_INTERVAL', 0.01)
    caplog.set_level(logging.DEBUG, LOGGER)
    with writing(path) as (journal, writer, loop):
        monkeypatch.setattr(journal, 'tidy', lambda _now: journal._db.execute('nonsense'))
        wait_until(lambda: 'cannot be tidied' in caplog.text)
        assert loop.wait(writer.accept, make_job('a')).is_new


# The clock


class Clock:
    """The clock of a system.

    :ivar shift: seconds by which it was set
    :ivar passed: seconds in which the machine has slept
    """

    def __init__(self):
        self.shift = self.passed = 0.0
        self.start = boottime()

    def __call__(self):
        return NOW + self.steady() - self.start + self.shift

    def steady(self):
        return boottime() + self.passed


def test_clock_set_back_an_hour(path):
    clock = Clock()
    with writing(path, clock=clock, steady=clock.steady) as (journal, writer, loop):
        loop.wait(writer.accept, make_job('now'))
        loop.wait(writer.accept, make_job('later', delay=60))
        loop.wait(writer.accept, make_job('never', delay=3600, expires=3000))
        clock.shift -= 3600
        claim = loop.wait(writer.claim, 9, ['convert'])
        assert [job.id for job in claim.jobs] == ['now']
        assert claim.wait < 60
        clock.passed += 60
        claim = loop.wait(writer.claim, 9, ['convert'])
        assert [job.id for job in claim.jobs] == ['later']
        clock.shift -= 30
        assert 3480 < loop.wait(writer.claim, 9, ['convert']).wait < 3540
        assert journal.counts.states['expired'] == 0


@pytest.mark.parametrize('steps', [[3600], [3600, -3600], [-3600, 3600], [-86400, 90000]])
def test_clock_that_is_set(path, steps):
    """A job neither begins nor expires earlier or later, also with the next broker."""
    clock = Clock()
    with writing(path, clock=clock, steady=clock.steady) as (_journal, writer, loop):
        loop.wait(writer.accept, make_job('a', delay=1800, expires=2400))
        for step in steps:
            clock.shift += step
            assert 1500 < loop.wait(writer.claim, 9, ['convert']).wait <= 1800
    with writing(path, clock=clock, steady=clock.steady) as (journal, writer, loop):
        assert 1500 < loop.wait(writer.claim, 9, ['convert']).wait <= 1800
        assert 1500 < journal.reader.get('a').due - clock() <= 1800
        clock.passed += 1800
        assert [job.id for job in loop.wait(writer.claim, 9, ['convert']).jobs] == ['a']


@pytest.mark.parametrize('step', [-0.2, 0.2])
def test_small_steps_of_the_clock_add_up(path, step):
    clock = Clock()
    with writing(path, clock=clock, steady=clock.steady) as (_journal, writer, loop):
        loop.wait(writer.accept, make_job('a', delay=10_000))
        clock.shift += step
        for _ in range(100):
            clock.shift += step
            wait = loop.wait(writer.claim, 1, ['convert']).wait
        assert wait < 10_000 + 0.8
        assert wait > 10_000 - TIMEOUT


# The end


def test_close_writes_what_waits(path):
    loop = Loop()
    journal = Journal(str(path))
    writer = SlowWriter(journal, loop.posted.put)
    outcomes = []
    for number in range(5):
        writer.accept(make_job(str(number)), outcomes.append)
    writer.go.set()
    assert writer.close()
    assert writer.close()
    for method, args in ((writer.accept, [make_job('x')]), (writer.cancel, ['0'])):
        with pytest.raises(ZMQMessageError, match='503'):
            method(*args, outcomes.append)
    while not loop.posted.empty():
        loop.turn()
    assert len(outcomes) == 5
    journal.close()
    bench = Bench(path)
    assert len(bench.states()) == 5
    bench.close()


def test_close_while_the_disk_hangs(path):
    journal = Journal(str(path))
    writer = SlowWriter(journal, Loop().posted.put)
    writer.accept(make_job('a'), print)
    assert writer.close(0.01 - writer_module._JOIN_SLACK) is False
    writer.go.set()
    assert writer.close()
    journal.close()


def test_loop_that_is_closed(path):
    loop = asyncio.new_event_loop()
    loop.close()
    journal = Journal(str(path))
    writer = JournalWriter(journal, loop.call_soon_threadsafe)
    writer.accept(make_job('a'), print)
    assert writer.close()
    assert journal.counts.states['waiting'] == 1
    journal.close()


def test_writer_in_a_fork(path):
    with writing(path) as (_journal, writer, loop):
        loop.wait(writer.accept, make_job('a'))
        pid = os.fork()
        if pid == 0:
            try:
                writer.accept(make_job('b'), print)
            except ZMQMessageError as error:
                os._exit(error.status - 500)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


# A journal that cannot be written


def test_database_that_is_locked(path, monkeypatch, caplog):
    monkeypatch.setattr('pyams_zmq.jobs.journal_file.BUSY_TIMEOUT', 0.01)
    monkeypatch.setattr(writer_module, '_RETRY_PAUSE', 0.01)
    with writing(path) as (journal, writer, loop):
        loop.wait(writer.accept, make_job('a'))
        [job] = loop.wait(writer.claim, 1, ['convert']).jobs
        outcomes = []
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute('begin immediate')
            writer.end(job.number, job.attempt, 'done', REPLY, outcomes.append)
            refused = loop.wait(writer.accept, make_job('b'))
            assert (refused.status, 'database is locked' in refused.text) == (507, True)
            assert loop.wait(writer.cancel, 'a').status == 507
            assert 'database is locked' in writer.problem
            wait_until(lambda: writer.is_stuck)
            assert journal.reader.get('a').state == 'running'
            claimed = []
            writer.claim(1, ['convert'], claimed.append)
            assert not outcomes
            other.execute('rollback')
        while not claimed:
            loop.turn()
        assert outcomes == [True]
        wait_until(lambda: not writer.is_stuck)
        assert journal.reader.get('a').state == 'done'
        assert loop.wait(writer.accept, make_job('b')).is_new
    assert [record.levelname for record in caplog.records] == ['ERROR', 'WARNING']
    assert 'can be written again' in caplog.text


def test_changes_that_are_given_up(path, monkeypatch, caplog):
    """The process ends while the journal cannot be written."""
    monkeypatch.setattr('pyams_zmq.jobs.journal_file.BUSY_TIMEOUT', 0.01)
    monkeypatch.setattr(writer_module, '_RETRY_PAUSE', 0.01)
    loop = Loop()
    journal = Journal(str(path))
    writer = JournalWriter(journal, loop.posted.put)
    loop.wait(writer.accept, make_job('a'))
    [job] = loop.wait(writer.claim, 1, ['convert']).jobs
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute('begin immediate')
        writer.end(job.number, job.attempt, 'done', REPLY)
        assert writer.close(0.1)
    journal.close()
    assert 'lacks 1 changes, which could not be written: database is locked' in caplog.text
    bench = Bench(path)
    assert bench.states() == {'a': 'running'}
    bench.close()


def test_only_new_jobs_are_refused_without_room_for_them(path, monkeypatch):
    """Cancels and retries in the same transaction need less."""
    with writing(path, SlowWriter) as (journal, writer, loop):
        writer.go.set()
        for job_id in ('a', 'b'):
            loop.wait(writer.accept, make_job(job_id))
        loop.wait(writer.cancel, 'b')
        monkeypatch.setattr(journal, 'check_room', lambda: os.statvfs(path / 'none'))
        writer.go.clear()
        writer.reached.clear()
        writer.cancel('none', print)
        writer.reached.wait()
        outcomes, claims = [], []
        for method, what in (
            *((writer.cancel, 'a'), (writer.accept, make_job('new')), (writer.retry, 'b')),
            *((writer.accept, make_job('newer')),),
        ):
            method(what, outcomes.append)
        writer.claim(1, ['convert'], claims.append)
        writer.go.set()
        while not claims:
            loop.turn()
        assert [getattr(each, 'status', each) for each in outcomes[:2]] == [507, 507]
        assert (outcomes[2].state, outcomes[3]) == ('cancelled', 'waiting')
        assert [job.id for job in claims[0].jobs] == ['b']
        assert loop.wait(writer.accept, make_job('alone')).status == 507
        assert writer.problem
        monkeypatch.undo()
        assert loop.wait(writer.accept, make_job('new')).is_new
        wait_until(lambda: not writer.problem)


def test_no_room_in_a_journal_that_is_nearly_full(path, monkeypatch):
    """Only if its size was the problem, it has to become smaller."""
    with writing(path) as (journal, writer, loop):
        loop.wait(writer.accept, make_job('large', frames=[bytes(400_000)]))
        journal._size = int(journal._upkeep.used / 0.97)
        monkeypatch.setattr(journal, 'check_room', lambda: os.statvfs(path / 'none'))
        assert loop.wait(writer.accept, make_job('a')).status == 507
        assert writer.problem
        assert not writer.is_stuck  # the ends of jobs can be written
        monkeypatch.undo()
        assert loop.wait(writer.accept, make_job('a')).is_new
        wait_until(lambda: not writer.problem)


def test_file_that_was_removed(path):
    with writing(path) as (_journal, writer, loop):
        loop.wait(writer.accept, make_job('a'))
        path.rename(path.with_name('moved'))
        refused = loop.wait(writer.accept, make_job('b'))
        assert (refused.status, 'No such file' in refused.text) == (507, True)
        assert str(path) not in refused.text  # clients read it
        assert str(path) in writer.problem
        path.with_name('moved').rename(path)
        assert loop.wait(writer.accept, make_job('b')).is_new
        wait_until(lambda: not writer.problem)


def test_no_memory(path, monkeypatch):
    with writing(path) as (_journal, writer, loop):
        job = make_job('a')
        monkeypatch.setattr('pyams_zmq.jobs.job_table.pack_frames', run_out_of_memory)
        refused = loop.wait(writer.accept, job)
        assert (refused.status, 'MemoryError' in refused.text) == (507, True)
        monkeypatch.undo()
        assert loop.wait(writer.accept, job).is_new


def run_out_of_memory(_frames):
    raise MemoryError


def test_threads_end(path):
    before = threading.active_count()
    with writing(path):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
