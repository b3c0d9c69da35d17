# SPDX-License-Identifier: ZPL-2.1
"""The command line: `pyams_zmq jobs`, without `watch`."""

import json
import os
import signal
from ipaddress import ip_address
from threading import Thread

import pytest

from checks import TIMEOUT, freeze, wait_until
from function_service import answer_as_2_0, answering
from job_checks import Asker
from job_handlers import JobPool, Jobs
from pyams_zmq.cli import job_list
from pyams_zmq.process import inspection as inspection_module
from terminals import Runner, write_ini

ACTIONS = (
    ('list',),
    ('show', 'x'),
    ('watch', 'x'),
    ('cancel', 'x'),
    ('retry', 'x'),
    ('prune', '--older-than', '0'),
)
EACH_ACTION = pytest.mark.parametrize('words', ACTIONS, ids=lambda words: words[0])


@pytest.fixture
def pool(start, tmp_path):
    """A pool with a journal."""

    def start_pool(address='127.0.0.1:0', **options):
        attributes = {'journal': tmp_path / 'x.jobs'}
        attributes |= {name: options.pop(name) for name in list(options) if hasattr(JobPool, name)}
        factory = type('OwnPool', (JobPool,), attributes)
        return start(address, Jobs, factory=factory, workers=2, **options)

    return start_pool


@pytest.fixture
def run(capsys, monkeypatch):
    return Runner(capsys, monkeypatch)


@pytest.fixture
def service(pool, run, tmp_path):
    """Return a client of a service, and a function that runs the command about it."""
    started = pool()
    ini = write_ini(tmp_path, converter=started.bound_address)
    with Asker(started) as asker:
        yield asker, lambda *words: run('jobs', ini, 'converter', *words)


# List and show


def test_no_jobs(service):
    _asker, jobs = service
    assert jobs() == (0, ['ID  TYPE  STATE  ATTEMPTS  PROGRESS  AGE'])
    assert jobs('list', '--json') == (0, [])


def test_list(service, tmp_path):
    asker, jobs = service
    held = tmp_path / 'held'
    held.touch()
    args = {'path': str(held), 'log': str(tmp_path / 'log'), 'total': 10**9}
    done = asker.run('add', [1], id='done')['id']
    running = asker.submit('work', args, id='a-running-one')
    asker.wait(running, until=lambda job: job['progress'])
    asker.submit('add', [1], id='later', delay=60)
    code, lines = jobs()
    held.unlink()
    assert (code, [line.split() for line in lines]) == (
        0,
        [
            ['ID', 'TYPE', 'STATE', 'ATTEMPTS', 'PROGRESS', 'AGE'],
            ['later', 'add', 'waiting', '0', *lines[1].split()[-2:]],
            [running, 'work', 'running', '1', '0', '%', *lines[2].split()[-2:]],
            [done, 'add', 'done', '1', *lines[3].split()[-2:]],
        ],
    )
    assert lines[1].endswith(' s')
    assert [line.split()[0] for line in jobs('--state', 'waiting')[1][1:]] == ['later']
    assert [line.split()[0] for line in jobs('--type', 'add', '--limit', '1')[1][1:]] == ['later']
    found = [json.loads(line) for line in jobs('list', '--json', '--type', 'add')[1]]
    assert [(job['id'], job['state'], job['reply']) for job in found] == [
        ('later', 'waiting', None),
        ('done', 'done', None),
    ]


def test_pages(service, monkeypatch):
    """Each page is aligned with those before."""
    asker, jobs = service
    monkeypatch.setattr(job_list, '_PAGE', 2)
    for number in range(5):
        asker.submit('add', [1], id=f'job{number}', delay=60)
    ids = [f'job{number}' for number in reversed(range(5))]
    assert [line.split()[0] for line in jobs()[1]] == ['ID', *ids]
    assert [line.split()[0] for line in jobs('--limit', '4')[1]] == ['ID', *ids[:4]]
    assert [line.split()[0] for line in jobs('--limit', '3')[1]] == ['ID', *ids[:3]]
    asker.submit('add', [1], id='job5', delay=60)
    assert len(jobs()[1]) == 7  # the last page is empty


def describe(job_id, **members):
    return {'id': job_id, 'type': 'add', 'state': 'done', 'revision': 1, **members}


def test_jobs_that_are_removed_between_two_pages(run, monkeypatch):
    monkeypatch.setattr(job_list, '_PAGE', 2)
    pages = {None: ['d', 'c'], 'c': None, 'd': ['b', 'a'], 'a': None, 'b': None}

    def reply(_name, args):
        page = pages[args.get('before')]
        if page is None:
            return [404, 'Unknown job id in "before"']
        return [200, [describe(each) for each in page]]

    with answering(reply) as address:
        code, lines = run('jobs', '--address', address)
    assert (code, [line.split()[0] for line in lines]) == (0, ['ID', *'dcba'])


