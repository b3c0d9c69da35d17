# SPDX-License-Identifier: ZPL-2.1
"""The folder of the locks of a user, which other users cannot change."""

import errno
import hashlib
import os
import stat
import tempfile
from contextlib import suppress

from pyams_zmq.process.file_lock import FileLock

_FOLDER = '/tmp'  # noqa: S108 - not that of TMPDIR, which differs from program to program

_OTHER_FOLDERS = ('/tmp', '/var/tmp', '/usr/tmp')  # noqa: S108 - those that Python tries

_MOUNTS = '/proc/self/ns/mnt'


class UserLock(FileLock):
    """A lock on a file in the folder of the user, for a name.

    The folder is in `/tmp`, which does not depend on `TMPDIR`. The file is never removed: another
    process may have opened it, to lock it next.

    :param name: any text
    :raises OSError: from the file system; EACCES if the folder does not belong to this user, or is
        open to others
    """

    def __init__(self, name: str):
        super().__init__(os.path.join(_make_folder(), f'{digest(name)}.lock'))

    def acquire(self) -> bool:
        """Try to take the name.

        It touches its file, so that cleaners of temporary files do not remove it, and makes it
        again if it was removed nevertheless.

        :raises OSError: from the file system
        :return: False if another process, or another lock of this one, has it
        """
        _make_folder()
        self.restore()
        is_held = super().acquire()
        if is_held:
            self.touch()
        return is_held


def describe_folder_error(error: OSError) -> str:
    """Return why the locks of a user cannot be made, and the way out."""
    return (
        f'the folder of the locks cannot be used: {error}; let {_FOLDER} be a folder of root that '
        'is open to all (mode 1777), or set TMPDIR of all programs of the application to one that '
        'this user can write to'
    )


def identify_mounts() -> str:
    """Return what programs with the same `/tmp` have in common, and containers have not."""
    with suppress(OSError):
        found = os.stat(_FOLDER)
        return f' {found.st_dev}:{found.st_ino}'
    with suppress(OSError):
        return f' {os.readlink(_MOUNTS)}'
    return ''


def digest(name: str) -> str:
    """Return a name as hexadecimal digits, which any file or socket can have as name."""
    return hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()


def _make_folder() -> str:
    """Return the folder of this user, which is made if it is missing."""
    user = os.geteuid()
    folder = os.path.join(_shared_folder(), f'pyams_zmq-{user}')
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise PermissionError(
            errno.EACCES,
            'it must be a folder of this user, closed to other users: remove it',
            folder,
        )
    return folder


def _shared_folder() -> str:
    """Return a folder that all programs of the machine have, or else that for temporary files.

    In a folder of root with the sticky bit, no user can rename or remove what another one has made.
    """
    with suppress(OSError):
        found = os.stat(_FOLDER)
        is_safe = found.st_uid == 0 and found.st_mode & stat.S_ISVTX
        if is_safe and os.access(_FOLDER, os.W_OK | os.X_OK):
            return _FOLDER
    folder = tempfile.gettempdir()
    named = filter(None, map(os.environ.get, ('TMPDIR', 'TEMP', 'TMP')))
    if folder not in {*map(os.path.abspath, named), *_OTHER_FOLDERS} and os.path.samefile(
        folder, os.curdir
    ):  # Python falls back to the working folder, which differs between programs
        raise FileNotFoundError(errno.ENOENT, 'no folder for temporary files is writable', _FOLDER)
    return folder
