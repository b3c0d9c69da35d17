# SPDX-License-Identifier: ZPL-2.1
"""The table of the outbox belongs to the application, whose migrations create it."""

import subprocess
import sys

import alembic.operations
import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata, produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import MetaData, inspect
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from databases import ENTRY
from pyams_zmq.outbox.sqlalchemy import SQLAlchemyStorage, outbox_table

OPTIONS = {'compare_type': True, 'compare_server_default': True}

WITHOUT = """
import sys
sys.modules[{name!r}] = None
try:
    import pyams_zmq.outbox.sqlalchemy
except ImportError as error:
    print(error.name, error)
"""


def test_table_is_defined_once():
    metadata = MetaData()
    table = outbox_table(metadata)
    assert table.name == 'pyams_zmq_outbox'
    assert outbox_table(metadata) is table
    assert outbox_table(metadata, 'other') is not table
    assert sorted(metadata.tables) == ['other', 'pyams_zmq_outbox']
    assert SQLAlchemyStorage('app', metadata=metadata).table is table
    assert SQLAlchemyStorage('app').table is not table


def test_table_of_something_else():
    with pytest.raises(TypeError) as caught:
        outbox_table(object)
    assert str(caught.value) == (
        "<class 'object'> is not a MetaData of SQLAlchemy: write Base.metadata"
    )


def test_table_in_a_schema():
    metadata = MetaData(schema='app')
    table = outbox_table(metadata)
    assert outbox_table(metadata) is table
    assert [*metadata.tables] == ['app.pyams_zmq_outbox']


@pytest.mark.parametrize(
    ('dialect', 'key'),
    [
        (sqlite.dialect(), 'n INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT'),
        (postgresql.dialect(), 'n BIGSERIAL NOT NULL'),
    ],
    ids=['sqlite', 'postgresql'],
)
def test_key(dialect, key):
    assert key in str(CreateTable(outbox_table(MetaData())).compile(dialect=dialect))


def test_table_that_exists_is_not_migrated(application):
    with application.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=OPTIONS)
        assert compare_metadata(context, application.metadata) == []
    assert inspect(application.engine).get_indexes('pyams_zmq_outbox') == []


def test_migration_creates_the_table(application):
    application.storage.table.drop(application.engine)
    with application.engine.begin() as connection:
        context = MigrationContext.configure(connection, opts=OPTIONS)
        script = produce_migrations(context, application.metadata)
        [operation] = script.upgrade_ops.ops
        assert operation.table_name == 'pyams_zmq_outbox'
        code = render_python_code(script.upgrade_ops)
        operations = alembic.operations.Operations(context)
        exec(f'if True:\n{code}', {'op': operations, 'sa': sqlalchemy})
    with application.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=OPTIONS)
        assert compare_metadata(context, application.metadata) == []
    [first] = application.add(ENTRY)
    application.storage.settle([first], [])
    [second] = application.add(ENTRY)
    assert second > first


@pytest.mark.parametrize('name', ['sqlalchemy', 'zope.sqlalchemy'])
def test_without_sqlalchemy(name):
    output = subprocess.check_output(
        [sys.executable, '-W', 'ignore', '-c', WITHOUT.format(name=name)], text=True
    )
    missing, _, text = output.partition(' ')
    assert missing == name
    assert 'SQLAlchemy' in text
    assert 'install pyams_zmq[sqlalchemy]' in text
