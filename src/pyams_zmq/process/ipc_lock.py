# SPDX-License-Identifier: ZPL-2.1
"""One live process per ipc path."""

import errno
import os
import socket
import stat
from contextlib import suppress

from pyams_zmq.process.file_lock import FileLock


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
        self._lock.restore()
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


def _is_served(path: str) -> bool:
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # libzmq would remove it with its data
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) not in (errno.ENOENT, errno.ECONNREFUSED)
