# SPDX-License-Identifier: ZPL-2.1
"""Jobs of a service, with the client for threads and that for coroutines.

The service is a pool with a journal; in the tests with `fake` it is a stand-in that shows what it
gets, and fails when it is told to.
"""

import itertools
import re
import threading
import time
from datetime import datetime, timedelta, timezone

import pytest

from checks import AT_ONCE, TIMEOUT
from client_jobs import make_pool
from job_clients import blocking_client, inner
from job_service import job_service
from peers import replying
from pyams_zmq.client import job_watch
from pyams_zmq.client.jobs import JobInfo, JobProgress, SubmittedJob
from pyams_zmq.exceptions import (
    ZMQClosedError,
    ZMQJobError,
    ZMQMessageError,
    ZMQRemoteError,
    ZMQReplyError,
    ZMQTimeoutError,
    ZMQUnreachableError,
)


@pytest.fixture
def service(request, address, start, tmp_path):
    """Pool with jobs; the stand-in, for tests that need what only that can do."""
    if 'fake' in request.fixturenames:
        with job_service(address) as service:
            yield service
    else:
        yield start(address, tmp_path, factory=make_pool)


@pytest.fixture
def fake(service):
    """Stand-in of a service with jobs."""
    return service


@pytest.fixture(params=['threads', 'asyncio'])
def kind(request):
    """Kind of the client."""
    return request.param


@pytest.fixture
def client(kind, service):
    """Client of the service."""
    with blocking_client(kind, service.bound_address) as client:
        yield client


@pytest.fixture
def path(tmp_path):
    """File that a job follows."""
    return tmp_path / 'steps'


def add(path, line):
    with path.open('a') as file:
        file.write(f'{line}\n')


def read_until(watch, condition):
    """Return the first job of a watch that fulfils a condition."""
    return next(job for job in watch if condition(job))


# Submitting


def test_result(client):
    job = client.submit('echo', {'path': 'a.mov'})
    assert re.fullmatch(
        r'[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}', job.id
    )
    assert job.is_new
    assert client.result(job.id, timeout=TIMEOUT) == {'path': 'a.mov'}
    info = client.job(job.id)
    assert (info.id, info.type, info.state, info.is_ended) == (job.id, 'echo', 'done', True)
    assert (info.attempt, info.failures, info.due) == (1, 0, None)
    assert info.reply == [200, {'path': 'a.mov'}]
    assert info.created <= info.started <= info.ended
    assert info.created.tzinfo == timezone.utc
    assert abs(datetime.now(timezone.utc) - info.created) < timedelta(seconds=TIMEOUT)


def test_frames(client):
    job = client.submit('measure', frames=[b'12', bytearray(b'345')])
    assert client.result(job.id, timeout=TIMEOUT) == [2, 3]


def test_id_is_known(client):
    assert client.submit('echo', 1, id='mine.1_-') == SubmittedJob('mine.1_-', True)
    assert client.submit('echo', 2, id='mine.1_-') == SubmittedJob('mine.1_-', False)
    assert client.result('mine.1_-', timeout=TIMEOUT) == 1


def test_key_is_known(client, path):
    first = client.submit('follow', str(path), key='clip')
    assert client.submit('follow', str(path), key='clip') == SubmittedJob(first.id, False)
    assert client.submit('follow', str(path), key='another').is_new
    add(path, 'end')
    assert client.result(first.id, timeout=TIMEOUT) == 0
    assert client.submit('follow', str(path), key='clip').is_new


def test_all_options(client, fake):
    due = datetime.now(timezone(timedelta(hours=5))) + timedelta(hours=1)
    options = {'id': 'x', 'key': 'k', 'expires': 7200, 'priority': -3, 'timeout': 5, 'retries': 0}
    client.submit('echo', 1, due=due, **options)
    [[name, args, sent]] = fake.messages
    assert (name, args) == ('echo', 1)
    assert 3590 < sent.pop('delay') <= 3600
    assert sent == options
    assert abs(client.job('x').due - due) < timedelta(seconds=TIMEOUT)
    client.submit('echo', 1, id='y', due=due - timedelta(hours=2), delay=None)
    assert fake.messages[-1][2] == {'id': 'y'}


def test_delay(client):
    job = client.submit('echo', 1, delay=3600)
    info = client.job(job.id)
    assert (info.state, info.is_ended, info.attempt) == ('waiting', False, 0)
    assert info.due - info.created == pytest.approx(timedelta(hours=1), abs=timedelta(seconds=1))


