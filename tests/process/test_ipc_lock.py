# SPDX-License-Identifier: ZPL-2.1
"""One live process per ipc path, also when files are removed at the wrong moment."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
from contextlib import contextmanager, suppress
from weakref import WeakSet

import pytest

from checks import open_fds
from handlers import Process
from pyams_zmq.exceptions import ZMQBindError
from pyams_zmq.process import ipc_lock
from pyams_zmq.process.ipc_lock import IPCLock
from pyams_zmq.wire import fork

FORK = multiprocessing.get_context('fork')


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'socket')


@pytest.fixture
def make_lock():
    """Make locks, released at the end."""
    locks = []

    def make(path):
        locks.append(IPCLock(path))
        return locks[-1]

    yield make
    for lock in locks:
        lock.release()


def try_lock(path):
    """Acquire a path in another process and leave: None, or the number of the error."""

    def acquire():
        try:
            IPCLock(path).acquire()
        except OSError as error:
            writer.send(error.errno)
        else:
            writer.send(None)

    reader, writer = FORK.Pipe(duplex=False)
    child = FORK.Process(target=acquire)
    child.start()
    result = reader.recv()
    child.join()
    reader.close()
    writer.close()
    return result


@contextmanager
def serving(path, backlog=1):
    """Serve a path without any lock, as other programs do."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(backlog)
        yield server


def test_acquire_and_release(path, make_lock):
    fds = open_fds()
    lock = make_lock(path)
    lock.acquire()
    assert os.path.exists(f'{path}.lock')
    assert os.stat(f'{path}.lock').st_mode & 0o777 == 0o600
    assert try_lock(path) == errno.EADDRINUSE
    lock.acquire()  # it has it
    lock.release()
    assert os.listdir(os.path.dirname(path)) == []
    assert try_lock(path) is None
    lock.release()
    assert open_fds() <= fds


def test_release_removes_the_socket(path, make_lock):
    lock = make_lock(path)
    lock.acquire()
    with serving(path):
        pass
    lock.release()
    assert os.listdir(os.path.dirname(path)) == []


def test_release_without_acquire(path, make_lock):
    make_lock(path).release()
    assert not os.path.exists(f'{path}.lock')


def test_lock_ends_with_its_process(path, make_lock):
    assert try_lock(path) is None
    assert os.path.exists(f'{path}.lock')  # left by the process that ended
    make_lock(path).acquire()
    assert try_lock(path) == errno.EADDRINUSE


def test_children_do_not_inherit_it(path, make_lock):
    """A child that outlives its parent, or uses an inherited lock, does not change the lock."""
    lock = make_lock(path)
    lock.acquire()
    reader, writer = FORK.Pipe(duplex=False)

    def use_and_stay():
        with suppress(OSError):
            lock.acquire()
            writer.send('acquired')
        lock.release()
        writer.send('closed')
        stay_reader.recv()

    stay_reader, stay_writer = FORK.Pipe(duplex=False)
    child = FORK.Process(target=use_and_stay)
    child.start()
    assert reader.recv() == 'closed'
    assert try_lock(path) == errno.EADDRINUSE
    lock.release()
    assert try_lock(path) is None
    stay_writer.send('end')
    child.join()
    assert child.exitcode == 0
    for end in (reader, writer, stay_reader, stay_writer):
        end.close()


def test_held_by_another_process(path, make_lock):
    fds = open_fds()
    holder = IPCLock(path)
    ready_reader, ready_writer = FORK.Pipe(duplex=False)
    end_reader, end_writer = FORK.Pipe(duplex=False)

    def hold():
        holder.acquire()
        ready_writer.send('ready')
        end_reader.recv()

    child = FORK.Process(target=hold)
    child.start()
    assert ready_reader.recv() == 'ready'
    lock = make_lock(path)
    with pytest.raises(OSError, match='Address already in use') as caught:
        lock.acquire()
    assert (caught.value.errno, caught.value.filename) == (errno.EADDRINUSE, path)
    assert caught.value.__context__ is None
    lock.release()  # it never had it
    assert try_lock(path) == errno.EADDRINUSE
    end_writer.send('end')
    child.join()
    lock.acquire()
    lock.release()
    for end in (ready_reader, ready_writer, end_reader, end_writer):
        end.close()
    child.close()
    assert open_fds() <= fds


