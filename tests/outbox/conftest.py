# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of the outbox: real databases, of sqlite and of PostgreSQL."""

import logging

import pytest

from checks import TIMEOUT
from databases import Application
from outbox_sending import Sending, Service
from pyams_zmq.outbox import relay as relay_module
from pyams_zmq.outbox import sql_connection


@pytest.fixture
def sqlite_url(tmp_path):
    """Return the URL of a database file that does not exist."""
    # With the name of the driver, zope.sqlalchemy allows savepoints.
    return f'sqlite+pysqlite:///{tmp_path}/app.db'


@pytest.fixture(params=['sqlite', 'postgresql'])
def url(request):
    """Return the URL of an empty database, for each kind of database."""
    return request.getfixturevalue(f'{request.param}_url')


@pytest.fixture
def make_application():
    """Make applications; close what they have opened at the end."""
    made = []

    def make(*args, **kwargs):
        made.append(Application(*args, **kwargs))
        return made[-1]

    yield make
    for application in made:
        application.close()


@pytest.fixture
def application(url, make_application):
    """Return an application, for each kind of database."""
    return make_application(url)


@pytest.fixture
def sqlite_application(sqlite_url, make_application):
    """Return an application with sqlite."""
    return make_application(sqlite_url)


@pytest.fixture
def postgresql_application(postgresql_url, make_application):
    """Return an application with PostgreSQL."""
    return make_application(postgresql_url)


@pytest.fixture
def service(tmp_path):
    """Return a service that does not run yet."""
    return Service(tmp_path, 'messages')


@pytest.fixture
def make_sending(service):
    """Make applications with an outbox; close them at the end."""
    made = []

    def make(application, name=None, **addresses):
        addresses.setdefault('messages', service.address)
        made.append(Sending(application, addresses, name))
        return made[-1]

    yield make
    for sending in made:
        sending.close()


@pytest.fixture
def sending(sqlite_application, make_sending):
    """Return an application with an outbox in sqlite, whose service does not run yet."""
    return make_sending(sqlite_application)


@pytest.fixture
def any_sending(application, make_sending):
    """Return the same, for each kind of database."""
    return make_sending(application)


@pytest.fixture
def patient(monkeypatch):
    """Let the background wait for sqlite: on a busy machine others have its lock for some time."""
    for name in ('_BEGIN_TIMEOUT', '_COMMIT_TIMEOUT'):
        monkeypatch.setattr(sql_connection, name, 1000 * TIMEOUT)


@pytest.fixture
def quick_checks(monkeypatch):
    """Let relays look for entries often."""
    monkeypatch.setattr(relay_module, 'CHECK_INTERVAL', 0.1)


@pytest.fixture
def records(caplog):
    """Return a function that returns the records of the log: their level and text."""
    caplog.set_level(logging.DEBUG, 'PyAMS (zmq)')

    def read(level=logging.WARNING):
        return [
            (record.levelname, record.getMessage())
            for record in caplog.records
            if record.name == 'PyAMS (zmq)' and record.levelno >= level
        ]

    return read
