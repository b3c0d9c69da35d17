# SPDX-License-Identifier: ZPL-2.1
"""Spans of clients and services: calls, messages, jobs, errors, and contexts from peers."""

import asyncio
import subprocess
import sys

import pytest
import transaction
from opentelemetry.trace import format_trace_id
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationError

import pyams_zmq.otel
from checks import TIMEOUT, wait_until
from log_lines import log_lines
from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient
from pyams_zmq.config import services_of
from pyams_zmq.exceptions import ZMQRemoteError, ZMQUnreachableError
from pyams_zmq.process.descendants import kill_with_descendants
from pyams_zmq.testing import RecordingClient, running
from pyams_zmq.transaction import send_on_commit, submit_on_commit
from pyams_zmq.wire.message import decode_reply
from traces import TracedJobs, TracedMethods, Traces

TRACE, SPAN = 'a' * 32, 'b' * 16
PARENT = f'00-{TRACE}-{SPAN}-01'


class App:
    """An application with one service, which runs beside it, and its traces."""

    def __init__(self, folder, stack):
        self.folder = folder
        self.stack = stack
        self.traces = Traces(folder / 'spans')
        self.config = Configurator()
        self.traces.install(self.config)
        self.registry = self.config.registry
        stack.callback(self.registry.zmq_clients.close)

    def run(self, handler=TracedMethods, **options):
        """Declare and start the service; return its client."""
        self.config.add_zmq_process(
            'converter',
            handler=handler,
            address=f'ipc://{self.folder}/converter',
            start='external',
            timeout=TIMEOUT,
            **options,
        )
        self.config.commit()
        self.start()
        return self.registry.zmq_clients.get('converter')

    def start(self):
        """Start the declared service."""
        process = services_of(self.registry)['converter'].make_process(self.registry)
        self.process = self.stack.enter_context(running(process))


@pytest.fixture
def app(tmp_path, stack):
    """Return an application with traces."""
    return App(tmp_path, stack)


def test_call(app):
    client = app.run()
    with app.traces.provider.get_tracer('test').start_as_current_span('request'):
        assert client.call('echo', [1]) == [1]
    wanted = 'CLIENT', 'SERVER', 'INTERNAL'
    sent, ran, request = app.traces.wait_for_kinds(*wanted)
    assert sent.name == ran.name == 'converter/echo'
    assert sent.trace == ran.trace == request.trace
    assert (request.parent, sent.parent, ran.parent) == (None, request.id, sent.id)
    assert sent.status == ran.status == 'UNSET'
    common = {'rpc.system': 'pyams_zmq', 'rpc.service': 'converter', 'rpc.method': 'echo'}
    path = app.process.bound_address.removeprefix('ipc://')
    assert ran.attributes == {**common, 'pyams_zmq.status': 200}
    assert sent.attributes == {**common, 'pyams_zmq.status': 200, 'server.address': path}


@pytest.mark.parametrize('method', ['wait', 'thread', 'requested', 'frames', 'text'])
@pytest.mark.parametrize('options', [{}, {'concurrency': 2}, {'workers': 1}])
def test_methods(app, method, options):
    client = app.run(**options)
    assert client.request([method, 1]) is not None
    sent, ran = app.traces.wait_for_kinds('CLIENT', 'SERVER')
    assert (ran.trace, ran.parent) == sent.identity
    assert ran.attributes.get('pyams_zmq.status') == (None if method == 'text' else 200)


@pytest.mark.parametrize('method', ['fail', 'fail_later', 'fail_in_thread'])
def test_error_of_a_method(app, method):
    with log_lines(app.folder / 'log') as log:
        client = app.run()
        with pytest.raises(ZMQRemoteError):
            client.call(method)
    sent, ran = app.traces.wait_for_kinds('CLIENT', 'SERVER')
    assert sent.status == ran.status == 'ERROR'
    assert sent.attributes['pyams_zmq.status'] == ran.attributes['pyams_zmq.status'] == 500
    assert ran.attributes['error.type'] == 'LookupError'
    assert ran.events[0]['exception.message'] == 'lost'
    record = log.find('Message handler failed')
    assert record.pop('error_id')
    trace = ran.trace.removeprefix('0x')
    assert record == {'service': 'converter', 'method': method, 'trace_id': trace}


def test_result_that_is_not_json(app):
    client = app.run()
    with pytest.raises(ZMQRemoteError):
        client.call('fail_to_encode')
    assert app.traces.wait_for_kinds('SERVER', 'CLIENT')[0].status == 'ERROR'


def test_system_exit(app):
    client = app.run()
    with pytest.raises(ZMQRemoteError):
        client.call('leave')
    _sent, ran = app.traces.wait_for_kinds('CLIENT', 'SERVER')
    assert ran.attributes['error.type'] == 'SystemExit'
    assert ran.events == []


def test_refusal_of_a_method(app):
    client = app.run()
    with pytest.raises(ZMQRemoteError):
        client.call('refuse')
    sent, ran = app.traces.wait_for_kinds('CLIENT', 'SERVER')
    assert (sent.status, ran.status) == ('ERROR', 'UNSET')
    assert 'error.type' not in ran.attributes


