# SPDX-License-Identifier: ZPL-2.1
"""Jobs of the clients that record messages instead of sending them."""

import pytest
import transaction
from pyramid.request import Request, apply_request_extensions

from pyams_zmq.client.jobs import JobProgress
from pyams_zmq.exceptions import ZMQJobError, ZMQMessageError, ZMQRemoteError, ZMQReplyError
from pyams_zmq.jobs import JobCancelled, zmq_job
from pyams_zmq.pool import ZMQPool
from pyams_zmq.testing import JobRecorder, RecordedJob, RecordingClient, Sent
from pyams_zmq.transaction import submit_on_commit


class Converter:
    """Has jobs, and a method that is not one."""

    def __init__(self):
        self.cleaned = []

    def check(self, clip):
        return [200, clip]

    @zmq_job(retries=3)
    def convert(self, args, *, job):
        try:
            for number in range(3):
                job.progress(number, 3, 'converting')
        except JobCancelled:
            self.cleaned.append(args)
            raise
        return [200, [args, job.id, job.attempt]]

    @zmq_job()
    async def convert_later(self, clip: str, size: int = 1, *, job):
        job.progress(1)
        job.progress(2)
        return [200, [clip, size]]

    @zmq_job()
    def measure(self, *frames):
        return len(frames[0])

    @zmq_job(retries=2, backoff=600)
    def fail(self, args, *, job):
        job.progress(job.attempt)
        if job.attempt < args:
            raise ValueError('secret')
        return [200, job.attempt]

    @zmq_job(retries=3)
    def refuse(self, status):
        raise ZMQMessageError(status, 'no')

    @zmq_job()
    def all_cleaned(self, args=None):
        return [200, self.cleaned]


@pytest.fixture(autouse=True)
def _abort():
    """Abort the transaction of each test."""
    yield
    transaction.abort()


@pytest.fixture(params=['class', 'pool'])
def eager(request):
    """Client whose handler runs the jobs in this process."""
    handler = Converter if request.param == 'class' else ZMQPool('127.0.0.1', Converter)
    with RecordingClient('converter', handler=handler) as client:
        yield client


@pytest.fixture
def client():
    """Client that records messages."""
    with RecordingClient('converter') as client:
        yield client


# Recorded


def test_recorded(client):
    submitted = client.submit('convert', {'path': ('a',)}, key='k', delay=5, frames=[b'x'])
    assert submitted.is_new
    [job] = client.recorder.jobs
    assert (job.name, job.id, job.type) == ('converter', submitted.id, 'convert')
    assert (job.args, job.frames) == ({'path': ['a']}, [b'x'])
    assert job.options == {'key': 'k', 'delay': 5}
    assert (job.state, job.attempt, job.progress, job.reply) == ('waiting', 0, [], None)
    text = "RecordedJob(name='converter', type='convert', args={'path': ['a']}, state='waiting')"
    assert repr(job) == text
    assert client.outbox == [Sent('converter', 'convert', {'path': ['a']}, [b'x'])]
    info = client.job(job.id)
    assert (info.id, info.state, info.is_ended) == (job.id, 'waiting', False)
    assert (info.due - info.created).total_seconds() == pytest.approx(5)
    job.run()  # nothing runs it
    assert job.state == 'waiting'


def test_ids_and_keys(client):
    assert client.submit('convert', 1, id='x', key='k').is_new
    assert client.submit('convert', 2, id='x').id == 'x'
    assert client.submit('convert', 3, key='k').id == 'x'
    assert client.submit('another', 4, key='k').is_new
    client.cancel('x')
    assert client.submit('convert', 5, key='k').is_new
    assert [job.args for job in client.recorder.jobs] == [1, 4, 5]


def test_commit(client):
    job = submit_on_commit(client, 'convert', 'a.mov')
    assert client.recorder.jobs == []
    transaction.commit()
    assert [(each.id, each.args) for each in client.recorder.jobs] == [(job.id, 'a.mov')]


def test_waiting_job_does_not_hang(client):
    job = client.submit('convert')
    with pytest.raises(ZMQJobError, match='409 .* does not go on by itself in a test'):
        client.result(job.id)


def test_cancel_and_lists(client):
    ids = [client.submit('convert', number).id for number in range(3)]
    client.cancel(ids[1])
    with pytest.raises(ZMQRemoteError, match='410'):
        client.result(ids[1])
    with pytest.raises(ZMQJobError, match='409 The job has ended, it is cancelled'):
        client.cancel(ids[1])
    client.retry(ids[1])
    with pytest.raises(ZMQJobError, match='409 The job is waiting'):
        client.retry(ids[1])
    client.cancel(ids[0])
    assert [job.id for job in client.jobs()] == ids[::-1]
    assert [job.id for job in client.jobs(state='cancelled', type='convert')] == [ids[0]]
    assert [job.id for job in client.jobs(limit=1, before=ids[2])] == [ids[1]]
    assert client.jobs(type='another') == []
    for call in (client.job, client.cancel, client.retry, lambda name: client.jobs(before=name)):
        with pytest.raises(ZMQJobError, match='404'):
            call('nobody')


