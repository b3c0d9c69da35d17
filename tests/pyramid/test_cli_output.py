# SPDX-License-Identifier: ZPL-2.1
"""The command line where the output, a path or a file has another encoding."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from logging.handlers import RotatingFileHandler

import pytest

from checks import TIMEOUT, wait_until
from handlers import Process
from pyams_zmq.cli.output import accept_any_record, accept_any_text
from pyams_zmq.client import ZMQClient
from pyams_zmq.testing import running

QUIET = ('-W', 'ignore:pkg_resources is deprecated')

ASCII = [
    pytest.param({'PYTHONIOENCODING': 'ascii'}, id='PYTHONIOENCODING'),
    pytest.param(
        {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}, id='locale without UTF-8'
    ),
]

INI = """
[app:main]
use = call:app.external:main
app.notes = %(here)s/notes
app.address = ipc://%(here)s/

[loggers]
keys = root

[handlers]
keys = file, console

[formatters]
keys = plain

[logger_root]
level = INFO
handlers = file, console

[handler_file]
class = FileHandler
args = ('records',)
formatter = plain

[handler_console]
class = StreamHandler
args = (sys.stdout,)
formatter = plain

[formatter_plain]
format = %(levelname)s %(message)s
"""


# tox sets the encoding.
USUAL = {name: value for name, value in os.environ.items() if name != 'PYTHONIOENCODING'}


@pytest.mark.parametrize('env', ASCII)
@pytest.mark.parametrize('args', [['--help'], ['serve', '--help'], ['worker', '--help']])
def test_help(args, env):
    result = subprocess.run(
        [sys.executable, *QUIET, '-m', 'pyams_zmq', *args],
        env={**USUAL, **env},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b'')
    assert b'usage: pyams_zmq' in result.stdout.decode('ascii').encode()


@pytest.mark.parametrize('env', [*ASCII, pytest.param({}, id='UTF-8')])
def test_serve_in_a_folder_with_a_name_in_latin_1(tmp_path, run_program, env):
    folder = tmp_path / os.fsdecode(b'f\xe9vrier')
    folder.mkdir()
    (folder / 'application.ini').write_text(INI)
    serve = ('-m', 'pyams_zmq', 'serve', f'{folder}/application.ini', 'echo')
    program = run_program(*QUIET, *serve, **env)
    try:
        notes = wait_until(lambda: _read(folder / 'notes'), TIMEOUT)
        assert notes.startswith(b'ipc://' + os.fsencode(folder) + b'/echo ')
        with ZMQClient(f'ipc://{folder}/echo') as client:
            assert client.call('pid') == int(notes.split()[1])
        program.send_signal(signal.SIGTERM)
        assert program.wait(TIMEOUT) == 0
        output = program.process.stdout.read()
        for records in (_read(tmp_path / 'records'), output):
            assert b'serves ipc://' in records
            assert b'INFO echo has ended with exit code 0' in records
        assert 'Error' not in program.log.read_text()
    finally:
        shutil.rmtree(os.fsencode(folder), ignore_errors=True)


def _read(path):
    return path.read_bytes() if path.exists() else b''


def test_ipc_path_that_is_not_ascii(tmp_path):
    """Process, lock and client use the same bytes for a path."""
    address = f'ipc://{tmp_path}/ø'
    with running(Process(address)) as process, ZMQClient(address) as client:
        assert process.bound_address == address
        assert (tmp_path / 'ø').is_socket()
        assert client.call('pid') == process.pid


def test_streams_of_other_kinds(capsys):
    accept_any_text(None, sys.stdout)
    print('Ø')
    assert capsys.readouterr().out == 'Ø\n'


@pytest.mark.parametrize(('errors', 'expected'), [(None, b'\\xd8'), ('replace', b'?')])
def test_log_files_are_rotated(tmp_path, errors, expected):
    """The next file of a handler accepts any text as well; a handler may say how itself."""
    path = tmp_path / 'log'
    handler = RotatingFileHandler(path, encoding='ascii', errors=errors, backupCount=1)
    delayed = RotatingFileHandler(tmp_path / 'other', encoding='ascii', delay=True, errors=errors)
    logger = logging.getLogger('test_log_files_are_rotated')
    logger.propagate = False
    logger.handlers = [handler, delayed, logging.NullHandler()]
    try:
        accept_any_record()
        for _number in range(2):
            logger.warning('Ø')
            handler.doRollover()
        assert (tmp_path / 'log.1').read_bytes() == expected + b'\n'
        assert (tmp_path / 'other').read_bytes() == (expected + b'\n') * 2
    finally:
        logger.handlers = []
        handler.close()
        delayed.close()
