# SPDX-License-Identifier: ZPL-2.1
"""The command line: `pyams_zmq outbox`."""

import json
import re
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace
from uuid import uuid4

import pytest
import zope.sqlalchemy
from pyramid.threadlocal import manager as thread_local
from sqlalchemy import text
from sqlalchemy.orm import Session
from transaction import TransactionManager

from answering import AnsweringService
from app.program import Program, WebServer
from checks import wait_until
from outbox_applications import open_storage
from pyams_zmq.cli import main
from pyams_zmq.outbox import relay
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.outbox.owner import identify_process
from pyams_zmq.outbox.storage import Entry, Refusal

TIME = r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00'

NOTHING = ['No message is waiting', 'No dead letters']

UNKNOWN = 'Some ids are not those of dead letters: see "list"'

SQLITE = pytest.mark.parametrize('database', ['sqlite'], indirect=True)


@pytest.fixture
def settings(make_application):
    """Return the settings of the application."""
    return make_application.settings


@pytest.fixture
def configure(tmp_path, settings):
    """Write the ini file of the application; return its path."""

    def write(**changed):
        return str(WebServer.configure(tmp_path, 'outboxed', {**settings, **changed}))

    return write


@pytest.fixture
def run(configure, capsys, monkeypatch):
    """Run the command in this process; return its exit code and its lines."""

    def call(*words, **changed):
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', ['pyams_zmq'])
            try:
                code = main(['outbox', configure(**changed), 'address=x', *words])
            except SystemExit as exit_:
                code = exit_.code
        thread_local.clear()
        found = capsys.readouterr()
        assert bool(found.err) == (code not in (0, 1) or not found.out)
        return code, (found.out or found.err).splitlines()

    return call


