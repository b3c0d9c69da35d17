# SPDX-License-Identifier: ZPL-2.1
"""The file of a journal: where it may be, whose it is, and that one broker at a time uses it."""

import errno
import os
import re
import sqlite3
import stat
import time
from contextlib import suppress
from functools import partial
from urllib.parse import quote

from pyams_zmq.exceptions import ZMQJournalError
from pyams_zmq.process.file_lock import FileLock
from pyams_zmq.wire.clock import monotonic

BUSY_TIMEOUT = 5.0
"""Seconds to wait for another program, `sqlite3` for instance, that has locked the database"""

_RESERVE = 16 * 1024 * 1024  # bytes of the disk, or an eighth of it, for the ends of jobs
_LOCK_INTERVAL = 0.05  # seconds between two attempts to lock the file
_MODE = 0o600  # it contains arguments and results
_FLAGS = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_MOUNTINFO = '/proc/self/mountinfo'
_FIELDS = 10  # of a line of mountinfo, at least

# Their locks and their shared memory do not work between machines, or not at all: WAL needs both.
_NETWORK = re.compile(
    r'nfs\d*|cifs|smb\w*|ncpfs?|9p|afs|auristorfs|coda|ceph|gluster\w*|lustre|gpfs|beegfs\w*|'
    r'orangefs|pvfs2|ocfs2|gfs2|moosefs|mfs|acfs|vboxsf|prl_fs|vmhgfs|davfs\d*|'
    r'fuse\.(sshfs|ceph\S*|gluster\S*|s3\S*|rclone|davfs\d*|curlftpfs|gcsfuse|goofys|juicefs|'
    r'mfs\S*|moosefs|lizardfs|smb\S*|nfs\S*|vmhgfs-fuse|blobfuse\d*|seaweedfs|weed)'
)

# A damaged byte in the text of one job must not keep the others from being read.
_read_text = partial(str, encoding='utf-8', errors='replace')

_open_connections: set[sqlite3.Connection] = set()


def find_network_mount(mountinfo: str, path: str) -> tuple[str, str] | None:
    """Return mount point and type of the network file system that a path is on.

    :param mountinfo: text of `/proc/self/mountinfo`, see proc_pid_mountinfo(5)
    :param path: an absolute path without symbolic links
    :return: None if the file system is on this machine
    """
    found = ('', '')
    for line in mountinfo.splitlines():
        fields = line.split(' ')
        if len(fields) >= _FIELDS and '-' in fields[6:-1]:
            point = re.sub(r'\\([0-7]{3})', lambda match: chr(int(match[1], 8)), fields[4])
            is_above = f'{path}/'.startswith(f'{point.rstrip("/")}/')
            if is_above and len(point) >= len(found[0]):  # a later mount is above an earlier one
                found = point, fields[fields.index('-', 6) + 1]
    return found if _NETWORK.fullmatch(found[1]) else None


class JournalFile:
    """The file of a journal, locked for this process until it is closed or the process ends.

    The lock is on another file, `PATH.lock`: POSIX takes the locks of sqlite away when any
    descriptor of the database is closed.

    :param path: path of the file; what a symbolic link leads to is used
    :param lock_timeout: seconds to wait for a former broker that has not closed it yet
    :raises ZMQJournalError: if it cannot be used
    """

    def __init__(self, path: str, lock_timeout: float = 0.0):
        self.path = os.path.realpath(path)
        self._lock = FileLock(f'{self.path}.lock')
        try:
            self._check_folder()
            self._acquire(lock_timeout)
            self._identity = self._make()
        except OSError as error:
            self.close()
            raise ZMQJournalError(self.path, _explain(error)) from error
        except BaseException:
            self.close()
            raise

    def _check_folder(self) -> None:
        folder = os.path.dirname(self.path)
        with suppress(FileNotFoundError), open(_MOUNTINFO, 'rb') as file:  # a system without /proc
            # As text without an encoding: mount points are bytes.
            mount = find_network_mount(os.fsdecode(file.read()), folder)
            if mount is not None:
                raise ZMQJournalError(
                    self.path,
                    f'{mount[0]} is a network file system ({mount[1]}), on which a database can be '
                    'damaged: name a file on a disk of this machine',
                )
        if os.path.isdir(self.path):
            raise ZMQJournalError(self.path, 'it is a folder: name a file in it')
        if not os.path.isdir(folder):
            raise ZMQJournalError(self.path, f'the folder {folder} does not exist: make it')
        if not os.access(folder, os.W_OK | os.X_OK):  # for the files that sqlite makes beside it
            is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
            code = errno.EROFS if is_read_only else errno.EACCES
            raise OSError(code, os.strerror(code), folder)

    def _acquire(self, timeout: float) -> None:
        deadline = monotonic() + timeout
        while not self._lock.acquire():
            if monotonic() >= deadline:
                raise ZMQJournalError(
                    self.path,
                    'another broker uses it: stop that one, or name another file; two services '
                    'cannot share a journal',
                )
            time.sleep(_LOCK_INTERVAL)

    def _make(self) -> tuple[int, int]:
        """Make the file if it is missing, and close it to other users."""
        fd = os.open(self.path, _FLAGS, _MODE)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise ZMQJournalError(self.path, 'it is not a regular file: name another one')
            os.fchmod(fd, _MODE)
        finally:
            os.close(fd)
        for suffix in ('-wal', '-shm'):  # sqlite gives new ones the mode of the file
            with suppress(FileNotFoundError):
                os.chmod(self.path + suffix, _MODE)
        return found.st_dev, found.st_ino

    def connect(self, mode: str) -> sqlite3.Connection:
        """Open the database.

        A fork keeps what it inherits: to close it there is not allowed.

        :param mode: `rw`, or `ro` for a connection that only reads
        :raises sqlite3.Error: if it cannot be opened
        """
        uri = f'file:{quote(os.fsencode(self.path))}?mode={mode}'
        db = sqlite3.connect(
            uri,
            timeout=BUSY_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,  # one thread at a time uses it
            uri=True,
        )
        db.text_factory = _read_text
        _open_connections.add(db)
        return db

    @staticmethod
    def disconnect(db: sqlite3.Connection) -> None:
        """Close a connection."""
        db.close()
        _open_connections.discard(db)

    def check(self) -> None:
        """Check that the file is still at its path, and make its lock again if that was removed.

        :raises OSError: if it was removed or replaced: what is written would be lost
        """
        found = os.stat(self.path)
        if (found.st_dev, found.st_ino) != self._identity:
            raise FileNotFoundError(errno.ENOENT, 'it was replaced', self.path)
        self._lock.restore()

    def check_room(self) -> None:
        """Check that the disk has room for new jobs, and for what becomes of all jobs after that.

        :raises OSError: ENOSPC, if it has not
        """
        disk = os.statvfs(self.path)
        needed = min(_RESERVE, disk.f_blocks * disk.f_frsize // 8)
        with suppress(FileNotFoundError):  # the file grows by that, at most
            needed += os.stat(f'{self.path}-wal').st_size
        if disk.f_bavail * disk.f_frsize < needed and disk.f_blocks:
            raise OSError(errno.ENOSPC, f'less than {needed >> 10} KiB of its disk are free')

    def close(self) -> None:
        """Give the lock back. Calling it again has no effect."""
        self._lock.release()


def _explain(error: OSError) -> str:
    return (
        f'{error}; let this user own the file and be able to write to its folder, on a disk that '
        'is not full'
    )