def test_deadline(app):
    client = app.run()
    with pytest.raises(ZMQRemoteError):
        client.call('late')
    sent, ran = app.traces.wait_for_kinds('CLIENT', 'SERVER')
    assert sent.attributes['pyams_zmq.status'] == 504
    assert ran.attributes['error.type'] == 'CancelledError'
    assert ran.status == 'ERROR'


def test_service_that_is_down(app):
    app.config.add_zmq_process(
        'down', address=f'ipc://{app.folder}/down', start='never', timeout=0.1
    )
    app.config.commit()
    with pytest.raises(ZMQUnreachableError):
        app.registry.zmq_clients.get('down').call('echo')
    [sent] = app.traces.wait('down/echo')
    assert (sent.status, sent.attributes['error.type']) == ('ERROR', 'ZMQUnreachableError')


def test_questions_have_no_span(app):
    client = app.run(workers=1)
    assert client.call('pyams_zmq.ping')['name']
    assert client.request({'any': 'message'})[0] == 400
    assert app.traces.spans() == []


def test_message(app):
    client = app.run()
    client.send('echo', 1)
    sent, ran = app.traces.wait_for_kinds('PRODUCER', 'CONSUMER')
    assert (sent.name, ran.name) == ('send converter/echo', 'process converter/echo')
    assert sent.trace != ran.trace
    assert ran.parent is None
    assert ran.links == [sent.identity]
    assert sent.attributes['messaging.operation.type'] == 'send'
    assert ran.attributes['messaging.destination.name'] == 'converter/echo'


def test_message_on_commit(app):
    client = app.run()
    with transaction.manager:
        send_on_commit(client, 'echo', 1)
    sent, ran = app.traces.wait_for_kinds('PRODUCER', 'CONSUMER')
    assert sent.name == 'create converter/echo'
    assert ran.links == [sent.identity]


def check_job(app, job, operation):
    """Check the spans of a job, which is tried twice."""
    app.registry.zmq_clients.get('converter').result(job.id, timeout=TIMEOUT)
    wait_until(lambda: len(app.traces.spans()) == 3)
    spans = app.traces.spans()
    [sent] = [span for span in spans if span.kind == 'PRODUCER']  # it may end after an attempt
    attempts = [span for span in spans if span.kind == 'CONSUMER']
    assert sent.name == f'{operation} converter/render'
    assert {span.name for span in attempts} == {'process converter/render'}
    assert [span.links for span in attempts] == [[sent.identity]] * 2
    assert len({span.trace for span in (sent, *attempts)}) == 3
    assert [span.attributes['pyams_zmq.job.attempt'] for span in attempts] == [1, 2]
    assert [span.status for span in attempts] == ['ERROR', 'UNSET']
    for span in (sent, *attempts):
        assert span.attributes['messaging.message.id'] == job.id
    return attempts


def test_job(app):
    with log_lines(app.folder / 'log') as log:
        client = app.run(TracedJobs, workers=1, journal=app.folder / 'jobs')
        job = client.submit('render', [1])
        [first, _second] = check_job(app, job, 'send')
    record = log.find('Message handler failed')
    assert record.pop('error_id')
    trace = first.trace.removeprefix('0x')
    assert record == {
        'service': 'converter',
        'method': 'render',
        'job': job.id,
        'trace_id': trace,
    }


def test_job_on_commit(app):
    client = app.run(TracedJobs, workers=1, journal=app.folder / 'jobs')
    with transaction.manager:
        job = submit_on_commit(client, 'render', [1])
    check_job(app, job, 'create')


def test_job_in_the_journal_of_a_killed_pool(app):
    """Its trace is there for the next broker."""
    client = app.run(TracedJobs, workers=1, journal=app.folder / 'jobs')
    job = client.submit('render', [1], delay=2)
    kill_with_descendants(app.process.pid)
    app.process.join(TIMEOUT)
    app.start()
    assert client.result(job.id, timeout=TIMEOUT) == [1]
    [sent] = [span for span in app.traces.spans() if span.kind == 'PRODUCER']
    attempts = [span for span in app.traces.spans() if span.kind == 'CONSUMER']
    assert attempts
    assert {span.links[0] for span in attempts} == {sent.identity}


def test_asyncio(app):
    app.run()

    async def call():
        async with AsyncZMQClient(app.process.bound_address) as client:
            client.tracing = app.registry.zmq_tracing
            client.service_name = 'converter'
            return await client.call('echo', 1)

    assert asyncio.run(call()) == 1
    sent, ran = app.traces.wait_for_kinds('CLIENT', 'SERVER')
    assert (ran.trace, ran.parent) == sent.identity


def test_empty_options(app):
    """They are null in a message, which gets a trace as one without options."""
    assert app.run().request(['echo', 1, None]) == [200, 1]
    sent, ran = app.traces.wait_for_kinds('CLIENT', 'SERVER')
    assert ran.parent == sent.id


