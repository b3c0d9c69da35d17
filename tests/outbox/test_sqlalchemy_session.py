# SPDX-License-Identifier: ZPL-2.1
"""An entry is added by the session of the request, and committed with its transaction."""

import sqlite3

import pytest
import transaction
import zope.sqlalchemy
from pyramid.testing import DummyRequest
from sqlalchemy import create_engine, event, insert, inspect, select
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session, registry, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool
from zope.sqlalchemy import datamanager

from databases import ENTRY, begin_explicitly, begun_manager
from pyams_zmq.exceptions import ZMQOutboxError
from pyams_zmq.outbox.storage import Entry

SECRET = Entry('converter', 'convert', b'["secret"]', (b'secret',))


def add(application, request, entry=ENTRY):
    return application.storage.add(entry, 'owner', request.tm, request)


def test_commit(application):
    with application.request() as request:
        key = add(application, request)
        assert application.keys() == []
    assert application.keys() == [key]


def test_abort(application):
    with application.request() as request:
        add(application, request)
        request.tm.abort()
    assert application.keys() == []


def test_same_transaction_as_the_application(application):
    with application.request() as request:
        request.dbsession.execute(insert(application.notes).values(text='first'))
        add(application, request)
        request.tm.abort()
        key = add(application, request)
        request.dbsession.execute(insert(application.notes).values(text='second'))
    with application.engine.connect() as connection:
        assert connection.scalars(select(application.notes.c.text)).all() == ['second']
    assert application.keys() == [key]


def test_one_statement(application):
    statements = []
    with application.request() as request:
        request.dbsession.connection()
        event.listen(
            application.engine,
            'before_cursor_execute',
            lambda conn, cursor, statement, *args: statements.append(statement),
        )
        add(application, request)
    assert len(statements) == 1
    assert statements[0].startswith('INSERT INTO pyams_zmq_outbox')


@pytest.fixture
def savepoint_application(application):
    """Return an application in whose database savepoints can be rolled back."""
    if application.engine.dialect.name == 'sqlite':
        begin_explicitly(application.engine)
        application.engine.dispose()
    return application


def test_savepoint(savepoint_application):
    application = savepoint_application
    with application.request() as request:
        first = add(application, request)
        savepoint = request.tm.savepoint()
        add(application, request)
        savepoint.rollback()
        last = add(application, request)
    assert application.keys() == [first, last]


def test_savepoint_before_the_session_is_used(savepoint_application):
    application = savepoint_application
    with application.request() as request:
        savepoint = request.tm.savepoint()
        add(application, request)
        savepoint.rollback()
        key = add(application, request)
    assert application.keys() == [key]


def test_transaction_in_two_phases(postgresql_application):
    application = postgresql_application
    with Session(application.engine, twophase=True) as session, begun_manager() as manager:
        zope.sqlalchemy.register(session, transaction_manager=manager)
        storage = application.make_storage(session=session)
        key = storage.add(ENTRY, 'owner', manager, None)
    assert application.keys() == [key]


# Where the session is


def test_attribute(application):
    storage = application.make_storage(session='session')
    with application.request() as request:
        request.session = request.dbsession
        key = storage.add(ENTRY, 'owner', request.tm, request)
    assert storage.read('owner', 'converter', None, 9)[0].key == key  # with the engine of `add`


def test_function(application):
    storage = application.make_storage(session=lambda request: request.dbsession)
    with application.request() as request:
        storage.add(ENTRY, 'owner', request.tm, request)
    assert len(application.keys()) == 1


def test_scoped_session_in_the_transaction_of_the_thread(application):
    """Applications without a session of each request use these."""
    session = scoped_session(sessionmaker(application.engine))
    zope.sqlalchemy.register(session)
    with transaction.manager:
        application.make_storage(session=session).add(ENTRY, 'owner', transaction.manager, None)
    with transaction.manager:
        storage = application.make_storage(session=lambda request: session)
        storage.add(ENTRY, 'owner', transaction.manager, None)
    assert len(application.keys()) == 2
    session.remove()


def test_session_that_has_joined_by_itself(application):
    with Session(application.engine) as session, begun_manager() as manager:
        datamanager.join_transaction(session, transaction_manager=manager)
        storage = application.make_storage(session=session)
        storage.add(ENTRY, 'owner', manager, None)
    assert len(application.keys()) == 1


