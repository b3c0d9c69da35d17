# SPDX-License-Identifier: ZPL-2.1
"""The command line: `pyams_zmq top`."""

import os
import signal
import time
from contextlib import ExitStack

import pytest

from checks import freeze
from function_service import answer_as_2_0, answering
from handlers import MessageHandler
from job_checks import Asker
from job_handlers import JobPool, Jobs
from pyams_zmq.cli.overview import TITLES
from terminals import COMMAND, WITHOUT_RICH, Runner, Terminal, write_ini

STATS = {
    'pid': 7,
    'state': 'up',
    'uptime': 100.0,
    'calls': 250,
    'errors': 3,
    'in_flight': 2,
    'queue': 4,
    'oldest': 130.0,
    'memory': 51.6,
    'workers': [{}, {}],
    'methods': {
        'convert': {'calls': 200, 'max': 3.0, 'buckets': [[0.001, 20], [0.01, 190]]},
        'ping': {'calls': 50, 'max': 0.0005, 'buckets': [[0.001, 50]]},
    },
    'jobs': {'states': {'running': 1, 'waiting': 12, 'done': 9}, 'types': {}},
    'unknown': 'a member of a later version',
}


@pytest.fixture
def run(capsys, monkeypatch):
    return Runner(capsys, monkeypatch)


@pytest.fixture
def pool(start, tmp_path):
    """A pool with a journal."""
    factory = type('OwnPool', (JobPool,), {'journal': tmp_path / 'x.jobs'})
    return start('127.0.0.1:0', Jobs, factory=factory, workers=2)


def stats_of(*args):
    return [200, STATS]


