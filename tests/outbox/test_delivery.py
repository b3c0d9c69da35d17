# SPDX-License-Identifier: ZPL-2.1
"""The messages of committed transactions are sent, in their order, and of no other ones."""

import threading
import time

import pytest
import zmq

from checks import AT_ONCE, wait_until
from job_service import job_service
from outbox_sending import Service
from outbox_services import JobRecorder
from pyams_zmq.client import ZMQClient
from pyams_zmq.client.socket import get_context
from pyams_zmq.outbox import relay as relay_module
from pyams_zmq.outbox.storage import Entry
from pyams_zmq.pool import ZMQPool
from pyams_zmq.testing import running

pytestmark = pytest.mark.usefixtures('patient')


def test_messages_are_sent_after_the_commit(any_sending, service):
    with service.run():
        any_sending.commit('first')
        service.wait_for(['first'])  # the connection is open then
        start = time.monotonic()
        for number in range(20):
            any_sending.commit(f'{number}.a', f'{number}.b')
        any_sending.wait_until_empty()
        assert time.monotonic() - start < AT_ONCE
    service.wait_for(['first', *(f'{number}.{part}' for number in range(20) for part in 'ab')])


def test_abort(any_sending, service):
    with service.run():
        with any_sending.application.request() as request:
            any_sending.send(request, 'aborted')
            request.tm.abort()
        any_sending.commit('committed')
        any_sending.wait_until_empty()
    assert service.names() == ['committed']


def test_rollback_to_a_savepoint(any_sending, service):
    with service.run():
        with any_sending.application.request() as request:
            any_sending.send(request, 'before')
            savepoint = request.tm.savepoint()
            any_sending.send(request, 'dropped')
            savepoint.rollback()
            any_sending.send(request, 'after')
        any_sending.wait_until_empty()
    assert service.names() == ['before', 'after']


def test_transaction_with_messages_to_several_services(sqlite_application, make_sending, tmp_path):
    services = {name: Service(tmp_path, name) for name in ('one', 'two')}
    sending = make_sending(
        sqlite_application, **{name: each.address for name, each in services.items()}
    )
    with services['one'].run(), services['two'].run():
        with sqlite_application.request() as request:
            for number in range(6):
                sending.send(request, str(number), service=('one', 'two')[number % 2])
        sending.wait_until_empty()
    assert services['one'].names() == ['0', '2', '4']
    assert services['two'].names() == ['1', '3', '5']


def test_frames(sending, service):
    with service.run():
        sending.commit('end', frames=[b'one', bytearray(b'two'), memoryview(b'three')])
        sending.wait_until_empty()
    assert service.names() == ['one', 'two', 'three', 'end']


def test_jobs(sending, tmp_path):
    recorder = JobRecorder(tmp_path / 'jobs')
    pool = ZMQPool(f'ipc://{tmp_path}/jobs.sock', recorder, workers=1)
    pool.journal = str(tmp_path / 'journal')
    with running(pool):
        sending.declare('jobs', pool.bound_address)
        with sending.application.request() as request:
            jobs = [sending.submit(request, name, service='jobs') for name in 'ab']
        sending.wait_until_empty()
        with ZMQClient(pool.bound_address) as client:
            for job in jobs:
                assert client.result(job.id, timeout=20) is None
    assert recorder.names() == ['a', 'b']


def test_job_is_submitted_again_with_its_id(sending, tmp_path):
    with job_service(f'ipc://{tmp_path}/jobs.sock') as jobs:
        sending.declare('jobs', jobs.bound_address)
        jobs.drop_next_reply()
        with sending.application.request() as request:
            job = sending.submit(request, 1, type='echo', service='jobs')
        sending.wait_until_empty()
        submitted = [options['id'] for name, _args, options in jobs.messages if name == 'echo']
    assert submitted == [job.id, job.id]
    assert list(jobs.jobs) == [job.id]


def test_threads(any_sending, service):
    def commit(thread):
        for number in range(15):
            any_sending.commit(f'{thread}.{number}')

    # A write of sqlite waits for others, up to 5 s.
    threads = [threading.Thread(target=commit, args=(name,)) for name in 'ab']
    with service.run():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        any_sending.wait_until_empty()
    for thread in 'ab':
        found = [name for name in service.names() if name.startswith(thread)]
        assert found == [f'{thread}.{number}' for number in range(15)]


def test_service_that_starts_after_the_commit(any_sending, service):
    start = time.monotonic()
    for number in range(5):
        any_sending.commit(str(number))
    assert time.monotonic() - start < AT_ONCE
    assert any_sending.count() == 5
    with service.run():
        any_sending.wait_until_empty()
    assert service.names() == ['0', '1', '2', '3', '4']


def test_service_that_is_restarted(sending, service):
    names = [str(number) for number in range(60)]
    for start in range(0, 60, 20):
        with service.run():
            for name in names[start : start + 20]:
                sending.commit(name)
    with service.run():
        sending.wait_until_empty()
    assert list(dict.fromkeys(service.names())) == names  # some may have run twice


