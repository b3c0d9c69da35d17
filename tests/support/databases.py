# SPDX-License-Identifier: ZPL-2.1
"""An application with a database, whose transactions fill an outbox."""

from contextlib import contextmanager

import zope.sqlalchemy
from pyramid.testing import DummyRequest
from sqlalchemy import Column, Integer, MetaData, Table, Text, create_engine, event
from sqlalchemy.orm import Session
from transaction import TransactionManager

from pyams_zmq.outbox.sqlalchemy import SQLAlchemyStorage, outbox_table
from pyams_zmq.outbox.storage import Entry

ENTRY = Entry('converter', 'convert', b'["convert", 1]')


@contextmanager
def begun_manager():
    """Return a transaction manager, whose transaction is committed at the end of the block."""
    manager = TransactionManager()
    with manager:
        yield manager


class Application:
    """An application with a table of its own, `notes`, and an outbox.

    :param options: arguments of `create_engine`
    """

    def __init__(self, url, name='app', **options):
        self.engine = create_engine(url, **options)
        self.metadata = MetaData()
        self.notes = Table(
            'notes', self.metadata, Column('n', Integer, primary_key=True), Column('text', Text)
        )
        outbox_table(self.metadata)
        self.metadata.create_all(self.engine)
        self.storages = []
        self.storage = self.make_storage(name, engine=self.engine)

    def make_storage(self, name='app', **options):
        """Make a storage in the database of this application."""
        self.storages.append(SQLAlchemyStorage(name, metadata=self.metadata, **options))
        return self.storages[-1]

    @contextmanager
    def request(self, **options):
        """Make a request with a transaction and a session in it, as pyramid_tm does.

        :param options: arguments of `zope.sqlalchemy.register`
        """
        with Session(self.engine) as session, begun_manager() as manager:
            request = DummyRequest(tm=manager, dbsession=session)
            zope.sqlalchemy.register(session, transaction_manager=manager, **options)
            yield request

    def add(self, *entries, owner='owner', storage=None):
        """Add entries in one transaction; return their keys."""
        storage = storage or self.storage
        with self.request() as request:
            return [storage.add(entry, owner, request.tm, request) for entry in entries]

    def bury(self, *entries, refusal, storage=None):
        """Add entries and make dead letters of them; return their ids."""
        keys = self.add(*entries, storage=storage)
        (storage or self.storage).settle([], [(key, refusal) for key in keys])
        return list(map(str, keys))

    def keys(self, owner='owner', storage=None):
        """Return the keys of the entries of an owner for one service."""
        return [each.key for each in (storage or self.storage).read(owner, 'converter', None, 99)]

    def close(self):
        """Close all connections."""
        for storage in self.storages:
            storage.close()
        self.engine.dispose()


def begin_explicitly(engine):
    """Let an engine with sqlite begin transactions with BEGIN, as SQLAlchemy documents it."""

    @event.listens_for(engine, 'connect')
    def connect(connection, record):
        connection.isolation_level = None

    @event.listens_for(engine, 'begin')
    def begin(connection):
        connection.exec_driver_sql('BEGIN')
