# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of applications."""

import pytest

from app.program import WebServer
from checks import TIMEOUT, wait_until


@pytest.fixture
def serve(run_program, tmp_path):
    """Start servers, `serve('pserve', '--reload')`; at the end kill those that still run."""

    def start(name, *args, **settings):
        settings.setdefault('address', f'ipc://{tmp_path}/zmq.sock')
        server = run_program(*args, factory=getattr(WebServer, name), **settings)
        server.wait_for_service()
        if name == 'gunicorn' and '--workers' in args:
            count = int(args[args.index('--workers') + 1])
            wait_until(lambda: len(server.workers()) == count, TIMEOUT)
        return server

    return start


# With an outbox


@pytest.fixture(params=['sqlite', 'postgresql', 'file', 'zeo'])
def database(request, tmp_path):
    """Return the settings of an application with a database."""
    from app import clips_sql  # here, because few tests need these
    from zodb_databases import run_zeo

    if request.param == 'file':
        yield {'app.clips': 'app.clips_zodb', 'zodbconn.uri': f'file://{tmp_path}/app.fs'}
    elif request.param == 'zeo':
        with run_zeo(tmp_path / 'app.fs') as path:
            yield {'app.clips': 'app.clips_zodb', 'zodbconn.uri': f'zeo://{path}'}
    else:
        url = f'sqlite:///{tmp_path}/app.sqlite'
        if request.param == 'postgresql':
            url = request.getfixturevalue('postgresql_url')
        clips_sql.make_tables(url)
        yield {'app.clips': 'app.clips_sql', 'app.url': url}


@pytest.fixture
def services(tmp_path):
    """Return the services of an application with an outbox, which do not run yet."""
    from outbox_applications import Services  # as above

    services = Services(tmp_path)
    yield services
    services.stop()


@pytest.fixture
def make_application(services, database):
    """Make applications with the database; close what they have opened at the end."""
    from outbox_applications import ApplicationFactory  # as above

    with ApplicationFactory({**database, **services.settings}) as make:
        yield make
