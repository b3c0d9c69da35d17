# SPDX-License-Identifier: ZPL-2.1
"""Jobs of `request.zmq(name)`, and the errors that name the service and the next step."""

import re

import pytest
import transaction
from pyramid.request import Request, apply_request_extensions

from checks import TIMEOUT
from job_service import job_service
from pyams_zmq.exceptions import (
    ZMQClosedError,
    ZMQJobError,
    ZMQRemoteError,
    ZMQReplyError,
    ZMQTimeoutError,
    ZMQUnreachableError,
)
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import running
from pyams_zmq.transaction import submit_on_commit


class Calls:
    """Methods that are not jobs."""

    def echo(self, args):
        return [200, args]


@pytest.fixture
def service(address):
    """Service with jobs."""
    with job_service(address) as service:
        yield service


@pytest.fixture
def request_(config, address):
    """Request of an application that has declared the service."""
    config.include('pyams_zmq')
    config.add_zmq_process('worker', start='never', address=address)
    config.commit()
    request = Request.blank('/')
    request.registry = config.registry
    apply_request_extensions(request)
    yield request
    config.registry.zmq_clients.close()


@pytest.fixture
def client(request_):
    """Client of the request."""
    return request_.zmq('worker')


@pytest.fixture
def manager(request_):
    """Transaction manager of the request, with a transaction."""
    request_.tm = transaction.TransactionManager(explicit=True)
    request_.tm.begin()
    return request_.tm


def check(error, text, step):
    """Check that an error names the service and the next step."""
    pattern = rf"{text}.*\. Service 'worker' at ipc://\S+ runs elsewhere \(start = never\): {step}"
    assert re.match(pattern, str(error), re.DOTALL), str(error)


def test_commit(service, client, manager):
    job = client.submit('echo', {'path': 'a.mov'}, key='k', priority=3)
    assert (len(job.id), job.is_new, service.messages) == (36, None, [])
    manager.commit()
    assert client.result(job.id, timeout=TIMEOUT) == {'path': 'a.mov'}
    assert service.jobs[job.id].options == {'id': job.id, 'key': 'k', 'priority': 3}


def test_abort(service, client, manager):
    client.submit('echo')
    manager.abort()
    assert client.submit('echo', id='now').is_new  # no transaction is under way
    assert list(service.jobs) == ['now']


def test_without_a_transaction(service, client):
    job = client.submit('measure', frames=[b'12'])
    assert job.is_new
    assert [info.state for info in client.watch(job.id, timeout=TIMEOUT)][-1] == 'done'
    assert client.result(job.id) == [2]
    assert client.job(job.id).state == 'done'
    assert [info.id for info in client.jobs(type='measure')] == [job.id]
    waiting = client.submit('echo', delay=60)
    client.cancel(waiting.id)
    client.retry(waiting.id)


def test_errors(service, client):
    done = client.submit('echo').id
    client.result(done, timeout=TIMEOUT)
    for call, error, text, step in (
        (lambda: client.job('x'), ZMQJobError, '404 Unknown job id', 'compare the id'),
        (
            lambda: next(client.watch(['x', done])),
            ZMQJobError,
            '404 Unknown job id',
            'compare the id',
        ),
        (lambda: client.cancel(done), ZMQJobError, '409 The job has ended', 'ask for its state'),
    ):
        with pytest.raises(error) as raised:
            call()
        check(raised.value, text, step)
    failed = client.submit('fail', 500).id
    with pytest.raises(ZMQRemoteError) as raised:
        client.result(failed, timeout=TIMEOUT)
    check(raised.value, '500 it has failed', 'its method has chosen this status')
    waiting = client.submit('echo', delay=60).id
    for wait in (client.result, lambda *args, **kwargs: [*client.watch(*args, **kwargs)]):
        with pytest.raises(ZMQTimeoutError) as raised:
            wait(waiting, timeout=0.1)
        check(raised.value, f'Job {waiting} has not ended within 0.1 s', 'it goes on: wait longer')
    client.cancel(waiting)
    with pytest.raises(ZMQRemoteError) as raised:
        client.result(waiting, timeout=TIMEOUT)
    check(raised.value, '410 The job', 'somebody has cancelled the job')
    service.refusal = [507, 'The journal cannot be written: No space left']
    with pytest.raises(ZMQRemoteError) as raised:
        client.submit('echo')
    check(raised.value, '507 The journal', 'make room on the disk of pyams_zmq.worker.journal')
    service.refusal = [403, 'Not allowed']
    with pytest.raises(ZMQJobError) as raised:
        client.jobs()
    check(raised.value, '403 Not', 'ask on the machine .* as a user of pyams_zmq.worker.stats_u')


def test_service_without_journal(address, client):
    with running(ZMQProcess(address, Calls)):
        with pytest.raises(ZMQReplyError) as raised:
            client.submit('echo', 1)
        check(raised.value, "'echo' was not accepted as a job", '.*jobs need pyams_zmq.worker.jou')
        with pytest.raises(ZMQJobError) as raised:
            client.job('x')
        check(raised.value, '501 The service keeps no jobs', 'set pyams_zmq.worker.journal and')
        with pytest.raises(ZMQRemoteError) as raised:
            client.submit('nobody')
        check(raised.value, '404 Unknown message type', 'compare the message with the public')


@pytest.mark.parametrize('includes', ['pyams_zmq', 'pyams_zmq.testing'])
def test_service_that_is_declared_without_journal(config, address, includes):
    """Its method would run as a call, and nobody but the log would know."""
    config.include(includes)
    config.add_zmq_process('worker', start='external', address=address, handler=Calls)
    config.commit()
    request = Request.blank('/')
    request.registry = config.registry
    apply_request_extensions(request)
    client = request.zmq('worker')
    for request.tm in (None, transaction.TransactionManager(explicit=True)):
        if request.tm is not None:
            request.tm.begin()
        with pytest.raises(ZMQJobError, match='501 The service keeps no jobs'):
            client.submit('echo', 1)
    config.registry.zmq_clients.close()


def test_unknown_option(client, manager):
    for name in 'prority', 'client', 'manager':
        with pytest.raises(TypeError, match=rf'submit\(\) got an unexpected keyword .*{name}'):
            client.submit('echo', 1, **{name: 1})


def test_service_that_is_down(client, manager):
    client._client.connect_timeout = 0.05
    for call in (client.job, client.cancel):
        with pytest.raises(ZMQUnreachableError) as raised:
            call('x')
        check(raised.value, 'No service has answered', 'start it there')
    submit_on_commit(client._client, 'echo', manager=manager, commit_timeout=0.05)
    with pytest.raises(ZMQUnreachableError) as raised:
        manager.commit()
    check(raised.value, 'No service has answered', 'start it there')
    manager.abort()
    with pytest.raises(ZMQUnreachableError) as raised:
        client.submit('echo')
    check(raised.value, 'No service has answered', 'start it there')
    client._client.close()
    with pytest.raises(ZMQClosedError) as raised:
        client.submit('echo')
    check(raised.value, 'The client of', 'get a new client')