def test_session_with_a_database_for_the_table(application):
    binds = {application.storage.table: application.engine}
    with Session(binds=binds) as session, begun_manager() as manager:
        zope.sqlalchemy.register(session, transaction_manager=manager)
        application.make_storage(session=session).add(ENTRY, 'owner', manager, None)
    assert len(application.keys()) == 1


def test_session_without_an_engine_for_the_table(application):
    with (
        Session(binds={application.notes: application.engine}) as session,
        begun_manager() as manager,
    ):
        zope.sqlalchemy.register(session, transaction_manager=manager)
        with pytest.raises(ZMQOutboxError) as caught:
            application.make_storage(session=session).add(ENTRY, 'owner', manager, None)
    assert str(caught.value) == (
        "The Session of SQLAlchemy has no engine for the table 'pyams_zmq_outbox': add it to its "
        'binds, as in sessionmaker(binds={outbox_table(metadata): engine})'
    )


def test_session_of_a_connection(savepoint_application):
    """Tests of applications roll back what was committed."""
    application = savepoint_application
    with application.engine.connect() as connection:
        with (
            Session(connection, join_transaction_mode='create_savepoint') as session,
            begun_manager() as manager,
        ):
            connection.begin()
            zope.sqlalchemy.register(session, transaction_manager=manager)
            storage = application.make_storage(session=session)
            storage.add(ENTRY, 'owner', manager, None)
        connection.rollback()
    assert application.keys(storage=storage) == []


@pytest.mark.parametrize('keep_session', [False, True])
def test_session_is_kept_as_it_was_registered(application, keep_session):
    class Note:
        pass

    mapped = registry()
    mapped.map_imperatively(Note, application.notes)
    with application.request(keep_session=keep_session) as request:
        note = Note()
        request.dbsession.add(note)
        add(application, request)
        request.tm.commit()
        assert (note in request.dbsession) == keep_session
    mapped.dispose()


# No session


def test_no_attribute(application):
    with application.request() as request:
        del request.dbsession
        with pytest.raises(ZMQOutboxError) as caught:
            add(application, request)
    assert str(caught.value) == (
        "The request has no attribute 'dbsession' with a Session of SQLAlchemy: set "
        'pyams_zmq.outbox_session to the attribute of the request that has it'
    )


def test_attribute_that_cannot_be_computed(application):
    def read(request):
        return request.unknown

    storage = application.make_storage(session='database')
    with application.request() as request:
        request.set_property(read, 'database')
        with pytest.raises(ZMQOutboxError) as caught:
            storage.add(ENTRY, 'owner', request.tm, request)
    assert 'unknown' in str(caught.value.__cause__)


def test_no_request(application):
    with begun_manager() as manager, pytest.raises(ZMQOutboxError) as caught:
        application.storage.add(ENTRY, 'owner', manager, None)
    assert str(caught.value) == (
        "The outbox finds its Session of SQLAlchemy in the attribute 'dbsession' of the request: "
        'call config.set_zmq_outbox with a function that returns the Session, as session'
    )


@pytest.mark.parametrize('value', [None, 'postgresql://user:secret@/', sessionmaker()])
@pytest.mark.parametrize('source', ['dbsession', lambda request: request.dbsession])
def test_not_a_session(application, source, value):
    storage = application.make_storage(session=source)
    with begun_manager() as manager, pytest.raises(ZMQOutboxError) as caught:
        storage.add(ENTRY, 'owner', manager, DummyRequest(dbsession=value))
    assert f'is not a Session of SQLAlchemy, but of {type(value)}' in str(caught.value)
    assert 'pyams_zmq.outbox_session' in str(caught.value)
    assert 'secret' not in str(caught.value)


# A session that is not committed with the transaction


def test_session_that_is_not_registered(application):
    with Session(application.engine) as session, begun_manager() as manager:
        storage = application.make_storage(session=session)
        with pytest.raises(ZMQOutboxError) as caught:
            storage.add(ENTRY, 'owner', manager, None)
        session.commit()
    assert str(caught.value) == (
        'The Session of SQLAlchemy is not committed with the transaction of the message: call '
        'zope.sqlalchemy.register(session, transaction_manager=request.tm) where it is made'
    )
    assert application.keys() == []


