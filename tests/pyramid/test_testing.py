# SPDX-License-Identifier: ZPL-2.1
"""Tools for the tests of applications: real processes, and clients that record messages."""

import asyncio
import inspect
import logging

import pytest
import transaction
from pyramid.config import Configurator
from pyramid.registry import Registry
from pyramid.testing import DummyRequest, setUp, tearDown
from pyramid.threadlocal import get_current_registry

from handlers import FailingSetup, Handler, MessageHandler, Process
from pyams_zmq.client import ZMQClient
from pyams_zmq.client.jobs import JobMethods
from pyams_zmq.client.problem import QueuedMessage
from pyams_zmq.exceptions import (
    ZMQClosedError,
    ZMQMessageError,
    ZMQRemoteError,
    ZMQUnreachableError,
)
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.message import MAX_MESSAGE_SIZE
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import RecordingClient, Sent, running
from pyams_zmq.transaction import send_on_commit


class TaskHandler(Handler):
    """Replies with the result of a task."""

    async def reply_in_a_task(self, args):
        return [200, await asyncio.create_task(asyncio.sleep(0, args))]


class TaskMessageHandler(MessageHandler):
    """Serves TaskHandler."""

    handler = TaskHandler


def make_process(bind_addr, handler):
    """Return a process, as a function of an application does."""
    return Process(bind_addr, handler)


@pytest.fixture
def client():
    """Client that records messages."""
    with RecordingClient('converter') as client:
        yield client


@pytest.fixture
def eager():
    """Client whose handler replies in this process."""
    with RecordingClient('converter', handler=MessageHandler) as client:
        yield client


@pytest.fixture
def errors(caplog):
    """Return the logged errors."""
    caplog.set_level(logging.ERROR, 'PyAMS (zmq)')
    return lambda: [record.getMessage() for record in caplog.records]


# Real processes


@pytest.mark.parametrize(
    ('args', 'kwargs'),
    [
        ((Process(),), {}),
        ((Process,), {}),
        ((Process, '127.0.0.1'), {}),
        ((ZMQProcess,), {'handler': MessageHandler}),
        ((ZMQProcess, '127.0.0.1', MessageHandler), {}),
        ((ZMQProcess,), {'bind_addr': '127.0.0.1', 'handler': MessageHandler}),
        ((lambda: Process(),), {}),  # noqa: PLW0108 - a function
        ((make_process,), {'handler': MessageHandler}),
    ],
)
def test_running(args, kwargs):
    with running(*args, **kwargs) as process, ZMQClient(process.bound_address) as client:
        assert process.bound_address.startswith('tcp://127.0.0.1:')
        assert client.call('pid') == process.pid
    assert process.exitcode == 0


def test_running_at_an_address(tmp_path):
    with running(Process, f'ipc://{tmp_path}/zmq.sock') as process:
        assert process.bound_address == f'ipc://{tmp_path}/zmq.sock'


def test_it_stops_after_an_exception():
    with pytest.raises(LookupError), running(Process) as process:
        raise LookupError
    assert process.exitcode == 0


def test_it_may_have_stopped():
    with running(Process) as process:
        process.stop()
    assert process.exitcode == 0


def test_it_cannot_start():
    process = FailingSetup()
    with pytest.raises(LookupError, match='no such tool: ffmpeg'), running(process):
        pass
    assert process.exitcode == 1


# Clients


@pytest.mark.parametrize(
    'name',
    sorted(name for name in vars(ZMQClient) if not name.startswith('_') or name == '__enter__'),
)
def test_same_interface(name):
    expected, actual = getattr(ZMQClient, name), getattr(RecordingClient('x'), name)
    if callable(expected):
        expected, actual = inspect.signature(expected), inspect.signature(actual)
        assert list(expected.parameters.values())[1:] == list(actual.parameters.values())


def test_inherited_methods():
    """They use the methods of this class, so none of them connects."""
    public = {name for name in dir(ZMQClient) if not name.startswith('_')}
    settings = set(ZMQClient.__annotations__)
    assert public - settings - set(vars(RecordingClient)) == {
        'address',
        'call',
        'reserve',
        'send',
        *(name for name in vars(JobMethods) if not name.startswith('_')),
    }


