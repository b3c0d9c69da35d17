# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of the outbox: real databases, of sqlite and of PostgreSQL."""

import pytest

from databases import Application


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
