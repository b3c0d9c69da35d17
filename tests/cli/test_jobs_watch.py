# SPDX-License-Identifier: ZPL-2.1
"""The command line: `pyams_zmq jobs INI NAME watch`, with and without a terminal."""

import json
import signal
import subprocess
import sys

import pytest

from app.program import Program
from checks import TIMEOUT
from client_jobs import make_pool
from function_service import answering
from job_checks import Asker
from pyams_zmq.cli import job_watch
from terminals import COMMAND, WITHOUT_RICH, Runner, Terminal

BAR = '━'


@pytest.fixture
def run(capsys, monkeypatch):
    return Runner(capsys, monkeypatch)


@pytest.fixture
def asker(start, tmp_path):
    """Return a client of a service whose jobs follow files."""
    pool = start('127.0.0.1:0', tmp_path, factory=make_pool)
    with Asker(pool) as asker:
        yield asker


@pytest.fixture
def watch(asker, run):
    """Watch jobs; return the exit code and the lines."""
    return lambda *words: run('jobs', '--address', asker.address, 'watch', *words)


@pytest.fixture
def follow(asker, tmp_path):
    """Submit a job that follows a file; return a function that adds a line to it."""

    def submit(job_id):
        path = tmp_path / f'file of {job_id}'
        asker.submit('follow', str(path), id=job_id)
        asker.wait(job_id, 'running')

        def add(line):
            with path.open('a') as file:
                file.write(f'{line}\n')

        return add

    return submit


@pytest.fixture
def open_terminal(asker, tmp_path):
    """Watch jobs on a terminal."""

    def start(*words, command=COMMAND, **env):
        return Terminal(
            tmp_path, *command, 'jobs', '--address', asker.address, 'watch', *words, **env
        )

    return start


def test_jobs_that_are_done(asker, watch):
    for job_id in 'ab':
        asker.run('echo', 1, id=job_id)
    code, lines = watch('a', 'b', 'a')
    assert (code, sorted(lines)) == (0, ['a echo done', 'b echo done'])


def test_jobs_that_are_not_done(asker, watch):
    asker.run('fail', 404, id='failed')
    asker.submit('echo', 1, id='cancelled', delay=60)
    asker.ask('pyams_zmq.job.cancel', 'cancelled')
    asker.run('echo', 1, id='done')
    assert watch('failed', 'done') == (1, ['failed fail failed', 'done echo done'])
    assert watch('cancelled') == (1, ['cancelled echo cancelled'])


def test_time_is_over(asker, run, watch):
    asker.submit('echo', 1, id='a', delay=60)
    assert watch('a', '--timeout', '0.3') == (5, ['a echo waiting'])
    assert 'Job a has not ended within 0.3 s' in run.err


def test_json(asker, watch):
    asker.run('echo', {'text': 'é'}, id='a')
    code, [line] = watch('a', '--json')
    job = json.loads(line)
    assert (code, job['state'], job['reply']) == (0, 'done', [200, {'text': 'é'}])


def test_few_lines_for_many_changes(run, monkeypatch):
    """Progress is written once a second, each change of the state at once."""
    revisions = iter(range(1, 20))

    def reply(_name, _args):
        number = next(revisions)
        job = {'id': 'a', 'type': 'add', 'revision': number, 'state': 'running', 'attempt': 1}
        if number == 19:
            job |= {'state': 'done', 'ended': '2026-01-01T00:00:00Z'}
        return [200, {**job, 'progress': {'done': number, 'total': 20, 'text': 'x\x1b'}}]

    times = iter([0, 0.1, 0.9, 1.5, *[1.6] * 20])
    monkeypatch.setattr(job_watch, 'monotonic', lambda: next(times))
    with answering(reply) as address:
        code, lines = run('jobs', '--address', address, 'watch', 'a')
    assert (code, lines) == (
        0,
        ['a add running, 10 %, x?', 'a add running, 25 %, x?', 'a add done, 95 %'],
    )


def test_interrupt_without_terminal(asker, follow, tmp_path):
    """The job runs on; with JSON, the output has nothing else."""
    add = follow('a')
    add('first')
    for options, expected in ((), ['interrupted; the jobs go on']), (('--json',), []):
        with subprocess.Popen(
            [sys.executable, *COMMAND, 'jobs', '--address', asker.address, 'watch', 'a', *options],
            env=Program.environ(tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        ) as program:
            assert 'running' in program.stdout.readline()
            program.send_signal(signal.SIGINT)
            rest = program.stdout.read().splitlines()
            assert program.wait(TIMEOUT) == 130
        assert [line for line in rest if 'running' not in line] == expected
    assert asker.job('a')['state'] == 'running'
    add('end')
    assert asker.wait('a')['state'] == 'done'


def test_bars(follow, open_terminal):
    first, second = follow('first'), follow('second')
    first('one')
    with open_terminal('first', 'second') as terminal:
        terminal.wait_for('first follow', 'running, 25 %, one', 'second follow', BAR)
        first('two')
        terminal.wait_for('running, 50 %, two')
        first('end')
        second('end')
        terminal.wait_for('done')
        assert terminal.wait() == 0
    assert '\x1b[?25h' in terminal.raw  # the cursor is there again


def test_bars_of_other_states(asker, open_terminal):
    asker.submit('echo', 1, id='a', delay=60)
    asker.ask('pyams_zmq.job.cancel', 'a')
    asker.submit('echo', 1, id='b', delay=0.5)
    with open_terminal('a', 'b') as terminal:
        assert terminal.wait() == 1
    assert 'a echo' in terminal.text
    assert 'cancelled' in terminal.text


def test_interrupt(asker, follow, open_terminal):
    add = follow('a')
    add('one')
    with open_terminal('a') as terminal:
        terminal.wait_for('running, 25 %, one')
        terminal.interrupt()
        assert terminal.wait() == 130
    assert 'interrupted; the jobs go on' in terminal.text
    assert asker.job('a')['state'] == 'running'
    add('end')
    assert asker.wait('a')['state'] == 'done'


@pytest.mark.parametrize(
    ('command', 'env'),
    [(WITHOUT_RICH, {}), (COMMAND, {'TERM': 'dumb'})],
    ids=['no rich', 'dumb terminal'],
)
def test_lines_on_a_terminal(follow, open_terminal, command, env):
    add = follow('a')
    add('one')
    with open_terminal('a', command=command, **env) as terminal:
        terminal.wait_for('a follow running')
        add('end')
        assert terminal.wait() == 0
    assert BAR not in terminal.text
    assert terminal.text.endswith('a follow done\n')


def test_terminal_that_is_not_utf_8(follow, open_terminal):
    add = follow('a')
    add('é')
    with open_terminal('a', LC_ALL='C', PYTHONUTF8='0', PYTHONIOENCODING='ascii') as terminal:
        terminal.wait_for('running, 25 %, \\xe9')
        add('end')
        assert terminal.wait() == 0


def test_service_that_is_started_again(start, tmp_path):
    """A watch goes on."""
    path = tmp_path / 'file'
    pool = start(f'ipc://{tmp_path}/zmq.sock', tmp_path, factory=make_pool)
    with Asker(pool) as asker:
        asker.submit('follow', str(path), id='a')
        asker.wait('a', 'running')
    program = Terminal(tmp_path, *COMMAND, 'jobs', '--address', pool.bound_address, 'watch', 'a')
    with program as terminal:
        terminal.wait_for('running')
        pool.stop()
        path.write_text('end\n')
        start(f'ipc://{tmp_path}/zmq.sock', tmp_path, factory=make_pool)
        assert terminal.wait() == 0
    assert 'done' in terminal.text
