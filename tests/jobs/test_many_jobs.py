# SPDX-License-Identifier: ZPL-2.1
"""With many jobs: nothing reads them all, the file does not grow for ever, neither does memory."""

import os
import subprocess
import sys
from contextlib import suppress
from functools import partial

import pytest

from journals import NOW, Bench, make_job
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs import upkeep
from pyams_zmq.jobs.pruning import PRUNED_STEP
from pyams_zmq.jobs.reader import MAX_PAGE

COUNT = 4000
_STEPS = 100  # instructions of sqlite between two calls of the handler


def fill(bench, count=COUNT, **options):
    """Make jobs that have ended, and as many that wait: one half is delayed, and all expire."""
    with bench.journal.transaction(bench.now) as jobs:
        for number in range(count):
            jobs.accept(make_job(f'{bench.now}-{number}', **options))
        for number, job in enumerate(jobs.claim(count, ['convert']).jobs):
            state = 'failed' if number % 1000 == 0 else 'done'
            jobs.end(job.number, job.attempt, state, b'[200, null]')
        for number in range(count):
            jobs.accept(
                make_job(
                    f'{bench.now}-{number}-waits',
                    type=f'type{number % 3}',
                    delay=number % 2 and 1000 + number,
                    expires=1e6 + number,
                )
            )


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    """Return a journal with many jobs."""
    bench = Bench(tmp_path_factory.mktemp('many') / 'jobs')
    fill(bench)
    yield bench
    bench.close()


def count_steps(db, function):
    """Return how many hundreds of instructions of sqlite a function takes, and its result."""
    steps = []
    db.set_progress_handler(lambda: steps.append(1), _STEPS)
    try:
        return function(), len(steps)
    finally:
        db.set_progress_handler(None, 0)


@pytest.mark.parametrize(
    ('filters', 'found'),
    [
        ({}, MAX_PAGE),
        ({'state': 'done'}, MAX_PAGE),
        ({'state': 'failed'}, 4),
        ({'type': 'convert'}, MAX_PAGE),
        ({'type': 'none'}, 0),
        ({'state': 'failed', 'type': 'convert'}, 4),
        ({'state': 'failed', 'type': 'type1'}, 0),
        ({'state': 'waiting', 'type': 'type1'}, MAX_PAGE),
        ({'state': 'running'}, 0),
        ({'limit': 7}, 7),
        ({'limit': -1}, 0),
        ({'limit': 1000}, MAX_PAGE),
    ],
)
@pytest.mark.parametrize('before', [None, f'{NOW}-3999'])
def test_pages_read_few_rows(full, filters, found, before):
    reader = full.journal.reader
    jobs, steps = count_steps(reader._db, partial(reader.page, before=before, **filters))
    assert steps < 80
    numbers = [job.number for job in jobs]
    assert numbers == sorted(numbers, reverse=True)
    if before is None:
        assert len(jobs) == found
    else:
        assert not numbers or max(numbers) < COUNT


@pytest.mark.parametrize(
    ('filters', 'index'),
    [
        ({}, None),
        ({'state': 'done'}, 'job_by_state'),
        ({'type': 'convert'}, 'job_by_type'),
        ({'state': 'failed', 'type': 'convert'}, 'job_state'),
    ],
)
@pytest.mark.parametrize('before', [None, f'{NOW}-3999'])
def test_pages_have_an_index_in_their_order(full, filters, index, before):
    reader = full.journal.reader
    queries = []
    reader._db.set_trace_callback(queries.append)
    try:
        reader.page(before=before, **filters)
    finally:
        reader._db.set_trace_callback(None)
    plan = [row[-1] for row in reader._db.execute(f'explain query plan {queries[-1]}')]
    assert len(plan) == 1  # nothing is sorted after that
    if index is not None:
        assert f'SEARCH job USING INDEX {index} ' in plan[0]
    else:
        assert plan[0].startswith('SCAN' if before is None else 'SEARCH')


@pytest.mark.parametrize('name', ['running', 'waiting_types', 'last_time'])
def test_other_queries_read_few_rows(full, name):
    reader = full.journal.reader
    result, steps = count_steps(reader._db, getattr(reader, name))
    assert steps < 10
    assert result == {'running': [], 'waiting_types': ['type0', 'type1', 'type2']}.get(name, NOW)


@pytest.mark.parametrize(
    ('method', 'args'),
    [
        ('accept', [make_job('one', key='key')]),
        ('claim', [0, ['convert']]),
        ('claim', [10, ['convert', 'none']]),
        ('claim', [5, ['type1', 'type2']]),
        ('expire', []),
        ('cancel', [f'{NOW}-7-waits']),
        ('retry', [f'{NOW}-1000']),
        ('assign', [7, 1, 'me']),
        ('end', [7, 1, 'done', b'']),
        ('change', [7, 1]),
    ],
)
def test_changes_read_few_rows(full, method, args):
    def change():
        with suppress(InterruptedError), full.journal.transaction(full.now) as jobs:
            getattr(jobs, method)(*args)
            raise InterruptedError  # the next test finds the same jobs

    assert count_steps(full.journal._db, change)[1] < 30


def test_no_work_reads_few_rows(full):
    journal = full.journal
    result, steps = count_steps(journal._db, partial(journal.tidy, full.now))
    assert result == ([], False)
    assert steps < 10


def test_reader_without_a_row(full):
    reader = full.journal.reader
    assert reader.get('none') is None
    with pytest.raises(ZMQMessageError, match='404'):
        reader.page(before='none')
    with pytest.raises(ZMQMessageError, match='500'):
        reader.get('\ud800')


