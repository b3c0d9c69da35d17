# SPDX-License-Identifier: ZPL-2.1
"""The tables of a journal, and how those of an older version become those of this one.

The row of a job is short, because each change of its state writes it again; the message, which may
have many MiB, is in a table of its own.
"""

import sqlite3
from collections.abc import Callable

from pyams_zmq.exceptions import ZMQJournalError

APPLICATION_ID = 0x7A6D716A
"""Number in the header of the file that tells a journal from other sqlite files: `zmqj`"""

_TABLES = (
    """
    create table job (
        number integer primary key autoincrement check (number < 1099511627776),
        id text not null,
        type text not null,
        user text not null,
        address text not null,
        key text,
        state text not null default 'waiting',
        attempt integer not null default 0,
        failures integer not null default 0,
        deaths integer not null default 0,
        priority integer not null,
        ready integer not null, -- 0 until the time is due
        due real,
        expires real,
        retries integer,
        timeout real,
        created real not null,
        started real,
        ended real,
        revision integer not null,
        cancel real,
        owner text,
        orphaned real,
        reply blob
    )
    """,
    'create table request (number integer primary key, frames blob not null)',
    # Seconds by which all times are ahead of the clock of the system.
    'create table clock (ahead real not null)',
    'insert into clock values(0.0)',
    # Ids of submissions whose key was that of a job: they are other names of it.
    'create table alias (row integer primary key, id text not null, number integer not null)',
    'create unique index alias_id on alias(id)',
    'create index alias_number on alias(number)',
    'create unique index job_id on job(id)',
    'create unique index job_key on job(type, user, key) where key is not null and ended is null',
    # An index ends with the number of the row, so that these are in the order of lists, too.
    'create index job_state on job(state, type)',
    'create index job_by_state on job(state)',
    'create index job_by_type on job(type)',
    # Few jobs are in these at a time, or change in them only once.
    """
    create index job_ready on job(type, priority desc, number)
        where state = 'waiting' and ready = 1
    """,
    "create index job_delayed on job(due) where state = 'waiting' and ready = 0",
    """
    create index job_expires on job(expires)
        where state = 'waiting' and expires is not null
    """,
    'create index job_ended on job(ended) where ended is not null',
)


def _create(db: sqlite3.Connection) -> None:
    for statement in _TABLES:
        db.execute(statement)
    db.execute(f'pragma application_id = {APPLICATION_ID}')


MIGRATIONS: list[Callable[[sqlite3.Connection], None]] = [_create]
"""Functions that make the tables of a version from those of the version before, from version 1 on;
each runs in a transaction, and must not end it"""


def check(db: sqlite3.Connection, path: str) -> bool:
    """Check that a file is a journal of a known version, or empty.

    :return: True if it is empty
    :raises ZMQJournalError: if it is not
    :raises sqlite3.Error: if it cannot be read
    """
    version = _version(db)
    if _pragma(db, 'application_id') != APPLICATION_ID:
        is_empty = not db.execute('select 1 from sqlite_master limit 1').fetchone()
        if version or not is_empty or _pragma(db, 'application_id'):
            raise ZMQJournalError(
                path, 'it is a file of another application: name a file that does not exist yet'
            )
        return True
    if version > len(MIGRATIONS):
        raise ZMQJournalError(
            path,
            f'its version {version} is newer than {len(MIGRATIONS)}, the last one that this '
            'pyams_zmq knows: upgrade pyams_zmq, or name another file',
        )
    return False


def migrate(db: sqlite3.Connection) -> None:
    """Make the tables of this version, in one transaction.

    :raises sqlite3.Error: if they cannot be written; the file is unchanged
    """
    version = _version(db)
    if version == len(MIGRATIONS):
        return
    db.execute('begin immediate')
    try:
        for step in MIGRATIONS[version:]:
            step(db)
        db.execute(f'pragma user_version = {len(MIGRATIONS)}')
        db.execute('commit')
    except BaseException:
        if db.in_transaction:
            db.execute('rollback')
        raise


def _version(db: sqlite3.Connection) -> int:
    return _pragma(db, 'user_version')


def _pragma(db: sqlite3.Connection, name: str) -> int:
    (value,) = db.execute(f'pragma {name}').fetchone()
    return int(value)
