# SPDX-License-Identifier: ZPL-2.1
"""The clips of an application in a table, and its sessions as in Pyramid's cookiecutter."""

import sqlalchemy as sql
import zope.sqlalchemy
from sqlalchemy.orm import sessionmaker

from pyams_zmq.outbox.sqlalchemy import outbox_table

metadata = sql.MetaData()
clips = sql.Table('clips', metadata, sql.Column('name', sql.Text, primary_key=True))
counters = sql.Table(
    'counters',
    metadata,
    sql.Column('name', sql.Text, primary_key=True),
    sql.Column('value', sql.Integer, nullable=False),
)
outbox_table(metadata)


def make_tables(url):
    """Make the tables of the application."""
    engine = sql.create_engine(url)
    metadata.create_all(engine)
    engine.dispose()


def make_session(request):
    """Return a session that takes part in the transaction of a request."""
    session = request.registry['dbsession_factory']()
    zope.sqlalchemy.register(session, transaction_manager=request.tm)
    return session


def make_raw_session(request):
    """Return a session that does not."""
    session = request.registry['dbsession_factory']()
    request.add_finished_callback(lambda request: session.close())
    return session


def add_clip(request, name):
    """Add a clip in the transaction of a request."""
    _execute(request, clips.insert().values(name=name))


def make_counters(registry, names):
    """Make counters, each a row of its own."""
    with registry.engine.begin() as connection:
        connection.execute(counters.insert(), [{'name': name, 'value': 0} for name in names])


def count(request, name):
    """Raise a counter in the transaction of a request."""
    statement = counters.update().where(counters.c.name == name)
    _execute(request, statement.values(value=counters.c.value + 1))


def read_counters(registry):
    """Return the values of the counters that are committed."""
    with registry.engine.connect() as connection:
        return {row.name: row.value for row in connection.execute(sql.select(counters))}


def _execute(request, statement):
    session = getattr(request, request.registry.settings.get('app.session', 'dbsession'))
    session.execute(statement)
    zope.sqlalchemy.mark_changed(session, transaction_manager=request.tm)


def read_clips(registry):
    """Return the names of the clips that are committed."""
    with registry.engine.connect() as connection:
        return sorted(connection.execute(sql.select(clips.c.name)).scalars())


def close(registry):
    """Close all connections."""
    registry.engine.dispose()


def includeme(config):
    """Let an application have clips, in the session `app.session` of a request."""
    engine = config.registry.engine = sql.create_engine(config.registry.settings['app.url'])
    config.registry['dbsession_factory'] = sessionmaker(engine)
    name = config.registry.settings.get('app.session', 'dbsession')
    config.add_request_method(make_session, name, reify=True)
    config.add_request_method(make_raw_session, 'raw', reify=True)
    config.add_request_method(add_clip)
    config.add_request_method(count)
    config.set_zmq_outbox('sqlalchemy', metadata=metadata)