def test_no_locks_left(path, make_lock, monkeypatch):
    def refuse(fd, flags):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, 'flock', refuse)
    fds = open_fds()
    with pytest.raises(OSError, match=os.strerror(errno.ENOLCK)):
        make_lock(path).acquire()
    assert open_fds() <= fds


@pytest.mark.parametrize('replace', [False, True], ids=['removed', 'replaced'])
def test_former_holder_removes_the_file(path, make_lock, monkeypatch, replace):
    """It does so after our open and before our lock: the locked file is not at its path."""
    flock, calls = fcntl.flock, []

    def slow_flock(fd, flags):
        calls.append(fd)
        if len(calls) == 1:
            os.unlink(f'{path}.lock')
            if replace:
                with open(f'{path}.lock', 'x', encoding='ascii'):
                    pass
        return flock(fd, flags)

    monkeypatch.setattr(fcntl, 'flock', slow_flock)
    fds = open_fds()
    lock = make_lock(path)
    lock.acquire()
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(lock._lock._fd), os.stat(f'{path}.lock'))
    assert try_lock(path) == errno.EADDRINUSE
    assert len(open_fds() - fds) == 1


def test_file_is_removed(path, make_lock):
    """By a cleaner of /tmp, for instance; the process ends without an error."""
    lock = make_lock(path)
    lock.acquire()
    os.unlink(f'{path}.lock')
    lock.release()
    assert not [file for _fd, file in open_fds() if path in file]


def test_file_is_removed_and_made_by_another_process(path, make_lock):
    """The path belongs to that process now: its files are not removed."""
    lock = make_lock(path)
    lock.acquire()
    os.unlink(f'{path}.lock')
    with open(f'{path}.lock', 'x', encoding='ascii'), serving(path):
        lock.release()
        assert sorted(os.listdir(os.path.dirname(path))) == ['socket', 'socket.lock']


def test_missing_folder(tmp_path, make_lock):
    fds = open_fds()
    with pytest.raises(FileNotFoundError):
        make_lock(str(tmp_path / 'missing' / 'socket')).acquire()
    assert open_fds() <= fds


@pytest.mark.parametrize('backlog', [0, 1])
def test_served_by_another_program(path, make_lock, backlog):
    fds = open_fds()
    lock = make_lock(path)
    with serving(path, backlog), socket.socket(socket.AF_UNIX) as client:
        client.connect(path)  # with a backlog of 0, the queue is full now
        with pytest.raises(OSError, match='Address already in use') as caught:
            lock.acquire()
        assert caught.value.errno == errno.EADDRINUSE
        assert os.listdir(os.path.dirname(path)) == ['socket']
    lock.acquire()
    assert len(open_fds() - fds) == 1


def test_stale_socket(path, make_lock):
    with serving(path):
        pass
    lock = make_lock(path)
    lock.acquire()
    assert ipc_lock._is_served(path) is False


def test_no_socket_is_there(path, make_lock):
    """libzmq would remove a file of data too, before it binds its socket."""
    with open(path, 'x', encoding='ascii') as file:
        file.write('precious')
    fds = open_fds()
    with pytest.raises(FileExistsError):
        make_lock(path).acquire()
    assert open_fds() <= fds
    assert os.listdir(os.path.dirname(path)) == ['socket']


def test_process_spares_data(path, tmp_path):
    (tmp_path / 'socket').write_text('precious', encoding='ascii')
    process = Process(f'ipc://{path}')
    process.start()
    with pytest.raises(ZMQBindError, match='not a socket') as caught:
        process.wait_ready()
    assert caught.value.errno == errno.EEXIST
    process.join(5)
    assert (tmp_path / 'socket').read_text(encoding='ascii') == 'precious'