def test_old_jobs_are_removed(path):
    bench = Bench(path, keep=100)
    fill(bench, 1000, frames=[bytes(9000)])
    bench.journal.checkpoint()
    bench.now += 100
    bench.begin('new')
    assert bench.journal.tidy(bench.now) == ([], False)  # they are not older than it says
    size = path.stat().st_size
    bench.now += 1
    steps = 0
    while True:
        before = bench.journal.counts.states
        expired, has_more = bench.journal.tidy(bench.now)
        bench.journal.checkpoint()
        steps += 1
        assert not expired
        removed = sum(before.values()) - sum(bench.journal.counts.states.values())
        assert removed <= PRUNED_STEP
        if not has_more:
            break
    counts = bench.journal.counts.states
    assert (counts['done'], counts['failed'], counts['waiting']) == (0, 0, 1000)
    assert 1000 / PRUNED_STEP < steps < 100  # some of them give pages back
    bench.reopen()
    assert bench.journal.counts.states == counts
    assert path.stat().st_size < 0.7 * size
    bench.close()


def test_jobs_that_wait_are_not_removed(path):
    bench = Bench(path, keep=1)
    bench.begin('running')
    bench.accept('waiting')
    bench.now += 1e9
    bench.journal.tidy(bench.now)
    assert bench.states() == {'running': 'running', 'waiting': 'waiting'}
    bench.close()


def test_large_jobs_are_removed_in_smaller_steps(path):
    bench = Bench(path, keep=1)
    for name in 'abcde':
        number, attempt = bench.begin(name, frames=[bytes(3 << 20)])
        bench.change('end', number, attempt, 'done', bytes(1 << 20))
    bench.now += 2
    left = []
    while bench.journal.tidy(bench.now)[1]:
        left.append(bench.journal.counts.states['done'])
    assert left == [4, 3, 2, 1]
    bench.close()


def test_space_is_used_again(path):
    bench = Bench(path, keep=1)
    sizes = []
    for _ in range(6):
        with bench.journal.transaction(bench.now) as jobs:
            for number in range(200):
                jobs.accept(make_job(f'{bench.now}-{number}', frames=[bytes(5000)]))
            for job in jobs.claim(200, ['convert']).jobs:
                jobs.end(job.number, job.attempt, 'done', b'')
        bench.now += 2
        while bench.journal.tidy(bench.now)[1]:
            bench.journal.checkpoint()
        sizes.append(path.stat().st_size)
    assert max(sizes[2:]) <= 1.1 * sizes[1]
    bench.close()


@pytest.fixture
def small_log(monkeypatch):
    """Return the size of a log after which it is copied, smaller than usual."""
    monkeypatch.setattr(upkeep, 'WAL_SIZE', 1 << 18)
    monkeypatch.setattr(upkeep, '_CHANGES', 50)
    monkeypatch.setattr(upkeep, '_WAL_PAGES', 300)
    return 1 << 18


def test_write_ahead_log_is_bounded(path, small_log):
    bench = Bench(path)
    log = path.with_name('converter.jobs-wal')
    sizes = []
    for number in range(200):
        bench.accept(str(number))
        bench.journal.checkpoint()
        sizes.append(log.stat().st_size)
    assert max(sizes) < 50 * 10 * 4096  # pages of a change
    for number in range(50):
        bench.accept(f'large {number}', frames=[bytes(1 << 16)])
        bench.journal.checkpoint()
    assert log.stat().st_size < 8 * small_log
    bench.close()


def test_log_shrinks_after_a_reader_has_left(path, small_log):
    """A reader that stays keeps the log growing; the next checkpoints after it make it short."""
    bench = Bench(path)
    bench.journal._db.execute(f'pragma journal_size_limit = {small_log}')
    bench.accept('first')
    other = bench.journal._connect('ro')
    rows = other.execute('select id from job union all select type from job')
    rows.fetchone()
    for number in range(50):
        bench.accept(f'large {number}', frames=[bytes(1 << 16)])
    bench.journal.checkpoint()
    log = path.with_name('converter.jobs-wal')
    assert log.stat().st_size > 8 * small_log
    rows.close()
    for number in range(20):
        bench.accept(f'last {number}', frames=[bytes(1 << 16)])
        bench.journal.checkpoint()
    assert log.stat().st_size <= 2 * small_log
    bench.close()


MEMORY = """
import resource, sys
from journals import Bench, make_job

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

bench = Bench(sys.argv[1])
def fill(start, count):
    for first in range(start, start + count, 1000):
        with bench.journal.transaction(bench.now, is_durable=False) as jobs:
            for number in range(first, first + 1000):
                jobs.accept(make_job(str(number)))
        bench.journal.checkpoint()
fill(0, 5000)
before = peak()
fill(5000, 25_000)
print(peak() - before)
bench.close()
"""


def test_memory_does_not_grow_with_jobs_that_wait(path):
    support = os.path.join(os.path.dirname(__file__), '..', 'support')
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', MEMORY, path],
        env={**os.environ, 'PYTHONPATH': support},
        check=True,
        capture_output=True,
    )
    assert int(result.stdout) < 6 * 1024  # KiB


def test_benchmark(tmp_path):
    program = os.path.join(os.path.dirname(__file__), '..', '..', 'benchmarks', 'journal.py')
    counts = ('--jobs', '64', '--ended', '1000', '--folder', tmp_path)
    command = [sys.executable, '-W', 'ignore', program, *counts]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 'left: 0 jobs' in result.stdout
