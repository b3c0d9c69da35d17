# SPDX-License-Identifier: ZPL-2.1
"""The soak runs, and each of its checks can fail."""

import random
import signal
import subprocess
import sys
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from checks import wait_until

BENCHMARKS = Path(__file__).resolve().parents[2] / 'benchmarks'

SENDS = 'once/load/send-single'
PATHS = {'single': {'single'}, 'pool': {'worker 1'}}


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def told(token, end, kind='send', route='single', time=1.0, seconds=0.1):
    """Return an entry of the record of a client."""
    from soak.checks import Told

    return Told(time, kind, route, token, end, seconds)


def runs(*tokens, service='single', time=1.0):
    """Return the journal of a service that has run tokens, one each second."""
    from soak.checks import Run

    return {service: [Run(time + index, 7, token) for index, token in enumerate(tokens)]}


def run_soak(folder, *options):
    """Run a soak with a seed; return its output."""
    done = subprocess.run(
        [
            *(sys.executable, '-W', 'ignore', '-m', 'soak', '--seed', '3', '--keep', folder),
            *options,
        ],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_soak_of_some_seconds(tmp_path):
    lines = run_soak(tmp_path, '--minutes', '0.1', '--jobs', '0')
    assert lines[0] == lines[-1] == 'seed 3'
    for name in ('wrong', 'lost', 'processes', 'growth', 'logs'):
        assert f'{name:10} 0' in lines


@pytest.mark.parametrize(
    'name',
    ['kills-1', *(pytest.param(each, marks=pytest.mark.slow) for each in ('stops', 'curve'))],
)
def test_soak_of_some_jobs(tmp_path, name):
    """Kill -9 at random times; no job is lost, and none begins after its success was recorded."""
    lines = run_soak(tmp_path, '--minutes', '0', '--jobs', '80', '--runs', name)
    assert any(line.startswith('jobs 80, accepted 80, given up 0, ') for line in lines)
    for check in ('lost', 'begun again', 'repeated', 'logs', 'processes'):
        assert f'{check:12} 0' in lines


def test_options_are_shown():
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'soak', '--help'],
        cwd=BENCHMARKS,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert '--seed' in done.stdout


def test_a_seed_repeats_the_faults():
    from soak.faults import KINDS, plan

    first, again, other = (list(islice(plan(seed), 50)) for seed in (1, 1, 2))
    assert first == again != other
    assert {fault.kind for fault in first[: len(KINDS)]} == set(KINDS)
    assert all(fault.target in KINDS[fault.kind] for fault in first)


# What clients and services write


def test_lines_are_read():
    from soak.checks import Loss, Run, Told, read_losses, read_runs, read_told

    assert read_runs('1.5 7 once/a/b/1\n') == [Run(1.5, 7, 'once/a/b/1')]
    line = '1.5 send single once/a/b/1 accepted 0.25\n'
    assert read_told(line) == [Told(1.5, 'send', 'single', 'once/a/b/1', 'accepted', 0.25)]
    log = (
        "1.5 7 ERROR Message 'once' to tcp://h:1: the connection was lost (3 times)\n"
        "2.5 7 ERROR Message 'once' to tcp://h:1: no reply\n"
        "3.5 7 ERROR 4 messages 'once' (ids 7.1-7.3, 7.5) to tcp://h:1: the connection was lost\n"
        '4.5 7 INFO another line\n'
    )
    assert read_losses(log) == [
        Loss(1.5, 'tcp://h:1', 'the connection was lost', 3),
        Loss(2.5, 'tcp://h:1', 'no reply', 1),
        Loss(3.5, 'tcp://h:1', 'the connection was lost', 4),
    ]


# Checks


@pytest.mark.parametrize('end', ['ok', '502', '503', '504', 'timeout', 'unreachable'])
def test_documented_ends_are_good(end):
    from soak.checks import check_ends

    assert not list(check_ends([told('once/a/b/1', end, 'call')], 5))


