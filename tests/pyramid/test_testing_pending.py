# SPDX-License-Identifier: ZPL-2.1
"""Recorded messages of transactions that have not ended, as in functional tests."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import transaction
from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.testing import DummyRequest
from transaction.interfaces import DoomedTransaction

from checks import TIMEOUT
from pyams_zmq.client.transaction import MessageDataManager
from pyams_zmq.exceptions import ZMQClosedError
from pyams_zmq.jobs import zmq_job
from pyams_zmq.testing import PendingMessages, RecordingClient, Sent
from pyams_zmq.transaction import send_on_commit, submit_on_commit
from transaction_checks import Journal


class Videos:
    """Counts the clips that it gets; has a job."""

    def __init__(self):
        self.count = 0

    def check(self, clip):
        self.count += 1
        return [200, self.count]

    @zmq_job()
    def convert(self, clip):
        return [200, f'{clip}.webm']


def check_view(request):
    """Send a message, and call the service."""
    clip = request.params['clip']
    request.zmq('videos').send('check', clip, frames=[b'picture'])
    return request.zmq('videos').call('check', f'called with {clip}')


def convert_view(request):
    """Submit a job to one service; another one gets a message that a rollback drops."""
    savepoint = request.tm.savepoint()
    request.zmq('mailer').send('mail', 'dropped')
    savepoint.rollback()
    job = request.zmq('videos').submit('convert', request.params['clip'], key='k')
    request.zmq('mailer').send('mail', job.id)
    return job.id


def make_app(journal, **settings):
    """Return an application with pyramid_tm, whose messages are recorded."""
    with Configurator(settings=settings) as config:
        config.include('pyramid_tm')
        config.include('pyams_zmq.testing')
        config.add_zmq_process(
            'videos', handler=Videos, address='127.0.0.1:25556', workers=2, journal=journal
        )
        config.add_zmq_process('mailer', start='never', address='127.0.0.1:25557')
        for view in (check_view, convert_view):
            config.add_route(view.__name__, f'/{view.__name__}')
            config.add_view(view, route_name=view.__name__, renderer='json')
        return config.make_wsgi_app()


@pytest.fixture(scope='module', params=['implicit', 'explicit'])
def app(request, tmp_path_factory):
    """Return the application of all functional tests."""
    hook = {'tm.manager_hook': 'pyramid_tm.explicit_manager'}
    journal = tmp_path_factory.getbasetemp() / 'videos.jobs'
    return make_app(journal, **(hook if request.param == 'explicit' else {}))


@pytest.fixture
def testing(app):
    """Return the messages of the application."""
    yield app.registry.zmq_testing
    app.registry.zmq_testing.reset()


@pytest.fixture
def tm():
    """Transaction manager whose transaction is never committed."""
    manager = transaction.TransactionManager(explicit=True)
    manager.begin()
    manager.doom()
    yield manager
    manager.abort()


@pytest.fixture
def get(app, tm):
    """Get a page in the transaction of the test."""

    def get_page(path):
        environ = {'tm.active': True, 'tm.manager': tm}
        return Request.blank(path, environ).get_response(app).json

    return get_page


@pytest.fixture
def client():
    """Client that records messages."""
    with RecordingClient('videos') as client:
        yield client


@pytest.fixture(params=['thread', 'implicit', 'explicit'])
def manager(request):
    """Transaction manager whose transaction has begun."""
    manager = transaction.manager
    if request.param != 'thread':
        manager = transaction.TransactionManager(explicit=request.param == 'explicit')
    manager.begin()
    return manager


def sent(*numbers):
    """Return the messages with these arguments."""
    return [('videos', 'check', number) for number in numbers]


# Transactions


def test_commit(client, manager):
    for number in range(3):
        send_on_commit(client, 'check', number, manager=manager)
    assert (client.pending, client.outbox) == (sent(0, 1, 2), [])
    manager.commit()
    assert (client.pending, client.outbox) == ([], sent(0, 1, 2))


def test_abort(client, manager):
    send_on_commit(client, 'check', 1, manager=manager)
    manager.abort()
    assert (client.pending, client.outbox) == ([], [])


def test_savepoints(client, manager):
    send_on_commit(client, 'check', 1, manager=manager)
    first = manager.savepoint()
    send_on_commit(client, 'check', 2, manager=manager)
    second = manager.savepoint()
    send_on_commit(client, 'check', 3, manager=manager)
    second.rollback()
    assert client.pending == sent(1, 2)
    send_on_commit(client, 'check', 4, manager=manager)
    assert client.pending == sent(1, 2, 4)
    first.rollback()
    assert client.pending == sent(1)
    send_on_commit(client, 'check', 5, manager=manager)
    manager.commit()
    assert (client.pending, client.outbox) == ([], sent(1, 5))


def test_a_new_list_each_time(client):
    send_on_commit(client, 'check', 1)
    client.pending.clear()
    assert client.pending == sent(1)
    transaction.abort()


def test_they_look_as_they_do_after_the_commit(client):
    send_on_commit(client, 'check', {'clip': ('a', 'b')})
    send_on_commit(client, 'check', 1, frames=[bytearray(b'x'), b'y'])
    submit_on_commit(client, 'convert', [1], key='k', delay=60)
    submit_on_commit(client, 'convert', 2, frames=[memoryview(b'z')])
    pending = client.pending
    assert client.recorder.jobs == []
    transaction.commit()
    assert len(client.recorder.jobs) == 2
    for before, after in zip(pending, client.outbox, strict=True):
        assert type(before) is Sent
        assert (before, before.frames, repr(before)) == (after, after.frames, repr(after))
    assert [each.frames for each in pending] == [[], [b'x', b'y'], [], [b'z']]


def test_later_changes_do_not_matter(client):
    args, frame = [1], bytearray(b'x')
    send_on_commit(client, 'check', args, frames=[frame])
    args.append(2)
    frame[:] = b'y'
    assert client.pending == [Sent('videos', 'check', [1], [b'x'])]
    transaction.abort()


def test_failed_commit(client):
    def refuse():
        raise ZeroDivisionError

    transaction.get().join(Journal('~~', tpc_vote=refuse))
    send_on_commit(client, 'check', 1)
    with pytest.raises(ZeroDivisionError):
        transaction.commit()
    assert (client.pending, client.outbox) == ([], [])
    transaction.abort()


def test_client_is_closed_before_the_commit(client):
    send_on_commit(client, 'check', 1)
    client.close()
    with pytest.raises(ZMQClosedError):
        transaction.commit()
    assert client.pending == []
    transaction.abort()


def test_doomed_transaction_is_not_committed(client, tm):
    send_on_commit(client, 'check', 1, manager=tm)
    with pytest.raises(DoomedTransaction):
        tm.commit()
    assert client.pending == sent(1)
    tm.abort()
    tm.begin()
    assert (client.pending, client.outbox) == ([], [])


def test_each_message_leaves_before_it_is_recorded():
    seen = []
    replies = {'check': lambda number: seen.append((client.pending, [*client.outbox]))}
    with RecordingClient('videos', replies=replies) as client:
        send_on_commit(client, 'check', 1)
        send_on_commit(client, 'check', 2)
        transaction.commit()
    assert seen == [(sent(2), sent(1)), ([], sent(1, 2))]


def test_shared():
    pending = PendingMessages()
    one, two = (RecordingClient(name, pending=pending) for name in ('one', 'two'))
    for client, type_ in ((two, 'a'), (one, 'b'), (two, 'c')):
        send_on_commit(client, type_)
    other = RecordingClient('other')
    send_on_commit(other, 'd')
    assert [each.name for each in one.pending] == ['two', 'one', 'two']
    assert one.pending == two.pending == pending.read()
    assert other.pending == [('other', 'd', None)]
    transaction.commit()
    assert pending.read() == other.pending == []
    assert two.outbox == [('two', 'a', None), ('two', 'c', None)]


def test_transactions_of_two_threads(client):
    turn = threading.Barrier(2, timeout=TIMEOUT)

    def run(own, end):
        """Send every second message; end the transaction when the other thread has seen all."""
        for number in range(4):
            if number in own:
                send_on_commit(client, 'check', number)
            turn.wait()
        pending = client.pending
        turn.wait()
        end()
        return pending

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(run, (0, 2), transaction.commit)
        two = threads.submit(run, (1, 3), transaction.abort)
        assert one.result(TIMEOUT) == two.result(TIMEOUT) == sent(0, 1, 2, 3)
    assert (client.pending, client.outbox) == ([], sent(0, 2))


@pytest.mark.parametrize('end', ['commit', 'abort', 'rollback'])
def test_nothing_is_kept_after_the_end(client, end):
    savepoint = transaction.savepoint()
    send_on_commit(client, 'check', 1)
    [message] = transaction.get()._resources
    assert isinstance(message, MessageDataManager)
    reference = weakref.ref(message)
    del message
    savepoint.rollback() if end == 'rollback' else getattr(transaction, end)()
    transaction.abort()
    del savepoint
    gc.collect()
    assert reference() is None


# Reset


def test_reset(app, testing):
    """Messages of a former test are not sent, although its transaction goes on."""
    client, other = map(app.registry.zmq_clients.get, ('videos', 'mailer'))
    former, manager = transaction.TransactionManager(), transaction.TransactionManager()
    savepoint = former.savepoint()
    send_on_commit(client, 'check', 1, manager=former)
    send_on_commit(other, 'mail', 2, manager=former)
    submit_on_commit(client, 'convert', 3, manager=former)
    assert [each.args for each in testing.pending] == [1, 2, 3]
    testing.reset()
    assert testing.pending == []
    send_on_commit(client, 'check', 4, manager=former)
    send_on_commit(client, 'check', 5, manager=manager)
    assert testing.pending == sent(4, 5)
    former.commit()
    assert (testing.pending, testing.outbox, testing.jobs) == (sent(5), sent(4), [])
    assert not savepoint.valid
    manager.abort()
    assert testing.pending == []


@pytest.mark.parametrize('phase', ['tpc_begin', 'tpc_vote', 'tpc_finish'])
@pytest.mark.parametrize('key', [' before the messages', '~~ after them'])
def test_reset_during_a_commit(app, testing, phase, key):
    """What has not been sent then is not sent any more."""
    transaction.get().join(Journal(key, **{phase: testing.reset}))
    send_on_commit(app.registry.zmq_clients.get('videos'), 'check', 1)
    transaction.commit()
    assert (testing.pending, testing.outbox) == ([], [])


def test_reset_and_a_closed_client(app, testing):
    """A commit does not fail because of messages that were forgotten."""
    client = app.registry.zmq_clients.get('videos')
    send_on_commit(client, 'check', 1)
    testing.reset()
    app.registry.zmq_clients.close()
    transaction.commit()
    assert testing.outbox == []


def test_reset_forgets_transactions_that_do_not_end(client):
    manager = transaction.TransactionManager()
    send_on_commit(client, 'check', 1, manager=manager)
    reference = weakref.ref(manager.get()._resources[0])
    del manager
    gc.collect()
    assert (client.pending, reference().is_dropped) == (sent(1), False)
    client._pending.reset()
    gc.collect()
    assert (client.pending, reference()) == ([], None)


# Functional tests


@pytest.mark.parametrize('clip', ['a.mov', 'b.mov'])
def test_functional(testing, get, tm, clip):
    """Each test has only its own messages; those of a call are sent at once."""
    get(f'/check_view?clip={clip}')
    assert testing.pending == [Sent('videos', 'check', clip, [b'picture'])]
    assert testing.outbox == [('videos', 'check', f'called with {clip}')]
    tm.abort()
    tm.begin()
    assert (testing.pending, len(testing.outbox)) == ([], 1)


@pytest.mark.parametrize('clip', ['a.mov', 'b.mov'])
@pytest.mark.parametrize('eager', [True, False])
def test_functional_job(testing, get, clip, eager):
    """Several requests of a test share its transaction; a job that is not sent does not run."""
    testing.eager = eager
    ids = [get(f'/convert_view?clip={clip}') for _request in range(2)]
    assert testing.pending == [
        ('videos', 'convert', clip),
        ('mailer', 'mail', ids[0]),
        ('videos', 'convert', clip),
        ('mailer', 'mail', ids[1]),
    ]
    assert (testing.outbox, testing.jobs) == ([], [])


def test_reset_before_the_abort(testing, get, tm):
    get('/check_view?clip=a.mov')
    testing.reset()
    tm.abort()
    tm.begin()
    assert (testing.pending, testing.outbox) == ([], [])


def test_eager_is_switched_between_tests(app, testing, get):
    """Handlers reply to calls; those of pending messages do not run, and reset makes new ones."""
    for _test in range(2):
        assert get('/check_view?clip=a.mov') is None
        testing.eager = True
        assert get('/check_view?clip=a.mov') == 1
        assert get('/check_view?clip=a.mov') == 2
        testing.eager = False
        assert get('/check_view?clip=a.mov') is None
        assert (len(testing.pending), len(testing.outbox)) == (4, 4)
        testing.reset()
        assert (testing.pending, testing.outbox, testing.eager) == ([], [], False)


@pytest.mark.parametrize('eager', [True, False])
def test_request_that_commits(app, testing, eager):
    """The transaction of pyramid_tm has ended after the request."""
    testing.eager = eager
    job_id = Request.blank('/convert_view?clip=a.mov').get_response(app).json
    assert testing.pending == []
    assert testing.outbox == [('videos', 'convert', 'a.mov'), ('mailer', 'mail', job_id)]
    assert [(job.id, job.state) for job in testing.jobs] == [
        (job_id, 'done' if eager else 'waiting')
    ]


def test_two_applications(get, testing, tm, tmp_path):
    """They may share a transaction; each has its own messages, and forgets only these."""
    other = make_app(tmp_path / 'videos.jobs')
    get('/check_view?clip=a.mov')
    environ = {'tm.active': True, 'tm.manager': tm}
    Request.blank('/check_view?clip=b.mov', environ).get_response(other)
    assert [each.args for each in testing.pending] == ['a.mov']
    testing.reset()
    assert testing.pending == []
    assert [each.args for each in other.registry.zmq_testing.pending] == ['b.mov']


def test_dummy_request(config, tm):
    """A unit test of a view can have the transaction, too."""
    config.include('pyams_zmq.testing')
    config.add_zmq_process('videos', start='never', address='127.0.0.1:25556')
    assert check_view(DummyRequest({'clip': 'a.mov'}, tm=tm)) is None
    assert config.registry.zmq_testing.pending == [Sent('videos', 'check', 'a.mov', [b'picture'])]