def test_replies():
    replies = {'good': [200, 'a.webm'], 'bad': lambda args: [415, args], 'none': ValueError('x')}
    client = RecordingClient(replies=replies)
    assert client.result(client.submit('good').id) == 'a.webm'
    job = client.submit('bad', 'no video')
    with pytest.raises(ZMQRemoteError, match='415 no video'):
        client.result(job.id)
    assert [job.state for job in client.recorder.jobs] == ['done', 'failed']
    with pytest.raises(ValueError, match='x'):
        client.submit('none')
    assert len(client.recorder.jobs) == 2


def test_replies_about_jobs():
    """Those of the test come first."""
    job = {'id': 'x', 'type': 'convert', 'state': 'expired', 'revision': 1}
    client = RecordingClient(
        replies={'pyams_zmq.job': [200, job], 'pyams_zmq.job.cancel': [403, '']}
    )
    assert client.job('x').state == 'expired'
    with pytest.raises(ZMQJobError, match='403'):
        client.cancel('x')


def test_messages_that_are_not_jobs(client):
    assert client.call('convert') is None
    assert client.request(['convert', 1, None]) == [200, None]
    assert client.request(['convert', 1, {'id': 'x'}, 'too much']) == [200, None]
    client.recorder.reset()
    assert client.call('pyams_zmq.jobs') == []
    assert client.request({'raw': 1}) == [200, None]
    assert client.recorder.jobs == []


# Eager


def test_eager(eager):
    job = eager.submit('convert', 'a.mov')
    assert eager.result(job.id) == ['a.mov', job.id, 1]
    [recorded] = eager.recorder.jobs
    assert recorded.progress == [JobProgress(number, 3, 'converting') for number in range(3)]
    assert (recorded.state, recorded.attempt) == ('done', 1)
    info = eager.job(job.id)
    assert (info.state, info.progress, info.attempt) == ('done', None, 1)
    assert info.created <= info.started <= info.ended
    assert [info.state for info in eager.watch(job.id)] == ['done']
    assert eager.result(eager.submit('convert_later', ['b.mov', 2]).id) == ['b.mov', 2]
    assert eager.result(eager.submit('measure', frames=[b'123']).id) == 3


def test_cancel_while_it_runs(eager):
    states = []

    def cancel(job):
        states.append(job.state)
        assert eager.job(job.id).progress == job.progress[-1]
        if len(job.progress) == 2:
            eager.cancel(job.id)

    eager.recorder.on_progress = cancel
    job = eager.submit('convert', 'a.mov')
    with pytest.raises(ZMQRemoteError, match='410 The job .* was cancelled'):
        eager.result(job.id)
    assert states == ['running', 'running']
    assert eager.job(job.id).state == 'cancelled'
    eager.recorder.on_progress = RecordedJob.cancel
    assert eager.job(eager.submit('convert_later', 'b.mov').id).state == 'cancelled'
    eager.recorder.on_progress = None
    assert eager.result(eager.submit('all_cleaned').id) == ['a.mov']


def test_delay_failure_and_retry(eager):
    job = eager.submit('convert', 1, delay=60)
    [recorded] = eager.recorder.jobs
    assert recorded.state == 'waiting'
    recorded.run()
    assert eager.result(job.id)[0] == 1
    job = eager.submit('fail', 2, retries=0)
    with pytest.raises(ZMQRemoteError, match='500 Internal error'):
        eager.result(job.id)
    assert (eager.job(job.id).state, eager.job(job.id).failures) == ('failed', 1)
    eager.retry(job.id)
    assert eager.result(job.id) == 2
    with pytest.raises(ZMQJobError, match='409 The job is done'):
        eager.retry(job.id)


def test_job_in_another_state(eager):
    """The methods of a recorded job are refused as the messages are."""
    submitted = eager.submit('convert', 1, delay=60)
    [job] = eager.recorder.jobs
    with pytest.raises(ZMQJobError, match='409 The job is waiting: only a job without success'):
        job.retry()
    job.run()
    for method, text in (
        (job.run, 'The job is done: only a job that waits is run'),
        (job.cancel, 'The job has ended, it is done'),
        (job.retry, 'The job is done: only a job without success is retried'),
    ):
        with pytest.raises(ZMQJobError, match=f'409 {text}'):
            method()
    assert (eager.job(submitted.id).state, job.attempt) == ('done', 1)
    eager.recorder.on_progress = RecordedJob.run
    assert eager.job(eager.submit('convert', 1, retries=0).id).state == 'failed'


def test_retry_while_another_job_has_the_key(client):
    first = client.submit('convert', 1, key='k').id
    client.cancel(first)
    client.submit('convert', 2, key='k')
    with pytest.raises(ZMQJobError, match='409 Another job with its key has not ended'):
        client.retry(first)


