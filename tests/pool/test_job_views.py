# SPDX-License-Identifier: ZPL-2.1
"""The clients that wait until a job has changed, without sockets and without a disk."""

import json

import pytest

from job_checks import make_record
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs import watchers as watchers_module
from pyams_zmq.jobs.job_messages import Wait
from pyams_zmq.pool import job_views as module
from pyams_zmq.pool.job_run import JobRun
from pyams_zmq.pool.job_views import JobViews
from pyams_zmq.pool.mailbox import Mailbox
from pyams_zmq.process.connections import Connection, Envelope


class Bench:
    """Some jobs, and the clients that wait for them; each function that is posted is a turn."""

    def __init__(self):
        self.jobs = {}
        self.runs = {}
        self.read = []  # ids of the jobs whose replies were read
        self.sent = []
        self.posted = []
        self.views = JobViews(
            self, lambda *reply: self.sent.append(reply), self.runs.get, self.posted.append
        )

    def add(self, job_id, alias=None, **options):
        record = make_record(len(self.jobs) + 1, id=job_id, **options)
        self.jobs[job_id] = self.jobs[alias or job_id] = record
        return record

    def end(self, job_id, revision):
        record = self.jobs[job_id]
        record.state, record.revision, record.reply = 'done', revision, b'[200,"%d"]' % revision
        self.views.notify(job_id)

    def look(self, job_id):
        record = self.jobs.get(job_id)
        return record and (record.id, record.state, record.revision)

    def get(self, job_id):
        self.read.append(job_id)
        return self.jobs.get(job_id)

    def wait(self, name='client', connection=None, **args):
        envelope = Envelope([name.encode(), b''])
        envelope.connection = connection
        self.views.wait(envelope, Wait(args))

    def turn(self):
        """Call what was posted, also by that; return the replies, by client."""
        while self.posted:
            self.posted.pop(0)()
        return self.take()

    def take(self):
        sent, self.sent[:] = self.sent[:], []
        return {envelope[0].decode(): json.loads(bytes(frame)) for envelope, [frame] in sent}


@pytest.fixture
def bench():
    return Bench()


def test_replies_of_jobs_that_the_client_knows_are_not_read(bench):
    for number in range(5):
        bench.add(f'job{number}', state='done', revision=number, reply=b'[200,null]')
    ids = list(bench.jobs)
    bench.wait(ids=ids, after={job_id: number for number, job_id in enumerate(ids)})
    assert (bench.sent, bench.read) == ([], [])
    bench.wait(ids=ids, after=dict.fromkeys(ids[:2], -1))
    assert bench.take()['client'][1]['id'] == 'job0'
    assert bench.read == ['job0']


def test_revision_of_a_progress(bench):
    record = bench.add('x')
    run = bench.runs['x'] = JobRun(record)
    bench.wait(id='x', after=1)
    assert bench.take() == {}
    run.publish(1, 2, '')
    bench.wait('other', id='x', after=1)
    assert bench.take()['other'][1]['progress']['done'] == 1
    bench.views.notify('x')
    assert bench.turn()['client'][1]['progress']['done'] == 1


def test_revisions_of_other_jobs():
    wait = Wait({'id': 'x', 'after': {'x': 1, 'y': 1}})
    assert not wait.is_new('x', 1, False)
    assert wait.is_new('y', 1, False)  # it is not kept
    with pytest.raises(ZMQMessageError, match='Bad after: write at most 100 revisions'):
        Wait({'id': 'x', 'after': dict.fromkeys(map(str, range(101)), 1)})


def test_many_who_wait_for_one_job(bench, monkeypatch):
    """They share the memory of the reply, and other messages have their turn in between."""
    monkeypatch.setattr(module, '_TURN', -1.0)
    bench.add('x', alias='y')
    for number in range(10):
        bench.wait(f'client{number}', id='x' if number % 2 else 'y', after=1)
    bench.end('x', 2)
    assert (bench.sent, bench.read, len(bench.views)) == ([], [], 0)
    frames, replies = set(), {}
    for number in range(10):
        assert len(bench.posted) == 1, number
        bench.posted.pop()()
        [(_envelope, [frame])] = bench.sent
        frames.add(frame)
        replies |= bench.take()
    assert bench.posted == []
    assert len(frames) == 2
    assert sorted(bench.read) == ['x', 'y']
    assert {name: job['id'] for name, (_status, job) in replies.items()} == {
        f'client{number}': 'x' if number % 2 else 'y' for number in range(10)
    }
    assert {tuple(job['reply']) for _status, job in replies.values()} == {(200, '2')}


def test_job_that_is_removed_before_the_reply(bench):
    bench.add('x')
    bench.wait('first', id='x', after=1)
    bench.end('x', 2)
    del bench.jobs['x']
    assert bench.turn()['first'][0] == 404


