# SPDX-License-Identifier: ZPL-2.1
"""The table of the outbox, what its rows mean, and the errors of the database about it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)
from sqlalchemy.exc import StatementError

from pyams_zmq.exceptions import ZMQOutboxError
from pyams_zmq.outbox.storage import MAX_REASON, Entry, Refusal

TABLE = 'pyams_zmq_outbox'
"""The name of the table"""

MAX_APPLICATION = 200
"""Characters of the name of an application in the table"""

_UNDEFINED_TABLE = '42P01'  # of PostgreSQL
_ID = re.compile('[1-9][0-9]{0,17}')  # one digit less than the largest BIGINT
_MAX_INTEGER = 2**31 - 1


def outbox_table(metadata: MetaData, name: str = TABLE) -> Table:
    """Define the table of the outbox in the metadata of the application, so that it is created.

    Call it where the models are defined; Alembic finds the table then, as any other one. A second
    call returns the same table.

    :param metadata: `Base.metadata` of the application, for instance
    :param name: name of the table
    :raises TypeError: if it is not a MetaData
    """
    if not isinstance(metadata, MetaData):
        raise TypeError(f'{metadata!r} is not a MetaData of SQLAlchemy: write Base.metadata')
    key = name if metadata.schema is None else f'{metadata.schema}.{name}'
    if key in metadata.tables:
        return metadata.tables[key]
    return Table(
        name,
        metadata,
        Column(
            'n',
            BigInteger().with_variant(Integer, 'sqlite'),
            primary_key=True,
            autoincrement=True,
        ),
        Column('application', String(MAX_APPLICATION), nullable=False),
        Column('owner', String(100), nullable=False),
        Column('service', Text, nullable=False),
        Column('type', Text, nullable=False),
        Column('is_job', Boolean, nullable=False),
        Column('data', LargeBinary, nullable=False),
        Column('frames', LargeBinary),
        Column('created', Float, nullable=False),
        Column('renewals', Integer, nullable=False, default=0),
        Column('status', Integer),  # of a dead letter
        Column('reason', Text),
        # A key is not used again for a later row, which a reader that is past it would not see.
        sqlite_autoincrement=True,
    )


def encode_entry(entry: Entry) -> dict[str, Any]:
    """Return the columns of an entry."""
    return {
        'service': entry.service,
        'type': entry.type,
        'is_job': entry.is_job,
        'data': entry.data,
        'frames': msgspec.msgpack.encode(entry.frames) if entry.frames else None,
    }


def decode_entry(row: Any) -> Entry:
    """Return the entry of a row."""
    frames = msgspec.msgpack.decode(row.frames, type=tuple[bytes, ...]) if row.frames else ()
    return Entry(row.service, row.type, row.data, frames, row.is_job)


def encode_refusal(refusal: Refusal) -> dict[str, Any]:
    """Return the columns of a dead letter; a service may send what a column cannot have."""
    reason = refusal.reason[:MAX_REASON].replace('\0', '\N{REPLACEMENT CHARACTER}')
    return {
        'status': max(-_MAX_INTEGER, min(refusal.status, _MAX_INTEGER)),
        'reason': reason.encode('utf-8', 'replace').decode(),  # without lone surrogates
    }


def parse_id(text: str) -> int | None:
    """Return the key in the id of a dead letter; None if it is not one."""
    return int(text) if _ID.fullmatch(text) else None


@contextmanager
def translate_errors(table: Table) -> Iterator[None]:
    """Raise a ZMQOutboxError if the table does not exist.

    Any other error of the database remains the same object, because some let a request be tried
    again; only its text does not show the parameters, which are the content of messages.
    """
    try:
        yield
    except StatementError as error:
        error.hide_parameters = True
        if _is_about_missing_table(error.orig):
            raise ZMQOutboxError(
                f'The database has no table {table.fullname!r}: create it with a migration, or '
                'with metadata.create_all(engine)'
            ) from error
        raise


def _is_about_missing_table(error: BaseException | None) -> bool:
    return getattr(error, 'sqlstate', None) == _UNDEFINED_TABLE or ('no such table: ' in str(error))
