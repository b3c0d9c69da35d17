# SPDX-License-Identifier: ZPL-2.1
"""The file of an ipc address: its mode and group, and its loss."""

import errno
import os
import shutil
import stat
from functools import partial
from uuid import uuid4

import pytest
import zmq

from checks import TIMEOUT, open_fds, wait_until
from handlers import LoggedProcess, Process
from pool_handlers import Pool
from pyams_zmq.client import ZMQClient
from pyams_zmq.device import ProcessDevice, ThreadDevice
from pyams_zmq.exceptions import ZMQBindError
from pyams_zmq.process import ipc_file, service
from pyams_zmq.process.ipc_file import check_mode, find_group, open_listener
from pyams_zmq.testing import running
from users import NOBODY, needs_root, run_as

GROUP = 4321


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def call(address):
    with ZMQClient(address, timeout=TIMEOUT) as client:
        return client.call('echo', 1)


@pytest.mark.parametrize('umask', [0, 0o077])
@pytest.mark.parametrize(
    ('options', 'mode', 'group'),
    [
        ({}, None, os.getegid()),
        ({'ipc_mode': 0o600}, 0o600, os.getegid()),
        ({'ipc_mode': 0o666}, 0o666, os.getegid()),
        ({'ipc_mode': '0606'}, 0o606, os.getegid()),
        pytest.param({'ipc_group': GROUP}, 0o660, GROUP, marks=needs_root),
        pytest.param({'ipc_group': str(GROUP), 'ipc_mode': 0o620}, 0o620, GROUP, marks=needs_root),
    ],
)
def test_mode_and_group(tmp_path, address, options, mode, group, umask):
    process = Process(address)
    for name, value in options.items():
        setattr(process, name, value)
    former = os.umask(umask)
    try:
        with running(process):
            assert call(address) == 1
            path = tmp_path / 'zmq.sock'
            assert mode_of(path) == (0o777 & ~umask if mode is None else mode)
            assert os.stat(path).st_gid == group
    finally:
        os.umask(former)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('kind', ['pool', ThreadDevice, ProcessDevice])
def test_pools_and_devices(address, kind):
    path = address.removeprefix('ipc://')
    if kind == 'pool':
        pool = Pool(address, workers=1)
        pool.ipc_mode = 0o640
        with running(pool):
            assert call(address) == 1
            assert mode_of(path) == 0o640
        return
    device = kind(zmq.QUEUE)
    device.ipc_mode = 0o640
    device.bind_in(address)
    device.bind_out('127.0.0.1')
    with device:
        assert mode_of(path) == 0o640


@needs_root
def test_group_may_connect(tmp_path, address):
    """Others get 401 at once, see tests/client/test_permission.py."""
    tmp_path.chmod(0o711)
    process = Process(address)
    process.ipc_group = GROUP
    with running(process):
        run_as(NOBODY, GROUP, call, address)


@needs_root
def test_file_is_never_open_to_more(tmp_path, monkeypatch):
    """While its group is still another one, nobody of that group may connect."""
    path, seen = str(tmp_path / 's'), []
    chown, chmod = os.chown, os.chmod

    def look(change, *args, **kwargs):
        seen.append(mode_of(path))
        change(*args, **kwargs)

    monkeypatch.setattr(ipc_file.os, 'chown', partial(look, chown))
    monkeypatch.setattr(ipc_file.os, 'chmod', partial(look, chmod))
    former = os.umask(0)
    try:
        open_listener(path, 0o660, GROUP, 1).close()
    finally:
        os.umask(former)
    assert seen == [0o600, 0o600]
    assert mode_of(path) == 0o660


@needs_root
def test_group_of_others(tmp_path, address):
    """The file is removed, and the error says why."""
    tmp_path.chmod(0o777)

    def bind():
        process = Process(address)
        process.ipc_group = GROUP
        process.bind_timeout = 0
        process.start()
        with pytest.raises(ZMQBindError, match='this user is not a member of ipc_group') as caught:
            process.wait_ready()
        process.stop()
        assert caught.value.errno == errno.EPERM
        assert os.listdir(tmp_path) == []
        with pytest.raises(PermissionError):
            open_listener(str(tmp_path / 's'), 0o660, GROUP, 1)
        assert os.listdir(tmp_path) == []

    run_as(NOBODY, NOBODY, bind)


def test_bad_values(address):
    for name, value in (('ipc_mode', 0o1777), ('ipc_mode', '999'), ('ipc_group', 'no such group')):
        process = Process(address)
        setattr(process, name, value)
        process.start()
        with pytest.raises(ValueError, match=repr(value)):
            process.wait_ready()
        process.stop()


def test_check_mode():
    assert [check_mode(each) for each in ('660', '0660', '0o660', 0o660)] == [0o660] * 4
    for value in (660, -1, 0o1000, '', 'rw', None, True, 1.0):
        with pytest.raises(ValueError, match='is not a file mode'):
            check_mode(value)


