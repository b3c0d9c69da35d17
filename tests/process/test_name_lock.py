# SPDX-License-Identifier: ZPL-2.1
"""The locks by which one process of several serves: by name, and by address."""

import errno
import os
import shutil
import sys
from itertools import product
from multiprocessing.context import ForkProcess

import pytest

from checks import TIMEOUT
from namespaces import mount, run_unshared
from pyams_zmq.exceptions import ZMQBindError
from pyams_zmq.process import lock as lock_module
from pyams_zmq.process.lock import LOCK_REFRESH, AddressLock, FileLock, NameLock, SocketLock
from pyams_zmq.supervisor import SupervisorProcess
from pyams_zmq.wire.endpoint import Endpoint
from users import NOBODY, needs_root, run_as


def test_name_lock(lock, monkeypatch):
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


def locks_of(address, *keys):
    """Return locks of an address; a key is that of an application."""
    endpoints = [Endpoint.parse(address, bind=True)]
    return [AddressLock(endpoints, key, f'application {key}') for key in keys]


def test_address_lock(address, tmp_path, monkeypatch):
    """Others can read whose the address is, while that application has it."""
    use_folder(tmp_path, monkeypatch)
    first, same, other = locks_of(address, *'ααβ')
    client, other_client = locks_of(address, *'αβ')
    assert first.find_other_owner() is None
    assert first.acquire()
    assert first.acquire()
    assert not same.acquire()
    assert not other.acquire()
    assert (client.find_other_owner(), same.find_other_owner()) == (None, None)
    owner = f'application α, process {os.getpid()}'
    assert other.find_other_owner() == other_client.find_other_owner() == owner
    assert client.find_other_owner() is None  # from its memory
    first.release()
    assert other_client.find_other_owner() is None
    assert other.acquire()
    assert other.find_other_owner() is None
    assert client.find_other_owner() == f'application β, process {os.getpid()}'
    for path in tmp_path.glob('*/*.lock'):
        path.unlink()  # a cleaner of temporary files
    assert client.find_other_owner() is None
    other.release()


ADDRESSES = [
    '127.0.0.1:1',
    '127.0.0.2:1',
    '127.0.0.1:2',
    '*:1',
    '[::1]:1',
    '[0:0::1]:1',
    '[::]:1',
    '[::ffff:127.0.0.1]:1',
    'ipc:///tmp/one',
    'ipc:///tmp/../tmp/one',
    'ipc:///tmp/two',
    'ipc://@one',
]


def test_addresses_that_overlap(tmp_path, monkeypatch):
    """Two applications can have the addresses that can be bound at the same time."""
    use_folder(tmp_path, monkeypatch)
    count = 0
    for one, two in product(ADDRESSES, repeat=2):
        overlap = Endpoint.parse(one, bind=True).overlaps(Endpoint.parse(two, bind=True))
        [first], [second] = locks_of(one, 'α'), locks_of(two, 'β')
        assert first.acquire()
        assert second.acquire() is not overlap, (one, two)
        owner = f'application α, process {os.getpid()}' if overlap else None
        assert second.find_other_owner() == owner, (one, two)
        first.release()
        assert second.acquire()
        second.release()
        count += overlap
    assert len(ADDRESSES) < count < len(ADDRESSES) ** 2 / 2


def test_two_addresses_of_a_process(tmp_path, monkeypatch):
    use_folder(tmp_path, monkeypatch)
    endpoints = [Endpoint.parse(text, bind=True) for text in ('127.0.0.1:1', '127.0.0.1:2')]
    pool = AddressLock(endpoints, 'α', 'application α')
    [other] = locks_of('*:2', 'β')
    assert other.acquire()
    assert not pool.acquire()
    [free] = locks_of('127.0.0.1:1', 'β')
    assert free.acquire()  # the pool takes all or nothing
    free.release()
    other.release()
    assert pool.acquire()
    assert not other.acquire()
    pool.release()


@pytest.mark.parametrize('server', ['127.0.0.1:1', '*:1', '[::]:1'])
def test_address_that_another_program_uses(tmp_path, monkeypatch, server):
    """Clients of the application do not call that program, until a process could bind it."""
    use_folder(tmp_path, monkeypatch)
    [lock] = locks_of(server, 'α')
    [client] = locks_of('[::1]:1' if server == '[::]:1' else '127.0.0.1:1', 'α')
    assert lock.acquire()
    assert client.find_other_owner() is None
    lock.note_use(True)
    assert client.find_other_owner() == 'an unknown program'
    assert lock.acquire()
    assert client.find_other_owner() == 'an unknown program'
    lock.note_use(False)
    assert client.find_other_owner() is None
    lock.note_use(True)
    lock.release()
    assert client.find_other_owner() is None
    lock.note_use(True)  # no effect without the lock
    assert lock.acquire()
    assert client.find_other_owner() is None
    lock.release()
    uri = Endpoint.parse(server, bind=True).uri
    assert lock.is_in_use(ZMQBindError(errno.EADDRINUSE, 'in use', uri))
    for error in (
        ZMQBindError(errno.EADDRINUSE, 'in use', 'tcp://127.0.0.1:3'),
        ZMQBindError(errno.EACCES, 'not allowed', uri),
        RuntimeError('fails'),
        None,
    ):
        assert not lock.is_in_use(error)


