# SPDX-License-Identifier: ZPL-2.1
"""The outbox in a table of a database that the application uses with SQLAlchemy."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

try:
    import sqlalchemy as sql

    from pyams_zmq.outbox.sql_connection import BackgroundConnection
    from pyams_zmq.outbox.sql_session import (
        SessionSource,
        find_session,
        join_transaction,
    )
    from pyams_zmq.outbox.sql_table import (
        MAX_APPLICATION,
        decode_entry,
        encode_entry,
        encode_refusal,
        outbox_table,
        parse_id,
        translate_errors,
    )
except ImportError as error:
    raise ImportError(
        f'The outbox in a database needs SQLAlchemy ({error}): install pyams_zmq[sqlalchemy]',
        name=error.name,
    ) from error

from pyams_zmq.exceptions import ZMQOutboxError
from pyams_zmq.outbox.storage import DeadLetter, Entry, Refusal, StoredEntry, Waiting
from pyams_zmq.wire.clock import time

__all__ = ['outbox_table']

_CHUNK = 500  # keys in a statement: databases limit its parameters


class SQLAlchemyStorage:
    """Entries in a table beside those of the application; see :class:`~.storage.Storage`.

    The session of the application inserts entries, with one statement each. All else uses a
    connection of its own, which is not in the pool of the engine. In a process that was forked
    after the application has used its engine, call `engine.dispose(close=False)` first, as
    SQLAlchemy requires for any use.

    PostgreSQL (psycopg 3) and files of sqlite are tested. With sqlite, a transaction that reads and
    writes then fails at once ("database is locked") if another one writes meanwhile, as the outbox
    does; it has that problem only if the application begins it with BEGIN. In a test with 20
    commits of the outbox a second, and a process that spent a third of the time between such a read
    and the write, one transaction failed in seven of these commits, and in three with a write-ahead
    log. None failed without BEGIN, which is the default of sqlite3, and with BEGIN IMMEDIATE.

    :param application: its name, which separates its entries from those of others; of a name with
        more than 200 characters, the SHA-256 is used
    :param metadata: the metadata with the table, see `outbox_table`
    :param engine: engine for the background, or a function that returns it; by default, or if that
        returns None, the one of the last session in `add`
    :param session: where the session of a request is: the name of its attribute, a function of the
        request, or the session itself
    """

    # PostgreSQL sends binary data as text, twice as large, and at most 1 GiB in a row.
    max_size: int | None = 2**28

    def __init__(
        self,
        application: str,
        *,
        metadata: sql.MetaData | None = None,
        engine: sql.Engine | Callable[[], sql.Engine | None] | None = None,
        session: SessionSource = 'dbsession',
    ):
        if len(application) > MAX_APPLICATION:
            application = hashlib.sha256(application.encode()).hexdigest()
        self.application = application
        self.table = outbox_table(sql.MetaData() if metadata is None else metadata)
        self._engine = engine
        self._seen_engine: sql.Engine | None = None
        self._session = session
        self._connection = BackgroundConnection(self._find_engine)
        columns = self.table.c
        self._insert = sql.insert(self.table)
        self._is_own = columns.application == application
        self._is_waiting = sql.and_(self._is_own, columns.status.is_(None))
        self._is_dead = sql.and_(self._is_own, columns.status.is_not(None))

    def add(self, entry: Entry, owner: str, manager: Any, request: Any) -> int:
        """Add an entry in the current transaction of a transaction manager; return its key.

        :raises ZMQOutboxError: if the request has no session, if that is not registered with
            zope.sqlalchemy for this transaction manager, or if the table does not exist
        """
        session = find_session(self._session, request)
        connection = join_transaction(session, manager, self.table)
        self._seen_engine = connection.engine
        row = {
            **encode_entry(entry),
            'application': self.application,
            'owner': owner,
            'created': time(),
        }
        with translate_errors(self.table):
            inserted: Any = connection.execute(self._insert, row).inserted_primary_key
        key: int = inserted.n
        return key

    def read_waiting(self) -> list[Waiting]:
        """Return how many entries wait, by owner and service."""
        columns = self.table.c
        query = (
            sql.select(
                columns.owner,
                columns.service,
                sql.func.count(),
                sql.func.min(columns.created),
                sql.func.max(columns.renewals),
            )
            .where(self._is_waiting)
            .group_by(columns.owner, columns.service)
        )
        with self._begin() as connection:
            return [Waiting(*row) for row in connection.execute(query)]

    def read(self, owner: str, service: str, after: int | None, limit: int) -> list[StoredEntry]:
        """Return entries of an owner that wait, ordered by their keys."""
        columns = self.table.c
        query = (
            sql.select(self.table)
            .where(self._is_waiting, columns.owner == owner, columns.service == service)
            .order_by(columns.n)
            .limit(limit)
        )
        if after is not None:
            query = query.where(columns.n > after)
        with self._begin() as connection:
            return [StoredEntry(row.n, decode_entry(row)) for row in connection.execute(query)]

    def settle(self, sent: Sequence[int], refused: Sequence[tuple[int, Refusal]]) -> None:
        """Drop entries that were sent, and make dead letters of others; ignore unknown keys."""
        key = self.table.c.n
        if not sent and not refused:
            return
        with self._begin(is_writing=True) as connection:
            for keys in _chunks(sent):
                connection.execute(sql.delete(self.table).where(self._is_own, key.in_(keys)))
            if refused:
                connection.execute(
                    sql.update(self.table).where(self._is_waiting, key == sql.bindparam('key')),
                    [{'key': number, **encode_refusal(refusal)} for number, refusal in refused],
                )

    def adopt(self, owner: str, heir: str) -> bool:
        """Give all entries of an owner to another one, in their order.

        The lock of the oldest one decides between two processes that try it. Without `SKIP LOCKED`
        the other one would wait; a query for the first row that is not locked would give it the
        second one.
        """
        columns = self.table.c
        is_of_owner = sql.and_(self._is_waiting, columns.owner == owner)
        oldest = sql.select(sql.func.min(columns.n)).where(is_of_owner).correlate(None)
        lock = (
            sql.select(columns.n)
            .where(is_of_owner, columns.n == oldest.scalar_subquery())
            .with_for_update(skip_locked=True)
        )
        with self._begin(is_writing=True) as connection:
            if connection.execute(lock).first() is None:
                return False
            connection.execute(sql.update(self.table).where(is_of_owner).values(owner=heir))
            return True

    def renew(self, owner: str) -> None:
        """Count one more renewal of the entries of an owner: in the oldest one for each service."""
        columns = self.table.c
        is_of_owner = sql.and_(self._is_waiting, columns.owner == owner)
        oldest = (
            sql.select(sql.func.min(columns.n))
            .where(is_of_owner)
            .group_by(columns.service)
            .correlate(None)
        )
        statement = (
            sql.update(self.table)
            .where(is_of_owner, columns.n.in_(oldest))
            .values(renewals=columns.renewals + 1)
        )
        with self._begin(is_writing=True) as connection:
            connection.execute(statement)

    def read_dead(self, limit: int, after: str | None = None) -> list[DeadLetter]:
        """Return dead letters, the oldest first."""
        columns = self.table.c
        query = sql.select(self.table).where(self._is_dead).order_by(columns.n).limit(limit)
        number = None if after is None else parse_id(after)
        if number is not None:
            query = query.where(columns.n > number)
        with self._begin() as connection:
            return [
                DeadLetter(str(row.n), decode_entry(row), row.status, row.reason, row.created)
                for row in connection.execute(query)
            ]

    def count_dead(self) -> dict[str, int]:
        """Return how many dead letters there are, by service."""
        service = self.table.c.service
        query = sql.select(service, sql.func.count()).where(self._is_dead).group_by(service)
        with self._begin() as connection:
            return {row[0]: row[1] for row in connection.execute(query)}

    def retry(self, ids: Sequence[str]) -> int:
        """Let dead letters be sent again, without an owner; return how many there were."""
        statement = sql.update(self.table).values(status=None, reason=None, owner='')
        return self._change_dead(statement, ids)

    def drop(self, ids: Sequence[str]) -> int:
        """Drop dead letters; return how many there were."""
        return self._change_dead(sql.delete(self.table), ids)

    def read_others(self) -> dict[str, int]:
        """Return how many entries other applications have in the same table, by their name."""
        columns = self.table.c
        query = (
            sql.select(columns.application, sql.func.count().label('number'))
            .where(sql.not_(self._is_own), columns.status.is_(None))
            .group_by(columns.application)
        )
        with self._begin() as connection:
            return {row.application: row.number for row in connection.execute(query)}

    def close(self) -> None:
        """Close the connection of the background; the next use opens it again."""
        self._connection.close()

    def _change_dead(self, statement: sql.Update | sql.Delete, ids: Sequence[str]) -> int:
        numbers = [number for text in ids if (number := parse_id(text)) is not None]
        if not numbers:
            return 0
        with self._begin(is_writing=True) as connection:
            return sum(
                connection.execute(
                    statement.where(self._is_dead, self.table.c.n.in_(keys))
                ).rowcount
                for keys in _chunks(numbers)
            )

    @contextmanager
    def _begin(self, *, is_writing: bool = False) -> Iterator[sql.Connection]:
        with translate_errors(self.table), self._connection.begin(is_writing=is_writing) as it:
            yield it

    def _find_engine(self) -> sql.Engine:
        engine = self._engine() if callable(self._engine) else self._engine
        engine = engine or self._seen_engine
        if engine is None:
            raise ZMQOutboxError(
                'The outbox does not know its database before the first message of this process: '
                "set registry['dbsession_factory'], or give config.set_zmq_outbox an engine"
            )
        return engine


def _chunks(keys: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(keys), _CHUNK):
        yield keys[start : start + _CHUNK]


def find_engine(make_session: Callable[[], Any] | None, table: sql.Table) -> sql.Engine | None:
    """Return the engine that sessions have for a table; None if they are bound later.

    :param make_session: makes a session, None if the application has registered no such function
    """
    if make_session is None:
        return None
    session = make_session()
    try:
        engine: sql.Engine = session.get_bind(clause=table).engine
        return engine
    except sql.exc.UnboundExecutionError:
        return None
    finally:
        session.close()
