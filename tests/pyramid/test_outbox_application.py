# SPDX-License-Identifier: ZPL-2.1
"""Applications with an outbox: what requests send, and what becomes of it."""

import multiprocessing
import os
import signal
from uuid import uuid4

import pytest
from pyramid.config import Configurator
from pyramid.request import Request
from sqlalchemy.exc import IntegrityError
from transaction import TransactionManager

from app import outboxed
from checks import TIMEOUT, wait_until
from outbox_applications import Application
from pyams_zmq.exceptions import ZMQOutboxError, ZMQUnreachableError
from pyams_zmq.outbox import relay
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.testing import Sent

ENDED = 'from pyams_zmq.outbox.owner import identify_process; print(identify_process(), end="")'


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch):
    monkeypatch.setattr(relay, 'CHECK_INTERVAL', 0.1)


@pytest.fixture
def application(make_application):
    return make_application()


# Transactions


def test_send(application, services):
    services.start('converter')
    for number in range(3):
        assert application.upload(f'clip{number}') == 200
    services.wait_for('clip0', 'clip1', 'clip2')
    application.wait_until_empty()
    assert application.clips() == ['clip0', 'clip1', 'clip2']


def test_submit(application, services):
    services.start('renderer')
    job_id = application.get('/render', name='clip').json
    services.wait_for('clip', service='renderer')
    job = application.registry.zmq_clients.get('renderer').job(job_id)
    assert job.id == job_id
    application.wait_until_empty()


def test_service_is_down(application, services):
    """Requests do not fail, and do not wait; messages come in their order when it is up."""
    for number in range(5):
        assert application.upload(f'clip{number}') == 200
    assert application.get('/render', name='clip').status_int == 200
    assert application.count_waiting() == {'converter': 5, 'renderer': 1}
    services.start('converter', 'renderer')
    services.wait_for('clip', service='renderer')
    services.wait_for(*(f'clip{number}' for number in range(5)))
    application.wait_until_empty()


@pytest.mark.parametrize('how', ['fail', 'doomed after'])
def test_abort(application, services, how):
    """Neither the message nor one of the exception view is sent."""
    services.start('converter')
    status = 500 if how == 'fail' else 200
    assert application.upload('lost', how=how) == status
    assert application.upload('kept') == 200
    services.wait_for('kept')
    assert application.clips() == ['kept']
    application.wait_until_empty()


def test_doomed(application, services):
    with pytest.raises(ZMQOutboxError) as caught:
        application.upload('lost', how='doomed before')
    assert str(caught.value).startswith(
        "Message 'note' to 'converter' would never be sent: the transaction is doomed. Send it "
        'before, or in another transaction; a test includes pyams_zmq.testing'
    )
    assert application.count_waiting() == {}
    assert application.clips() == []


def test_without_a_transaction(application, services):
    """It is sent now, as without an outbox: an error if the service is down."""
    services.start('converter')
    assert application.get('/send_late', name='late').status_int == 200
    services.wait_for('late')
    assert application.count_waiting() == {}
    services.stop('converter')
    with pytest.raises(ZMQUnreachableError):
        application.get('/send_late', name='lost')
    assert application.count_waiting() == {}


def test_several_services(application, services):
    """Each has its own order, and does not wait for the others."""
    services.start('converter')
    for number in range(3):
        assert application.upload(f'clip{number}', to='renderer converter') == 200
    services.wait_for('clip0', 'clip1', 'clip2')
    wait_until(lambda: application.count_waiting() == {'renderer': 3})
    services.stop('converter')
    services.start('renderer')
    services.wait_for('clip0', 'clip1', 'clip2', service='renderer')
    application.wait_until_empty()


def test_dead_letter(application, services, caplog):
    services.start('converter')
    for kind, name in (('no', 'refused'), ('note', 'kept')):
        assert application.upload(name, type=kind) == 200
    services.wait_for('kept')
    [letter] = wait_until(application.outbox.dead_letters)
    assert (letter.entry.type, letter.status) == ('no', 404)
    assert 'refused' not in caplog.text


