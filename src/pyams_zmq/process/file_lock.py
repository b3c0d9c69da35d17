# SPDX-License-Identifier: ZPL-2.1
"""A lock on a file, which one process has."""

import fcntl
import os

from pyams_zmq.wire.fork import close_in_forks

_FLAGS = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class FileLock:
    """A lock on a file, see flock(2): one process has it until it releases it, or ends.

    A forked child shares the lock by the descriptor that it inherits, so it closes that.

    :param path: path of the file, which is not a symbolic link
    """

    operation = fcntl.LOCK_EX  #: LOCK_SH for a lock that other objects with LOCK_SH can have, too

    def __init__(self, path: str):
        self.path = path
        self._fd = -1
        self._pid = 0
        close_in_forks(self)

    @property
    def is_held(self) -> bool:
        """True if this object has the lock."""
        if self._pid != os.getpid():  # a fork made by C code (uWSGI) runs no hooks
            self.close()
        return self._fd >= 0

    def acquire(self) -> bool:
        """Try to lock the file. Calling it again has no effect.

        :raises OSError: from the file system
        :return: False if another process, or another object of this one, has the lock
        """
        while not self.is_held:
            fd = self._lock_file()
            if fd is None:
                return False
            self._pid, self._fd = os.getpid(), fd
            if not self.is_in_place():  # its former holder has removed it just now
                self.close()
        return True

    def _lock_file(self) -> int | None:
        fd = os.open(self.path, _FLAGS, 0o600)
        try:
            fcntl.flock(fd, self.operation | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                return None
            raise
        return fd

    def restore(self) -> bool:
        """Make the file again if it was removed, by a cleaner of temporary files for instance.

        The lock stays that on the removed file if another process has locked a new one meanwhile.

        :raises OSError: from the file system
        :return: True if there is a new file
        """
        if not self.is_held or self.is_in_place():
            return False
        fd = self._lock_file()
        if fd is None:
            return False
        self.close()
        self._fd = fd
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
            self.close()

    def touch(self) -> None:
        """Set the time of the locked file to the present."""
        os.utime(self._fd)

    def write(self, data: bytes) -> None:
        """Replace what is in the locked file."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)

    def close(self) -> None:
        """Close the file; forks that have inherited it keep the lock."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