def use_folder(tmp_path, monkeypatch):
    """Let the locks of this process be in a folder of its own."""
    monkeypatch.setattr(lock_module, '_FOLDER', str(tmp_path))  # which is not safe: no sticky bit
    monkeypatch.setattr(lock_module.tempfile, 'tempdir', str(tmp_path))


def test_folder_does_not_depend_on_the_environment(run_program, tmp_path):
    code = 'from pyams_zmq.process.lock import NameLock as L; print(f\'["{L(str()).path}"]\')'
    program = run_program('-c', code, TMPDIR=str(tmp_path))
    assert program.read(TIMEOUT) == [NameLock('').path]


def test_folder_that_is_not_safe(tmp_path, monkeypatch):
    """One that is missing, or in which other users can rename our folder, is not used."""
    use_folder(tmp_path, monkeypatch)
    own = tmp_path / f'pyams_zmq-{os.geteuid()}'
    for folder in (tmp_path / 'missing', tmp_path):
        monkeypatch.setattr(lock_module, '_FOLDER', str(folder))
        assert NameLock('x').path.startswith(f'{own}/')


@pytest.mark.parametrize('kind', ['open', 'link', 'stranger'])
def test_folder_of_locks(tmp_path, monkeypatch, kind):
    use_folder(tmp_path, monkeypatch)
    folder = tmp_path / f'pyams_zmq-{os.geteuid()}'
    if kind == 'link':
        (tmp_path / 'elsewhere').mkdir(mode=0o700)
        folder.symlink_to('elsewhere')
    else:
        folder.mkdir(mode=0o700)
        NameLock('free')
    if kind == 'open':
        folder.chmod(0o750)
    if kind == 'stranger':
        user = os.geteuid()
        folder.rename(tmp_path / f'pyams_zmq-{user + 1}')
        monkeypatch.setattr(lock_module.os, 'geteuid', lambda: user + 1)
    supervisor = SupervisorProcess({}, lock='theirs')
    with pytest.raises(PermissionError, match='must be a folder of this user') as caught:
        supervisor.start()
    assert f'{supervisor.name} cannot start: ' in str(caught.value)
    assert 'set TMPDIR' in str(caught.value)


def test_file_of_a_name_is_removed(lock, try_name, tmp_path, monkeypatch):
    """No other process gets the name; the file is made again at the next attempt."""
    use_folder(tmp_path, monkeypatch)
    own = NameLock(lock)
    assert own.acquire()
    shutil.rmtree(os.path.dirname(own.path))
    assert not try_name(lock)
    assert own.acquire()
    assert own.is_in_place()
    assert not try_name(lock)
    own.release()
    assert try_name(lock)


def test_another_process_makes_the_file_first(lock, tmp_path, monkeypatch):
    """The name stays that of the process that has it."""
    use_folder(tmp_path, monkeypatch)
    own = NameLock(lock)
    assert own.acquire()
    os.unlink(own.path)
    other = FileLock(own.path)
    assert other.acquire()
    assert own.acquire()
    assert not own.is_in_place()
    other.release()
    assert own.acquire()
    assert own.is_in_place()
    own.release()


def test_folder_is_lost(lock, try_name, tmp_path, monkeypatch, caplog):
    """The name stays reserved without its file, which is logged once."""
    use_folder(tmp_path, monkeypatch)
    own, second = NameLock(lock), NameLock(lock)
    assert own.acquire()
    folder = tmp_path / f'pyams_zmq-{os.geteuid()}'
    shutil.rmtree(folder)
    folder.write_text('')
    assert own.acquire()
    assert own.acquire()
    assert not second.acquire()
    assert len(caplog.records) == 2
    assert 'A lock is held without its file: the folder of the locks cannot' in caplog.text
    own.release()
    assert second.acquire()
    folder.unlink()
    assert second.acquire()
    assert second.is_in_place()
    assert not try_name(lock)
    second.release()


def test_folder_of_addresses_is_lost(address, tmp_path, monkeypatch, caplog):
    """The service runs without that protection, which is logged once."""
    use_folder(tmp_path, monkeypatch)
    [own] = locks_of(address, 'α')
    [client] = locks_of(address, 'β')
    assert own.acquire()
    own.note_use(True)
    folder = tmp_path / f'pyams_zmq-{os.geteuid()}'
    shutil.rmtree(folder)
    folder.write_text('')
    assert own.acquire()
    assert own.acquire()
    [record] = caplog.records
    assert 'addresses of application α cannot be locked: another' in record.getMessage()
    assert client.find_other_owner() is None
    folder.unlink()
    assert own.acquire()
    assert client.find_other_owner() == f'application α, process {os.getpid()}'  # with its note
    own.release()