def rows_of(lines):
    """Return the cells of a table by service, without the titles."""
    titles = lines[0]
    starts = [titles.index(title) for title in TITLES]
    ends = [*starts[1:], None]
    rows = [
        [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        for line in lines[1:]
        if ': ' not in line
    ]
    return {name: cells for name, *cells in rows}


def test_all_members(run):
    with answering(stats_of) as address:
        code, lines = run('top', '--address', address)
    assert (code, lines[0].split('  ')[0]) == (0, 'SERVICE')
    assert rows_of(lines) == {
        address: [
            *('up', '2.5', '3', '2', '4', '2 min', '10.0 ms', '3.0 s', '2', '52 MiB', '1', '12')
        ]
    }


def test_pool(run, pool, tmp_path):
    ini = write_ini(tmp_path, converter=pool.bound_address)
    with Asker(pool) as asker:
        asker.ask('ping')
        asker.submit('add', [1], delay=60)
    code, lines = run('top', ini)
    cells = dict(zip(TITLES[1:], rows_of(lines)['converter'], strict=True))
    assert code == 0
    assert (cells['STATE'], cells['WORKERS']) == ('up', '2')
    assert (cells['JOBS RUN'], cells['JOBS WAIT']) == ('0', '1')
    assert cells['P50'].endswith(' ms')


def test_plain_process(run, start):
    """It is its own worker, and has no jobs."""
    process = start('127.0.0.1:0', MessageHandler)
    with Asker(process) as asker:
        assert asker.ask('pid')[0] == 200
    code, lines = run('top', '--address', process.bound_address)
    [row] = rows_of(lines).values()
    cells = dict(zip(TITLES[1:], row, strict=True))
    assert (code, cells['STATE'], cells['WORKERS'], cells['JOBS RUN']) == (0, 'up', '1', '-')
    assert cells['MEMORY'].endswith(' MiB')
    assert cells['P99'].endswith('s')


def test_services_in_each_state(run, pool, tmp_path):
    """One that hangs does not delay the others."""
    pids = [pool.pid, pool.stats()['pid']]
    replies = {
        'draining': lambda *_args: [200, {'state': 'draining'}],
        'forbidden': lambda *_args: [403, 'User may not read the statistics'],
        'older': answer_as_2_0,
        'strange': lambda *_args: [200, {'calls': 'many\x1b'}],
        'broken': lambda *_args: [500, 'Internal error 5'],
    }
    with ExitStack() as stack:
        addresses = {name: stack.enter_context(answering(reply)) for name, reply in replies.items()}
        ini = write_ini(
            tmp_path,
            **addresses,
            hung=pool.bound_address,
            missing=f'ipc://{tmp_path}/nothing.sock',
        )
        for pid in pids:
            stack.callback(os.kill, pid, signal.SIGCONT)
            freeze(pid)
        begin = time.monotonic()
        code, lines = run('top', ini)
        seconds = time.monotonic() - begin
    states = {name: cells[0] for name, cells in rows_of(lines).items()}
    hung = states.pop('hung')
    assert hung in ('down', 'no answer')
    assert states == {
        'broken': 'error',
        'draining': 'draining',
        'forbidden': 'refused',
        'missing': 'down',
        'older': 'no statistics',
        'strange': 'error',
    }
    assert seconds < 5  # it loads the application, and asks for one second
    assert code == 1
    problems = [line for line in lines if ': ' in line]
    assert [line.partition(':')[0] for line in problems] == [
        *('broken', 'forbidden', 'hung', 'missing', 'older', 'strange')
    ]
    assert '\x1b' not in '\n'.join(lines)


def test_some_services(run, tmp_path):
    missing = f'ipc://{tmp_path}/nothing.sock'
    with answering(stats_of) as address:
        ini = write_ini(tmp_path, first=address, second=address, third=missing)
        code, lines = run('top', ini, 'second', 'first', 'second')
        assert (code, list(rows_of(lines))) == (0, ['second', 'first'])
        assert run('top', ini, 'third', '--timeout', '0.2')[0] == 4


def test_address_that_does_not_answer(run, tmp_path):
    code, lines = run('top', '--address', f'ipc://{tmp_path}/nothing.sock', '--timeout', '0.2')
    assert code == 4
    assert lines[1].split()[1] == 'down'


@pytest.mark.parametrize(
    ('words', 'text'),
    [
        ((), 'write INI, or --address'),
        (('--interval', '0'), "bad value '0': write seconds, 0.1 or more"),
        (('--interval', 'x'), "bad value 'x'"),
        (('--interval', 'inf'), "bad value 'inf'"),
        (('{ini}', 'lost'), 'unknown process lost; '),
        (('{ini}', '--key', 'x'), '--auth-file, --key and --server-key are for --address'),
        (('--address', '127.0.0.1:1', 'x'), 'unexpected arguments: x'),
    ],
)
def test_bad_arguments_of_top(run, tmp_path, words, text):
    ini = write_ini(tmp_path, converter='127.0.0.1:1')
    assert run('top', *(word.format(ini=ini) for word in words)) == (2, [])
    assert text in run.err.splitlines()[-1]


def test_nothing_is_declared(run, tmp_path):
    ini = write_ini(tmp_path)
    assert run('top', ini) == (2, [])
    assert f'{ini} declares: none' in run.err


@pytest.mark.parametrize('command', [COMMAND, WITHOUT_RICH], ids=['rich', 'no rich'])
def test_live(tmp_path, command):
    """Rates and durations are those since the table before; Ctrl-C ends it without an error."""
    calls = [0]

    def reply(_name, _args):
        calls[0] += 1
        method = {'calls': calls[0], 'max': 9.0, 'buckets': [[0.002, calls[0] - 1]]}
        return [200, {**STATS, 'calls': 1000 * calls[0], 'methods': {'add': method}}]

    missing = f'ipc://{tmp_path}/nothing.sock'
    with answering(reply) as address:
        ini = write_ini(tmp_path, good=address, missing=missing)
        options = ('--interval', '0.1', '--timeout', '0.2')
        with Terminal(tmp_path, *command, 'top', ini, *options) as terminal:
            terminal.wait_for('SERVICE', '10.0', '2.0 ms', 'missing: ')
            terminal.wait_until(lambda: calls[0] > 4)
            terminal.interrupt()
            assert terminal.wait() == 0
    assert terminal.raw.count('\x1b[') > 3
    assert 'Traceback' not in terminal.text


def test_once_on_a_terminal(tmp_path):
    with answering(stats_of) as address:
        arguments = ('top', '--address', address, '--once')
        with Terminal(tmp_path, *COMMAND, *arguments) as terminal:
            assert terminal.wait() == 0
    assert '\x1b' not in terminal.raw