def test_close(application, services):
    """A program may close the clients; the next use begins again, with the same outbox."""
    services.start('converter')
    outbox = application.outbox
    assert isinstance(outbox, Outbox)
    for number in range(3):
        assert application.registry.zmq_clients.outbox is outbox
        assert application.upload(f'clip{number}') == 200
        wait_until(lambda number=number: len(services.names()) > number)
        application.registry.zmq_clients.close()
        assert application.count_waiting() == {}
    services.wait_for('clip0', 'clip1', 'clip2')


SQLITE = pytest.mark.parametrize('database', ['sqlite'], indirect=True)


def test_retry(application, services):
    """Only the message of the last attempt is sent."""
    services.start('converter')
    assert application.upload('clip', how='conflict') == 200
    assert application.upload('last') == 200
    services.wait_for('clip', 'last')
    application.wait_until_empty()


@pytest.mark.parametrize('database', ['file'], indirect=True)
def test_too_large(application):
    response = application.get('/upload', name='x' * 70_000)
    assert response.status_int == 500
    assert 'the limit of this outbox is 65536: write the data to a file' in response.json
    assert 'max_message_size' not in response.json
    assert (application.count_waiting(), application.clips()) == ({}, [])


@SQLITE
def test_error_of_the_commit(application, services):
    """The clip is there already, which the database refuses."""
    services.start('converter')
    assert application.upload('clip') == 200
    with pytest.raises(IntegrityError):
        application.upload('clip')
    services.wait_for('clip')
    application.wait_until_empty()


@SQLITE
def test_transaction_that_is_not_begun(application, make_application, services):
    """pyramid_tm has a hook for requests without a transaction."""
    services.start('converter')
    other = make_application(**{'tm.activate_hook': f'{__name__}.has_no_transaction'})
    assert other.get('/send_now', name='now').status_int == 200
    services.wait_for('now')


def has_no_transaction(request):
    return False


@SQLITE
def test_without_pyramid_tm(database, services):
    services.start('converter')
    with Configurator() as config:
        config.include('pyams_zmq')
        config.set_zmq_outbox('sqlalchemy')
        config.add_zmq_process(
            'converter', address=services.settings['app.converter'], start='never'
        )
        config.add_route('send_now', '/')
        config.add_view(outboxed.send_now, route_name='send_now', renderer='json')
        app = config.make_wsgi_app()
    assert Request.blank('/?name=now').get_response(app).json == 'now'
    services.wait_for('now')
    app.registry.zmq_clients.close()


# The session of a request


@SQLITE
def test_other_attribute(make_application, services):
    services.start('converter')
    application = make_application(**{'pyams_zmq.outbox_session': 'db', 'app.session': 'db'})
    assert application.upload('clip') == 200
    services.wait_for('clip')
    application.wait_until_empty()


@SQLITE
@pytest.mark.parametrize(
    ('settings', 'text'),
    [
        (
            {'app.session': 'db'},
            "The request has no attribute 'dbsession' with a Session of SQLAlchemy: set "
            'pyams_zmq.outbox_session to the attribute of the request that has it',
        ),
        (
            {'pyams_zmq.outbox_session': 'tm'},
            "The attribute 'tm' of the request is not a Session of SQLAlchemy, but of <class "
            "'transaction._manager.ThreadTransactionManager'>: set pyams_zmq.outbox_session to the "
            'attribute of the request that has it',
        ),
        (
            {'app.session': 'db', 'pyams_zmq.outbox_session': 'raw'},
            'The Session of SQLAlchemy is not committed with the transaction of the message: call '
            'zope.sqlalchemy.register(session, transaction_manager=request.tm) where it is made',
        ),
    ],
    ids=['missing', 'something else', 'not registered'],
)
def test_no_session(make_application, settings, text):
    application = make_application(**settings)
    with pytest.raises(ZMQOutboxError) as caught:
        application.upload('lost')
    assert str(caught.value) == text
    assert (application.count_waiting(), application.clips()) == ({}, [])


