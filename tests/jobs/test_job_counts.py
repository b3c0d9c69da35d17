# SPDX-License-Identifier: ZPL-2.1
"""The numbers of jobs by type and state, and the removal of those that have ended."""

import pytest

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.counts import MAX_TYPES, JobCounts
from pyams_zmq.jobs.job_messages import read_age
from pyams_zmq.jobs.pruning import PRUNED_SIZE, PRUNED_STEP

REPLY = b'[200, "a.webm"]'


def test_types_follow_the_jobs(bench):
    bench.accept('a')
    bench.accept('c', type='index')
    [job] = bench.claim(types=('index',))
    number, attempt = job.number, job.attempt
    bench.accept('b', type='index')
    counts = bench.journal.counts
    assert counts.types == {'convert': {'waiting': 1}, 'index': {'waiting': 1, 'running': 1}}
    bench.change('end', number, attempt, 'failed', REPLY)
    bench.change('retry', 'c')
    bench.change('cancel', 'a')
    assert counts.types == {'convert': {'cancelled': 1}, 'index': {'waiting': 2}}
    [job] = bench.claim(types=('index',))
    bench.change('change', job.number, job.attempt)
    bench.accept('d', expires=1)
    bench.now += 2
    bench.journal.tidy(bench.now)
    assert counts.types == {'convert': {'cancelled': 1, 'expired': 1}, 'index': {'waiting': 2}}
    bench.reopen()
    assert bench.journal.counts.types == counts.types
    bench.states()


def test_many_types():
    names = [f'type{number:03}' for number in range(MAX_TYPES + 2)]
    counts = JobCounts({(name, 'waiting'): 1 for name in names})
    types = counts.types
    assert list(types) == ['type000', *names[1:MAX_TYPES], '*']
    assert types['*'] == {'waiting': 2}
    assert counts.states['waiting'] == len(names)


def end_jobs(bench, count, size=0):
    for number in range(count):
        begun = bench.begin(f'job{number}', frames=[b'x' * size])
        bench.change('end', *begun, 'done', REPLY)


def test_prune_the_oldest_ones_in_steps(bench):
    end_jobs(bench, PRUNED_STEP + 1)
    bench.accept('waiting', delay=60)
    bench.now += 10
    bench.change('end', *bench.begin('later'), 'done', REPLY)
    outcome = bench.change('prune', 5)
    assert (outcome.removed, outcome.has_more) == (PRUNED_STEP, True)
    outcome = bench.change('prune', 5)
    assert (outcome.removed, outcome.has_more) == (1, False)
    assert bench.states() == {'waiting': 'waiting', 'later': 'done'}
    assert bench.change('prune', 5).removed == 0


def test_prune_few_large_jobs_at_a_time(bench):
    end_jobs(bench, 3, size=PRUNED_SIZE // 2 + 1)
    bench.now += 1
    outcomes = [bench.change('prune', 0) for _step in range(2)]
    assert [(each.removed, each.has_more) for each in outcomes] == [(2, True), (1, False)]


def test_prune_by_the_clock_of_the_journal(bench):
    """A clock that was set does not make jobs older."""
    end_jobs(bench, 1)
    bench.set_clock(3600)
    assert bench.change('prune', 1800).removed == 0
    bench.now += 1801
    assert bench.change('prune', 1800).removed == 1


@pytest.mark.parametrize(
    'args', [None, 5, {}, {'older_than': None}, {'older_than': -1}, {'older_than': '5'}]
)
def test_bad_age(args):
    with pytest.raises(ZMQMessageError) as error:
        read_age(args)
    assert error.value.status == 400


def test_age():
    assert read_age({'older_than': 90}) == 90.0
