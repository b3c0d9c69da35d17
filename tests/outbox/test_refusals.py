# SPDX-License-Identifier: ZPL-2.1
"""Messages that their service refuses become dead letters, and do not block those behind them."""

import logging

import pytest

from checks import wait_until
from job_service import job_service
from outbox_sending import Noter, Service
from peers import replying
from pyams_zmq.outbox.storage import MAX_REASON, Entry

pytestmark = pytest.mark.usefixtures('patient')

SECRET = 'the content of the message'

END = '; it is a dead letter now: see "pyams_zmq outbox INI"'


class LaterNoter(Noter):
    """A later version of a service, with another method."""

    def later(self, name):
        return self.note(name)


@pytest.mark.parametrize(
    ('type_', 'args', 'status', 'reason'),
    [
        ('unknown', SECRET, 404, "Unknown message type 'unknown'"),
        ('refuse', [400, f'bad {SECRET}'], 400, f'bad {SECRET}'),
        ('refuse', [418, ''], 418, ''),
        ('fail', SECRET, 500, None),
        ('note', SECRET * 1000, 413, None),
    ],
)
def test_refusal(sending, service, records, type_, args, status, reason):
    with service.run(max_message_size=10_000):
        sending.commit('before')
        sending.commit(args, type=type_)
        sending.commit('after')
        sending.wait_until_empty()
    assert service.names() == ['before', 'after']
    [letter] = sending.outbox.dead_letters()
    assert letter.entry.type == type_
    assert letter.status == status
    if reason is None:
        assert letter.reason
        assert not letter.reason.startswith(str(status))
    else:
        assert letter.reason == reason
    text = f"Message {type_!r} of the outbox to 'messages': the reply has status {status}"
    wait_until(lambda: records(logging.ERROR))  # after the entry is a dead letter
    assert records(logging.INFO) == [('ERROR', text + END)]


def test_text_of_the_service_is_for_debugging(sending, service, records):
    with service.run():
        sending.commit([400, SECRET], type='refuse')
        sending.wait_until_empty()
    wait_until(lambda: ('DEBUG', f'Reply of a service: 400 {SECRET}') in records(logging.DEBUG))


def test_long_reason(sending, service):
    with service.run():
        sending.commit([404, 'x' * 5000], type='refuse')
        sending.wait_until_empty()
    [letter] = sending.outbox.dead_letters()
    assert letter.reason == 'x' * MAX_REASON


def test_reply_that_is_not_json(sending, service, records):
    with replying(b'no JSON', b'[200, null]') as address:
        sending.declare('odd', address)
        sending.commit('a', service='odd')
        sending.wait_until_empty()
    [letter] = sending.outbox.dead_letters()
    assert (letter.status, letter.reason) == (0, 'the reply is not JSON')
    wait_until(lambda: records(logging.ERROR))
    text = "Message 'note' of the outbox to 'odd': the reply is not JSON"
    assert records() == [('ERROR', text + END)]


def test_retry_and_drop(any_sending, service, quick_checks, tmp_path):
    """Those that are retried have no owner until a process adopts them."""
    with service.run():
        any_sending.commit('a', 'b', 'c', type='later')
        any_sending.wait_until_empty()
        first, second, third = any_sending.outbox.dead_letters()
        assert any_sending.outbox.dead_letters(1, after=first.id) == [second]
        assert any_sending.outbox.retry([first.id, third.id]) == 2
        any_sending.wait_until_empty()
        assert [letter.since for letter in any_sending.outbox.dead_letters()] == [
            letter.since for letter in (first, second, third)
        ]  # they are refused again
        assert any_sending.outbox.drop(second.id) == 1
        assert any_sending.outbox.drop(second.id) == 0
    ids = [letter.id for letter in any_sending.outbox.dead_letters()]
    other = Service(tmp_path, 'other', LaterNoter)
    any_sending.declare('messages', other.address)
    with other.run():
        assert any_sending.outbox.retry(iter(ids)) == 2
        any_sending.wait_until_empty()
    assert other.names() == ['a', 'c']
    assert any_sending.outbox.dead_letters() == []


@pytest.mark.parametrize('is_job', [False, True])
def test_service_that_is_overloaded(sending, records, tmp_path, is_job):
    """Status 503 is not a refusal; nor is 507 of a job, whose service has a full disk."""
    with job_service(f'ipc://{tmp_path}/jobs.sock') as jobs:
        jobs.refusal = [507, 'the disk is full'] if is_job else [503, 'overloaded']
        sending.declare('jobs', jobs.bound_address)
        with sending.application.request() as request:
            if is_job:
                sending.submit(request, 1, type='echo', service='jobs')
            else:
                sending.send(request, 1, type='echo', service='jobs')
        wait_until(lambda: len(jobs.messages) > 2)
        assert sending.count() == 1
        jobs.refusal = None
        sending.wait_until_empty()
        assert len(jobs.jobs) == 1
    assert sending.outbox.dead_letters() == []
    assert records(logging.ERROR) == []


@pytest.mark.parametrize('status', [400, 403, 404, 413, 500])
def test_job_that_is_refused(sending, records, tmp_path, status):
    with job_service(f'ipc://{tmp_path}/jobs.sock') as jobs:
        jobs.refusal = [status, 'refused']
        sending.declare('jobs', jobs.bound_address)
        with sending.application.request() as request:
            sending.submit(request, SECRET, type='echo', service='jobs')
        sending.wait_until_empty()
    [letter] = sending.outbox.dead_letters()
    assert (letter.status, letter.reason, letter.entry.is_job) == (status, 'refused', True)
    wait_until(lambda: records(logging.ERROR))
    assert SECRET not in str(records(logging.DEBUG))


def test_job_for_a_method_that_is_not_one(sending, service):
    with service.run():
        with sending.application.request() as request:
            entry = Entry('messages', 'note', b'["note", "a"]', is_job=True)
            sending.outbox.add(entry, request.tm, request)
        sending.wait_until_empty()
    [letter] = sending.outbox.dead_letters()
    assert (letter.status, letter.entry) == (200, entry)
    assert 'the method is not one' in letter.reason


def test_messages_of_a_service_that_runs_no_more(any_sending, service, tmp_path):
    """An operator drops them."""
    other = Service(tmp_path, 'other')
    any_sending.commit_to('gone', *map(str, range(5)))
    any_sending.declare('other', other.address)
    any_sending.commit('kept', service='other')
    assert any_sending.outbox.discard('gone') == 5
    assert any_sending.outbox.discard('gone') == 0
    [waiting] = any_sending.outbox.waiting()
    assert (waiting.service, waiting.count) == ('other', 1)
    assert any_sending.outbox.others() == {}


def test_discard_reads_pages(sending, monkeypatch):
    monkeypatch.setattr('pyams_zmq.outbox.outbox.PAGE', 2)
    sending.commit_to('gone', *map(str, range(5)))
    assert sending.outbox.discard('gone') == 5
    assert sending.count() == 0
