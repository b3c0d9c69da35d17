# SPDX-License-Identifier: ZPL-2.1
"""The locks by which one process of several has a name."""

import os
import shutil
import sys
from multiprocessing.context import ForkProcess

import pytest

from namespaces import mount, run_unshared
from pyams_zmq.process.file_lock import FileLock
from pyams_zmq.process.name_lock import NameLock
from pyams_zmq.supervisor.driver import LOCK_REFRESH


def test_name_lock(lock):
    own = NameLock(lock)
    assert own.acquire()
    path = own.path
    os.utime(path, (0, 0))
    assert own.acquire()
    assert os.stat(path).st_mtime > 0
    own.release()
    own.release()
    assert LOCK_REFRESH < 24 * 3600


def test_name_lock_twice_in_a_process(lock, try_name):
    first, second = NameLock(lock), NameLock(lock)
    assert first.acquire()
    assert not second.acquire()
    second.release()
    assert not try_name(lock)
    first.release()
    assert try_name(lock)
    assert second.acquire()
    second.release()


def test_name_lock_in_a_fork(lock, try_name):
    """A child has no locks, and cannot release that of its parent."""
    own = NameLock(lock)
    assert own.acquire()

    def use_it():
        assert not own.acquire()
        own.release()

    child = ForkProcess(target=use_it)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert not try_name(lock)
    own.release()


@pytest.fixture
def try_name():
    """Return a function that returns True if another process gets a name."""

    def try_it(name):
        child = ForkProcess(target=lambda: sys.exit(int(NameLock(name).acquire())))
        child.start()
        child.join()
        return bool(child.exitcode)

    return try_it


def test_file_of_a_name_is_removed(lock, try_name, lock_folder):
    """No other process gets the name; the file is made again at the next attempt."""
    own = NameLock(lock)
    assert own.acquire()
    shutil.rmtree(lock_folder)
    assert not try_name(lock)
    assert own.acquire()
    assert own._file_lock.is_in_place()
    assert not try_name(lock)
    own.release()
    assert try_name(lock)


@pytest.mark.usefixtures('lock_folder')
def test_another_process_makes_the_file_first(lock):
    """The name stays that of the process that has it."""
    own = NameLock(lock)
    assert own.acquire()
    os.unlink(own.path)
    other = FileLock(own.path)
    assert other.acquire()
    assert own.acquire()
    assert not own._file_lock.is_in_place()
    other.release()
    assert own.acquire()
    assert own._file_lock.is_in_place()
    own.release()


def test_folder_is_lost(lock, try_name, lock_folder, caplog):
    """The name stays reserved without its file, which is logged once."""
    own, second = NameLock(lock), NameLock(lock)
    assert own.acquire()
    shutil.rmtree(lock_folder)
    lock_folder.write_text('')
    assert own.acquire()
    assert own.acquire()
    assert not second.acquire()
    assert len(caplog.records) == 2
    assert 'A lock is held without its file: the folder of the locks cannot' in caplog.text
    own.release()
    assert second.acquire()
    lock_folder.unlink()
    assert second.acquire()
    assert second._file_lock.is_in_place()
    assert not try_name(lock)
    second.release()


def test_containers_with_one_network(lock):
    """Each can take the name, because it has a folder of its own for the files."""

    def use_it():
        mount('-t', 'tmpfs', '-o', 'mode=1777', 'none', '/tmp')
        assert NameLock(lock).acquire()

    own = NameLock(lock)
    assert own.acquire()
    run_unshared(use_it)
    own.release()