@pytest.mark.parametrize(
    ('kind', 'end'),
    [('call', 'wrong:reply'), ('call', '500'), ('call', 'accepted'), ('send', 'timeout')],
)
def test_other_ends_are_wrong(kind, end):
    from soak.checks import check_ends

    (problem,) = check_ends([told('once/a/b/1', end, kind)], 5)
    assert problem == f'once/a/b/1 to single ended with {end}'


def test_calls_that_take_too_long_are_wrong():
    from soak.checks import check_ends

    (problem,) = check_ends([told('once/a/b/1', 'ok', 'call', seconds=10.5)], 5)
    assert 'took 10.5 s' in problem
    assert not list(check_ends([told('once/a/b/1', 'ok', 'call', seconds=9.5)], 5))


@pytest.mark.parametrize(
    ('target', 'begin', 'is_wrong'), [('single', 9, False), ('single', 1, True), ('pool', 9, True)]
)
def test_calls_fail_only_by_a_fault(target, begin, is_wrong):
    from soak.checks import Interruption, check_failures

    record = [
        told('once/a/b/1', 'timeout', 'call', time=10.0),
        told('once/a/b/2', 'ok', 'call', time=10.0),
        told('late/a/b/3', '504', 'call', time=10.0),
        told('once/a/b/4', 'unreachable', time=10.0),  # a refused message is not lost
        told('once/a/b/5', '503', 'call', time=10.0),  # a queue is full
    ]
    fault = Interruption(target, begin, begin + 1, loses=False)
    problems = list(check_failures(record, PATHS, [fault]))
    expected = ['once/a/b/1 to single ended with timeout without a fault']
    assert problems == (expected if is_wrong else [])


@pytest.mark.parametrize(
    ('kind', 'end'), [('call', '503'), ('send', 'unreachable'), ('send', 'aborted')]
)
def test_what_was_refused_must_not_run(kind, end):
    from soak.checks import check_runs

    record = [told('once/a/b/1', end, kind)]
    assert not list(check_runs(record, runs()))
    (problem,) = check_runs(record, runs('once/a/b/1'))
    assert 'but was run' in problem


def test_what_has_a_reply_must_have_run():
    from soak.checks import check_runs

    record = [told('once/a/b/1', 'ok', 'call')]
    assert not list(check_runs(record, runs('once/a/b/1')))
    (problem,) = check_runs(record, runs('once/a/b/2'))
    assert 'was not run' in problem


def test_only_repeatable_methods_run_twice():
    from soak.checks import check_runs

    journal = runs('once/a/b/1', 'once/a/b/1', 'again/a/b/2', 'again/a/b/2')
    assert list(check_runs([], journal)) == ['once/a/b/1 was run 2 times']


def test_messages_must_run_in_order():
    from soak.checks import Interruption, check_order

    def check(journal, record=(), interruptions=()):
        return list(check_order(record, journal, PATHS, interruptions))

    tokens = [f'{SENDS}/{number}' for number in ('1.0', '1.1', '3.0', '2.0')]
    (problem,) = check(runs(*tokens))
    assert problem.endswith('(2, 0) ran after (3, 0)')
    assert not check(runs(*sorted(tokens)))
    assert not check(runs(*tokens, service='pool'))  # its workers run side by side
    assert not check(runs('once/load/call-single/2', 'once/load/call-single/1'))
    # The connection was lost between the message and its run, which a client logs.
    record = [told(tokens[-1], 'accepted', time=90.0)]
    for begin, problems in (95, 0), (80, 1):
        reset = Interruption('single', begin, begin + 1, loses=True)
        assert len(check(runs(*tokens, time=100.0), record, [reset])) == problems
    stop = Interruption('single', 95, 96, loses=False)
    assert check(runs(*tokens, time=100.0), record, [stop])


def test_a_message_that_was_not_run_is_lost():
    from soak.checks import find_lost

    record = [told(f'{SENDS}/{number}', 'accepted', time=number) for number in (1, 2, 3)]
    at_risk, lost = find_lost(record, runs(f'{SENDS}/1', f'{SENDS}/3'), PATHS, [])
    assert (at_risk, lost) == ([], [record[1]])
    assert find_lost(record, runs(*(each.token for each in record)), PATHS, []) == ([], [])


