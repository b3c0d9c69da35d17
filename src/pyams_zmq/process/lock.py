# SPDX-License-Identifier: ZPL-2.1
"""One live process per ipc path, or per name."""

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import stat
import tempfile
from contextlib import suppress
from weakref import WeakSet

_PREFIX = 'pool-'


class FileLock:
    """A lock on a file, see flock(2): one process has it until it releases it, or ends.

    A forked child shares the lock by the descriptor that it inherits, so it closes that.

    :param path: path of the file, which is not a symbolic link
    :param flags: flags of :func:`os.open`, to make the file by default
    """

    def __init__(self, path: str, flags: int = os.O_CREAT):
        self.path = path
        self._flags = flags | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = -1
        self._pid = 0
        _locks.add(self)

    @property
    def is_held(self) -> bool:
        """True if this object has the lock."""
        if self._pid != os.getpid():  # a fork made by C code (uWSGI) runs no hooks
            self._close()
        return self._fd >= 0

    def acquire(self) -> bool:
        """Try to lock the file. Calling it again has no effect.

        :raises OSError: from the file system
        :return: False if another process, or another object of this one, has the lock
        """
        while not self.is_held:
            self._pid = os.getpid()
            self._fd = os.open(self.path, self._flags, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._close()
                if isinstance(error, BlockingIOError):
                    return False
                raise
            if not self.is_in_place():  # its former holder has removed it just now
                self._close()
        return True

    def is_in_place(self) -> bool:
        """Return True if the locked file is still at its path."""
        try:
            return self.is_held and os.path.samestat(os.fstat(self._fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock back, if this object has it."""
        if self.is_held:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # also of forks that have the descriptor
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_locks: WeakSet[FileLock] = WeakSet()


def _close_inherited() -> None:
    for lock in _locks:
        lock._close()


os.register_at_fork(after_in_child=_close_inherited)


class IPCLock:
    """Reserves the path of an ipc endpoint for this process, by a lock on `PATH.lock`.

    libzmq removes a socket file that is in the way before it binds its own, so that a second
    process would silently take the endpoint over.

    :param path: path of the socket
    """

    def __init__(self, path: str):
        self.path = path
        self._lock = FileLock(f'{path}.lock')

    def acquire(self) -> None:
        """Reserve the path. A second call succeeds only after the first socket was closed.

        :raises OSError: EADDRINUSE if another process has it, or another lock of this one, EEXIST
            if a file that is not a socket is there, or an error of the file system
        """
        was_held = self._lock.is_held
        is_free = False
        try:  # a program that does not use our locks may serve the path
            is_free = self._lock.acquire() and not _is_served(self.path)
        finally:
            if not (is_free or was_held):
                self._remove_lock()
        if not is_free:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), self.path)

    def release(self) -> None:
        """Remove the socket file, which libzmq leaves, and give the path back.

        Calling it again has no effect.
        """
        if self._lock.is_in_place():
            with suppress(OSError):
                os.unlink(self.path)
        self._remove_lock()

    def _remove_lock(self) -> None:
        # If the file was removed, another process may have made a new one by now.
        if self._lock.is_in_place():
            os.unlink(self._lock.path)
        self._lock.release()


class NameLock(FileLock):
    """Reserves a name for this process, among all of this user and machine.

    The locked file is in a folder of the user in the folder for temporary files. It is never
    removed: another process may have opened it, to lock it next.

    :param name: any text
    :raises PermissionError: the folder does not belong to this user, or is open to others
    """

    def __init__(self, name: str):
        file_name = f'{hashlib.sha256(name.encode()).hexdigest()}.lock'
        super().__init__(os.path.join(_user_folder(), file_name))

    def acquire(self) -> bool:
        """Try to take the name.

        It touches its file, so that cleaners of temporary files do not remove it.

        :raises OSError: from the file system
        :return: False if another process, or another lock of this one, has it
        """
        _user_folder()
        is_held = super().acquire()
        if is_held:
            os.utime(self._fd)
        return is_held


class PrivateFolder:
    """A folder for the sockets of one process, closed to other users; a context manager.

    It is in the folder of the user where locks are, and is removed with its process. If the process
    is killed, the next one that makes such a folder removes it: a lock shows whether the process
    lives, on any machine and in any container that shares the folder.

    :raises PermissionError: the folder of the user does not belong to this user, or is open to
        others
    """

    def __enter__(self) -> 'PrivateFolder':  # noqa: PYI034 - Python 3.10 has no Self
        parent = _user_folder()
        for name in os.listdir(parent):
            path = os.path.join(parent, name)
            if name.startswith(_PREFIX) and self.is_stale(path):
                shutil.rmtree(path, ignore_errors=True)
        while True:
            self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
            self._lock = FileLock(os.path.join(self.path, 'lock'))
            # Another process may take it for stale before it is locked, and remove it.
            with suppress(FileNotFoundError):
                if self._lock.acquire():
                    return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()
        self._lock.release()

    def remove(self) -> None:
        """Remove the folder and its contents. Calling it again has no effect."""
        shutil.rmtree(self.path, ignore_errors=True)

    @staticmethod
    def is_stale(path: str) -> bool:
        """Return True if the process of such a folder has ended."""
        lock = FileLock(os.path.join(path, 'lock'), flags=0)
        try:
            return lock.acquire()
        except OSError:  # it is being made, or removed, at this moment
            return False
        finally:
            lock.release()


def _user_folder() -> str:
    user = os.geteuid()
    folder = os.path.join(tempfile.gettempdir(), f'pyams_zmq-{user}')
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise PermissionError(
            errno.EACCES, 'it must be a folder of this user, closed to other users', folder
        )
    return folder


def _is_served(path: str) -> bool:
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # libzmq would remove it with its data
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) not in (errno.ENOENT, errno.ECONNREFUSED)