def test_error_between_two_pages(run, monkeypatch):
    monkeypatch.setattr(job_list, '_PAGE', 1)

    def reply(_name, args):
        return [503, 'The service is stopping'] if 'before' in args else [200, [describe('a')]]

    with answering(reply) as address:
        code, lines = run('jobs', '--address', address)
    assert (code, len(lines)) == (1, 2)
    assert '503 The service is stopping' in run.err


def test_text_that_controls_a_terminal(run):
    strange = '\x1b[2J\n\u202eØ'
    job = describe('a', type=strange, progress={'done': 2.5, 'text': strange}, reply=[200, strange])

    def reply(name, _args):
        return [200, [job] if name == 'pyams_zmq.jobs' else job]

    with answering(reply) as address:
        assert run('jobs', '--address', address)[1][1].split() == [
            *('a', '?[2J??Ø', 'done', '0', '2.5')
        ]
        lines = run('jobs', '--address', address, 'show', 'a')[1]
    assert lines == [
        'id        a',
        'type      ?[2J??Ø',
        'state     done',
        'attempts  0',
        'failures  0',
        'progress  2.5, ?[2J??Ø',
        'reply     [200, "\\u001b[2J\\n?Ø"]',
    ]


def test_show(service):
    asker, jobs = service
    asker.run('add', [1, 2], id='a')
    code, lines = jobs('show', 'a')
    assert code == 0
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert list(facts) == [
        *('id', 'type', 'state', 'attempts', 'failures', 'created', 'started', 'ended', 'reply'),
    ]
    assert (facts['id'], facts['state'], facts['reply']) == ('a', 'done', '[200, 3]')
    assert facts['created'].endswith('+00:00')
    code, lines = jobs('show', 'a', '--json')
    job = json.loads('\n'.join(lines))
    assert (code, job['reply'], job['attempt'], job['created'][-1]) == (0, [200, 3], 1, 'Z')


def test_time_left(run):
    progress = {'done': 1, 'total': 3}
    job = describe('a', state='running', eta=130.5, progress=progress)
    with answering(lambda *_args: [200, job]) as address:
        lines = run('jobs', '--address', address, 'show', 'a')[1]
    assert lines[-2:] == ['progress  33 %', 'time left 2 min']


# Cancel, retry, prune


def test_cancel_and_retry(service):
    asker, jobs = service
    for job_id in 'ab':
        asker.submit('add', [1], id=job_id, delay=60)
    code, lines = jobs('cancel', 'a', 'b', 'a')
    assert (code, lines) == (
        0,
        [f'{each} is cancelled, or will be at its next progress' for each in 'ab'],
    )
    assert [asker.job(each)['state'] for each in 'ab'] == ['cancelled'] * 2
    assert jobs('retry', 'b') == (0, ['b waits again'])
    assert asker.wait('b')['state'] == 'done'


def test_forced_cancel(service, tmp_path):
    asker, jobs = service
    held = tmp_path / 'held'
    held.touch()
    job_id = asker.submit('stubborn', {'path': str(held), 'log': str(tmp_path / 'log')})
    wait_until((tmp_path / 'log').exists, TIMEOUT)
    assert jobs('cancel', '--force', job_id)[0] == 0
    assert asker.wait(job_id)['state'] == 'cancelled'


@pytest.mark.parametrize('action', ['show', 'cancel', 'retry', 'watch'])
def test_unknown_ids(service, run, action):
    """They are named; the others are handled."""
    asker, jobs = service
    asker.run('refuse', 404, id='failed')
    asker.submit('add', [1], id='waiting', delay=60)
    known = {'cancel': 'waiting', 'watch': 'failed'}.get(action, 'failed')
    code, lines = jobs(action, 'nothing', known, 'never')
    assert (code, any(known in line for line in lines)) == (1, True)
    errors = run.err.splitlines()
    assert [error.split()[2] for error in errors] == ['nothing:', 'never:']
    assert '404 Unknown job id' in errors[0]


def test_only_unknown_ids(service, run):
    assert service[1]('watch', 'nothing') == (1, [])
    assert 'nothing: 404 Unknown job id' in run.err


def test_wrong_state(service, run):
    asker, jobs = service
    asker.run('add', [1], id='done')
    assert jobs('cancel', 'done') == (1, [])
    assert 'done: 409 The job has ended, it is done' in run.err
    assert jobs('retry', 'done') == (1, [])
    assert 'done: 409 The job is done' in run.err


def test_prune(service):
    asker, jobs = service
    for number in range(101):  # more than one step removes
        asker.submit('add', [number])
    asker.submit('add', [1], delay=60)
    wait_until(lambda: len(jobs('--state', 'done', '--json')[1]) == 101, TIMEOUT)
    assert jobs('prune', '--older-than', '1h') == (0, ['0 jobs removed'])
    assert jobs('prune', '--older-than', '0') == (0, ['101 jobs removed'])
    assert len(jobs('--json')[1]) == 1


