# SPDX-License-Identifier: ZPL-2.1
"""One live process per ipc path, per name, or per address."""

import errno
import fcntl
import hashlib
import logging
import os
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from pyams_zmq.wire.endpoint import ANY_HOST, Endpoint

LOGGER = logging.getLogger('PyAMS (zmq)')

_FLAGS = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW

UNKNOWN = 'an unknown program'
"""Description of a program that has bound an address without a note"""

_NOTE_TIME = 0.01  # seconds
_IN_USE = 'in use'

_FOLDER = '/tmp'  # noqa: S108 - not that of TMPDIR, which differs from program to program

_OTHER_FOLDERS = ('/tmp', '/var/tmp', '/usr/tmp')  # noqa: S108 - those that Python tries

_MOUNTS = '/proc/self/ns/mnt'

LOCK_INTERVAL = 0.2
"""Seconds between two attempts of a standby to take a lock"""

LOCK_REFRESH = 10.0
"""Seconds after which the file of a lock is touched, and made again if it was removed"""

_BACKLOG = 4096  # connections of standbys, and of others, until the next refresh
_CREDENTIALS = struct.Struct('=iII')  # see SO_PEERCRED in unix(7): pid, user, group


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
            fd = self._lock_file()
            if fd is None:
                return False
            self._pid, self._fd = os.getpid(), fd
            if not self.is_in_place():  # its former holder has removed it just now
                self._close()
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
        self._close()
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
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_locks: WeakSet[Any] = WeakSet()


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


class _UserLock(FileLock):
    """A lock on a file in the folder of the user, for a name.

    The folder is in `/tmp`, which does not depend on `TMPDIR`. The file is never removed: another
    process may have opened it, to lock it next.

    :param name: any text
    :raises OSError: from the file system; EACCES if the folder does not belong to this user, or is
        open to others
    """

    def __init__(self, name: str):
        super().__init__(os.path.join(_user_folder(), f'{_digest(name)}.lock'))

    def acquire(self) -> bool:
        """Try to take the name.

        It touches its file, so that cleaners of temporary files do not remove it, and makes it
        again if it was removed nevertheless.

        :raises OSError: from the file system
        :return: False if another process, or another lock of this one, has it
        """
        _user_folder()
        self.restore()
        is_held = super().acquire()
        if is_held:
            os.utime(self._fd)
        return is_held


class SocketLock:
    """Reserves a name without a file, among the processes of this user that have the same `/tmp`.

    A socket has the name in the abstract namespace, see unix(7), which is that of the network
    namespace. If a program of another user has it, to be in the way, the lock can be taken
    nevertheless. A standby keeps a connection to the holder, which ends with that.

    :param name: any text
    """

    def __init__(self, name: str):
        self._address = f'\0pyams_zmq-{os.geteuid()}-{_digest(name + _identify_mounts())}'.encode()
        self._socket: socket.socket | None = None
        self._holder: socket.socket | None = None  # connection to it
        self._has_warned = False
        self._pid = 0
        _locks.add(self)

    def acquire(self) -> bool:
        """Try to take the name. Calling it again has no effect.

        :return: False if another process of this user, or another lock of this one, has it
        """
        if self._pid != os.getpid():
            self._close()
        if self._socket is None:
            return not self._has_live_holder() and self._bind()
        self._end_connections(self._socket)
        return True

    def _end_connections(self, own: socket.socket) -> None:
        """End the connections of standbys, which then connect again, and those of others."""
        with suppress(OSError):
            while True:
                own.accept()[0].close()

    def _has_live_holder(self) -> bool:
        """Return True if the connection to the holder has not ended."""
        if self._holder is None:
            return False
        try:
            self._holder.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            pass
        self._close()
        return False

    def _bind(self) -> bool:
        self._pid = os.getpid()
        for _attempt in range(2):  # its holder may have ended between the two questions
            own = socket.socket(socket.AF_UNIX)
            own.setblocking(False)
            try:
                own.bind(self._address)
                own.listen(_BACKLOG)
            except OSError:
                own.close()
            else:
                self._socket = own
                return True
            if self._is_ours():
                return False
        return True

    def _is_ours(self) -> bool:
        """Return True if a process of this user has the name, or that cannot be known now."""
        probe = socket.socket(socket.AF_UNIX)
        probe.setblocking(False)
        try:
            probe.connect(self._address)
            data = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(data)[1] == os.geteuid():
                self._holder = probe
                return True
        except BlockingIOError:  # too many connections wait: two holders would be worse than none
            if not self._has_warned:
                LOGGER.warning(
                    'A lock counts as held, because too many programs are connected to the '
                    'abstract socket %r: find them by "ss -xp"',
                    self._address[1:].decode(),
                )
            self._has_warned = True
            probe.close()
            return True
        except OSError:  # it has ended, or does not listen
            pass
        probe.close()
        return False

    def release(self) -> None:
        """Give the name back, if this object has it; forks may have its socket."""
        if self._socket is not None and self._pid == os.getpid():
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._end_connections(self._socket)  # the socket of a fork would keep them
        self._close()

    def _close(self) -> None:
        sockets = self._socket, self._holder
        self._socket = self._holder = None
        for each in sockets:
            if each is not None:
                each.close()