@pytest.mark.parametrize(
    ('address', 'wanted'), [('[::1]:1', '::1'), ('ipc://@no such service', '@no such service')]
)
def test_addresses_of_other_forms(app, address, wanted):
    with ZMQClient(address, timeout=0.1) as client:
        client.tracing = app.registry.zmq_tracing
        with pytest.raises(ZMQUnreachableError):
            client.call('echo')
    [sent] = app.traces.wait(f'{client.address}/echo')
    assert sent.attributes['server.address'] == wanted


def test_address(app):
    """A client that is not declared: its service is known by the address."""
    with ZMQClient('localhost:1', timeout=0.1) as client:
        client.tracing = app.registry.zmq_tracing
        with pytest.raises(ZMQUnreachableError):
            client.call('echo')
    [sent] = app.traces.wait('tcp://localhost:1/echo')
    assert sent.attributes['server.address'] == 'localhost'
    assert sent.attributes['server.port'] == 1


# The context on the wire


def read_options(client):
    """Return the options of the only message that a service gets."""
    [data] = client.sent
    return decode_reply(data)[2]


class SpyClient(RecordingClient):
    """Keeps what is sent."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def post(self, type_, data, *args):
        self.sent.append(data)


@pytest.fixture
def spy(app):
    """Return a client that records encoded messages."""
    client = SpyClient()
    client.tracing = app.registry.zmq_tracing
    return client


def test_context_of_a_message(app, spy):
    tracer = app.traces.provider.get_tracer('test')
    with tracer.start_as_current_span('request') as request:
        spy.send('echo')
    options = read_options(spy)
    assert options.pop('one_way') is True
    _version, trace, _span, _flags = options.pop('traceparent').split('-')
    assert trace == format_trace_id(request.get_span_context().trace_id)
    assert options == {}


def test_without_a_provider(app, spy):
    """The API alone makes spans that are not valid."""
    spy.tracing = type(app.registry.zmq_tracing)()
    spy.send('echo')
    assert read_options(spy) == {'one_way': True}


def test_deadline_of_a_call(app):
    assert app.run(send_deadline=True).call('echo', 1) == 1
    sent, ran = app.traces.wait_for_kinds('CLIENT', 'SERVER')
    assert ran.parent == sent.id


@pytest.mark.parametrize('options', [{'tracestate': 'a=1'}, {'tracestate': 'a=1, b@c=2'}, {}])
def test_context_of_a_peer(app, ask, options):
    app.run()
    message = ['echo', 1, {'traceparent': PARENT, **options}]
    assert ask(app.process, message) == [200, 1]
    [ran] = app.traces.wait('converter/echo')
    assert (ran.trace, ran.parent) == (f'0x{TRACE}', f'0x{SPAN}')
    assert len(ran.state) >= len(options)


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'traceparent': 1},
        {'traceparent': None},
        {'traceparent': ''},
        {'traceparent': 'x'},
        {'traceparent': 'x' * 3000},
        {'traceparent': PARENT.replace('a', '0')},
        {'traceparent': PARENT + '-x'},
        {'traceparent': 'ff' + PARENT[2:]},
        {'tracestate': 'a=1'},
    ],
)
def test_malformed_context(app, ask, options):
    app.run()
    assert ask(app.process, ['echo', 1, options]) == [200, 1]
    [ran] = app.traces.wait('converter/echo')
    assert (ran.parent, ran.links) == (None, [])


@pytest.mark.parametrize(
    'state',
    [
        *('no pair', 'A=1', 'a=', ',' * 400, 'a=1,' * 40, 'x' * 600, 'a=1,a=2', 7),
        *('a=1\n', 'a=1\u2003', '\n', 'a=1,\x0b'),
    ],
)
def test_malformed_state(app, ask, state):
    with log_lines(app.folder / 'log') as log:
        app.run()
        message = ['echo', 1, {'traceparent': PARENT, 'tracestate': state}]
        assert ask(app.process, message) == [200, 1]
    [ran] = app.traces.wait('converter/echo')
    assert (ran.trace, ran.state) == (f'0x{TRACE}', '[]')
    assert [record for record in log.read() if record['level'] != 'INFO'] == [
        {'text': 'echo', 'level': 'WARNING'}
    ]


def test_one_way_of_a_peer(app, ask):
    app.run()
    assert ask(app.process, ['echo', 1, {'one_way': 'yes'}]) == [200, 1]
    assert app.traces.wait('converter/echo')[0].kind == 'SERVER'


# The include


def test_without_the_include():
    code = (
        'import sys, pyams_zmq.handler, pyams_zmq.pool, pyams_zmq.include, pyams_zmq.otel\n'
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, '-c', code], check=True)
    client = SpyClient()
    client.send('echo', 1)
    assert client.sent == [b'["echo",1]']


def test_second_include():
    config = Configurator()
    config.include('pyams_zmq.otel')
    tracing = config.registry.zmq_tracing
    pyams_zmq.otel.includeme(config)
    assert config.registry.zmq_tracing is tracing


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'opentelemetry.trace', None)
    monkeypatch.delitem(sys.modules, 'pyams_zmq.monitor.tracing', raising=False)
    with pytest.raises(ConfigurationError, match=r'pip install "pyams_zmq\[otel\]"$'):
        Configurator().include('pyams_zmq.otel')
