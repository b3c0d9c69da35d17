# SPDX-License-Identifier: ZPL-2.1
"""Jobs that are submitted when a transaction is committed."""

import pytest
import transaction

from checks import TIMEOUT, wait_until
from job_service import job_service
from peers import replying
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQJobError, ZMQMessageError, ZMQUnreachableError
from pyams_zmq.transaction import send_on_commit, submit_on_commit
from transaction_checks import without_ids


@pytest.fixture
def service(address):
    """Service with jobs."""
    with job_service(address) as service:
        yield service


@pytest.fixture
def client(service):
    """Client of the service."""
    with ZMQClient(service.bound_address) as client:
        yield client


def test_commit(client, service):
    job = submit_on_commit(client, 'echo', {'path': 'a.mov'}, key='k', frames=[b'x'])
    assert (len(job.id), job.is_new) == (36, None)
    with pytest.raises(ZMQJobError, match='404'):
        client.job(job.id)
    transaction.commit()
    assert client.result(job.id, timeout=TIMEOUT) == {'path': 'a.mov'}  # it may arrive after that
    assert service.jobs[job.id].options == {'id': job.id, 'key': 'k'}
    assert service.jobs[job.id].frames == (b'x',)


def test_abort(client, service):
    submit_on_commit(client, 'echo')
    transaction.abort()
    submit_on_commit(client, 'echo', id='first')
    savepoint = transaction.savepoint()
    submit_on_commit(client, 'echo', id='second')
    savepoint.rollback()
    transaction.commit()
    client.result('first', timeout=TIMEOUT)
    assert list(service.jobs) == ['first']


def test_order(client, service):
    for number in range(20):
        submit_on_commit(client, 'echo', number)
        send_on_commit(client, 'echo', number)
    transaction.commit()
    wait_until(lambda: len(service.messages) == 40)
    assert [message[1] for message in service.messages] == [n for n in range(20) for _two in 'ab']


def test_errors_at_once(client):
    with pytest.raises(ValueError, match='Bad delay'):
        submit_on_commit(client, 'echo', delay=-1)
    with pytest.raises(TypeError, match=r'^submit_on_commit\(\) got an unexpected keyword'):
        submit_on_commit(client, 'echo', prority=1)
    client.max_message_size = 100
    with pytest.raises(ZMQMessageError, match='413'):
        submit_on_commit(client, 'echo', frames=[b'x' * 100])


def test_service_is_down(down):
    with ZMQClient(down) as client:
        submit_on_commit(client, 'echo', commit_timeout=0.05)
        with pytest.raises(ZMQUnreachableError, match='for 0.05 s'):
            transaction.commit()


def test_lost_reply(client, service, errors):
    """A job is sent again; a message is not, because it may have run."""
    submit_on_commit(client, 'echo', id='first')
    transaction.commit()
    client.result('first', timeout=TIMEOUT)
    service.drop_next_reply()
    send_on_commit(client, 'echo')
    submit_on_commit(client, 'echo', id='second')
    send_on_commit(client, 'echo')
    transaction.commit()
    client.result('second', timeout=TIMEOUT)
    wait_until(lambda: not len(client._queue.get()))
    assert len(errors()) == 1
    assert without_ids(errors())[0].endswith('the connection was lost, it may have run or not')
    assert "'second'" not in errors()[0]
    assert client._queue.get().size == 0


def test_service_that_is_replaced(client, service, errors):
    """What was under way is sent again, in its order, and known jobs are not made twice."""
    service.refusal = [503, 'stopping']
    for number in range(10):
        submit_on_commit(client, 'echo', number, id=str(number))
    transaction.commit()
    wait_until(lambda: service.messages)
    service.stop()
    service.refusal = None
    service.start()
    assert client.result('9', timeout=TIMEOUT) == 9
    assert list(service.jobs) == list(map(str, range(10)))
    assert errors() == []


def test_full_disk(client, service, caplog):
    """The job waits until the disk has room."""
    service.refusal = [507, 'The disk is full']
    submit_on_commit(client, 'echo', 1, id='x')
    transaction.commit()
    wait_until(lambda: len(service.messages) > 1)
    service.refusal = None
    assert client.result('x', timeout=TIMEOUT) == 1
    assert caplog.records == []


def test_message_and_full_disk(client, service, errors):
    """A message may be one of another kind, which has chosen this status."""
    service.refusal = [507, 'The disk is full']
    client.send('echo')
    wait_until(errors)
    assert without_ids(errors()) == [
        f"Message 'echo' to {client.address}: the reply has status 507"
    ]


@pytest.mark.parametrize('reply', [b'[200, null]', b'[200, {"id": 5}]'])
def test_service_without_journal(reply, errors):
    with replying(reply) as address, ZMQClient(address) as client:
        submit_on_commit(client, 'echo')
        transaction.commit()
        wait_until(errors)
    assert 'the service keeps no jobs, or the method is not one: it has run' in errors()[0]