def test_bad_reply_to_prune(run):
    with answering(lambda *_args: [200, 5]) as address:
        assert run('jobs', '--address', address, 'prune', '--older-than', '0') == (1, [])
    assert 'The reply is not that of a service with jobs' in run.err


# Services in each state


@EACH_ACTION
def test_down(run, tmp_path, words):
    ini = write_ini(tmp_path, converter=f'ipc://{tmp_path}/nothing.sock')
    assert run('jobs', ini, 'converter', '--timeout', '0.5', *words) == (4, [])
    assert 'converter' in run.err


@EACH_ACTION
def test_hung(pool, run, tmp_path, words):
    process = pool()
    pids = [process.stats()['pid'], process.pid]
    try:
        for pid in pids:
            freeze(pid)
        command = ('jobs', '--address', process.bound_address, '--timeout', '0.5')
        code, lines = run(*command, *words)
        assert (code in (4, 5), lines) == (True, [])
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@EACH_ACTION
def test_refused(pool, run, tmp_path, words):
    users = tmp_path / 'user'
    users.write_text('alice:wrong\n')
    users.chmod(0o600)
    process = pool(auth=['alice:a'])
    command = ('jobs', '--address', process.bound_address, '--auth-file', users)
    assert run(*command, *words) == (3, [])


@pytest.mark.parametrize('words', [ACTIONS[0], *ACTIONS[3:]], ids=lambda words: words[0])
def test_forbidden(pool, run, tmp_path, monkeypatch, words):
    """Who knows an id may see the job."""
    monkeypatch.setattr(inspection_module, 'parse_ip', lambda address: ip_address('192.0.2.1'))
    process = pool(auth=['alice:a', 'bob:b'])
    user = tmp_path / 'user'
    user.write_text('alice:a\n')
    user.chmod(0o600)
    with Asker(process, auth='bob:b') as asker:
        asker.submit('add', [1], id='x', delay=60)
    command = ('jobs', '--address', process.bound_address, '--auth-file', user)
    assert run(*command, *words) == (3, [])
    assert 'add it to stats_users' in run.err


@EACH_ACTION
def test_server_of_2_0(run, words):
    with answering(answer_as_2_0) as address:
        assert run('jobs', '--address', address, *words) == (1, [])
    assert '501 The service keeps no jobs' in run.err


@EACH_ACTION
def test_draining(pool, run, tmp_path, words):
    held = tmp_path / 'held'
    held.touch()
    process = pool(drain_timeout=TIMEOUT)
    with Asker(process) as asker:
        call = Thread(target=asker.ask, args=('hold', str(held)))
        call.start()
        wait_until(lambda: process.stats()['in_flight'], TIMEOUT)
        stop = Thread(target=process.stop)
        stop.start()
        try:
            wait_until(lambda: process.stats()['state'] == 'draining', TIMEOUT)
            assert run('jobs', '--address', process.bound_address, *words) == (1, [])
            assert '503 The service is stopping' in run.err
        finally:
            held.unlink()
            call.join()
            stop.join()


# Arguments


@pytest.mark.parametrize(
    ('words', 'text'),
    [
        (('lost',), "unknown action 'lost': write list, show, watch, cancel, retry, prune"),
        (('list', 'x'), '"list" takes no ids'),
        (('prune', 'x'), '"prune" takes no ids'),
        (('prune',), '"prune" needs --older-than'),
        (('show',), '"show" needs the ids of jobs'),
        (('cancel', 'ä'), "Bad id 'ä'"),
        (('show', 'x', '--state', 'done'), '--state is for list'),
        (('--force',), '--force is for cancel'),
        (('cancel', 'x', '--json'), '--json is for list, show, watch'),
        (('--limit', '0'), "bad value '0': write a number of jobs, 1 or more"),
        (('--limit', 'x'), "bad value 'x'"),
        (('prune', '--older-than', '1y'), "bad value '1y': write a number with s, min, h, d or w"),
        (('prune', '--older-than', '11w x'), "bad value '11w x'"),
        (('prune', '--older-than', '530w'), "bad value '530w'"),
        (('watch', *(f'id{number}' for number in range(101))), 'Bad ids: there are 101'),
    ],
)
def test_bad_arguments(run, words, text):
    assert run('jobs', '--address', '127.0.0.1:1', *words) == (2, [])
    assert text in run.err.splitlines()[-1]


@pytest.mark.parametrize(
    ('text', 'seconds'),
    [('90', 90), ('1.5min', 90), ('2 h', 7200), ('7d', 604800), ('2w', 1209600), ('3m', 180)],
)
def test_durations(run, text, seconds):
    asked = []

    def reply(name, args):
        asked.append((name, args['older_than']))
        return [200, {'removed': 0, 'has_more': False}]

    with answering(reply) as address:
        assert run('jobs', '--address', address, 'prune', '--older-than', text)[0] == 0
    [(name, age)] = asked
    assert name == 'pyams_zmq.jobs.prune'
    assert seconds <= age < seconds + TIMEOUT
