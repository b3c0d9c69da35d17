# SPDX-License-Identifier: ZPL-2.1
"""The ZODB connection in which an entry is added, of those that a transaction has."""

from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest
import transaction
from pyramid.request import Request
from transaction import TransactionManager
from ZODB.DB import DB

from pyams_zmq.exceptions import ZMQOutboxError
from pyams_zmq.outbox.storage import Entry
from pyams_zmq.outbox.zodb import ROOT_KEY, ZODBStorage
from pyams_zmq.outbox.zodb_connection import list_connections

TAKE = Entry('camera', 'take', b'["take",1]')


@pytest.fixture
def manager():
    manager = TransactionManager(explicit=True)
    manager.begin()
    yield manager
    manager.abort()


@pytest.fixture
def db():
    with closing(DB(None)) as db:
        yield db


@pytest.fixture
def multi():
    """Yield databases that know each other by their names."""
    databases = {}
    with closing(DB(None, database_name='main', databases=databases)) as main:
        with closing(DB(None, database_name='mail', databases=databases)):
            yield databases
        assert main.databases


@contextmanager
def open_connection(db, manager, **options):
    """Open a connection, and abort the transaction at the end."""
    connection = db.open(transaction_manager=manager, **options)
    try:
        yield connection
    finally:
        connection.transaction_manager.abort()
        if isinstance(manager, TransactionManager):
            manager.begin()  # the fixture aborts it
        connection.close()


def add(manager, request=None, storage=None, **options):
    """Add an entry."""
    (storage or ZODBStorage('app', **options)).add(TAKE, 'web', manager, request)


def has_entry(connection):
    """Return True if a connection has an entry."""
    return ROOT_KEY in connection.root()


def test_connection_that_is_open(db, manager):
    with open_connection(db, manager) as connection:
        add(manager)
        assert has_entry(connection)


def test_connection_that_has_joined(db, manager):
    with open_connection(db, manager) as first, open_connection(db, manager) as second:
        second.root()['a'] = 1
        add(manager)
        assert (has_entry(first), has_entry(second)) == (False, True)
        # The private attributes of the package transaction on which this depends.
        assert manager.get()._resources == [second]
        found = []
        manager.get()._synchronizers.map(found.append)
        assert found == [first, second]
        assert list_connections(manager) == [second, first]


@pytest.mark.parametrize('wrapped', [True, False])
def test_transaction_of_the_thread(db, wrapped):
    with open_connection(db, transaction.manager if wrapped else None) as connection:
        add(transaction.manager)
        assert has_entry(connection)
        transaction.abort()
        add(transaction.manager, SimpleNamespace(zodb=connection), connection='zodb')
        assert has_entry(connection)


def test_connection_to_the_past(db, manager):
    past = db.lastTransaction()
    with open_connection(db, manager, before=past), open_connection(db, manager) as current:
        add(manager)
        assert has_entry(current)


def test_no_connection(db, manager):
    with (
        open_connection(db, TransactionManager()),
        pytest.raises(ZMQOutboxError, match='No ZODB connection takes part.* open one with its'),
    ):
        add(manager)
    for request in (Request.blank('/'), SimpleNamespace(registry=SimpleNamespace())):
        with pytest.raises(ZMQOutboxError, match='include pyramid_zodbconn'):
            add(manager, request)


@pytest.fixture
def request_of(config):
    """Return a function that makes requests of an application with pyramid_zodbconn."""
    config.add_settings({'zodbconn.uri': 'memory://', 'zodbconn.uri.mail': 'memory://'})
    config.include('pyramid_zodbconn')
    requests = []

    def make(manager):
        request = Request.blank('/')
        request.registry = config.registry
        if manager is not None:
            request.tm = manager
        requests.append(request)
        return request

    yield make
    for request in requests:
        request._process_finished_callbacks()
    for db in [*config.registry._zodb_databases.values()]:
        db.close()


@pytest.mark.parametrize('name', [None, 'mail'])
def test_connection_of_pyramid_zodbconn(request_of, name):
    from pyramid_zodbconn import get_connection

    manager = TransactionManager(explicit=True)
    manager.begin()
    request = request_of(manager)
    add(manager, request, database=name)
    connection = get_connection(request)
    assert has_entry(connection) == (name is None)
    assert has_entry(get_connection(request, 'mail')) == (name == 'mail')
    assert list_connections(manager) != []


def test_pyramid_zodbconn_with_another_transaction(request_of, manager):
    with pytest.raises(ZMQOutboxError, match=r'does not take part .* which is request\.tm'):
        add(manager, request_of(None))


@pytest.mark.parametrize('option', ['zodb', lambda request: request.zodb])
def test_connection_of_a_request(db, manager, option):
    with open_connection(db, manager) as other, open_connection(db, manager) as connection:
        other.root()['a'] = 1
        add(manager, SimpleNamespace(zodb=connection), connection=option)
        assert has_entry(connection)
        assert not has_entry(other)
    with open_connection(db, TransactionManager()) as foreign:
        with pytest.raises(ZMQOutboxError, match='does not take part in the transaction'):
            add(manager, SimpleNamespace(zodb=foreign), connection=option)
        with pytest.raises(ZMQOutboxError, match='not a ZODB connection but DB: correct'):
            add(manager, SimpleNamespace(zodb=db), connection=option)


@pytest.mark.parametrize('request_', [None, Request.blank('/')])
def test_request_without_the_connection(manager, request_):
    with pytest.raises(ZMQOutboxError, match=r"'zodb' .* not a ZODB connection but NoneType"):
        add(manager, request_, connection='zodb')


def test_first_of_several_databases(multi, manager):
    with open_connection(multi['main'], manager) as main:
        mail = main.get_connection('mail')
        mail.root()['a'] = 1
        add(manager)
        assert (has_entry(main), has_entry(mail)) == (True, False)


def test_named_database(multi, manager):
    with open_connection(multi['main'], manager) as main:
        add(manager, database='mail')
        add(manager, SimpleNamespace(zodb=main), database='mail', connection='zodb')
        assert (has_entry(main), has_entry(main.get_connection('mail'))) == (False, True)
        with pytest.raises(ZMQOutboxError, match="'other' .* only 'mail', 'main': correct"):
            add(manager, database='other')


def test_databases_that_do_not_know_each_other(db, multi, manager):
    with (
        open_connection(db, manager) as first,
        open_connection(multi['main'], manager) as main,
    ):
        with pytest.raises(ZMQOutboxError, match=r"Several .*\('main', 'unnamed'\).* give "):
            add(manager)
        add(manager, db=multi['main'])
        assert (has_entry(first), has_entry(main)) == (False, True)
        add(manager, database='unnamed')
        assert has_entry(first)
    # The first one that has an entry has them all.
    storage = ZODBStorage('app')
    with open_connection(db, manager):
        add(manager, storage=storage)
    with open_connection(multi['main'], manager) as main, open_connection(db, manager) as last:
        add(manager, storage=storage)
        assert (has_entry(main), has_entry(last)) == (False, True)
