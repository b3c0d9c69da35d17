# SPDX-License-Identifier: ZPL-2.1
"""The socket file of an ipc address: who may connect to it."""

import grp
import os
import socket
import tempfile
from contextlib import suppress

MAX_MODE = 0o777

GROUP_MODE = 0o660
"""Mode of a file with a group, by default"""

_GROUP_BITS = 0o070
_NO_GROUP = 2**32 - 1


class NotInGroupError(PermissionError):
    """This user cannot give a file to a group of which it is not a member."""


def make_folder(mode: int) -> str:
    """Make a folder for the file of an address without a path, and return its path."""
    folder = tempfile.mkdtemp(prefix='pyams_zmq-')
    os.chmod(folder, mode)
    return folder


def check_mode(mode: int | str) -> int:
    """Check the mode of a file, and return it.

    :param mode: a number, or its octal digits as text
    :raises ValueError: if it is not a mode
    """
    with suppress(ValueError):
        number = int(mode, 8) if isinstance(mode, str) else mode
        if type(number) is int and 0 <= number <= MAX_MODE:
            return number
    raise ValueError(f'{mode!r} is not a file mode: write octal digits, 0660 for instance')


def find_group(group: int | str) -> int:
    """Return the id of a group.

    :param group: its name, or its id
    :raises ValueError: if the group does not exist
    """
    if type(group) is int and 0 <= group < _NO_GROUP:
        return group
    if isinstance(group, str):
        if group.isdecimal():
            return find_group(int(group))
        with suppress(KeyError):
            return grp.getgrnam(group).gr_gid
    raise ValueError(f'{group!r} is not a group of this machine')


def open_listener(path: str, mode: int | None, group: int | None, backlog: int) -> socket.socket:
    """Open a socket that listens at a path; a file there is replaced.

    The file is never open to more than *mode* and *group* say.

    :param path: path of the file
    :param mode: mode of the file, None for 0777 without the bits of the umask
    :param group: id of its group, None for that of the process
    :param backlog: connections that wait to be accepted
    :raises NotInGroupError: if this user is not a member of the group
    :raises OSError: from the file system
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.setblocking(False)  # libzmq expects it: a peer may be gone before it is accepted
        # Linux gives the file this mode at once, less the umask; its group is another one then.
        first = MAX_MODE if mode is None else mode
        os.fchmod(listener.fileno(), first if group is None else first & ~_GROUP_BITS)
        with suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(os.fsencode(path))
        try:
            if group is not None:
                _give(path, group)
            if mode is not None:
                os.chmod(path, mode)
            listener.listen(backlog)
        except BaseException:
            os.unlink(path)
            raise
    except BaseException:
        listener.close()
        raise
    return listener


def _give(path: str, group: int) -> None:
    try:
        os.chown(path, -1, group, follow_symlinks=False)
    except PermissionError as error:
        raise NotInGroupError(error.errno, error.strerror, path) from None
