# SPDX-License-Identifier: ZPL-2.1
"""What log records of services say beside their text."""

import logging

import pytest
from pyramid.registry import Registry

from checks import TIMEOUT, wait_until
from log_lines import FIELDS, log_lines
from pyams_zmq.client import ZMQClient
from pyams_zmq.config.service import Service
from pyams_zmq.exceptions import ZMQRemoteError
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.handler.errors import error_reply
from pyams_zmq.logs import ServiceFilter
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.supervisor import Supervisor
from pyams_zmq.testing import RecordingClient, running
from pyams_zmq.wire.log_fields import extra, has_filters
from traces import TracedJobs, TracedMethods


class NamedProcess(ZMQProcess):
    """A process with a name, as that of a declared service."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.name = 'converter'


class NamedPool(ZMQPool):
    """A pool with a name."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, workers=1, **kwargs)
        self.name = 'converter'


@pytest.fixture
def log(tmp_path):
    """Return the log of this process and of those that it forks."""
    with log_lines(tmp_path / 'log') as log:
        yield log


@pytest.fixture
def filtered_log(tmp_path):
    """Return the same log, with the filter for the records of methods."""
    with log_lines(tmp_path / 'log', ServiceFilter()) as log:
        yield log


@pytest.fixture(params=[{}, {'concurrency': 2}])
def process(request, start):
    """Start a process with and without threads; return a function that does it."""

    def run():
        factory = type('OwnProcess', (NamedProcess,), request.param)
        return start('127.0.0.1:0', TracedMethods, factory=factory)

    return run


@pytest.mark.parametrize('method', ['fail', 'fail_later', 'fail_in_thread', 'fail_to_encode'])
def test_error_of_a_method(log, process, ask, method):
    status, text = ask(process(), [method, 1])
    assert status == 500
    error_id = text.rpartition(' ')[2]
    fields = {'service': 'converter', 'method': method, 'error_id': error_id}
    assert log.find('Message handler failed') == fields


def test_deadline(log, process, ask):
    assert ask(process(), ['late', 1])[0] == 504
    assert log.find('has not ended after') == {'service': 'converter', 'method': 'late'}


def test_worker(log, start, ask):
    pool = start('127.0.0.1:0', TracedMethods, factory=NamedPool)
    assert ask(pool, ['fail', 1])[0] == 500
    fields = log.find('Message handler failed')
    assert (fields['service'], fields['method']) == ('converter', 'fail')
    for text in ('converter worker 1 is process', 'is ready', 'converter worker 1 serves'):
        assert log.find(text) == {'service': 'converter'}


def test_job(log, start, tmp_path):
    factory = type('JobPool', (NamedPool,), {'journal': str(tmp_path / 'jobs')})
    pool = start('127.0.0.1:0', TracedJobs, factory=factory)
    with ZMQClient(pool.bound_address, timeout=TIMEOUT) as client:
        job = client.submit('render', 1)
        assert client.result(job.id, timeout=TIMEOUT) == 1
    fields = log.find('Message handler failed')
    assert fields.pop('error_id')
    assert fields == {'service': 'converter', 'method': 'render', 'job': job.id}


def test_service_of_a_remote_worker(log, start, ask, tmp_path):
    class RemotePool(NamedPool):
        def __init__(self, *args, **kwargs):
            super().__init__(
                *args, worker_address='127.0.0.1:0', worker_auth='worker:secret', **kwargs
            )

    pool = start('127.0.0.1:0', TracedMethods, factory=RemotePool)
    worker = pool.worker_factory(pool.bound_worker_address, TracedMethods, 'worker:secret')
    worker.name = 'remote'
    with running(worker):
        assert log.find('remote serves') == {'service': 'converter'}


# The filter