def test_processes(path, start, ask):
    first = start(f'ipc://{path}')
    second = Process(f'ipc://{path}')
    second.start()
    with pytest.raises(ZMQBindError, match='another process serves it'):
        second.wait_ready()
    second.join(5)
    assert ask(first, ['echo', 1]) == [200, 1]
    first.stop()
    assert first.exitcode == 0
    assert os.listdir(os.path.dirname(path)) == []
    third = start(f'ipc://{path}')
    third.kill()  # it leaves its files
    third.join()
    assert sorted(os.listdir(os.path.dirname(path))) == ['socket', 'socket.lock']
    assert ask(start(f'ipc://{path}'), ['echo', 1]) == [200, 1]


@pytest.mark.parametrize('linked', [False, True])
def test_second_lock_of_this_process(path, make_lock, linked):
    first = make_lock(path)
    first.acquire()
    if linked:
        folder = os.path.dirname(path)
        os.symlink(folder, f'{folder}-link')
        path = f'{folder}-link/socket'
    second = make_lock(path)
    with pytest.raises(OSError, match='Address already in use') as caught:
        second.acquire()
    assert caught.value.errno == errno.EADDRINUSE
    second.release()  # it never had it
    assert try_lock(path) == errno.EADDRINUSE
    first.release()
    second.acquire()
    assert try_lock(path) == errno.EADDRINUSE


def test_second_try_after_a_failure(path, make_lock):
    with serving(path), pytest.raises(OSError, match='Address already in use'):
        make_lock(path).acquire()
    make_lock(path).acquire()


class TwoStreams(Process):
    """Binds one path twice."""

    def setup(self):
        super().setup()
        with pytest.raises(ZMQBindError, match='another process serves it'):
            self.stream(self.socket_type, self.bind_addr, bind=True)


def test_one_process_twice(path, start, ask):
    """The second lock of one process is refused, and does not release the first one."""
    process = start(f'ipc://{path}', factory=TwoStreams)
    assert ask(process, ['echo', 1]) == [200, 1]
    assert try_lock(path) == errno.EADDRINUSE
    process.stop()
    assert process.exitcode == 0


def has_open(path):
    """Return True if this process has a file open."""
    fds = (f'/proc/self/fd/{fd}' for fd in os.listdir('/proc/self/fd'))
    return path in [os.readlink(fd) for fd in fds if os.path.exists(fd)]


@pytest.mark.parametrize('has_hooks', [True, False])
def test_fork(path, make_lock, has_hooks, monkeypatch):
    """A forked child closes what it has inherited; without hooks (uWSGI) when it uses the lock."""
    lock = make_lock(path)
    lock.acquire()
    if not has_hooks:
        monkeypatch.setattr(fork, '_resources', WeakSet())

    def look():
        was_open = has_open(f'{path}.lock')
        lock.release()
        os._exit(was_open + 2 * has_open(f'{path}.lock'))

    child = FORK.Process(target=look)
    child.start()
    child.join()
    assert child.exitcode == (0 if has_hooks else 1)
    assert os.path.exists(f'{path}.lock')
    assert try_lock(path) == errno.EADDRINUSE


def test_release_with_a_fork_that_has_the_descriptor(path, make_lock, monkeypatch):
    """It runs no hooks, and does not use the lock: it must not keep it from others."""
    lock = make_lock(path)
    lock.acquire()
    monkeypatch.setattr(fork, '_resources', WeakSet())
    child = FORK.Process(target=signal.pause)
    child.start()
    lock.release()
    assert try_lock(path) is None
    child.kill()
    child.join()


def test_link_in_the_place_of_the_file(path, make_lock):
    """Another user has made it, so that we would write to another file."""
    os.symlink(f'{path}.other', f'{path}.lock')
    with pytest.raises(OSError, match='symbolic links'):
        make_lock(path).acquire()
    assert not os.path.exists(f'{path}.other')
