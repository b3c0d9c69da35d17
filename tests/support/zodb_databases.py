# SPDX-License-Identifier: ZPL-2.1
"""ZODB databases: a FileStorage of one process, and ZEO servers in a process of their own."""

import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path

from ZEO.ClientStorage import ClientStorage
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from checks import TIMEOUT, wait_until

# The server has not the package: it may run elsewhere.
_SERVER = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'pyams_zmq':
            raise ImportError(name)

sys.meta_path.insert(0, Finder())

from ZEO.runzeo import main

main(sys.argv[1:])
"""


@contextmanager
def open_file(path, **options):
    """Open a FileStorage; a file has one process at a time.

    :param path: path of the file
    :param options: those of `ZODB.DB`
    """
    with closing(DB(FileStorage(str(path)), pool_size=20, **options)) as db:
        yield db


@contextmanager
def run_zeo(path):
    """Run a ZEO server; yield its address, which stays the same when it is run again.

    :param path: path of its FileStorage, at most 100 bytes; the log is beside it
    """
    address = Path(f'{path}.sock')
    address.unlink(missing_ok=True)  # that of a killed server
    command = [sys.executable, '-c', _SERVER, '-a', address, '-f', path]
    with (
        open(f'{path}.log', 'ab') as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log) as server,
    ):
        try:
            wait_until(lambda: address.exists() or server.poll() is not None)
            assert server.poll() is None, Path(log.name).read_text()
            yield str(address)
        finally:
            # A SIGTERM may have no effect: the exception that the handler of ZEO raises is lost in
            # a destructor, and in callbacks of uvloop.
            server.kill()


@contextmanager
def open_zeo(address, **options):
    """Open the database of a ZEO server.

    :param address: the result of `run_zeo`
    :param options: those of `ZODB.DB`
    """
    with closing(DB(ClientStorage(address, wait_timeout=TIMEOUT), pool_size=20, **options)) as db:
        yield db