@pytest.mark.parametrize(
    ('target', 'begin', 'end', 'loses', 'explains'),
    [
        ('single', 20, 21, True, True),  # while it was under way
        ('single', 20, 21, False, False),  # which keeps what is under way
        ('worker 1', 20, 21, True, False),  # of another service
        ('single', 2, 3, True, False),  # before it was sent
        ('single', 40, 41, True, False),  # after a later message has run
    ],
)
def test_an_interruption_explains_what_was_under_way(target, begin, end, loses, explains):
    from soak.checks import Interruption, find_lost

    record = [told(f'{SENDS}/{number}', 'accepted', time=10.0) for number in (1, 2)]
    journal = runs(f'{SENDS}/2', time=30.0)
    at_risk, lost = find_lost(record, journal, PATHS, [Interruption(target, begin, end, loses)])
    assert (at_risk, lost) == (([record[0]], []) if explains else ([], [record[0]]))


def test_what_is_lost_must_be_in_the_log():
    from soak.checks import Loss, check_losses

    at_risk = [told(f'{SENDS}/{number}', 'accepted') for number in (1, 2)]
    addresses = {'single': 'tcp://h:1'}
    assert not list(check_losses(at_risk, [Loss(1, 'tcp://h:1', '', 2)], addresses))
    (problem,) = check_losses(
        at_risk, [Loss(1, 'tcp://h:1', '', 1), Loss(1, 'tcp://h:2', '', 1)], addresses
    )
    assert problem == '2 messages to single were lost, 1 are in the log'


@pytest.mark.parametrize(('unit', 'start', 'leak'), [('KiB', 50_000, 200), ('descriptors', 20, 1)])
def test_a_process_that_grows_is_reported(unit, start, leak):
    from soak.checks import MIN_LIFE, check_growth

    rng = random.Random(1)
    flat = [start + rng.randrange(10) for _ in range(3 * MIN_LIFE)]
    flat[100:110] = [10 * start] * 10  # for a moment, during a fault
    growing = [value + index * leak for index, value in enumerate(flat)]
    assert not list(check_growth('single', unit, flat))
    assert not list(check_growth('single', unit, growing[: MIN_LIFE - 1]))
    (problem,) = check_growth('single', unit, growing)
    assert problem.startswith('single grew from ')
    assert problem.endswith(unit)


@pytest.mark.parametrize(
    'line',
    [
        'Assertion failed: !_io_error (src/stream_engine_base.cpp:310)',
        '1.5 7 ERROR single ended after 1.0 s with exit code -6, it is started again in 0.1 s',
        '1.5 7 CRITICAL single fails: each of its last 5 starts ended within 10.0 s',
        'Traceback (most recent call last):',
    ],
)
def test_bad_lines_of_a_log_are_reported(line):
    from soak.checks import check_log

    good = '1.5 7 ERROR single ended after 1.0 s with exit code -9, it is started again in 0.1 s\n'
    assert list(check_log('single', f'{good}{line}\n')) == [f'single: {line}']
    assert not list(check_log('single', good))


# Jobs


def job(job_id='a', **values):
    """Return a job as a client knows it."""
    ended = datetime.fromtimestamp(100, timezone.utc)
    values = {'state': 'done', 'attempt': 1, 'reply': [200, job_id], 'ended': ended, **values}
    return SimpleNamespace(id=job_id, **values)


def begins(*attempts, time=99.0):
    """Return the runs of some attempts."""
    from soak.checks import Run

    return [Run(time, 7, attempt) for attempt in attempts]


@pytest.mark.parametrize(
    ('jobs', 'attempts', 'text'),
    [
        ([job()], ['a/1'], None),
        ([], ['a/1'], 'a was accepted, and is unknown'),
        ([job(state='failed', reply=[500, 'x'])], ['a/1'], 'a is failed after 1 attempts: '),
        ([job(state='failed', reply=[502, 'x'])], ['a/1', 'a/3'], 'a is failed after 1 attempts: '),
        ([job(state='failed', reply=[502, 'x'])], ['a/1', 'a/2', 'a/3'], None),  # as documented
        ([job(reply=[200, 'b'])], ['a/1'], "a has the result [200, 'b']"),
        ([job()], [], 'a is done, and has not begun'),
    ],
)
def test_jobs_that_are_lost(jobs, attempts, text):
    from soak.job_checks import check_lost

    found = list(check_lost(['a'], {each.id: each for each in jobs}, begins(*attempts)))
    assert found == [] if text is None else found[0].startswith(text)