def test_session_of_another_transaction_manager(application):
    with begun_manager() as manager, application.request() as request:
        with pytest.raises(ZMQOutboxError, match='is not committed with the transaction'):
            application.storage.add(ENTRY, 'owner', manager, request)
        zope.sqlalchemy.mark_changed(request.dbsession, request.tm)
    assert application.keys() == []


def test_session_that_is_read_only(application):
    with (
        application.request(initial_state=datamanager.STATUS_READONLY) as request,
        pytest.raises(ZMQOutboxError, match='registered as read only'),
    ):
        add(application, request)
    assert application.keys() == []


# Errors of the database


def check_content_is_hidden(error):
    assert 'hidden' in str(error)
    assert 'secret' not in str(error)


def test_no_table(application):
    application.storage.table.drop(application.engine)
    with application.request() as request:
        with pytest.raises(ZMQOutboxError) as caught:
            add(application, request, SECRET)
        request.tm.abort()
    assert str(caught.value) == (
        "The database has no table 'pyams_zmq_outbox': create it with a migration, or with "
        'metadata.create_all(engine)'
    )
    check_content_is_hidden(caught.value.__cause__)
    with pytest.raises(ZMQOutboxError, match='has no table'):
        application.storage.read_waiting()
    assert inspect(application.engine).has_table('notes')


def test_database_is_locked(sqlite_url, make_application):
    application = make_application(sqlite_url, connect_args={'timeout': 0})
    with application.engine.begin() as connection:
        connection.execute(insert(application.notes).values(text=''))
        with application.request() as request:
            with pytest.raises(OperationalError, match='database is locked') as caught:
                add(application, request, SECRET)
            request.tm.abort()
    check_content_is_hidden(caught.value)
    assert isinstance(caught.value.orig, sqlite3.OperationalError)


def test_conflict_of_transactions_can_be_retried(postgresql_url, make_application):
    """pyramid_retry asks the transaction manager whether it makes sense."""
    application = make_application(postgresql_url, isolation_level='SERIALIZABLE')
    with application.request() as request:
        request.dbsession.execute(select(application.notes))
        with application.request() as other:
            other.dbsession.execute(select(application.storage.table))
            other.dbsession.execute(insert(application.notes).values(text=''))
            zope.sqlalchemy.mark_changed(other.dbsession, other.tm)
        with pytest.raises(OperationalError) as caught:
            add(application, request, SECRET)
        assert request.tm.get().isRetryableError(caught.value)
        request.tm.abort()
    check_content_is_hidden(caught.value)


def test_type_that_the_database_cannot_store(postgresql_application):
    application = postgresql_application
    with application.request() as request, pytest.raises(DBAPIError, match='NUL') as caught:
        add(application, request, Entry('converter', 'a\0', b'secret'))
    check_content_is_hidden(caught.value)


# The engine of the background


@pytest.mark.parametrize('engine', [None, lambda: None])
def test_no_engine(application, engine):
    storage = application.make_storage(engine=engine)
    with pytest.raises(ZMQOutboxError) as caught:
        storage.read_waiting()
    assert str(caught.value) == (
        'The outbox does not know its database before the first message of this process: set '
        "registry['dbsession_factory'], or give config.set_zmq_outbox an engine"
    )


def test_engine_of_a_function(application):
    keys = application.add(ENTRY)
    storage = application.make_storage(engine=lambda: application.engine)
    assert application.keys(storage=storage) == keys


@pytest.mark.parametrize('pool', [StaticPool, None])
def test_database_in_the_memory(make_application, pool):
    """It has one connection, or one for each thread, with different content."""
    options = {} if pool is None else {'poolclass': pool}
    application = make_application('sqlite://', **options)
    application.add(ENTRY)
    with pytest.raises(ZMQOutboxError, match='Pool.* use a file instead of'):
        application.storage.read_waiting()
    with application.engine.connect() as connection:
        assert len(connection.execute(select(application.storage.table)).all()) == 1


def test_password_is_not_shown(sqlite_application):
    url = 'postgresql+psycopg://user:secret@/app?host=/nowhere'
    storage = sqlite_application.make_storage(engine=create_engine(url))
    with pytest.raises(OperationalError) as caught:
        storage.read_waiting()
    assert 'nowhere' in str(caught.value)
    assert 'secret' not in str(caught.value) + repr(storage)