def test_find_group():
    assert find_group('root') == find_group('0') == find_group(0) == 0
    for value in ('', 'no such group', -1, 2**32, True, None, 1.5j):
        with pytest.raises(ValueError, match='is not a group'):
            find_group(value)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Return the folder for temporary files, which is not the working folder."""
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    monkeypatch.setattr(ipc_file.tempfile, 'tempdir', str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures('_often')
@pytest.mark.parametrize('mode', [None, 0o666])
def test_any_path(folder, mode):
    """It has a folder of its own, where the file is made again; nothing is left."""
    process = Process('ipc://*')
    process.ipc_mode = mode
    former = os.umask(0o077)
    try:
        with running(process):
            path = process.bound_address.removeprefix('ipc://')
            assert path.startswith(f'{folder}/pyams_zmq-')
            for _number in range(2):
                wait_until(lambda: mode_of(path) == (0o700 if mode is None else mode))
                assert call(process.bound_address) == 1
                os.unlink(path)
                wait_until(partial(os.path.exists, path))
            assert mode_of(os.path.dirname(path)) == (0o700 if mode is None else 0o711)
    finally:
        os.umask(former)
    assert os.listdir(folder) == ['work']
    assert os.listdir() == []


@pytest.mark.parametrize('options', [{'ipc_mode': 0o600}, {'ipc_group': 0}])
def test_no_file(tmp_path, options):
    """The options cannot protect an abstract address, which is an error."""
    process = Process(f'ipc://@{tmp_path}')
    for name, value in options.items():
        setattr(process, name, value)
    process.start()
    with pytest.raises(ValueError, match='has no file for ipc_mode and ipc_group'):
        process.wait_ready()
    process.stop()


@needs_root
@pytest.mark.parametrize('group', [None, NOBODY])
def test_file_of_another_user(tmp_path, address, group):
    """In a folder with the sticky bit it cannot be replaced; the error does not blame the group."""
    tmp_path.chmod(0o1777)
    open_listener(str(tmp_path / 'zmq.sock'), 0o666, None, 1).close()

    def bind():
        process = Process(address)
        process.ipc_group, process.bind_timeout = group, 0
        process.start()
        with pytest.raises(ZMQBindError, match='a file of another user is there'):
            process.wait_ready()
        process.stop()

    run_as(NOBODY, NOBODY, bind)


def listeners_of(process):
    """Return the number of sockets of a process that have the path of its address."""
    path = process.bound_address.rpartition('/')[2].encode()
    with open('/proc/net/unix', 'rb') as file:
        inodes = {b'socket:[%s]' % line.split()[6] for line in file if path in line}
    folder = f'/proc/{process.pid}/fd'
    found = [os.readlink(f'{folder}/{fd}').encode() for fd in os.listdir(folder)]
    return sum(each in inodes for each in found)


# Loss of the file


@pytest.fixture
def _often(monkeypatch):
    """Let services check their files often."""
    monkeypatch.setattr(service, 'FILE_INTERVAL', 0.05)


@pytest.mark.usefixtures('_often')
@pytest.mark.parametrize('options', [{}, {'ipc_mode': 0o600}], ids=['default', 'with a mode'])
@pytest.mark.parametrize('factory', [Process, partial(Pool, workers=1)], ids=['process', 'pool'])
def test_file_is_removed(tmp_path, address, factory, options):
    """It is made again, while calls of connected clients go on."""
    process = factory(address)
    for name, value in options.items():
        setattr(process, name, value)
    path = tmp_path / 'zmq.sock'
    with running(process), ZMQClient(address, timeout=TIMEOUT) as client:
        pid = client.call('pid')
        for names in (['zmq.sock'], ['zmq.sock', 'zmq.sock.lock']):
            for name in names:
                (tmp_path / name).unlink()
            assert client.call('pid') == pid
            wait_until(path.exists)
            with ZMQClient(address, timeout=TIMEOUT) as other:
                assert other.call('pid') == pid
            assert client.call('pid') == pid
            if options:
                assert mode_of(path) == options['ipc_mode']
            wait_until((tmp_path / 'zmq.sock.lock').exists)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures('_often')
def test_listeners_do_not_pile_up(tmp_path):
    """One whose file was removed is kept only for its connections."""
    path = tmp_path / f'{uuid4()}'
    process = Process(f'ipc://{path}')
    with running(process), ZMQClient(process.bound_address, timeout=TIMEOUT) as client:
        pid = client.call('pid')
        for _number in range(5):
            path.unlink()
            wait_until(path.exists)
            assert client.call('listeners_of_a_fork') == 0
        assert client.call('pid') == pid
        assert listeners_of(process) == 3  # with that of the connection, and the connection
        assert process.bound_address == f'ipc://{path}'
        assert call(process.bound_address) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures('_often')
def test_folder_is_removed(tmp_path):
    """That is logged once; the address is bound again when the folder is there."""
    folder = tmp_path / 'run'
    folder.mkdir()
    address = f'ipc://{folder}/zmq.sock'
    log = tmp_path / 'log'
    process = LoggedProcess(str(log), address)
    with running(process), ZMQClient(address, timeout=TIMEOUT) as client:
        pid = client.call('pid')
        shutil.rmtree(folder)
        wait_until(lambda: 'cannot be made again' in log.read_text())
        for _number in range(10):  # some checks later
            assert client.call('sleep', 0.05)
        folder.mkdir()
        wait_until((folder / 'zmq.sock').exists)
        with ZMQClient(address, timeout=TIMEOUT) as other:
            assert other.call('pid') == pid
    records = log.read_text()
    assert records.count('cannot be made again') == records.count('it is made again; let no') == 1


@pytest.mark.usefixtures('_often')
def test_file_of_another_program(tmp_path, address):
    """It is left alone, until it is gone."""
    log = tmp_path / 'log'
    process = LoggedProcess(str(log), address)
    path = tmp_path / 'zmq.sock'
    with running(process):
        path.unlink()
        with open_listener(str(path), 0o600, None, 1):
            wait_until(lambda: 'Address already in use' in log.read_text())
        path.unlink()
        wait_until(path.exists)
        assert call(address) == 1


def test_listener_is_closed_after_an_error(tmp_path):
    fds = open_fds()
    with pytest.raises(FileNotFoundError):
        open_listener(str(tmp_path / 'missing' / 's'), 0o600, None, 1)
    assert open_fds() <= fds