class NameLock(_UserLock):
    """Reserves a name for this process, among all of this user and machine.

    It locks a file, see `_UserLock`, and has a :class:`SocketLock`: nobody can remove that, and
    others cannot be in the way of the file.

    :param name: any text
    :raises OSError: see `_UserLock`
    """

    def __init__(self, name: str):
        super().__init__(name)
        self._socket_lock = SocketLock(name)
        self._has_failed = False

    def acquire(self) -> bool:
        """Try to take the name; an error of the file system is logged once.

        :return: False if another process, or another lock of this one, has it
        """
        try:
            if not super().acquire():
                return False
        except OSError as error:
            if not self._has_failed:
                LOGGER.error('A lock is held without its file: %s', describe_folder_error(error))
            self._has_failed = True
        if self._socket_lock.acquire():
            return True
        super().release()
        return False

    def release(self) -> None:
        """Give the name back, if this object has it."""
        super().release()
        self._socket_lock.release()


class _AddressPart(_UserLock):
    """The lock of one name of an address, with a note that says whose the address is.

    :param name: name, see `_names_of`
    :param is_shared: True if other addresses may have the name at the same time
    :param key, description: see :class:`AddressLock`
    """

    def __init__(self, name: str, is_shared: bool, key: str, description: str):
        super().__init__(name)
        if is_shared:
            self.operation = fcntl.LOCK_SH
        self._key = hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()
        self._description = description
        self._is_in_use = False
        self._seen: tuple[int, int, int] | None = None  # of a file that names this application

    def acquire(self) -> bool:
        """Try to take the name, and note whose it is."""
        was_held = self.is_held
        is_held = super().acquire()
        if is_held and not was_held:
            self.write_note(False)
        return is_held

    def restore(self) -> bool:
        """Write the note again, too."""
        is_new = super().restore()
        if is_new:
            self.write_note(self._is_in_use)
        return is_new

    def write_note(self, is_in_use: bool) -> None:
        """Note whose the address is, if this object has the lock.

        :param is_in_use: True if the application cannot bind the address, because another program
            has bound it
        """
        self._is_in_use = is_in_use
        if self.is_held:
            text = f'{self._key}\n{_IN_USE * is_in_use}\n{self._description}, process {os.getpid()}'
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, text.encode(errors='replace'), 0)

    def find_other_owner(self, operation: int) -> str | None:
        """Return the description of a program that has the address, and is not this application.

        :param operation: what its lock prevents, LOCK_SH or LOCK_EX
        """
        owner = self._read_other_owner(operation)
        if owner is None:
            return None
        time.sleep(_NOTE_TIME)  # a process that has just taken the address may not have noted it
        return self._read_other_owner(operation)

    def _read_other_owner(self, operation: int) -> str | None:
        description = ''
        try:
            found = os.stat(self.path)
            seen = (found.st_ino, found.st_mtime_ns, found.st_size)
            if seen == self._seen:
                return None
            with open(self.path, encoding='utf-8', errors='replace') as file:
                key, _newline, text = file.read().partition('\n')
                use, _newline, description = text.partition('\n')
                if key == self._key:
                    if use != _IN_USE:
                        self._seen = seen
                        return None
                    description = UNKNOWN
                fcntl.flock(file.fileno(), operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return description or UNKNOWN  # it is being written
        except OSError:  # no such file; or it cannot be known now
            pass
        return None


class AddressLock:
    """Reserves the addresses of a process for an application, among all of this user and machine.

    Two applications cannot have addresses that overlap, see :meth:`Endpoint.overlaps`.

    :param endpoints: addresses; the first is that of its clients
    :param key: identifies the application, the same for all its processes
    :param description: what a user knows the application by
    :raises OSError: see `_UserLock`
    """

    def __init__(self, endpoints: Sequence[Endpoint], key: str, description: str):
        self._description = description
        self._has_failed = False
        self.address = str(endpoints[0].bound)
        self._uris = {each.uri for endpoint in endpoints for each in (endpoint, endpoint.bound)}
        names = {name: shared for each in endpoints for name, shared in _names_of(each).items()}
        self._parts = [_AddressPart(*item, key, description) for item in sorted(names.items())]
        self._refused: _AddressPart | None = None

    def acquire(self) -> bool:
        """Try to take all addresses, and note whose they are; log an error of the file system once.

        :return: False if another process, or another lock of this one, has one of them
        """
        try:
            self._refused = next((part for part in self._parts if not part.acquire()), None)
        except OSError as error:
            if not self._has_failed:
                LOGGER.error(UNLOCKED, self._description, describe_folder_error(error))
            self._has_failed = True
            self._refused = None
        if self._refused is not None:
            self.release()
        return self._refused is None

    def release(self) -> None:
        """Give the addresses back."""
        for part in self._parts:
            part.release()

    def note_use(self, is_in_use: bool) -> None:
        """Note if another program has bound an address, so that clients do not call that one.

        It has an effect while this object has the lock.
        """
        for part in self._parts:
            part.write_note(is_in_use)

    def is_in_use(self, error: Exception | None) -> bool:
        """Return True if an error says that another program has bound one of the addresses."""
        return (
            isinstance(error, OSError)
            and error.errno == errno.EADDRINUSE
            and error.filename in self._uris
        )

    def find_other_owner(self) -> str | None:
        """Return the description of another program that has an address, or None.

        That is another application, or any program that has bound an address of this one. It takes
        2 µs for each address while this application has it.
        """
        if self._refused is not None:
            return self._refused.find_other_owner(self._refused.operation)
        for part in self._parts:
            owner = part.find_other_owner(fcntl.LOCK_SH)
            if owner is not None:
                return owner
        return None


def _names_of(endpoint: Endpoint) -> dict[str, bool]:
    """Return the names that an address needs, each with True if others may have it, too.

    An address of all interfaces needs the port alone; other hosts share the port.
    """
    bound = endpoint.bound
    if bound.protocol != 'tcp':
        return {f'address {bound}': False}
    ports = [f'{version} port {bound.port}' for version in ('IPv4', 'IPv6')]
    if bound.host == '[::]':
        return dict.fromkeys(ports, False)
    if bound.host == ANY_HOST:
        return {ports[0]: False}
    return {ports[bound.is_ipv6]: True, f'address {bound}': False}


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


def _identify_mounts() -> str:
    """Return what programs with the same `/tmp` have in common, and containers have not."""
    with suppress(OSError):
        found = os.stat(_FOLDER)
        return f' {found.st_dev}:{found.st_ino}'
    with suppress(OSError):
        return f' {os.readlink(_MOUNTS)}'
    return ''


UNLOCKED = 'The addresses of %s cannot be locked: another application may serve them, too; %s'
"""Log record: for the service of an application, and why"""


def describe_folder_error(error: OSError) -> str:
    """Return why the locks of a user cannot be made, and the way out."""
    return (
        f'the folder of the locks cannot be used: {error}; let {_FOLDER} be a folder of root that '
        'is open to all (mode 1777), or set TMPDIR of all programs of the application to one that '
        'this user can write to'
    )


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()


def _user_folder() -> str:
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


def _is_served(path: str) -> bool:
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # libzmq would remove it with its data
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) not in (errno.ENOENT, errno.ECONNREFUSED)