def test_expiry(client, path):
    for _job_at_a_time in 'ab':
        client.submit('follow', str(path), priority=1)
    job = client.submit('echo', 1, expires=0.01)
    with pytest.raises(ZMQRemoteError, match=f'504 The job {job.id} has expired') as raised:
        client.result(job.id, timeout=TIMEOUT)
    assert not isinstance(raised.value, ZMQJobError)
    add(path, 'end')


@pytest.mark.parametrize(
    ('error', 'text', 'options'),
    [
        (ValueError, 'Bad id', {'id': ''}),
        (ValueError, 'Bad id', {'id': 'a b'}),
        (ValueError, 'Bad id', {'id': 'ä'}),
        (ValueError, 'Bad id', {'id': 'x' * 65}),
        (ValueError, 'Bad id', {'id': 5}),
        (
            ValueError,
            'Bad id SubmittedJob.*: write its `id`',
            {'id': SubmittedJob('x')},
        ),
        (ValueError, 'Bad key', {'key': ''}),
        (ValueError, 'Bad key', {'key': 'ä' * 128}),
        (ValueError, 'Bad key', {'key': 5}),
        (ValueError, 'Bad delay', {'delay': -1}),
        (ValueError, 'Bad delay', {'delay': False}),
        (ValueError, 'Bad delay', {'delay': '1'}),
        (ValueError, 'Bad delay', {'delay': float('nan')}),
        (ValueError, 'Bad delay', {'delay': 1e10}),
        (ValueError, 'Bad expires', {'expires': -1}),
        (ValueError, 'Bad expires 0: write more seconds than its delay', {'expires': 0}),
        (ValueError, 'Bad expires 5: write more', {'expires': 5, 'delay': 5}),
        (ValueError, 'Bad due', {'due': datetime(2030, 1, 1)}),  # noqa: DTZ001 - what is tested
        (ValueError, 'Bad due', {'due': 5}),
        (ValueError, 'not both', {'due': datetime.now(timezone.utc), 'delay': 1}),
        (ValueError, 'Bad due .* ten years', {'due': datetime(9999, 1, 1, tzinfo=timezone.utc)}),
        (ValueError, 'Bad priority', {'priority': 1001}),
        (ValueError, 'Bad priority', {'priority': -1001}),
        (ValueError, 'Bad priority', {'priority': 0.5}),
        (ValueError, 'Bad timeout', {'timeout': 0}),
        (ValueError, 'Bad timeout', {'timeout': float('inf')}),
        (ValueError, "Bad priority 'high': write an integer from -1000", {'priority': 'high'}),
        (ValueError, 'Bad timeout .*seconds above 0, up to 100000000', {'timeout': 1e9}),
        (ValueError, "Bad retries '3': write an integer from 0 to 1000", {'retries': '3'}),
        (ValueError, 'Bad retries', {'retries': -1}),
        (ValueError, 'Bad retries', {'retries': 1001}),
        (TypeError, 'Bad frame 0', {'frames': ['text']}),
        (TypeError, 'Bad message type', {'type': ['secret']}),
        (ZMQMessageError, '413', {'args': 'x' * 2000}),
    ],
)
def test_bad_arguments(client, fake, error, text, options):
    inner(client).max_message_size = 1000
    with pytest.raises(error, match=text) as raised:
        client.submit(**{'type': 'echo', **options})
    assert 'secret' not in str(raised.value)
    assert fake.messages == []


def test_lost_reply(client, fake):
    """It is submitted again, with the same id: there is one job, and it is new."""
    fake.drop_next_reply()
    job = client.submit('echo', 1)
    assert job.is_new
    assert [message[2]['id'] for message in fake.messages] == [job.id, job.id]
    assert list(fake.jobs) == [job.id]


def test_number_of_attempts(kind, down):
    with blocking_client(kind, down) as client:
        inner(client).connect_timeout = 0.05
        with pytest.raises(ZMQUnreachableError):
            client.submit('echo')


def test_full_disk(client, fake):
    fake.refusal = [507, 'The disk of the journal is full']
    with pytest.raises(ZMQRemoteError, match='^507 The disk of the journal is full$') as raised:
        client.submit('echo')
    assert (type(raised.value), raised.value.status) == (ZMQRemoteError, 507)