def test_attributes(client):
    assert client.address == 'tcp://127.0.0.1:1'
    assert repr(client) == '<RecordingClient of tcp://127.0.0.1:1>'
    assert RecordingClient(address='ipc:///tmp/zmq').address == 'ipc:///tmp/zmq'
    real = ZMQClient(client.address)
    public = {name for name in vars(real) if not name.startswith('_')}
    assert {name: getattr(client, name) for name in public} == {
        name: getattr(real, name) for name in public
    }


def test_it_records(client):
    assert client.call('convert', {'path': ('a', 'b')}) is None
    client.send('clean')
    assert client.request(['check', 1]) == [200, None]
    assert client.request(['check', 1, {'deadline': 1.5}]) == [200, None]
    assert client.request({'raw': 1}) == [200, None]
    assert client.outbox == [
        Sent('converter', 'convert', {'path': ['a', 'b']}),
        Sent('converter', 'clean', None),
        Sent('converter', 'check', 1),
        Sent('converter', 'check', 1),
        Sent('converter', None, {'raw': 1}),
    ]


def test_later_changes_do_not_matter(client):
    args = [1]
    client.send('convert', args)
    args.append(2)
    assert client.outbox == [('converter', 'convert', [1])]


def test_shared_outbox():
    outbox = []
    one, two = RecordingClient('one', outbox=outbox), RecordingClient('two', outbox=outbox)
    one.send('a')
    two.call('b')
    assert outbox == [('one', 'a', None), ('two', 'b', None)]


def test_replies(errors):
    replies = {
        'good': [201, ('a', 1)],
        'missing': [404, 'No such clip'],
        'raw': 'text',
        'down': ZMQUnreachableError('down'),
        'sum': lambda args: [200, sum(args)],
    }
    client = RecordingClient(replies=replies)
    assert client.call('good') == ['a', 1]
    assert client.call('sum', [1, 2]) == 3
    assert client.request(['missing', None]) == [404, 'No such clip']
    assert client.request(['raw', None]) == 'text'
    with pytest.raises(ZMQRemoteError) as error:
        client.call('missing')
    assert (error.value.status, error.value.text) == (404, 'No such clip')
    assert client.call('raw') == 'text'
    with pytest.raises(ZMQUnreachableError, match='down'):
        client.call('down')
    assert not errors()
    # `send` ignores the reply; errors are logged.
    for name in replies:
        client.send(name, [1, 2])
    assert errors() == [
        f"Message 'missing' to {client.address}: the reply has status 404",
        f"Message 'down' to {client.address}: down",
    ]
    assert len(client.outbox) == 7 + len(replies)


@pytest.mark.parametrize(
    ('type_', 'args', 'error'),
    [
        ('note', object(), TypeError),
        ('note', '\ud800', ValueError),
        ('note', 'x' * MAX_MESSAGE_SIZE, ZMQMessageError),
    ],
)
def test_bad_message(client, type_, args, error):
    for method in (client.call, client.send):
        with pytest.raises(error):
            method(type_, args)
    assert client.outbox == []


def test_close(client):
    client.close()
    client.close()
    for method in (client.call, client.send, client.request):
        with pytest.raises(ZMQClosedError):
            method('echo')
    with pytest.raises(ZMQClosedError):
        client.post('echo', b'["echo",null]')
    with pytest.raises(ZMQClosedError):
        client.prepare()
    with pytest.raises(ZMQClosedError):
        client.offer(QueuedMessage('echo', b'["echo",null]'))


def test_offer(client, errors):
    """What belongs to a real queue is recorded, and has its reply at once."""
    replies = []

    def offer(name, frames=None, *, is_job=False, on_reply=replies.append):
        data = b'["%s",1]' % name.encode()
        return client.offer(QueuedMessage(name, data, frames, is_job, on_reply))

    client.replies.update(
        missing=[404, 'no such file'], busy=[503, 'later'], gone=ZMQUnreachableError('gone')
    )
    assert offer('echo', [b'x'])
    assert offer('echo', is_job=True)
    assert offer('missing')
    assert offer('busy')
    assert not offer('gone')
    assert offer('echo', on_reply=None)
    client.withdraw()
    assert [reply.status for reply in replies] == [200, 200, 404, 503]
    assert replies[0].problem is None
    assert replies[1].problem.startswith('the service keeps no jobs')
    assert replies[2].text == '404 no such file'
    assert [sent.type for sent in client.outbox] == [
        *('echo', 'echo', 'missing', 'busy', 'gone', 'echo')
    ]
    assert client.outbox[0] == Sent('converter', 'echo', 1, [b'x'])
    assert not errors()


