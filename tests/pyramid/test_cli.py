# SPDX-License-Identifier: ZPL-2.1
"""The command line: `pyams_zmq serve`, as a console script and by `python -m pyams_zmq`."""

import importlib
import os
import signal
import sys

import pytest

from app.external import INI
from checks import TIMEOUT, wait_until
from pyams_zmq.cli import main

CONSOLE_SCRIPT = """
import sys
from pyams_zmq.cli import main

sys.argv[0] = '/usr/local/bin/pyams_zmq'
sys.exit(main())
"""


@pytest.fixture
def ini(tmp_path):
    path = tmp_path / 'application.ini'
    path.write_text(INI.format(folder=tmp_path, setting='app.address = %(address)s'))
    return str(path)


@pytest.fixture
def address(tmp_path):
    return f'ipc://{tmp_path}/'


@pytest.fixture
def run(run_program, ini, address):
    """Start programs that serve."""

    def start(*args, command=('-m', 'pyams_zmq')):
        options = ('-W', 'ignore:pkg_resources is deprecated')
        return run_program(*options, *command, 'serve', ini, *args, f'address={address}')

    return start


@pytest.fixture
def notes(tmp_path):
    """Read the notes of the processes: address, pid, and name of the program."""

    def read(count):
        path = tmp_path / 'notes'

        def lines():
            found = path.read_text().splitlines() if path.exists() else []
            return found if len(found) >= count else None

        return sorted(line.split() for line in wait_until(lines, TIMEOUT))

    return read


@pytest.mark.parametrize(
    'command', [('-m', 'pyams_zmq'), ('-c', CONSOLE_SCRIPT)], ids=['module', 'console script']
)
@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name)
def test_serve(run, notes, ask, address, command, num):
    program = run('echo', 'other', command=command)
    (echo, pid, name), (other, _, _) = notes(2)
    assert (echo, other, name) == (f'{address}echo', f'{address}other', 'pyams_zmq')
    assert ask(echo, ['pid', None]) == [200, int(pid)]
    program.send_signal(num)
    assert program.wait(TIMEOUT) == 0
    assert program.running() == []
    assert 'from the ini file: INFO echo is process' in program.log.read_text()


def test_crash(run, notes, ask, address):
    run('echo')
    [(_, pid, _)] = notes(1)
    os.kill(int(pid), signal.SIGKILL)
    assert len(notes(2)) == 2
    status, second = ask(f'{address}echo', ['pid', None], timeout=TIMEOUT)
    assert status == 200
    assert second != int(pid)


def test_process_that_cannot_start(run):
    program = run('broken')
    assert program.wait(TIMEOUT) == 1
    assert 'from the ini file: CRITICAL broken fails: each of its' in program.log.read_text()


def test_unknown_name(run, ini):
    program = run('echo', 'eco')
    assert program.wait(TIMEOUT) == 2
    assert program.log.read_text().splitlines()[-1] == (
        f'pyams_zmq serve: error: unknown process eco; {ini} declares: '
        'broken, echo, elsewhere, other'
    )


def test_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['pyams_zmq'])
    with pytest.raises(SystemExit) as error:
        main(['serve', f'{tmp_path}/nothing.ini#main', 'echo'])
    assert error.value.code == 2
    assert f'file {tmp_path}/nothing.ini does not exist\n' in capsys.readouterr().err


def test_process_that_runs_elsewhere(run):
    program = run('echo', 'elsewhere')
    assert program.wait(TIMEOUT) == 2
    assert 'elsewhere has no handler: it runs elsewhere' in program.log.read_text()


def test_no_name(run, notes, ask, address):
    """All external processes run, and not those that are started in another way."""
    program = run()
    (echo, _, _), (other, _, _) = notes(2)
    assert (echo, other) == (f'{address}echo', f'{address}other')
    wait_until(lambda: 'broken fails' in program.log.read_text())
    program.send_signal(signal.SIGTERM)
    assert program.wait(TIMEOUT) in (0, 1)
    assert 'elsewhere' not in program.log.read_text()


def test_no_external_process(tmp_path, ini, run):
    setting = 'pyams_zmq.a.address = 127.0.0.1:1\npyams_zmq.a.start = never\n'
    text = INI.format(folder=tmp_path, setting=setting)
    (tmp_path / 'application.ini').write_text(text.replace('external:main', 'external:plain'))
    program = run()
    assert program.wait(TIMEOUT) == 2
    assert program.log.read_text().splitlines()[-1] == (
        f'pyams_zmq serve: error: {ini} declares no process with start = external, but: a (never)'
    )


@pytest.mark.parametrize(
    ('names', 'problem'),
    [
        (['echo'], 'unknown process echo; {ini} declares: none'),
        ([], '{ini} declares no process with start = external, but: none'),
    ],
)
def test_nothing_declared(tmp_path, ini, run, names, problem):
    (tmp_path / 'application.ini').write_text(INI.format(folder=tmp_path, setting=''))
    program = run(*names)
    assert program.wait(TIMEOUT) == 2
    assert problem.format(ini=ini) in program.log.read_text()


def test_import():
    """Importing the module does not run the command line."""
    importlib.import_module('pyams_zmq.__main__')


def test_no_arguments(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert 'usage: pyams_zmq' in capsys.readouterr().err


def test_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['pyams_zmq', 'serve', '--help'])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 0
    assert '%(VARIABLE)s' in capsys.readouterr().out
