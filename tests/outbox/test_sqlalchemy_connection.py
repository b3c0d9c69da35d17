# SPDX-License-Identifier: ZPL-2.1
"""The connection of the background: it is not in the pool, not shared, and hinders few others."""

import gc
import sqlite3
import time
from multiprocessing.context import ForkProcess
from threading import Thread, Timer

import pytest
from sqlalchemy import create_engine, event, insert, select, text
from sqlalchemy.exc import OperationalError

from checks import AT_ONCE, TIMEOUT
from databases import ENTRY, begin_explicitly
from pyams_zmq.outbox.storage import Refusal


def backend_of(storage):
    """Return the process id of the server of PostgreSQL for the connection of a storage."""
    with storage._connection.begin() as connection:
        return connection.scalar(text('SELECT pg_backend_pid()'))


def test_pool_is_not_used(url, make_application):
    application = make_application(url, pool_size=1, max_overflow=0, pool_timeout=AT_ONCE)
    keys = application.add(ENTRY)
    assert application.keys() == keys
    with application.engine.connect():
        assert application.engine.pool.checkedout() == 1
        assert application.keys() == keys


@pytest.mark.parametrize('level', ['AUTOCOMMIT', 'SERIALIZABLE'])
def test_isolation_level_of_the_application(url, make_application, level):
    """Each method is one transaction, also in the engine of an application that has none."""

    def fail():
        with application.storage._begin(is_writing=True) as connection:
            connection.execute(application.storage.table.delete())
            raise RuntimeError('half')

    application = make_application(url, isolation_level=level)
    keys = application.add(ENTRY, ENTRY)
    with pytest.raises(RuntimeError, match='half'):
        fail()
    assert application.keys() == keys
    application.storage.settle(keys, [])
    assert application.keys() == []


def test_close(application):
    [key] = application.add(ENTRY)
    application.storage.close()
    assert application.keys() == [key]
    application.storage.close()
    application.storage.close()
    application.storage.settle([key], [])
    assert application.keys() == []


def test_connection_that_cannot_be_set_up(application):
    """A handler of the application fails: the connection is closed, the next use opens another."""
    opened = []

    def fail(driver, _record):
        opened.append(driver)
        raise RuntimeError('handler')

    event.listen(application.engine, 'detach', fail)
    with pytest.raises(RuntimeError, match='handler'):
        application.keys()
    event.remove(application.engine, 'detach', fail)
    with pytest.raises(Exception, match='closed'):
        opened[0].execute('SELECT 1')
    assert application.keys() == []


def test_connection_is_lost(postgresql_application):
    application = postgresql_application
    application.add(ENTRY)
    backend = backend_of(application.storage)
    assert backend_of(application.storage) == backend
    with application.engine.connect() as connection:
        connection.execute(text(f'SELECT pg_terminate_backend({backend}, 9999)'))
    with pytest.raises(OperationalError, match='terminating connection'):
        application.keys()
    assert len(application.keys()) == 1
    assert backend_of(application.storage) != backend


def test_error_in_a_transaction_changes_nothing(application):
    keys = application.add(ENTRY, ENTRY)
    with pytest.raises(AttributeError):
        application.storage.settle(keys[:1], [(keys[1], None)])
    assert application.keys() == keys


class BrokenConnection(sqlite3.Connection):
    """A connection to a file that cannot be read."""

    closed = 0

    def execute(self, statement, *args):
        if 'busy_timeout' in statement:
            raise sqlite3.OperationalError('disk I/O error')
        return super().execute(statement, *args)

    def close(self):
        type(self).closed += 1
        super().close()


def test_error_while_it_is_opened(sqlite_application):
    url = sqlite_application.engine.url
    engine = create_engine(url, connect_args={'factory': BrokenConnection})
    storage = sqlite_application.make_storage(engine=engine)
    with pytest.raises(sqlite3.OperationalError, match='disk I/O error'):
        storage.read_waiting()
    assert BrokenConnection.closed == 1


# Forks and threads


def run_in_fork(function):
    child = ForkProcess(target=function)
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == 0


def test_fork(application):
    def check():
        application.engine.dispose(close=False)
        assert application.keys() == keys
        application.storage.close()
        application.add(ENTRY)
        gc.collect()

    keys = application.add(ENTRY)
    assert application.keys() == keys
    run_in_fork(check)
    assert len(application.keys()) == 2


def test_fork_has_a_connection_of_its_own(postgresql_application):
    application = postgresql_application

    def check():
        application.engine.dispose(close=False)
        application.storage.close()
        assert backend_of(application.storage) != backend

    backend = backend_of(application.storage)
    run_in_fork(check)
    assert backend_of(application.storage) == backend