def test_offer_of_a_job(client):
    """It has the reply of a service that keeps jobs."""
    replies = []
    data = b'["convert",1,{"id":"one"}]'
    assert client.offer(QueuedMessage('convert', data, None, True, replies.append))
    assert [(reply.status, reply.problem) for reply in replies] == [(200, None)]
    assert [job.id for job in client.recorder.jobs] == ['one']


# Eager


@pytest.mark.parametrize(
    ('message', 'reply'),
    [
        (['echo', {'a': 1}], [200, {'a': 1}]),
        (['async_echo', 1], [200, 1]),
        (['async_sleep', 0.01], [200, 0.01]),
        (['nothing', 1], None),
        (['who', 1], [200, ['anonymous', '', 1]]),
        (['returns', 'tuple'], [200, 'OK']),
        (['raises', 'ZMQMessageError'], [418, 'I am a teapot']),
        (['async_raises', 'ZMQMessageError'], [418, 'I am a teapot']),
        (['registry', None], [200, True]),
        (['stop', None], [200, 'stopping']),
    ],
)
def test_eager(eager, message, reply):
    assert eager.request(message) == reply


def test_eager_pool():
    config = Configurator()
    config.include('pyams_zmq.testing')
    config.add_zmq_process('svc', handler=MessageHandler, address='127.0.0.1:1', workers=2)
    config.make_wsgi_app()
    config.registry.zmq_testing.eager = True
    client = config.registry.zmq_clients.get('svc')
    assert client.call('echo', 1) == 1
    assert client.call('registry') is True


class Visits:
    """Counts the messages of a test; says whose it is."""

    def __init__(self):
        self.count = 0

    def visit(self, args):
        self.count += 1
        return [200, [self.count, self.process.registry is get_current_registry()]]


@pytest.mark.parametrize('options', [{}, {'workers': 2}, {'concurrency': 3}])
def test_switch_and_reset(options):
    """Each test of an application chooses, also after messages; a reset is a new start."""
    config = Configurator()
    config.include('pyams_zmq.testing')
    config.add_zmq_process('svc', handler=Visits, address='127.0.0.1:1', **options)
    config.make_wsgi_app()
    testing, client = config.registry.zmq_testing, config.registry.zmq_clients.get('svc')
    for _test in range(2):
        assert client.call('visit') is None
        testing.eager = True
        assert client.call('visit') == [1, True]
        testing.eager = False
        assert client.call('visit') is None
        testing.eager = True
        assert client.call('visit') == [2, True]
        testing.replies['svc'] = {'visit': [200, 'given']}
        assert client.call('visit') == 'given'
        assert len(testing.outbox) == 5
        testing.reset()
        assert (testing.outbox, testing.replies['svc'], testing.eager) == ([], {}, False)


def test_eager_without_a_handler():
    """A service that runs elsewhere has only replies that are given."""
    config = Configurator()
    config.include('pyams_zmq.testing')
    config.add_zmq_process('svc', start='never', address='127.0.0.1:1')
    config.commit()
    config.registry.zmq_testing.eager = True
    client = config.registry.zmq_clients.get('svc')
    assert client.call('visit') is None
    config.registry.zmq_testing.replies['svc'] = {'visit': [200, 'given']}
    assert client.call('visit') == 'given'


