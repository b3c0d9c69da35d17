# SPDX-License-Identifier: ZPL-2.1
"""The connection with which a background thread uses the database of the application."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

from sqlalchemy import Connection, Engine
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from pyams_zmq.exceptions import ZMQOutboxError
from pyams_zmq.wire.fork import ForkLocal

# Milliseconds that sqlite waits before it reads or begins to write, while another connection
# commits: on a disk whose fsync takes 20 ms, that takes 60 ms and more.
_BEGIN_TIMEOUT = 1000

# Milliseconds that a commit of sqlite waits for readers. It keeps new ones out meanwhile, so that
# it gets its turn. Measured with a rollback journal, 20 commits a second, and three processes that
# each read for a third of the time, in transactions begun with BEGIN: 21 % of the commits succeeded
# without a wait, all with it.
_COMMIT_TIMEOUT = 50

_LEGACY_TRANSACTION_CONTROL = -1  # a name of sqlite3 since Python 3.12


class BackgroundConnection:
    """A connection that is not in the pool of its engine, opened by its first use.

    An error closes it, so that the next use opens another one. A forked process opens its own, and
    leaves that of its parent alone.

    A file of sqlite has one lock for all that write. It is held here for the milliseconds of one
    transaction. While a transaction waits to begin, for a second at most, it has no lock; a commit
    waits for readers for 50 ms at most, then it is rolled back, and its error raised.

    :param find_engine: returns the engine
    """

    def __init__(self, find_engine: Callable[[], Engine]):
        self._find_engine = find_engine
        self._slot = ForkLocal(_Slot)

    @contextmanager
    def begin(self, *, is_writing: bool = False) -> Iterator[Connection]:
        """Return the connection for a transaction, which is committed at the end of the block.

        :param is_writing: true if rows may be changed
        """
        slot = self._slot.get()
        with slot.lock:
            try:
                if slot.connection is None:
                    slot.connection = _open(self._find_engine())
                with slot.connection.begin():
                    _begin_sqlite(slot.connection, is_writing=is_writing)
                    yield slot.connection
            except BaseException:
                slot.close()
                raise

    def close(self) -> None:
        """Close the connection of this process, after the transaction that uses it."""
        slot = self._slot.get()
        with slot.lock:
            slot.close()


class _Slot:
    """The connection of a process.

    :ivar lock: held by the thread that uses it
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.connection: Connection | None = None

    def close(self) -> None:
        """Close the connection, if it is open."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()


def _open(engine: Engine) -> Connection:
    if isinstance(engine.pool, SingletonThreadPool | StaticPool):
        raise ZMQOutboxError(
            f'The outbox needs a second connection to the database, which a {engine.pool!r} of '
            'SQLAlchemy does not have: use a file instead of a database in the memory'
        )
    connection = engine.connect()
    try:
        connection.detach()
        driver: Any = connection.connection.dbapi_connection
        if _is_sqlite(driver):
            # No BEGIN but our own, also if the application has set something else for its pool.
            with suppress(AttributeError):  # before Python 3.12
                driver.autocommit = _LEGACY_TRANSACTION_CONTROL
            driver.isolation_level = None
        else:
            connection.dialect.set_isolation_level(driver, 'READ COMMITTED')
    except BaseException:
        connection.close()
        raise
    return connection


def _begin_sqlite(connection: Connection, *, is_writing: bool) -> None:
    """Let sqlite wait for others; begin its transaction with the lock for writing if needed.

    Without this lock, a transaction that reads first and writes then fails if another one has
    written meanwhile.
    """
    driver: Any = connection.connection.dbapi_connection
    if not _is_sqlite(driver):
        return
    driver.execute(f'PRAGMA busy_timeout = {_BEGIN_TIMEOUT}').close()
    if is_writing:
        driver.rollback()  # handlers of the event "begin" may have begun a transaction
        connection.exec_driver_sql('BEGIN IMMEDIATE')
        driver.execute(f'PRAGMA busy_timeout = {_COMMIT_TIMEOUT}').close()


def _is_sqlite(driver: Any) -> bool:
    return isinstance(driver, sqlite3.Connection)
