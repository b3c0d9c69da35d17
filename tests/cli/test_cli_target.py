# SPDX-License-Identifier: ZPL-2.1
"""How a command reaches a service: by an application, or by an address."""

import json

import pytest

from answering import PING

DECLARED = {'b.address': '127.0.0.1:1', 'b.start': 'never', 'a.address': '127.0.0.1:2'}


@pytest.mark.parametrize(
    ('words', 'problem'),
    [
        ([], 'write INI and NAME, or --address'),
        (['--key', 'x'], '--auth-file, --key and --server-key are for --address'),
        (['--auth-file', 'x', 'a.ini', 'b'], '--auth-file, --key and --server-key are for --addr'),
        (['{folder}/none.ini', 'b'], 'file {folder}/none.ini does not exist'),
        (['{ini}'], 'no process is named; {ini} declares: a, b'),
        (['{ini}', 'c'], 'unknown process c; {ini} declares: a, b'),
        (['{ini}', 'b', 'more', 'words'], 'unexpected arguments: more words'),
        (['--address', '127.0.0.1:1', '--key', 'x'], 'CURVE needs both --key and --server-key'),
        (['--address', '127.0.0.1:1', '--server-key', 'x'], 'CURVE needs both --key and --serv'),
        (
            ['--address', '127.0.0.1:1', '--server-key', 'x', '--key', 'y'],
            'A CURVE key is 40 characters of Z85',
        ),
        (['--address', '127.0.0.1'], "Bad ØMQ address '127.0.0.1'"),
        (
            ['--address', '127.0.0.1:1', '--auth-file', '{folder}/none'],
            "Credentials file '{folder}/none': No such file or directory",
        ),
        (['--address', '127.0.0.1:1', 'word'], 'unexpected arguments: word'),
        (['--unknown', '{ini}', 'b'], 'unrecognized arguments: --unknown'),
    ],
)
def test_usage(run, ini, tmp_path, words, problem):
    settings = {**DECLARED, 'a.start': 'never'}
    values = {'ini': ini(**settings), 'folder': tmp_path}
    code, out, err = run('ping', *(word.format(**values) for word in words))
    assert (code, out) == (2, '')
    assert problem.format(**values) in err.splitlines()[-1]


def test_nothing_declared(run, ini):
    path = ini()
    code, out, err = run('ping', path, 'a')
    assert (code, out) == (2, '')
    assert err.endswith(f'error: unknown process a; {path} declares: none\n')


def test_configuration_error(run, ini):
    path = ini(**{'a.address': '127.0.0.1:1', 'a.tiemout': '3'})
    code, out, err = run('ping', path, 'a')
    assert (code, out) == (2, '')
    assert err.startswith(
        f"pyams_zmq: error: Unknown setting 'pyams_zmq.a.tiemout' in {path}, section main: did you "
        'mean pyams_zmq.a.timeout?'
    )
    assert err.count('\n') == 1


def test_variable(run, answer, declare):
    _option, address = answer(ping=[200, {'state': 'up', **PING}])
    path, name = declare('127.0.0.1:%(port)s')
    port = address.rpartition(':')[2]
    for words in ([path, name, f'port={port}'], [path, f'port={port}', name]):
        assert run('ping', *words).code == 0


def test_file_of_users(run, start, tmp_path):
    users = tmp_path / 'users'
    users.write_text('# the operator\nalice:secret\n')
    process = start(auth=users)
    target = ('--address', process.bound_address, '--auth-file', str(users))
    assert run('call', *target, 'echo', '1') == (0, '1\n', '')


def test_application_that_prints_and_logs(run, answer, tmp_path):
    """A question does not write to the logs of the application; JSON stays JSON."""
    _option, address = answer(stats=[200, {}])
    ini = tmp_path / 'application.ini'
    ini.write_text(PRINTING.format(address=address, folder=tmp_path))
    code, out, err = run('stats', str(ini), 'converter', '--json')
    assert (code, json.loads(out), err) == (0, {'outbox': None}, 'printed\n')
    assert not (tmp_path / 'records').exists()


PRINTING = """
[app:main]
use = call:app.external:printing
pyams_zmq.converter.address = {address}
pyams_zmq.converter.start = never

[loggers]
keys = root
[handlers]
keys = file
[formatters]
keys =
[logger_root]
level = INFO
handlers = file
[handler_file]
class = FileHandler
args = ('{folder}/records',)
"""