def test_exception_of_the_replies():
    """The job waits again, as if its service had not been there."""
    replies = {'convert': ValueError('x')}
    with RecordingClient(replies=replies) as client:
        client.submit('convert', delay=60)
        [job] = client.recorder.jobs
        with pytest.raises(ValueError, match='x'):
            job.run()
        replies['convert'] = [200, 'a.webm']
        job.run()
        assert client.result(job.id) == 'a.webm'


def test_attempts(eager):
    """Those of a service, without its pauses; a status 4xx is final."""
    info = eager.job(eager.submit('fail', 3).id)
    assert (info.state, info.attempt, info.failures, info.reply) == ('done', 3, 2, [200, 3])
    info = eager.job(eager.submit('fail', 9).id)
    assert (info.state, info.attempt, info.failures) == ('failed', 3, 3)
    info = eager.job(eager.submit('fail', 9, retries=1).id)
    assert (info.state, info.attempt, info.failures) == ('failed', 2, 2)
    info = eager.job(eager.submit('refuse', 422).id)
    assert (info.state, info.attempt, info.failures) == ('failed', 1, 0)
    info = eager.job(eager.submit('refuse', 503).id)
    assert (info.state, info.attempt, info.failures) == ('failed', 4, 4)
    eager.recorder.on_progress = RecordedJob.cancel
    info = eager.job(eager.submit('fail', 9).id)
    assert (info.state, info.attempt, info.reply) == ('cancelled', 1, None)


def test_attempts_of_a_reply():
    replies = {'convert': [503, 'no']}
    with RecordingClient(replies=replies) as client:
        info = client.job(client.submit('convert', retries=4).id)
        assert (info.attempt, info.failures) == (5, 5)
        assert client.job(client.submit('convert').id).attempt == 1


def test_id_of_a_submission_with_a_known_key(client):
    """It is another name of the job, as in a service."""
    first = client.submit('convert', 1, key='k', delay=9)
    second = submit_on_commit(client, 'convert', 2, key='k', delay=9)
    for _turn in range(2):  # sent again
        submit_on_commit(client, 'convert', 2, key='k', id=second.id)
    transaction.commit()
    assert client.request(['convert', 3, {'key': 'k'}]) == [200, None]  # a call, for a service
    [job] = client.recorder.jobs
    assert (job.id, job.aliases) == (first.id, [second.id])
    assert client.job(second.id).id == second.id
    client.cancel(second.id)
    assert [info.state for info in client.watch([second.id, first.id])] == ['cancelled'] * 2
    client.retry(second.id)
    assert client.job(first.id).state == 'waiting'


def test_known_key_of_a_call(eager):
    job = eager.submit('convert', 1, key='k', delay=9)
    assert eager.request(['convert', 2, {'key': 'k'}]) == [200, {'id': job.id}]
    assert len(eager.recorder.jobs) == 1


def test_what_is_a_job(eager):
    """As in a pool: the call of a job submits it, and other methods are no jobs."""
    assert list(eager.call('convert', 1)) == ['id']
    assert len(eager.recorder.jobs) == 1
    with pytest.raises(ZMQReplyError, match="'check' was not accepted as a job"):
        eager.submit('check', 1)
    with pytest.raises(ZMQRemoteError, match='404'):
        eager.submit('nobody', 1)
    assert eager.call('check', 1) == 1
    submit_on_commit(eager, 'convert', 2)
    transaction.commit()
    assert [(job.args, job.state) for job in eager.recorder.jobs] == [(1, 'done'), (2, 'done')]


# Applications


@pytest.mark.parametrize('has_handler', [True, False])
def test_application(config, tmp_path, has_handler):
    config.include('pyams_zmq.testing')
    options = {'start': 'never'}
    if has_handler:
        options = {'handler': Converter, 'workers': 2, 'journal': tmp_path / 'x.jobs'}
    config.add_zmq_process('converter', address='127.0.0.1:25556', **options)
    config.add_zmq_process('other', start='never', address='127.0.0.1:25557')
    config.commit()
    testing = config.registry.zmq_testing
    request = Request.blank('/')
    request.registry = config.registry
    apply_request_extensions(request)
    testing.eager = True
    request.tm = transaction.TransactionManager(explicit=True)
    request.tm.begin()
    job = request.zmq('converter').submit('convert', 1, key='k')
    assert testing.jobs == []
    request.tm.commit()
    [recorded] = testing.jobs
    assert (recorded.name, recorded.id) == ('converter', job.id)
    assert recorded.state == ('done' if has_handler else 'waiting')
    assert request.zmq('converter').job(job.id).state == recorded.state
    with pytest.raises(ZMQJobError, match='404'):
        request.zmq('other').job(job.id)
    request.zmq('other').submit('convert', 1, id=job.id, key='k')
    assert [each.name for each in testing.jobs] == ['converter', 'other']
    testing.reset()
    assert testing.jobs == []


def test_recorder_is_shared():
    recorder = JobRecorder()
    for name in ('a', 'b'):
        RecordingClient(name, recorder=recorder).submit('convert')
    assert [job.name for job in recorder.jobs] == ['a', 'b']