@pytest.mark.parametrize(
    'reply',
    [b'[200, "a.webm"]', b'{"id": "x"}', b'[200, {"id": "other"}]', b'[202, {"id": 5}]', b'[202]'],
)
def test_not_a_job(kind, reply):
    with (
        replying(reply) as address,
        blocking_client(kind, address) as client,
        pytest.raises(ZMQReplyError, match="'echo' was not accepted as a job"),
    ):
        client.submit('echo', 1)


def test_service_without_journal(kind, start):
    process = start()
    with blocking_client(kind, process.bound_address) as client:
        calls = (client.job, client.cancel, client.retry, lambda name: next(client.watch(name)))
        for call in calls:
            with pytest.raises(ZMQJobError, match='501 The service keeps no jobs'):
                call('x')
        with pytest.raises(ZMQJobError, match='501'):
            client.jobs()
        with pytest.raises(ZMQRemoteError, match='404 Unknown message type'):
            client.submit('nobody', 1)


# Asking, cancelling, retrying


def test_unknown_job(client):
    for call in (client.job, client.cancel, client.retry):
        with pytest.raises(ZMQJobError, match='404 Unknown job id'):
            call('nobody')
        with pytest.raises(ValueError, match='Bad id'):
            call('no body')


def test_cancel(client, path):
    job = client.submit('follow', str(path))
    client.cancel(job.id)
    with pytest.raises(ZMQRemoteError, match=f'410 The job {job.id} was cancelled'):
        client.result(job.id, timeout=TIMEOUT)
    with pytest.raises(ZMQJobError, match='409 The job has ended') as raised:
        client.cancel(job.id, force=True)
    assert raised.value.status == 409
    with pytest.raises(TypeError, match='Bad force'):
        client.cancel(job.id, force=1)


def test_failure_and_retry(client):
    job = client.submit('fail', 418)
    with pytest.raises(ZMQRemoteError, match='418 it has failed') as raised:
        client.result(job.id, timeout=TIMEOUT)
    assert not isinstance(raised.value, ZMQJobError)
    assert client.job(job.id).state == 'failed'
    client.retry(job.id)
    with pytest.raises(ZMQRemoteError, match='418'):
        client.result(job.id, timeout=TIMEOUT)
    assert client.job(job.id).attempt == 2
    done = client.submit('echo')
    client.result(done.id, timeout=TIMEOUT)
    with pytest.raises(ZMQJobError, match='409'):
        client.retry(done.id)


def test_lists(client):
    ids = [client.submit('echo', number).id for number in range(3)]
    other = client.submit('fail', 400).id
    for job_id in ids:
        client.result(job_id, timeout=TIMEOUT)
    assert ids == sorted(ids)
    assert [job.id for job in client.jobs()] == [other, *reversed(ids)]
    assert [job.id for job in client.jobs(type='fail')] == [other]
    assert [job.id for job in client.jobs(state='done', limit=2)] == [ids[2], ids[1]]
    assert [job.id for job in client.jobs(state='done', before=ids[1])] == [ids[0]]
    assert {job.reply for job in client.jobs()} == {None}
    with pytest.raises(ValueError, match='Bad limit'):
        client.jobs(limit=0)


# Watching


def test_watch(client, path):
    job = client.submit('follow', str(path))
    watch = client.watch(job.id, timeout=TIMEOUT)
    first = next(watch)
    assert first.state in ('waiting', 'running')
    add(path, 'one')
    info = read_until(watch, lambda job: job.progress)
    assert info.progress == JobProgress(1, 4, 'one')
    assert info.progress.fraction == 0.25
    assert timedelta() < info.eta < timedelta(seconds=TIMEOUT)
    add(path, 'two')
    assert read_until(watch, lambda job: job.progress.done == 2).progress.text == 'two'
    add(path, 'end')
    [last] = watch
    assert (last.state, last.result()) == ('done', 2)
    assert [job.state for job in client.watch(job.id)] == ['done']  # one that has ended already


def test_watch_several(client, path, tmp_path):
    paths = [path, tmp_path / 'other']
    ids = [client.submit('follow', str(each)).id for each in paths]
    watch = client.watch([*ids, ids[0]], timeout=TIMEOUT)
    assert read_until(watch, lambda job: job.id == ids[1])
    add(paths[1], 'end')
    assert read_until(watch, lambda job: job.is_ended).id == ids[1]
    add(paths[0], 'end')
    assert [job.id for job in watch if job.is_ended] == [ids[0]]
    assert list(client.watch([])) == []