SQUATTER = """
import os, socket, sys, time
os.setuid(65534)
name = bytes.fromhex(sys.argv[1])
holders = [socket.socket(socket.AF_UNIX)]
holders[0].bind(name)
if sys.argv[2] == 'listens':
    holders[0].listen()
print('1', flush=True)
time.sleep(60)  # until the test kills this program
"""


@needs_root
@pytest.mark.parametrize('mode', ['listens', 'does not listen'])
def test_name_that_another_user_has(lock, run_program, mode):
    """It cannot keep a service from starting."""
    own = SocketLock(lock)
    program = run_program('-c', SQUATTER, own._address.hex(), mode)
    assert program.read(TIMEOUT) == 1
    assert own.acquire()
    program.end()
    other = SocketLock(lock)
    assert own.acquire()
    assert not other.acquire()
    own.release()
    other.release()


def test_name_is_asked_for_again_and_again(lock, monkeypatch):
    """The questions of standbys do not pile up between two looks of the holder."""
    monkeypatch.setattr(lock_module, '_BACKLOG', 2)
    own, other = SocketLock(lock), SocketLock(lock)
    for _number in range(3):
        assert own.acquire()
        for _question in range(10):
            assert not other.acquire()
    assert not other._has_warned
    own.release()
    assert other.acquire()
    own.release()
    other.release()


def test_too_many_standbys(lock, monkeypatch, caplog):
    """The name is not taken while it cannot be known whose it is, which is logged once."""
    monkeypatch.setattr(lock_module, '_BACKLOG', 1)
    own, *others = (SocketLock(lock) for _number in range(6))
    assert own.acquire()
    for _question in range(2):
        assert not any(other.acquire() for other in others)
    assert 0 < len(caplog.records) == sum(other._has_warned for other in others) < len(others)
    assert 'A lock counts as held' in caplog.text
    assert own.acquire()
    own.release()
    assert sum([other.acquire() for other in others]) == 1
    for other in others:
        other.release()


def test_holder_dies(lock):
    """The connection of a standby that it has not accepted ends, too."""
    own, other = SocketLock(lock), SocketLock(lock)
    assert own.acquire()
    assert not other.acquire()
    own._close()
    assert other.acquire()
    other.release()


def test_holder_with_a_fork_stops(lock):
    """Its socket, which the fork has inherited without hooks, does not keep the standbys."""
    own, other = SocketLock(lock), SocketLock(lock)
    assert own.acquire()
    assert not other.acquire()
    with own._socket.dup():
        own.release()
        assert other.acquire()
    other.release()


@needs_root
def test_user_with_a_high_number(lock):
    """The number of a user has 32 bits without a sign."""

    def use_it():
        own, other = SocketLock(lock), SocketLock(lock)
        assert own.acquire()
        assert not other.acquire()
        own.release()
        other.release()

    run_as(3_000_000_000, NOBODY, use_it)


def test_containers_with_one_network(lock):
    """Each can take the name, because it has a folder of its own for the files."""

    def use_it():
        mount('-t', 'tmpfs', '-o', 'mode=1777', 'none', '/tmp')
        assert NameLock(lock).acquire()

    own = NameLock(lock)
    assert own.acquire()
    run_unshared(use_it)
    own.release()


def test_mounts_without_the_folder(tmp_path, monkeypatch):
    """They have a number in the kernel, if /proc shows that."""
    here = lock_module._identify_mounts()
    monkeypatch.setattr(lock_module, '_FOLDER', str(tmp_path))
    assert lock_module._identify_mounts() != here
    monkeypatch.setattr(lock_module, '_FOLDER', str(tmp_path / 'missing'))
    assert lock_module._identify_mounts() == f' {os.readlink("/proc/self/ns/mnt")}'
    monkeypatch.setattr(lock_module, '_MOUNTS', str(tmp_path / 'missing'))
    assert lock_module._identify_mounts() == ''


def test_working_folder_is_not_for_locks(tmp_path, monkeypatch):
    """Python takes it if no other folder is writable; it differs from program to program."""
    use_folder(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('TMPDIR', raising=False)
    with pytest.raises(FileNotFoundError, match='no folder for temporary files is writable'):
        NameLock('x')
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    assert NameLock('x').path.startswith(f'{tmp_path}/')


def test_name_in_a_fork_without_hooks(lock, try_name):
    """The process id is compared."""
    own = SocketLock(lock)
    assert own.acquire()
    own._pid += 1
    own.release()
    assert own.acquire()
    own.release()