@pytest.fixture
def run_program(configure, tmp_path):
    """Run the command as a program; return its exit code, its output and its errors."""

    def call(*words, env=(), **changed):
        result = subprocess.run(
            [
                *(sys.executable, '-W', 'ignore', '-m', 'pyams_zmq', 'outbox'),
                *(configure(**changed), 'address=x', *words),
            ],
            env=Program.environ(tmp_path, **dict(env)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return result.returncode, result.stdout.splitlines(), result.stderr

    return call


@pytest.fixture
def fill(settings):
    """Add messages as the process *owner*; with a refusal they become dead letters."""
    this_process = identify_process()

    def add(*names, owner=this_process, service='converter', kind='note', refusal=None):
        with open_storage(settings) as storage, Session(storage._engine) as session:
            with (manager := TransactionManager()):
                zope.sqlalchemy.register(session, transaction_manager=manager)
                request = SimpleNamespace(dbsession=session)
                keys = [
                    storage.add(
                        Entry(service, kind, f'["{kind}","{name}"]'.encode()),
                        owner,
                        manager,
                        request,
                    )
                    for name in names
                ]
            if refusal is not None:
                storage.settle([], [(key, refusal) for key in keys])
        return list(map(str, keys))

    return add


# List


@SQLITE
@pytest.mark.parametrize('words', [(), ('list',)])
def test_nothing(run, words):
    assert run(*words) == (0, NOTHING)


@SQLITE
def test_waiting(run, fill):
    fill('a', 'b')
    fill('c', service='renderer', owner='')
    fill('d', owner='0123456789abcdef:1:1')
    fill('e', service='archive')
    code, lines = run()
    assert code == 0
    assert [re.sub(TIME, 'TIME', line) for line in lines] == [
        '2 waiting for converter since TIME, of a running process',
        '1 waiting for renderer since TIME, of a process that has ended',
        '1 waiting for converter since TIME, of another machine',
        '1 waiting for archive since TIME, of a running process; the service is not declared',
        'No dead letters',
    ]


@SQLITE
def test_dead_letters(run, fill):
    """What a service or a client has chosen does not control the terminal."""
    strange = 'no\x1b[2J\n\u202eØ'
    [first] = fill('secret', refusal=Refusal(404, "Unknown message type 'note'"))
    [second] = fill('secret', kind='"', refusal=Refusal(418, strange))
    code, lines = run()
    assert code == 0
    assert [re.sub(TIME, 'TIME', line) for line in lines] == [
        'No message is waiting',
        f"dead letter {first}: 'note' to converter, TIME, status 404: \"Unknown message type "
        "'note'\"",
        f"dead letter {second}: '\"' to converter, TIME, status 418: 'no\\x1b[2J\\n\\u202eØ'",
    ]
    assert 'secret' not in str(lines)


@SQLITE
def test_ascii(run_program, fill):
    """The output can have any encoding."""
    fill('a', refusal=Refusal(404, 'Ø\ud800'))
    code, lines, errors = run_program(env={'PYTHONIOENCODING': 'ascii'})
    assert (code, errors) == (0, '')
    assert lines[1].endswith(r"status 404: '\xd8?'")


@SQLITE
def test_many_dead_letters(run, fill):
    ids = fill(*range(250), refusal=Refusal(404, ''))
    _code, lines = run()
    assert [line.split()[2] for line in lines[1:]] == [f'{each}:' for each in ids]
    assert run('drop', '--all') == (0, ['250 dead letters'])
    assert run() == (0, NOTHING)


@SQLITE
def test_other_application(run, fill):
    fill('a', 'b')
    other = f'test {uuid4()}'
    _code, lines = run(**{'pyams_zmq.application': other})
    name = re.fullmatch("2 messages belong to another application, '(test .*)'", lines[-1])
    assert name
    assert lines[:-1] == NOTHING
    assert run('drop', '--all', **{'pyams_zmq.application': other}) == (0, ['0 dead letters'])
    assert run()[1][0].startswith('2 waiting for converter ')


# Retry and drop


@SQLITE
@pytest.mark.parametrize('has_ids', [True, False])
def test_retry(run, fill, make_application, services, monkeypatch, has_ids):
    monkeypatch.setattr(relay, 'CHECK_INTERVAL', 0.1)
    ids = fill('a', 'b', 'c', refusal=Refusal(404, ''))
    assert run('retry', *(ids if has_ids else ['--all'])) == (0, ['3 dead letters'])
    assert run('retry', '--all') == (0, ['0 dead letters'])
    services.start('converter')
    application = make_application()
    services.wait_for('a', 'b', 'c')
    application.wait_until_empty()


@SQLITE
@pytest.mark.parametrize('action', ['retry', 'drop'])
def test_some_ids_are_unknown(run, fill, action):
    [letter] = fill('a', refusal=Refusal(404, ''))
    [waiting] = fill('b')
    for ids, number in (([letter, letter, waiting, '999', 'x'], 1), ([letter], 0)):
        assert run(action, *ids) == (
            1,
            [f'{number} dead letters', UNKNOWN],
        )


@SQLITE
def test_drop(run, fill):
    ids = fill('a', 'b', refusal=Refusal(404, ''))
    fill('c')
    assert run('drop', ids[0], ids[0]) == (0, ['1 dead letters'])
    code, lines = run()
    assert code == 0
    assert [line.split()[:3] for line in lines] == [
        ['1', 'waiting', 'for'],
        ['dead', 'letter', f'{ids[1]}:'],
    ]


@SQLITE
def test_drop_what_waits_for_a_service(run, fill):
    fill(*range(450), service='archive')
    fill('a', service='archive', owner='')
    fill('b', 'c')
    fill('d', service='archive', refusal=Refusal(404, ''))
    assert run('drop', '--service', 'archive') == (0, ['451 messages dropped'])
    code, lines = run()
    assert (code, len(lines)) == (0, 2)
    assert lines[0].startswith('2 waiting for converter ')
    assert "'note' to archive" in lines[1]


@SQLITE
def test_drop_what_waits_for_a_misspelt_service(run, fill):
    """Those are named for which messages wait, also if they are declared."""

    def drop(names):
        assert run('drop', '--service', 'archiv') == (
            1,
            ['0 messages dropped', f"No message waits for 'archiv'; messages wait for: {names}"],
        )

    drop('none')
    fill('a', service='archiv', refusal=Refusal(404, ''))
    fill('b', 'c', service='archive')
    fill('d', service='archive', owner='')
    fill('e')
    drop('archive, converter')
    assert run()[1][0].startswith('2 waiting for archive ')


@pytest.mark.parametrize('database', ['postgresql', 'zeo'], indirect=True)
def test_databases(run_program, make_application, services):
    """A program shows and changes the outbox of an application that runs."""

    def run(*words, **changed):
        code, lines, errors = run_program(*words, **changed)
        assert errors == ''
        return code, lines

    services.start('converter')
    application = make_application()
    for name in 'ab':
        assert application.upload(name, type='no') == 200
    wait_until(lambda: len(application.outbox.dead_letters()) == 2)
    services.stop()
    assert application.upload('c') == 200
    code, lines = run()
    assert (code, len(lines)) == (0, 3)
    assert re.fullmatch(f'1 waiting for converter since {TIME}, of a running process', lines[0])
    first, second = (line.split()[2].strip(':') for line in lines[1:])
    assert run('retry', first) == (0, ['1 dead letters'])
    assert run('drop', first, second) == (1, ['1 dead letters', UNKNOWN])
    code, lines = run(**{'pyams_zmq.application': 'other'})
    assert (code, lines[:2]) == (0, NOTHING)
    assert lines[2].startswith("2 messages belong to another application, 'test ")


# Errors


@SQLITE
@pytest.mark.parametrize(
    ('words', 'problem'),
    [
        (['show'], "unknown action 'show': write list, retry, drop"),
        (['7'], "unknown action '7': write list, retry, drop"),
        (['retry'], '"retry" needs the ids of dead letters, or --all'),
        (['drop'], '"drop" needs the ids of dead letters, or --all'),
        (['list', '7'], '"list" takes no ids, and no option'),
        (['--all'], '"list" takes no ids, and no option'),
        (['--service', 'archive'], '--service is for "drop", without ids'),
        (['retry', '--service', 'archive'], '--service is for "drop", without ids'),
        (['drop', '7', '--service', 'archive'], '--service is for "drop", without ids'),
        (['drop', '7', '--all'], 'write ids or --all, not both'),
        (
            ['drop', '--all', '--service', 'archive'],
            'argument --service: not allowed with argument --all',
        ),
        (
            ['drop', '--service', 'converter'],
            "'converter' is declared: its messages are sent when it runs",
        ),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_bad_arguments(run, fill, words, problem):
    fill('a')
    code, lines = run(*words)
    assert (code, lines[-1]) == (2, f'pyams_zmq outbox: error: {problem}')
    assert run()[1][0].startswith('1 waiting for converter ')


@SQLITE
def test_no_outbox(run, tmp_path):
    code, lines = run(**{'pyams_zmq.outbox': 'none'})
    assert (code, lines[-1]) == (
        2,
        f'pyams_zmq outbox: error: the application of {tmp_path}/application.ini has no outbox: '
        'set pyams_zmq.outbox',
    )


@SQLITE
def test_no_table(run, settings):
    with open_storage(settings) as storage, storage._engine.begin() as connection:
        connection.execute(text('DROP TABLE pyams_zmq_outbox'))
    for words in ((), ('drop', '--all'), ('drop', '--service', 'archive'), ('retry', '1')):
        assert run(*words) == (
            1,
            [
                "pyams_zmq: error: The database has no table 'pyams_zmq_outbox': create it "
                'with a migration, or with metadata.create_all(engine)'
            ],
        )


@pytest.mark.parametrize('database', ['postgresql'], indirect=True)
@pytest.mark.parametrize('is_running', [True, False])
def test_no_secret(run_program, settings, tmp_path, is_running):
    """As a program; the server of this test lets all passwords pass, if it runs."""
    url = settings['app.url'].replace('postgres@', 'postgres:hush@')
    if not is_running:
        url = f'{url.partition("?")[0]}?host={tmp_path}'
    code, lines, errors = run_program(**{'app.url': url})
    assert 'hush' not in str((lines, errors))
    if is_running:
        assert (code, lines, errors) == (0, NOTHING, '')
    else:
        assert (code, lines) == (1, [])
        problem = f'the database of the outbox of {tmp_path}/application.ini cannot be used: '
        assert errors.startswith(f'pyams_zmq: error: {problem}OperationalError: ')


# Statistics


@pytest.fixture
def show_stats(configure, capsys, monkeypatch):
    """Run `pyams_zmq stats` for a service that answers; return the last line, and the JSON."""

    def call():
        with closing(AnsweringService(stats=[200, {}])) as service:
            ini = configure(**{'pyams_zmq.converter.address': service.address})
            found = []
            for option in (), ('--json',):
                with monkeypatch.context() as patch:
                    patch.setattr(sys, 'argv', ['pyams_zmq'])
                    assert main(['stats', ini, 'converter', 'address=x', *option]) == 0
                thread_local.clear()
                found.append(capsys.readouterr().out)
        return found[0].splitlines()[-1], json.loads(found[1])['outbox']

    return call


@SQLITE
def test_messages_in_the_statistics(show_stats, fill):
    fill('a', 'b')
    fill('c', service='renderer')
    fill('d', refusal=Refusal(404, 'no'))
    assert show_stats() == (
        'outbox: 2 waiting, 1 dead letters',
        {'waiting': 2, 'dead': 1},
    )


@SQLITE
def test_statistics_without_a_database(show_stats, monkeypatch):
    def fail(_outbox):
        raise OSError('the database is down\nat this place')

    monkeypatch.setattr(Outbox, 'count_waiting', fail)
    problem = 'its database cannot be used: OSError: the database is down'
    assert show_stats() == (f'outbox: {problem}', {'problem': problem})
