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

# Locks of this process, by the real path of their file: a record lock ends when its process closes
# any descriptor of the file, so nobody here may open it once more.
_own: dict[str, 'IPCLock | NameLock'] = {}


def _forget() -> None:
    # A child has no record locks; the descriptors would make it believe that it had.
    for lock in _own.values():
        fd, lock._fd = lock._fd, None
        if fd is not None:
            os.close(fd)
    _own.clear()


os.register_at_fork(after_in_child=_forget)


_PREFIX = 'pool-'


class IPCLock:
    """Keeps the path of an ipc endpoint for this process.

    libzmq removes a socket file which is in the way before it binds its own, so that a second
    process silently takes the endpoint over. The lock is a POSIX record lock on `PATH.lock`:
    it ends with its process, however that ends, and children do not inherit it.

    :param str path: path of the socket
    """

    def __init__(self, path: str):
        self.path = path
        self._lock_path = f'{path}.lock'
        self._real_path = os.path.realpath(self._lock_path)
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the path; once more for another socket of this process, if the first is closed.

        :raises OSError: EADDRINUSE if another process has it, or another lock of this one, EEXIST
            if a file which is no socket is there, or what the file system says
        """
        if _own.setdefault(self._real_path, self) is not self:
            raise self._in_use()
        was_held = self._fd is not None
        try:
            self._lock()
            self._look_for_others()
        except BaseException:
            if not was_held:
                self._unlock()
            raise

    def _lock(self) -> None:
        while self._fd is None:
            fd = _lock_file(self._lock_path)
            if fd is None:
                raise self._in_use()
            if _same_file(fd, self._lock_path):
                self._fd = fd
            else:  # its former holder has removed it just now
                os.close(fd)

    def _look_for_others(self) -> None:
        if _is_served(self.path):  # by a program which knows nothing of our locks
            raise self._in_use()

    def release(self) -> None:
        """Remove the socket, which libzmq leaves, and give the path back; twice does no harm."""
        if self._fd is not None and _same_file(self._fd, self._lock_path):
            with suppress(OSError):
                os.unlink(self.path)
        self._unlock()

    def _unlock(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            if _same_file(fd, self._lock_path):  # else somebody removed it, and by now the path
                os.unlink(self._lock_path)  # may have another process
            os.close(fd)
        if _own.get(self._real_path) is self:
            del _own[self._real_path]

    def _in_use(self) -> OSError:
        return OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), self.path)


class NameLock:
    """Keeps a name for this process, among all of this user and machine.

    A POSIX record lock on a file in a folder of the user, in that for temporary files: it ends
    with its process, however that ends, and children do not inherit it.

    :param name: any text
    :raises PermissionError: the folder is not this user's own, or others may enter it
    """

    def __init__(self, name: str):
        file_name = f'{hashlib.sha256(name.encode()).hexdigest()}.lock'
        self._path = os.path.join(_user_folder(), file_name)
        self._fd: int | None = None

    def acquire(self) -> bool:
        """Try to take the name; touch its file, if this lock has it already.

        :raises OSError: what the file system says
        :return: true if this lock has it; false if another process has it, or another lock of
            this one
        """
        if self._fd is not None:
            os.utime(self._fd)
            return True
        if _own.setdefault(self._path, self) is not self:
            return False
        try:
            _user_folder()
            self._fd = _lock_file(self._path, os.O_NOFOLLOW)
        finally:
            if self._fd is None:
                del _own[self._path]
        return self._fd is not None

    def release(self) -> None:
        """Give the name back; twice does no harm."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)  # the file stays: who removes it takes it from one who has just opened it
            del _own[self._path]


def _lock_file(path: str, flags: int = 0) -> int | None:
    """Open a file, and lock it; give its descriptor, or None if another process has the lock."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return None
    return fd


class PrivateFolder:
    """A folder for the sockets of one process, which nobody else may enter; a context manager.

    It is in the folder of the user where locks are, and goes with its process; what a process that
    was killed has left is removed by the next one that makes such a folder. A record lock tells
    whether the process lives, on whatever machine or in whatever container that shares the folder.

    :raises PermissionError: the folder of the user is not this user's own, or others may enter it
    """

    def __enter__(self) -> 'PrivateFolder':  # noqa: PYI034 - Python 3.10 has no Self
        parent = _user_folder()
        _sweep(parent)
        self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
        self._fd = os.open(self._lock_path(self.path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()
        os.close(self._fd)

    def remove(self) -> None:
        """Remove the folder and what is in it; twice does no harm."""
        shutil.rmtree(self.path, ignore_errors=True)

    @staticmethod
    def _lock_path(path: str) -> str:
        return os.path.join(path, 'lock')

    @classmethod
    def is_stale(cls, path: str) -> bool:
        """Tell if the process of such a folder does not live any more."""
        try:
            fd = os.open(cls._lock_path(path), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # it is being made, or removed, at this moment
            return False
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        finally:
            os.close(fd)
        return True


def _sweep(parent: str) -> None:
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        if name.startswith(_PREFIX) and PrivateFolder.is_stale(path):
            shutil.rmtree(path, ignore_errors=True)


def _user_folder() -> str:
    user = os.geteuid()
    folder = os.path.join(tempfile.gettempdir(), f'pyams_zmq-{user}')
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise PermissionError(
            errno.EACCES, 'it must be a folder of this user which nobody else may enter', folder
        )
    return folder


def _same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _is_served(path: str) -> bool:
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # libzmq would remove it, whatever it holds
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) not in (errno.ENOENT, errno.ECONNREFUSED)