@pytest.mark.parametrize(
    ('attempt', 'time', 'seen', 'text'),
    [
        ('a/1', 99, 102, None),
        ('a/2', 99, 102, 'a: attempt 2 has begun, the last one is 1'),
        ('a/1', 101, 102, 'a: attempt 1 has begun 0.900 s after its end'),
        ('a/1', 99, 98, 'a: attempt 1 has begun 1.000 s after its end'),
        ('other/1', 200, 0, None),
    ],
)
def test_jobs_that_begin_after_their_end(attempt, time, seen, text):
    from soak.job_checks import check_begun_again

    found = list(check_begun_again({'a': seen}, {'a': job()}, begins(attempt, time=time)))
    assert found == ([] if text is None else [text])
    assert not list(check_begun_again({}, {'a': job(ended=None)}, begins(attempt, time=time)))


def test_jobs_that_begin_more_than_once():
    from soak.job_checks import check_repeated

    runs = begins(*(f'{number}/{attempt}' for number in range(11) for attempt in (1, 2)))
    assert not list(check_repeated(220, runs))
    (problem,) = check_repeated(219, runs)
    assert problem.startswith('11 jobs have begun more than once: 0 2, 1 2, ')


def test_a_seed_repeats_the_faults_of_jobs():
    from soak.job_faults import STOPPED, TARGETS, plan

    first, again, other = (list(plan(seed, 200)) for seed in (1, 1, 2))
    assert first == again != other
    assert {fault.target for fault in first} == set(TARGETS)
    assert not any(fault.stop for fault in first)
    stops = [fault.target for fault in plan(1, 200, has_stops=True) if fault.stop]
    assert set(stops) == set(STOPPED)


# Programs


@pytest.fixture
def program(tmp_path):
    """A program that starts a child, which ends."""
    from soak.programs import Program

    code = 'import signal, subprocess; child = subprocess.Popen("true"); signal.pause()'
    (tmp_path / 'zombie_maker.py').write_text(code)
    made = Program('zombies', tmp_path, 'zombie_maker')
    yield made
    made.kill()


def test_a_zombie_is_reported(program, tmp_path, monkeypatch):
    from soak.programs import ZOMBIE, Sampler, list_tree

    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    program.start()
    pid = program.process.pid
    wait_until(lambda: 'Z' in list_tree(pid).values())
    sampler = Sampler([program])
    for _ in range(ZOMBIE):
        assert not sampler.zombies
        sampler.step()
    assert len(sampler.zombies) == 1
    (samples,) = sampler.samples.values()
    assert len(samples['KiB']) == len(samples['descriptors']) == ZOMBIE


def test_processes_that_are_left_behind_are_reported(program, tmp_path, monkeypatch):
    from soak.programs import end_descendants, list_tree

    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    (tmp_path / 'zombie_maker.py').write_text(
        'import subprocess; subprocess.run(["sleep", "600"]); input()'
    )
    program.start()
    pid = program.process.pid
    wait_until(lambda: len(list_tree(pid)) > 1)
    (problem,) = end_descendants(pid)
    assert problem.endswith('was left behind')
    wait_until(lambda: set(list_tree(pid)) == {pid})
    assert not end_descendants(pid)


def test_a_program_that_ends_by_itself_is_reported_and_started_again(
    program, tmp_path, monkeypatch
):
    from soak.programs import restart_ended

    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    program.start()
    assert not list(restart_ended([program]))
    program.process.send_signal(signal.SIGABRT)
    wait_until(lambda: program.process.poll() is not None)
    assert list(restart_ended([program])) == ['zombies ended with exit code -6']
    assert program.wait(0) == 'hangs'