def test_watch_ends_early(client, path):
    job = client.submit('follow', str(path))
    for info in client.watch(job.id):
        assert info.id == job.id
        break
    assert client.call('pyams_zmq.job', job.id)['id'] == job.id


def test_watch_of_an_unknown_job(client, monkeypatch):
    monkeypatch.setattr(job_watch, 'UNKNOWN', 0.2)
    with pytest.raises(ZMQJobError, match='404'):
        next(client.watch('nobody'))
    with pytest.raises(ValueError, match='Bad id'):
        client.watch(['x', 'no body'])
    with pytest.raises(ValueError, match='Bad id'):
        client.watch(5)
    with pytest.raises(ValueError, match='there are 101; write 100 at most'):
        client.watch(map(str, range(101)))
    with pytest.raises(ValueError, match='Bad timeout'):
        client.watch('x', timeout=-1)


def test_job_that_is_known_a_moment_later(client, fake):
    """What is sent on commit may arrive after the first question."""
    fake.refusal = [404, 'Unknown job id']

    def submit():
        while [message[0] for message in fake.messages].count('pyams_zmq.job.wait') < 2:
            time.sleep(0.005)  # no event announces a message
        fake.refusal = None
        fake._submit('echo', 1, [], {'id': 'later'})

    thread = threading.Thread(target=submit)
    thread.start()
    assert client.result('later', timeout=TIMEOUT) == 1
    thread.join()


def test_restart(client, fake, path):
    job = client.submit('follow', str(path))
    watch = client.watch(job.id, timeout=TIMEOUT)
    next(watch)
    for line in ('one', 'two'):
        fake.stop()
        add(path, line)
        timer = threading.Timer(0.3, fake.start)
        timer.start()
        assert read_until(watch, lambda job, line=line: job.progress and job.progress.text == line)
        timer.join()
    fake.refusal = [503, 'The service is stopping, try again later']
    timer = threading.Timer(0.2, lambda: setattr(fake, 'refusal', None))
    timer.start()
    add(path, 'end')
    assert read_until(watch, lambda job: job.is_ended)
    timer.join()
    assert list(watch) == []


def test_pool_that_is_killed(client, service, start, path, address, tmp_path):
    """The job runs again in the next pool, and the watch goes on."""
    job = client.submit('follow', str(path))
    add(path, 'one')
    watch = client.watch(job.id, timeout=2 * TIMEOUT)
    read_until(watch, lambda job: job.progress)
    service.kill()
    service.join()
    start(address, tmp_path, factory=make_pool)
    add(path, 'two')
    info = read_until(watch, lambda job: job.progress and job.progress.done == 2)
    assert info.state == 'running'
    add(path, 'end')
    assert [job.reply for job in watch][-1] == [200, 2]


@pytest.mark.parametrize(
    ('refusal', 'error'),
    [(None, ZMQUnreachableError), ([503, 'stopping'], ZMQJobError)],
)
def test_service_that_does_not_come_back(client, fake, path, refusal, error):
    inner(client).connect_timeout = 0.1
    job = client.submit('follow', str(path))
    watch = client.watch(job.id, patience=0.3, timeout=TIMEOUT)
    next(watch)
    if refusal is None:
        fake.stop()
    fake.refusal = refusal
    start = time.monotonic()
    with pytest.raises(error):
        list(watch)
    assert 0.25 < time.monotonic() - start < AT_ONCE
    if refusal is None:
        fake.start()


def test_other_errors_end_a_watch(client, fake, path):
    job = client.submit('follow', str(path))
    watch = client.watch(job.id)
    next(watch)
    fake.refusal = [403, 'Not allowed']
    with pytest.raises(ZMQJobError, match='403'):
        list(watch)


def test_result_in_time(client, path):
    job = client.submit('follow', str(path))
    start = time.monotonic()
    with pytest.raises(ZMQTimeoutError, match=f'Job {job.id} has not ended within 0.3 s'):
        client.result(job.id, timeout=0.3)
    assert 0.3 <= time.monotonic() - start < AT_ONCE
    add(path, 'end')