@pytest.mark.parametrize('method', ['echo', 'wait', 'thread'])
def test_record_of_a_method(filtered_log, process, ask, method):
    assert ask(process(), [method, 1]) == [200, 1]
    assert filtered_log.find(method) == {
        'service': 'converter',
        'method': method,
        'job': None,
        'error_id': None,
        'trace_id': None,
    }


def test_record_of_a_job(filtered_log, start, tmp_path):
    factory = type('JobPool', (NamedPool,), {'journal': str(tmp_path / 'jobs')})
    pool = start('127.0.0.1:0', TracedJobs, factory=factory)
    with ZMQClient(pool.bound_address, timeout=TIMEOUT) as client:
        job = client.submit('render', 1)
        assert client.result(job.id, timeout=TIMEOUT) == 1
    fields = filtered_log.find('render')
    assert (fields['service'], fields['method'], fields['job']) == ('converter', 'render', job.id)


def test_call_ends(filtered_log, process, ask):
    running_process = process()
    assert ask(running_process, ['echo', 1]) == [200, 1]
    running_process.stop()
    fields = filtered_log.find('echo')
    assert fields['method'] == 'echo'
    others = [record for record in filtered_log.read() if record['text'] != 'echo']
    assert others
    assert not any(record['method'] for record in others)


def test_missing_values():
    log_filter = ServiceFilter(missing='-')
    record = logging.makeLogRecord({'method': 'convert', 'job': None})
    assert log_filter.filter(record) is True
    assert [vars(record)[name] for name in FIELDS] == ['-', 'convert', '-', '-', '-']
    assert has_filters()
    del log_filter
    assert not has_filters()


# In the process of a test


@pytest.mark.parametrize('logger', ['', 'PyAMS'])
def test_factory_with_an_attribute_of_the_same_name(caplog, logger):
    """It may set that for the records of some loggers only."""
    former = logging.getLogRecordFactory()

    def make(name, *args, **kwargs):
        record = former(name, *args, **kwargs)
        if name.startswith(logger):
            record.service = 'web'
        return record

    logging.setLogRecordFactory(make)
    try:
        assert extra(service='converter', method='convert') == {'method': 'convert'}
        error_reply(LookupError('lost'), 'convert')
    finally:
        logging.setLogRecordFactory(former)
    [record] = caplog.records
    assert (record.service, record.method) == ('web', 'convert')


def test_error_without_a_method(caplog):
    error_reply(LookupError('lost'))
    [record] = caplog.records
    assert [name for name in FIELDS if name in vars(record)] == ['error_id']


def test_eager_handler(caplog):
    with pytest.raises(ZMQRemoteError):
        RecordingClient(handler=TracedMethods).call('fail')
    assert caplog.records[0].method == 'fail'


def test_reply_that_cannot_be_sent(caplog):
    class Stream:
        def send(self, reply):
            raise OSError('gone')

    class Handler(ZMQMessageHandler):
        handler = TracedMethods

    Handler(None, Stream(), None)([b'["echo",1]'])
    Handler(None, Stream(), None)([b'["unknown",1]'])
    sent, refused = [record for record in caplog.records if 'could not be sent' in record.message]
    assert sent.method == 'echo'
    assert not hasattr(refused, 'method')


# Clients


def test_reply_with_an_error(caplog, start):
    process = start('127.0.0.1:0', TracedMethods)
    service = Service('converter', address=process.bound_address, start='never')
    with caplog.at_level(logging.DEBUG, 'PyAMS (zmq)'), service.make_client() as client:
        client.send('refuse', 1)
        wait_until(lambda: len(caplog.records) >= 2)
    for record in caplog.records[:2]:
        assert (record.service, record.method) == ('converter', 'refuse')


def test_service_that_cannot_be_started(caplog):
    def fail():
        raise LookupError('no handler')

    supervisor = Supervisor({'converter': fail}, registry=Registry())
    supervisor.step(0.0)
    supervisor.stop()
    supervisor.step(0.0)
    assert {record.service for record in caplog.records} == {'converter'}
