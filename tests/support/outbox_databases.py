# SPDX-License-Identifier: ZPL-2.1
"""The databases with an outbox, and an application of one table or tree in each."""

from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import transaction

from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.process.name_lock import NameLock
from zodb_databases import open_file, open_zeo

APPLICATION = 'application under test'
"""Name of the application in each database"""


def make_outbox(url, storage, find_client):
    """Return the outbox of a database; those of other tests run at the same time."""
    return Outbox(storage, find_client, _name_of(url))


def remove_lock(url):
    """Remove the file of the lock for the outbox of a database that is not used any more."""
    Path(NameLock(f'outbox of {_name_of(url)}').path).unlink(missing_ok=True)


def _name_of(url):
    return f'{APPLICATION} {url}'


class SQLDatabase:
    """A database with the table of an application, and its outbox.

    :param url: URL of SQLAlchemy
    """

    def __init__(self, url):
        # Imported here: a program with a ZODB starts sooner without it.
        import sqlalchemy as sql
        import zope.sqlalchemy
        from sqlalchemy.orm import sessionmaker

        from pyams_zmq.outbox.sqlalchemy import SQLAlchemyStorage

        self._sql = sql
        metadata = sql.MetaData()
        self._clips = sql.Table('clips', metadata, sql.Column('name', sql.Text, primary_key=True))
        self.engine = sql.create_engine(url)
        self._make_session = sessionmaker(self.engine)
        self._register = zope.sqlalchemy.register
        self._mark_changed = zope.sqlalchemy.mark_changed
        self.storage = SQLAlchemyStorage(APPLICATION, metadata=metadata, engine=self.engine)
        metadata.create_all(self.engine)

    def make_request(self, manager):
        """Return a request with a session of a transaction manager."""
        session = self._make_session()
        self._register(session, transaction_manager=manager)
        return SimpleNamespace(dbsession=session, tm=manager)

    def add(self, request, name):
        """Add a clip in the transaction of a request."""
        request.dbsession.execute(self._clips.insert().values(name=name))
        self._mark_changed(request.dbsession, transaction_manager=request.tm)

    def names(self):
        """Return the names of all clips that are committed."""
        with self.engine.connect() as connection:
            return set(connection.execute(self._sql.select(self._clips.c.name)).scalars())

    def close(self):
        """Close all connections."""
        self.storage.close()
        self.engine.dispose()


class ObjectDatabase:
    """A ZODB with a tree of an application for each process, and its outbox.

    :param db: the database
    :param process: name of the process
    """

    def __init__(self, db, process):
        from pyams_zmq.outbox.zodb import ZODBStorage

        self._db = db
        self._process = process
        self.storage = ZODBStorage(APPLICATION, db=db)
        self._connection = None

    def make_request(self, manager):
        """Return a request with a connection of a transaction manager."""
        if self._connection is None:
            self._connection = self._db.open(transaction_manager=manager)
        return SimpleNamespace(connection=self._connection, tm=manager)

    def add(self, request, name):
        """Add a clip in the transaction of a request."""
        from BTrees.OOBTree import OOBTree

        root = request.connection.root()
        if self._process not in root:
            root[self._process] = OOBTree()
        root[self._process][name] = None

    def names(self):
        """Return the names of all clips that are committed."""
        manager = transaction.TransactionManager()
        with closing(self._db.open(transaction_manager=manager)) as connection:
            trees = connection.root().items()
            found = {name for key, tree in trees if key.startswith('web') for name in tree}
            manager.abort()
            return found

    def close(self):
        """Close the connection."""
        self.storage.close()
        if self._connection is not None:
            self._connection.transaction_manager.abort()
            self._connection.close()


@contextmanager
def open_database(url, process):
    """Open a database.

    :param url: URL of SQLAlchemy, `zeo:PATH` with the socket of a ZEO server, or `file:PATH`
    :param process: name of the process
    """
    kind, _, path = url.partition(':')
    if kind in ('zeo', 'file'):
        open_storage = open_zeo if kind == 'zeo' else open_file
        with open_storage(path) as db, closing(ObjectDatabase(db, process)) as database:
            yield database
    else:
        with closing(SQLDatabase(url)) as database:
            yield database