def test_service_that_hangs(kind):
    """A service that does not reply does not make it wait longer than the time-out."""
    with (
        replying() as address,
        blocking_client(kind, address) as client,
        pytest.raises(ZMQTimeoutError, match='Job x has not ended within 0.2 s'),
    ):
        client.result('x', timeout=0.2)


def test_polls_are_limited(client, path, monkeypatch, fake):
    """A long poll ends after some time, and the next one begins; nothing is reported twice."""
    monkeypatch.setattr(job_watch, 'POLL', 0.05)
    job = client.submit('follow', str(path))
    with pytest.raises(ZMQTimeoutError):
        list(client.watch(job.id, timeout=0.5))
    waits = [message[1] for message in fake.messages if message[0] == 'pyams_zmq.job.wait']
    assert len(waits) > 2
    assert max(wait['timeout'] for wait in waits) <= 0.05


def test_server_that_does_not_wait(kind):
    """It is not asked without end."""
    reply = b'[200, {"id": "x", "type": "echo", "state": "running", "revision": 1}]'
    replies = [reply, b'[200, null]', *[reply] * 100]
    count = itertools.count()

    def answer(reply):
        next(count)
        return reply

    with (
        replying(*[lambda reply=reply: answer(reply) for reply in replies]) as address,
        blocking_client(kind, address) as client,
    ):
        start = time.monotonic()
        watch = client.watch('x', timeout=0.5)
        assert next(watch).revision == 1
        with pytest.raises(ZMQTimeoutError):
            next(watch)
        assert time.monotonic() - start < AT_ONCE
        assert next(count) < 10


# Replies


def test_unknown_members():
    assert JobInfo(id='x', type='t', state='new kind', revision=1).state == 'new kind'


@pytest.mark.parametrize(
    'payload',
    [
        b'null',
        b'5',
        b'{"id": 5, "type": "t", "state": "done", "revision": 1}',
        b'{"id": "x", "type": "t", "revision": 1}',
        b'{"id": "x", "type": "t", "state": "done", "revision": "1"}',
        b'{"id": "x", "type": "t", "state": "done", "revision": 1, "created": "now"}',
        b'{"id": "x", "type": "t", "state": "done", "revision": 1, "ended": "2030-01-01T00:00:00"}',
        b'{"id": "x", "type": "t", "state": "done", "revision": 1, "eta": -1}',
        b'{"id": "x", "type": "t", "state": "done", "revision": 1, "eta": 1e300}',
        b'{"id": "x", "type": "t", "state": "done", "revision": 1, "progress": 5}',
    ],
)
def test_bad_job(kind, payload):
    with (
        replying(b'[200, ' + payload + b']') as address,
        blocking_client(kind, address) as client,
        pytest.raises(ZMQReplyError, match='what a service says about jobs'),
    ):
        client.job('x')


def test_reply_without_status(kind):
    with (
        replying(b'{"secret": 1}', b'[200, 5]') as address,
        blocking_client(kind, address) as client,
    ):
        with pytest.raises(ZMQReplyError, match=r'not \[status, payload\]: dict$'):
            client.cancel('x')
        with pytest.raises(ZMQReplyError, match='Expected `array`'):
            client.jobs()


def test_snapshot():
    info = JobInfo(id='x', type='t', state='running', revision=1, reply=['secret'])
    assert repr(info) == "JobInfo('t', id='x', 'running')"
    with pytest.raises(AttributeError):
        info.state = 'done'
    assert info.eta is None
    for state in ('waiting', 'running', 'failed'):
        job = JobInfo(id='x', type='t', state=state, revision=1)
        with pytest.raises(ZMQRemoteError, match=f'409 The job x is {state} and has no result'):
            job.result()
    assert JobInfo(id='x', type='t', state='done', revision=1).result() is None
    assert JobInfo(id='x', type='t', state='done', revision=1, reply='text').result() == 'text'


@pytest.mark.parametrize(
    ('progress', 'fraction'),
    [
        (JobProgress(), None),
        (JobProgress(1), None),
        (JobProgress(1, 0), None),
        (JobProgress(None, 4), None),
        (JobProgress(1, 4), 0.25),
        (JobProgress(5, 4), 1.0),
        (JobProgress(-1, 4), 0.0),
    ],
)
def test_fraction(progress, fraction):
    assert progress.fraction == fraction


def test_closed(client):
    inner(client).close()
    with pytest.raises(ZMQClosedError):
        client.job('x')