@pytest.mark.parametrize('database', ['file'], indirect=True)
def test_other_database(make_application, services, tmp_path):
    """It is one of several of pyramid_zodbconn."""
    application = make_application(
        **{
            'zodbconn.uri.messages': f'file://{tmp_path}/messages.fs',
            'pyams_zmq.outbox_database': 'messages',
        }
    )
    assert application.upload('clip') == 200
    assert application.count_waiting() == {'converter': 1}
    databases = application.registry._zodb_databases
    roots = {}
    for name, database in databases.items():
        with database.transaction() as connection:
            roots[name] = list(connection.root())
    assert roots == {'': ['clips'], 'messages': ['pyams_zmq.outbox']}
    services.start('converter')
    services.wait_for('clip')
    application.wait_until_empty()


# With pyams_zmq.testing


@pytest.mark.parametrize('includes', ['before', 'after'])
def test_testing(includes):
    """Messages are recorded as without an outbox: its table is not needed, nor its package."""
    tm = TransactionManager(explicit=True)
    with Configurator(settings={'pyams_zmq.outbox': 'sqlalchemy'}) as config:
        config.include('pyramid_tm')
        config.include('pyams_zmq.testing' if includes == 'before' else 'pyams_zmq')
        config.add_zmq_process('converter', address='127.0.0.1:1', start='never')
        config.add_route('send_now', '/')
        config.add_view(outboxed.send_now, route_name='send_now', renderer='json')
        if includes == 'after':
            config.include('pyams_zmq.testing')
        app = config.make_wsgi_app()
    testing = app.registry.zmq_testing
    assert app.registry.zmq_outbox is app.registry.zmq_clients.outbox is None
    with tm:
        environ = {'tm.active': True, 'tm.manager': tm}
        assert Request.blank('/?name=clip', environ).get_response(app).json == 'clip'
        assert testing.pending == [Sent('converter', 'note', 'clip')]
        assert testing.outbox == []
    assert (testing.pending, testing.outbox) == ([], [Sent('converter', 'note', 'clip')])


@SQLITE
def test_testing_of_an_application_that_was_made(application):
    """It has used its outbox."""
    assert application.upload('clip') == 200
    config = Configurator(application.registry)
    config.include('pyams_zmq.testing')
    config.commit()
    assert application.upload('other') == 200
    assert application.registry.zmq_testing.outbox == [Sent('converter', 'note', 'other')]
    assert application.count_waiting() == {'converter': 1}


# Other processes


def upload_and_die(settings, names):
    """Upload clips, and be killed."""
    application = Application(settings)
    for name in names:
        assert application.upload(name) == 200
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_kill(settings, *names):
    """Run an application that uploads clips, in a process that is killed."""
    process = multiprocessing.get_context('fork').Process(
        target=upload_and_die, args=(settings, names)
    )
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == -signal.SIGKILL


def test_process_is_killed(make_application, services):
    """Its messages are sent by an application that gets no request."""
    names = ['clip0', 'clip1', 'clip2']
    run_and_kill(make_application.settings, *names)
    services.start('converter')
    application = make_application()
    services.wait_for(*names)
    application.wait_until_empty()
    assert application.clips() == names


def test_two_applications(make_application, services):
    """They do not take the messages of each other, also when a process has ended."""
    settings = [
        {**make_application.settings, 'pyams_zmq.application': f'{name} {uuid4()}'}
        for name in ('first', 'second')
    ]
    run_and_kill(settings[0], 'clip-1')
    run_and_kill(settings[1], 'clip-2')
    services.start('converter')
    second = make_application(**settings[1])
    services.wait_for('clip-2')
    second.wait_until_empty()
    name = settings[0]['pyams_zmq.application']
    assert second.outbox.others() == {name: 1}
    second.close()
    first = make_application(**settings[0])
    services.wait_for('clip-2', 'clip-1')
    first.wait_until_empty()
    assert first.outbox.others() == {}