def test_fork_while_a_thread_uses_the_connection(application):
    """The child does not wait for the lock of a thread that it does not have."""

    def check():
        application.engine.dispose(close=False)
        application.storage.close()
        assert application.keys() == keys

    keys = application.add(ENTRY)
    with application.storage._begin():
        run_in_fork(check)
    assert application.keys() == keys


def test_threads_take_turns(application):
    keys = application.add(*[ENTRY] * 40)
    shares = [keys[start::4] for start in range(4)]

    def settle(share):
        for key in share:
            application.storage.settle([key], [])

    threads = [Thread(target=settle, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert application.keys() == []


# Locks of sqlite


@pytest.fixture(params=['delete', 'wal'])
def sqlite_file(request, sqlite_application):
    """Return an application with sqlite, for each kind of journal."""
    with sqlite_application.engine.connect() as connection:
        connection.exec_driver_sql(f'PRAGMA journal_mode = {request.param}')
    return sqlite_application


def elapsed(function):
    start = time.monotonic()
    function()
    return time.monotonic() - start


def test_another_one_writes(sqlite_file):
    """The background does not wait long, and tries again."""
    application = sqlite_file
    [key] = application.add(ENTRY)

    def fail():
        with pytest.raises(OperationalError, match='database is locked'):
            application.storage.settle([], [(key, Refusal(500, 'secret'))])

    with application.engine.begin() as connection:
        connection.execute(insert(application.notes).values(text=''))
        assert elapsed(fail) < 4  # it waits for 1 s, and a connection of sqlite3 for 5
    application.storage.settle([key], [])
    assert application.keys() == []


def test_another_one_commits(sqlite_file):
    """On a slow disk that takes more than 50 ms: the background waits."""
    application = sqlite_file
    keys = application.add(ENTRY)
    path = application.engine.url.database
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    for use in (application.storage.read_waiting, lambda: application.storage.settle(keys, [])):
        other.execute('BEGIN EXCLUSIVE')
        timer = Timer(0.2, other.execute, ['COMMIT'])
        timer.start()
        use()
        timer.join()
    other.close()
    assert application.keys() == []


def test_commit_that_waits_for_a_reader_leaves_no_lock(sqlite_application):
    """The lock PENDING keeps readers out, until the transaction is rolled back."""
    application = sqlite_application
    keys = application.add(ENTRY)
    path = application.engine.url.database
    reader, later = (sqlite3.connect(path, timeout=0, isolation_level=None) for _ in range(2))
    reader.execute('BEGIN')
    reader.execute('SELECT * FROM notes').fetchall()
    with pytest.raises(OperationalError, match='database is locked'):
        application.storage.settle(keys, [])
    assert later.execute('SELECT * FROM notes').fetchall() == []
    reader.execute('INSERT INTO notes (text) VALUES (1)')  # it reads and writes
    reader.execute('COMMIT')
    reader.close()
    later.close()
    application.storage.settle(keys, [])
    assert application.keys() == []


def test_no_lock_between_transactions(sqlite_file):
    application = sqlite_file
    [key] = application.add(ENTRY)
    application.storage.adopt('unknown', 'heir')
    application.storage.settle([], [(key, Refusal(500, ''))])
    application.storage.read_dead(9)
    path = application.engine.url.database
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    other.execute('BEGIN EXCLUSIVE')
    other.execute('COMMIT')
    other.close()


def check_transactions(application):
    keys = application.add(ENTRY, ENTRY)
    application.storage.settle(keys[:1], [])
    assert application.storage.adopt('owner', 'heir')
    assert application.keys('heir') == keys[1:]
    with application.engine.connect() as connection:  # another one sees it
        table = application.storage.table
        assert connection.scalars(select(table.c.owner)).all() == ['heir']


def test_application_that_begins_explicitly(sqlite_file):
    begin_explicitly(sqlite_file.engine)
    sqlite_file.engine.dispose()
    check_transactions(sqlite_file)


@pytest.mark.skipif(
    not hasattr(sqlite3, 'LEGACY_TRANSACTION_CONTROL'), reason='an option since Python 3.12'
)
def test_application_without_autocommit(sqlite_url, make_application):
    check_transactions(make_application(sqlite_url, connect_args={'autocommit': False}))


def test_connection_of_the_application_is_not_changed(sqlite_application):
    application = sqlite_application
    application.add(ENTRY)
    application.keys()
    with application.engine.connect() as connection:
        assert connection.connection.dbapi_connection.isolation_level == ''
        assert connection.exec_driver_sql('PRAGMA busy_timeout').scalar() == 5000