def test_dummy_request(config):
    config.include('pyams_zmq.testing')
    config.add_zmq_process('svc', handler=Visits, address='127.0.0.1:1')
    request = DummyRequest()
    request.zmq('svc').send('visit', 1)
    config.registry.zmq_testing.eager = True
    assert request.zmq('svc').call('visit') == [1, True]
    assert config.registry.zmq_testing.outbox == [('svc', 'visit', 1), ('svc', 'visit', None)]
    with pytest.raises(LookupError, match='Unknown ØMQ service'):
        request.zmq('other')
    with pytest.raises(ZMQMessageError, match=r'^413 Message is \d+ bytes; the limit is \d+$'):
        request.zmq('svc').send('visit', 'x' * MAX_MESSAGE_SIZE)
    assert DummyRequest(zmq='mine').zmq == 'mine'
    assert 'zmq' in dir(DummyRequest)
    assert DummyRequest.zmq is vars(DummyRequest)['zmq']


def test_dummy_request_of_another_registry(config):
    """The class keeps `zmq`; a request without clients does not have it."""
    setUp().include('pyams_zmq.testing')
    assert hasattr(DummyRequest(), 'zmq')
    tearDown()
    setUp()
    assert not hasattr(DummyRequest(), 'zmq')
    with pytest.raises(AttributeError, match=r'call config.include\("pyams_zmq.testing"\)'):
        _ = DummyRequest().zmq


@pytest.mark.parametrize(
    ('message', 'status'),
    [
        ({'raw': 1}, 400),
        ([1, 2], 400),
        (['no_args', 1], 400),
        (['_private', 1], 404),
        (['hook', 1], 404),
        (['echo', 'x' * ZMQProcess.max_message_size], 413),
        (['raises', 'ValueError'], 500),
        (['raises', 'SystemExit'], 500),
        (['async_raises', 'ValueError'], 500),
        (['async_raises', 'CancelledError'], 500),
        (['returns', 'object'], 500),
        (['returns', 'surrogate'], 500),
        (['echo', 1, {'deadline': 1.0}], 504),
    ],
)
def test_eager_failures(eager, message, status):
    reply = eager.request(message)
    assert reply[0] == status
    assert 'secret' not in reply[1]
    assert len(eager.outbox) == 1


def test_eager_as_in_its_process(start, eager, ask):
    process = start()
    for message in (
        ['no', 1],
        ['echo'],
        ['no_args', 1],
        'text',
        ['echo', {'é': []}],
    ):
        assert eager.request(message) == ask(process, message)


def test_eager_keeps_its_state():
    class Counter:
        count = 0

        def add(self, args):
            self.count += args
            return [200, self.count]

    class CounterMessageHandler(ZMQMessageHandler):
        handler = Counter

    client = RecordingClient(handler=CounterMessageHandler)
    assert [client.call('add', 1), client.call('add', 2)] == [1, 3]


def test_eager_process():
    registry = Registry('tests')
    process = Process(registry=registry)
    client = RecordingClient(handler=process)
    assert client.call('registry') is True
    assert get_current_registry() is not registry
    assert client.call('echo', 1) == 1


def test_eager_with_replies():
    client = RecordingClient(handler=TaskMessageHandler, replies={'echo': [503, 'overloaded']})
    assert client.call('reply_in_a_task', 1) == 1
    with pytest.raises(ZMQRemoteError):
        client.call('echo', 1)


def test_eager_send(eager, errors):
    eager.send('echo', 1)
    assert not errors()
    eager.send('no', 1)
    assert errors() == [f"Message 'no' to {eager.address}: the reply has status 404"]


# Transactions


def test_commit(client):
    for number in range(10):
        send_on_commit(client, 'convert', number)
    assert client.outbox == []
    transaction.commit()
    assert client.outbox == [('converter', 'convert', number) for number in range(10)]


def test_abort(client):
    send_on_commit(client, 'convert', 1)
    savepoint = transaction.savepoint()
    send_on_commit(client, 'convert', 2)
    savepoint.rollback()
    transaction.abort()
    transaction.commit()
    assert client.outbox == []


def test_eager_commit(eager, errors):
    send_on_commit(eager, 'raises', 'ValueError')
    transaction.commit()
    assert eager.outbox == [('converter', 'raises', 'ValueError')]
    assert errors()[-1] == f"Message 'raises' to {eager.address}: the reply has status 500"


def test_closed_at_commit(client):
    send_on_commit(client, 'convert', 1)
    client.close()
    with pytest.raises(ZMQClosedError):
        transaction.commit()
    transaction.abort()