def test_backlog_of_the_client_is_full(sending, service, monkeypatch):
    """The rest is read from the database, also while further messages are committed."""
    monkeypatch.setattr(relay_module, 'PAGE', 7)
    sending.declare('messages', service.address, max_backlog=5)
    names = [str(number) for number in range(80)]
    for name in names[:40]:
        sending.commit(name)
    assert len(sending.relay._known) == 5
    assert sending.count() == 40
    with service.run():
        for name in names[40:]:
            sending.commit(name)
        sending.wait_until_empty()
    assert service.names() == names


def test_entries_on_several_pages(sending, service, monkeypatch):
    monkeypatch.setattr(relay_module, 'PAGE', 7)
    names = [str(number) for number in range(3 * 7)]
    sending.commit_to('later', *names)
    sending.declare('later', service.address)
    with service.run():
        sending.wait_until_empty()
    assert service.names() == names


def test_message_that_the_client_gives_back(sending, service, monkeypatch):
    monkeypatch.setattr(relay_module, 'RETURN_DELAY', 0.01)
    sending.commit('a', 'b')
    sending.clients['messages'].withdraw()
    sending.commit('c')
    with service.run():
        sending.wait_until_empty()
    assert sorted(service.names()) == ['a', 'b', 'c']


def test_client_that_was_closed(sending, service, records):
    """Its messages are sent nevertheless; those that it does not take are sent by the next one."""
    sending.commit('a')
    sending.clients['messages'].close()
    sending.commit('b')
    sending.commit('c')
    [(level, text)] = records()
    assert level == 'ERROR'
    assert text.startswith("Messages to 'messages' wait in the outbox: The client of ")
    assert text.endswith('was closed: make another one')
    sending.declare('messages', service.address)
    with service.run():
        sending.wait_until_empty()
    assert sorted(service.names()) == ['a', 'b', 'c']


def test_terminated_context(sending, service, monkeypatch):
    monkeypatch.setattr(relay_module, 'RETURN_DELAY', 0.01)
    sending.commit('a')
    get_context().destroy(0)
    sending.commit('b')
    with service.run():
        sending.wait_until_empty()
    assert sorted(service.names()) == ['a', 'b']


def test_entry_that_was_read_before_it_is_posted(sending, service):
    """The hooks of a transaction may run a while after the commit of the database."""
    entry = Entry('messages', 'note', b'["note", "a"]')
    relay = sending.make_relay()
    with sending.application.request() as request:
        key = sending.storage.add(entry, relay.owner, request.tm, request)
    now = time.monotonic()
    relay.step(now + 5)  # sees it
    assert sending.count() == 1
    relay.step(now + 5.1)  # reads it
    assert relay._known == {key: 'messages'}
    relay.post(key, entry)
    with service.run():
        sending.wait_until_empty()
    assert service.names() == ['a']


def test_unknown_service(sending, service, records, tmp_path):
    other = Service(tmp_path, 'other')
    with service.run(), other.run():
        sending.commit_to('other', 'a', 'b')
        sending.commit_to('other', 'c')
        sending.commit('after')
        service.wait_for(['after'])
        wait_until(lambda: sending.count() == 3)
        # It is read several times.
        wait_until(lambda: sending.relay._catch_ups['other']._pause > 0.5)
        text = "Messages to 'other' wait in the outbox: Unknown service 'other'"
        assert records() == [('ERROR', text)]
        sending.declare('other', other.address)
        sending.wait_until_empty()
        other.wait_for(['a', 'b', 'c'])
    assert records() == [('ERROR', text)]


def test_client_that_cannot_be_made(sending, service, records, monkeypatch):
    """A user without a file of passwords, for instance; a later error is logged, too."""
    errors = ['no file', 'no file', 'no right']

    def fail(service):
        raise OSError(errors.pop(0) if len(errors) > 1 else errors[0])

    with monkeypatch.context() as patch:
        patch.setattr(sending.outbox._relay.get(), '_find_client', fail)
        sending.commit('a')
        wait_until(lambda: len(records()) == 2)
    prefix = "Messages to 'messages' wait in the outbox: "
    assert records() == [('ERROR', f'{prefix}no file'), ('ERROR', f'{prefix}no right')]
    with service.run():
        sending.wait_until_empty()


def test_entries_that_a_network_keeps(sending, service, monkeypatch):
    """One service does not answer; the messages to another one are sent."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as silent:
        silent.linger = 0
        port = silent.bind_to_random_port('tcp://127.0.0.1')
        sending.declare('silent', f'127.0.0.1:{port}')
        sending.clients['silent'].flush_timeout = 0.1
        with service.run():
            sending.commit('lost', service='silent')
            sending.commit('a')
            service.wait_for(['a'])
            assert silent.poll(20_000)
            wait_until(lambda: sending.count() == 1)
        sending.outbox.close()
        assert sending.count() == 1


def test_transaction_that_is_committed_after_later_ones(
    postgresql_application, make_sending, service
):
    """The relay has read on; the message is not passed by."""
    sending = make_sending(postgresql_application)
    sending.declare('messages', service.address, max_backlog=1)
    with postgresql_application.request() as request:
        sending.send(request, 'late')
        sending.commit('1', '2', '3')
        # The first one is in the backlog, which is full.
        wait_until(lambda: sending.relay._catch_ups['messages'].after is not None)
    with service.run():
        sending.wait_until_empty()
    assert service.names() == ['1', 'late', '2', '3']
