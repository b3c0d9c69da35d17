# SPDX-License-Identifier: ZPL-2.1
"""The command line as a program: encodings, pipes, signals and closed files."""

import json
import os
import signal
import subprocess
import sys

import pytest

from checks import TIMEOUT, wait_until
from handlers import Process
from pyams_zmq.testing import running

COMMAND = (sys.executable, '-W', 'ignore:pkg_resources is deprecated', '-m', 'pyams_zmq')

ENCODINGS = [
    pytest.param({'PYTHONIOENCODING': 'ascii'}, id='PYTHONIOENCODING'),
    pytest.param({'PYTHONIOENCODING': 'latin-1'}, id='latin-1'),
    pytest.param({'PYTHONIOENCODING': 'utf-8'}, id='utf-8'),
    pytest.param({'LC_ALL': 'C'}, id='LC_ALL'),
    pytest.param(
        {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}, id='locale without UTF-8'
    ),
]

# tox sets the encoding.
USUAL = {name: value for name, value in os.environ.items() if name != 'PYTHONIOENCODING'}

TEXT = 'é €\x9b'


def run_program(*argv, env=(), **options):
    """Run the command as a program without a terminal; return its exit code and its output."""
    return subprocess.run(
        [*COMMAND, *argv],
        env={**USUAL, **dict(env)},
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=TIMEOUT,
        **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **options},
    )


@pytest.fixture
def target(start):
    """Return the options that name the address of a service."""
    return '--address', start().bound_address


def test_version():
    result = run_program('--version')
    assert (result.returncode, result.stdout, result.stderr) == (0, b'pyams_zmq 3.0.0\n', b'')


@pytest.mark.parametrize('env', ENCODINGS)
def test_call(target, env):
    text = json.dumps(TEXT, ensure_ascii=False)
    result = run_program('call', *target, 'echo', text, env=env)
    assert (result.returncode, result.stderr) == (0, b'')
    assert json.loads(result.stdout) == TEXT


@pytest.mark.parametrize('env', ENCODINGS)
def test_error(target, env):
    result = run_program('call', *target, TEXT, env=env)
    assert (result.returncode, result.stdout) == (1, b'')
    assert result.stderr.startswith(b"pyams_zmq: error: 404 Unknown message type '")
    assert result.stderr.count(b'\n') == 1


def test_reader_that_ends(target):
    """As `head` does: without an error, as a program that SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    result = run_program('call', *target, 'big', '100000', stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b'')


def test_output_that_cannot_be_written(target):
    with open('/dev/full', 'w', encoding='ascii') as full:
        result = run_program('call', *target, 'big', '100000', stdout=full)
    assert result.returncode == 1
    assert result.stderr == (
        b'pyams_zmq: error: the output cannot be written: No space left on device\n'
    )


@pytest.mark.parametrize(
    ('closed', 'words', 'code'),
    [(1, 'echo 1', 0), (2, 'echo 1', 0), (2, 'none', 1), (0, 'echo -', 2)],
)
def test_closed_file(target, closed, words, code):
    line = ' '.join(['"$@"', words, f'{closed}>&-'])
    result = subprocess.run(
        ['sh', '-c', line, 'sh', *COMMAND, 'call', *target],
        capture_output=True,
        check=False,
        timeout=TIMEOUT,
    )
    assert result.returncode == code
    assert b'Traceback' not in result.stderr


def test_interrupt(tmp_path):
    """Ctrl+C, while the method runs."""
    path = tmp_path / 'wait'
    with running(Process('127.0.0.1:0')) as process:
        argv = [*COMMAND, 'call', '--address', process.bound_address, 'wait_for', f'"{path}"']
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
            wait_until(path.exists)
            program.send_signal(signal.SIGINT)
            assert program.communicate(timeout=TIMEOUT) == (b'', b'')
        path.unlink()
    assert program.returncode == 130