def test_change_of_a_job_that_cannot_be_read(bench):
    bench.add('x')
    bench.wait(id='x', after=1, timeout=0)
    del bench.jobs['x']
    bench.views.notify('x')
    assert (bench.turn(), len(bench.views)) == ({}, 1)
    bench.views.reply_late(float('inf'))
    assert bench.turn()['client'][0] == 404


@pytest.mark.parametrize('reply', [b'\xff', b'[200', b''])
def test_reply_that_is_damaged(bench, reply):
    record = bench.add('x')
    bench.wait('first', id='x', after=1)
    bench.wait('second', id='x', after=1)
    record.state, record.revision, record.reply = 'done', 2, reply
    bench.views.notify('x')
    replies = bench.turn()
    bench.wait('third', id='x', after=1)
    replies |= bench.take()
    for name in 'first', 'second', 'third':
        status, job = replies[name]
        assert (status, job['state']) == (200, 'done')
        assert job['reply'] == [500, 'The reply of the job is damaged in the journal']


def wait_for_two(bench):
    """Let two clients wait; the job of the first one cannot be described."""
    for job_id in 'xy':
        bench.add(job_id)
        bench.wait(job_id, id=job_id, after=1)
    for job_id in 'xy':
        bench.end(job_id, 2)
    bench.jobs['x'].created = 'never'


def test_one_reply_that_fails(bench, caplog):
    """The others are sent, and so are later ones."""
    wait_for_two(bench)
    assert list(bench.turn()) == ['y']
    assert 'A client that waits for a job gets no reply' in caplog.text
    bench.add('z')
    bench.wait('z', id='z', after=1)
    bench.end('z', 2)
    assert list(bench.turn()) == ['z']


def test_reply_that_fails_at_the_end_of_the_broker(bench):
    bench.add('z')
    bench.wait('z', id='z', after=1)
    wait_for_two(bench)
    bench.views.end()
    assert {name: status for name, (status, _job) in bench.take().items()} == {'y': 200, 'z': 503}


def test_number_of_a_job(bench):
    """The journal is read only if somebody waits, and an error of it fails nothing else."""
    bench.add('x')
    numbers = []

    def find_id(number):
        numbers.append(number)
        if number > 1:
            raise ZMQMessageError(500, 'The journal cannot be read')
        return 'x'

    bench.find_id = find_id
    bench.views.notify_number(1)
    assert numbers == []
    bench.wait(id='x', after=1)
    bench.jobs['x'].revision = 2
    bench.views.notify_number(2)
    assert bench.turn() == {}
    bench.views.notify_number(1)
    assert bench.turn()['client'][1]['revision'] == 2
    assert numbers == [2, 1]


def test_late_reply_has_the_job_that_is_new(bench):
    bench.add('x')
    changed = bench.add('y')
    bench.wait('first', ids=['x', 'y'], after={'x': 1, 'y': 1})
    changed.revision = 5  # without a notice
    bench.wait('second', ids=['x', 'y'], after={'x': 1, 'y': 5})
    assert bench.take() == {}
    bench.views.reply_late(float('inf'))
    replies = bench.turn()
    assert {name: job['id'] for name, (_status, job) in replies.items()} == {
        'first': 'y',
        'second': 'x',
    }


def test_late_reply_without_one_of_the_jobs(bench):
    bench.add('x')
    bench.add('y')
    bench.wait(ids=['x', 'y'], after={'x': 1, 'y': 1})
    del bench.jobs['y']
    bench.views.reply_late(float('inf'))
    assert bench.turn()['client'][1]['id'] == 'x'


def test_end_of_the_broker(bench):
    bench.add('x')
    bench.add('y')
    bench.wait('first', id='x', after=1)
    bench.wait('second', id='y', after=1)
    bench.end('x', 2)
    bench.views.end()
    assert {name: status for name, (status, _job) in bench.take().items()} == {
        'first': 200,
        'second': 503,
    }
    assert bench.turn() == {}


def test_one_client_does_not_take_all(bench, monkeypatch):
    monkeypatch.setattr(watchers_module, 'MAX_SIZE', 10_000)
    greedy, modest = Connection(0.0), Connection(0.0)
    bench.add('x')
    for number in range(20):
        bench.wait(f'greedy{number}', greedy, id='x', after=1)
    refused = bench.take()
    assert {status for status, _text in refused.values()} == {503}
    assert 'greedy0' not in refused
    assert len(refused) + len(bench.views) == 20
    bench.wait('modest', modest, id='x', after=1)
    assert [name[:6] for name in bench.take()] == ['greedy']
    bench.end('x', 2)
    assert 'modest' in bench.turn()


def test_functions_that_post_others():
    """The sockets have their turn in between."""
    mailbox = Mailbox()
    calls = []

    def post_again():
        calls.append(len(calls))
        mailbox.post(post_again)

    mailbox.post(post_again)
    mailbox.post(lambda: calls.append('other'))
    mailbox.read()
    assert calls == [0, 'other']
    mailbox.read()
    assert calls == [0, 'other', 2]
