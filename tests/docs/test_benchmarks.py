# SPDX-License-Identifier: ZPL-2.1
"""The benchmarks run, and their calculations are right. No test checks a rate."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from checks import wait_until

BENCHMARKS = Path(__file__).resolve().parents[2] / 'benchmarks'


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def run():
    """Run a program of the benchmarks; return its output."""

    def run_program(name, *arguments):
        done = subprocess.run(
            [sys.executable, '-W', 'ignore', BENCHMARKS / name, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert not done.returncode, done.stderr
        return done.stdout

    return run_program


def make_run(**rates):
    """Make a run of one cell, with one client and the small message."""
    cell = {'payload': 60, 'clients': 1, 'rates': rates, 'times': {}, 'failed': {}}
    return {'names': list(rates), 'missing': {}, 'cells': [cell]}


# The programs


def test_all_modules_can_be_imported():
    """No test runs some of the programs, which use modules of the tests and of the package."""
    names = ','.join(path.stem for path in BENCHMARKS.glob('*.py'))
    code = f"""
import sys
sys.path[0] = {str(BENCHMARKS)!r}
import {names}
"""
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, timeout=60)


@pytest.mark.parametrize('name', ['life.py', 'application.py', 'environments.py', 'scrape.py'])
def test_programs_without_another_test_show_their_options(run, name):
    assert f'usage: {name}' in run(name, '--help')


def test_delays_of_jobs(run):
    text = run('job_delays.py', '--rounds', 1, '--seconds', 3, '--kills', 1)
    for name in (
        'progress is visible',
        'cancel is known',
        'forced cancel is done',
        'ffmpeg is gone',
    ):
        assert re.search(rf'{name}.* median \d', text)
    assert re.search(r'a job of 3 s, 1 brokers killed: done .* in attempt 1;', text)


def test_counting(run):
    options = ('--rounds', 1, '--calls', 20, '--seconds', 0.3)
    assert [line.partition(':')[0] for line in run('counting.py', *options).splitlines()] == [
        '1 in flight',
        '64 in flight',
        'stats while a method is busy (sleep)',
        'stats while a method is busy (compute)',
    ]


def test_outbox(run):
    lines = run('outbox.py', 'sqlite', 'file', '--commits', 20, '--pause', 0).splitlines()
    assert [line.partition(':')[0] for line in lines] == ['sqlite', 'file']
    for line in lines:
        assert re.search(r'no message \d.*\(1\.00\), no outbox \d.*, outbox \d', line)


@pytest.mark.slow
def test_contenders_of_this_environment_are_measured(run, tmp_path):
    from contenders import CONTENDERS, OURS

    file = tmp_path / 'run.json'
    text = run(
        'bench.py',
        *('--rounds', 1, '--seconds', 0.01, '--payload', '60,10000', '--clients', 2),
        *('--only', 'bare;asyncio;ours', '--save', file),
    )
    result = json.loads(file.read_text())
    expected = [name for name, item in CONTENDERS.items() if item.environment == OURS]
    assert result['names'] == expected
    cells = [(cell['payload'], cell['clients']) for cell in result['cells']]
    assert cells == [(60, 2), (10_000, 2)]
    for cell in result['cells']:
        assert not cell['failed']
        assert set(cell['rates']) | set(result['missing']) == set(expected)
        assert set(cell['times']) == set(cell['rates'])
        for name, rates in cell['rates'].items():
            assert len(rates) == len(cell['times'][name]) == 1
            assert min(rates) > 0
            assert all(client > 0 <= server for client, server in cell['times'][name])
    for name in expected:
        assert name in text
    cells = ('--payload', '60,10000', '--clients', 2)
    assert text == run('bench.py', '--show', file, *cells)
    assert '10 kB' not in run('bench.py', '--show', file, '--payload', 60, '--clients', 2)
    assert '+0%' in run('bench.py', '--compare', file, file)
    assert 'processor time' in run('bench.py', '--show', file, '--cpu', *cells)
    assert '.. list-table::' in run('bench.py', '--show', file, '--rst', *cells)


def test_peers_without_an_environment_are_listed(run, tmp_path):
    elsewhere = [f'--python={name}={tmp_path}/no' for name in ('peers', 'aiozmq', 'pyams_zmq-2')]
    text = run(
        'bench.py',
        *('--rounds', 1, '--seconds', 0.01, '--payload', 60, '--clients', 1),
        *('--only', 'rpyc;aiozmq;2.0.0', *elsewhere),
    )
    lines = [line for line in text.splitlines() if 'not measured: no environment' in line]
    assert [line.split('  ')[0] for line in lines] == [
        'RPyC',
        'aiozmq.rpc',
        'aiozmq.rpc, 256 in flight',
        'pyams_zmq 2.0.0, socket per message',
        'pyams_zmq 2.0.0, kept socket',
    ]


def test_peers_that_cannot_be_imported_are_listed(run):
    text = run(
        'bench.py',
        *('--rounds', 1, '--seconds', 0.01, '--payload', 60, '--clients', 1),
        *('--only', 'rpyc', f'--python=peers={sys.executable}'),
    )
    assert "not measured: No module named 'rpyc'" in text


@pytest.mark.slow
def test_footprint_is_measured(run, tmp_path):
    from footprint import GOALS

    file = tmp_path / 'run.json'
    run('footprint.py', '--runs', 1, '--idle', 3, '--calls', 40, '--save', file)
    figures = json.loads(file.read_text())
    assert set(GOALS) <= set(figures)


def test_frames_are_measured(run):
    text = run('frames.py', '--rounds', 1, '--calls', 1, '--size', 0.1)
    assert [line.split()[0] for line in text.splitlines()[1:]] == ['there'] * 4


def test_jobs_are_measured(run, tmp_path):
    text = run(
        *('jobs.py', 'accept', 'calls', 'ended', 'memory'),
        *('--jobs', 20, '--clients', 2, '--seconds', 0.1, '--rounds', 1, '--paces', 80),
        *('--ended', 1000, '--pages', 2, '--waiting', 300, '--folder', tmp_path),
    )
    # Whether they are reached depends on the machine.
    assert text.count(' goal ') == 9, text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_queues_are_compared(run, tmp_path):
    text = run(
        *('jobs.py', 'queues', '--clients', 2, '--seconds', 0.2, '--rounds', 1, '--kills', 4),
        *('--only', 'pyams;huey', '--environments', tmp_path / 'none', '--folder', tmp_path),
    )
    lines = {line[:32].strip(): line[32:].split() for line in text.splitlines()}
    assert float(lines['pyams_zmq'][0]) > 0
    assert lines['pyams_zmq'][2:] == ['1.00', 'x', 'yes', '4', '(1)', '0/200', '3']
    assert lines['huey, sqlite'][:2] == ['not', 'measured:']
    assert list(tmp_path.iterdir()) == []


def test_queue_that_does_not_start_is_named(tmp_path):
    """An interpreter without its package is one that was not installed."""
    from queues import CONTENDERS
    from queues.compare import run
    from queues.service import measure_rates

    for name in ('huey, sqlite', 'rq, redis always'):
        reason = run(name, sys.executable, tmp_path, measure_rates, 1, 0.1, 1)
        assert isinstance(reason, str), name
    assert {each.environment for each in CONTENDERS.values()} == {'ours', 'queues'}


def test_a_failing_contender_does_not_stop_the_others():
    from bench import FailedError, measure

    class Runner:
        def __init__(self, *rates):
            self.rates = list(rates)

        def run_turn(self, payload, clients, seconds):
            rate = self.rates.pop(0)
            if not rate:
                raise FailedError('it ended')
            return {'rate': rate, 'client': 0.1, 'server': 0.2}

    cell = measure({'good': Runner(1, 2, 3), 'bad': Runner(1, 0)}, 60, 1, 2, 0.1)
    assert cell == {
        'payload': 60,
        'clients': 1,
        'rates': {'good': [2, 3]},  # without the first round
        'times': {'good': [[0.1, 0.2], [0.1, 0.2]]},
        'failed': {'bad': 'it ended'},
    }


@pytest.mark.parametrize(('until', 'rounds'), [(0, 1), (float('inf'), 3)])
def test_a_cell_gets_fewer_rounds_when_the_time_is_up(until, rounds):
    from bench import measure

    class Runner:
        def run_turn(self, payload, clients, seconds):
            return {'rate': 1, 'client': 0.1, 'server': 0.2}

    assert measure({'x': Runner()}, 60, 1, 3, 0.1, until)['rates'] == {'x': [1] * rounds}


@pytest.mark.parametrize('reply', [[500, {}], [200, {'path': 'another'}], [200, None]])
def test_a_wrong_reply_ends_a_turn(reply):
    from contenders.base import Pair, make_args

    class Wrong(Pair):
        def connect(self, address):
            return lambda args: reply

    with pytest.raises(RuntimeError, match='The reply is'):
        Wrong().open('', make_args(60), 1)(0)


@pytest.mark.parametrize(
    ('pair', 'error'),
    [('bare.ReqRep', 'TypeError'), ('bare.DealerRouter', 'TypeError')],
)
def test_clients_report_errors(pair, error):
    from side import load, run_turn

    with pytest.raises(RuntimeError, match=error):
        run_turn(load(pair), address=None, size=60, clients=2, flight=1, seconds=0.01)


def find_programs(mark):
    """Return the pids of processes that have a mark in their environment."""
    found = []
    for path in Path('/proc').glob('[0-9]*/environ'):
        with suppress(OSError):
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize('num', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_driver(num, tmp_path):
    driver = subprocess.Popen(
        [
            *(sys.executable, '-W', 'ignore', BENCHMARKS / 'bench.py'),
            *('--only', 'request.zmq', '--seconds', '60', '--clients', '2'),
        ],
        # setproctitle would write the titles of the services over their environment.
        env={**os.environ, 'MARK_OF_TEST': str(tmp_path), 'SPT_NOENV': '1'},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    mark = f'MARK_OF_TEST={tmp_path}\0'.encode()
    try:
        # The driver, two servers (one has a child), two programs for clients, two clients.
        wait_until(lambda: len(find_programs(mark)) >= 8, 60)
    finally:
        driver.send_signal(num)
        driver.wait(30)
    wait_until(lambda: not find_programs(mark), 30)


# Calculations


@pytest.mark.parametrize('size', [75, 10_000, 1_000_000])
def test_messages_have_the_size(size):
    from contenders.base import KIND, make_args

    assert len(json.dumps([KIND, make_args(size)])) == size


def test_small_message_is_not_padded():
    from contenders.base import ARGS, make_args

    assert make_args(60) == ARGS == {'path': '/this/is/my/path', 'format': 'JPEG'}


@pytest.mark.parametrize(('rounds', 'text'), [([3, 3], '3'), ([1, 3], '1 to 3')])
def test_rounds_are_counted(rounds, text):
    from contenders import BARE
    from results import count_rounds

    assert count_rounds({'cells': [{'rates': {BARE: [1] * n}} for n in rounds]}) == text


def test_ratio_is_the_median_of_the_ratios_within_a_round():
    from contenders import BARE
    from results import ratio

    # The machine was slow in the last round: the ratio of the medians would be 2.
    rates = {BARE: [100, 100, 10], 'x': [50, 200, 20]}
    assert ratio(rates, 'x') == 2
    assert ratio(rates, BARE) == 1
    assert ratio(rates, BARE, over='x') == 0.5


@pytest.mark.parametrize('rates', [{}, {'x': [1]}, {'bare REQ/REP': [1]}])
def test_no_ratio_without_both(rates):
    from results import ratio

    assert ratio(rates, 'x') is None


@pytest.mark.parametrize(
    ('rate', 'verdict'), [(94, 'missed (0.94)'), (95, 'reached (0.95)'), (None, 'not measured')]
)
def test_goals_are_judged(rate, verdict):
    from contenders import BARE, SERIAL
    from results import describe_goals

    rates = {BARE: [100]} if rate is None else {BARE: [100], SERIAL: [rate]}
    first, second = describe_goals(make_run(**rates), SERIAL).split('; ')
    assert first == f'0.95: {verdict}'
    assert second == '1 with 8 clients: not measured'


def test_goals_name_contenders():
    from contenders import CONTENDERS
    from results import GOALS

    assert {goal.name for goal in GOALS} | {goal.over for goal in GOALS} <= set(CONTENDERS)


def test_goals_of_the_footprint_are_maxima():
    from footprint import judge

    assert judge('start to ready, ms', 60) == 'at most 60: reached'
    assert judge('start to ready, ms', 61) == 'at most 60: missed'
    assert judge('start to ready of the bare child, ms', 61) == ''


def test_comparison_of_two_runs():
    from contenders import BARE, CLIENT, SERIAL
    from results import compare, make_rows_of_times

    old = make_run(**{BARE: [100, 100], CLIENT: [50, 50]})
    new = make_run(**{BARE: [10, 10], CLIENT: [6, 6], SERIAL: [10, 10]})
    for run, times in ((old, [4e-5, 6e-5]), (new, [3e-5, 2e-5])):
        run['cells'][0]['times'] = {CLIENT: [times, times]}
    assert list(compare(old, new)) == [
        ['', 'ratio', 'new', 'change', 'CPU us', 'new', 'change'],
        [f'60 B x1, {BARE}', '1.00', '1.00', '+0%', '-', '-', '-'],
        [f'60 B x1, {SERIAL}', '-', '1.00', '-', '-', '-', '-'],
        [f'60 B x1, {CLIENT}', '0.50', '0.60', '+20%', '100', '50', '-50%'],
    ]
    assert list(make_rows_of_times(new))[2] == [CLIENT, '30 + 20', '']


def test_table_shows_missing_and_failed_contenders():
    from contenders import BARE, CLIENT, CONCURRENT, SERIAL
    from results import list_failures, make_rows, print_rst, print_table

    result = make_run(**{BARE: [100], CLIENT: [120]})
    result['names'] += [SERIAL, CONCURRENT]
    result['missing'] = {CONCURRENT: 'not yet'}
    result['cells'][0]['failed'] = {SERIAL: 'it ended'}
    rows = list(make_rows(result))
    assert rows == [
        ['ratio of calls per second', '60 B x1', 'goal'],
        [f'{BARE}, calls per second', '100', ''],
        [CLIENT, '1.20', '1.15: reached (1.20)'],
        [SERIAL, 'failed', '0.95: not measured; 1 with 8 clients: not measured'],
        [CONCURRENT, 'not measured: not yet'],
    ]
    assert list(list_failures(result)) == [f'{SERIAL}, 60 B x1: it ended']
    text = io.StringIO()
    print_table(rows, text.write)
    assert text.getvalue().splitlines()[2] == f'{CLIENT:39}     1.20  1.15: reached (1.20)'
    text = io.StringIO()
    print_rst(rows, text.write)
    assert text.getvalue().splitlines()[:9] == [
        '.. list-table::',
        '   :header-rows: 1',
        '',
        '   * - ratio of calls per second',
        '     - 60 B x1',
        '     - goal',
        f'   * - {BARE}, calls per second',
        '     - 100',
        '     -',
    ]


@pytest.mark.parametrize(
    'arguments', [['--clients', '0'], ['--payload', 'x'], ['--only', 'nobody']]
)
def test_bad_arguments_are_refused(arguments, capsys):
    from bench import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert 'invalid' in capsys.readouterr().err


def test_bare_pair_is_always_measured():
    from bench import parse_arguments
    from contenders import BARE, CLIENT

    assert parse_arguments(['--only', 'ZMQClient']).only[:2] == [BARE, CLIENT]


def test_reason_of_a_missing_environment_is_the_failed_installation(tmp_path, monkeypatch):
    import bench
    import environments

    monkeypatch.setattr(environments, 'FOLDER', tmp_path)
    monkeypatch.setattr(bench, 'ENVIRONMENTS_FOLDER', tmp_path)
    monkeypatch.setattr(environments, 'make', lambda name, requirements: environments.run('false'))
    monkeypatch.setattr(sys, 'argv', ['environments.py', 'peers'])
    with redirect_stdout(io.StringIO()):
        environments.main()
    assert bench.explain_environment('peers') == 'no output'
    assert 'make bench' in bench.explain_environment('aiozmq')
