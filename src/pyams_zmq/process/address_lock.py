# SPDX-License-Identifier: ZPL-2.1
"""One application per address."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress

from pyams_zmq.process.lock_folder import UserLock, describe_folder_error, digest
from pyams_zmq.wire.endpoint import ANY_HOST, Endpoint

LOGGER = logging.getLogger('PyAMS (zmq)')

UNLOCKED = 'The addresses of %s cannot be locked: another application may serve them, too; %s'
"""Log record: for the service of an application, and why"""

_UNKNOWN = 'an unknown program'  # one that has bound an address without a note
_NOTE_TIME = 0.01  # seconds
_IN_USE = 'in use'
_MAX_PROBLEM = 500  # characters


class _AddressPart(UserLock):
    """The lock of one name of an address, with a note that says whose the address is.

    :param name: name, see `_names_of`
    :param is_shared: True if other addresses may have the name at the same time
    :param key, description: see :class:`AddressLock`
    """

    def __init__(self, name: str, is_shared: bool, key: str, description: str):
        super().__init__(name)
        if is_shared:
            self.operation = fcntl.LOCK_SH
        self._key = digest(key)
        self._description = description
        self._is_in_use = False
        self._problem = ''
        self._seen: tuple[int, int, int] | None = None  # of a file that names this application

    def acquire(self) -> bool:
        """Try to take the name, and note whose it is."""
        was_held = self.is_held
        is_held = super().acquire()
        if is_held and not was_held:
            self._is_in_use, self._problem = False, ''
            self.write_note()
        return is_held

    def restore(self) -> bool:
        """Write the note again, too."""
        is_new = super().restore()
        if is_new:
            self.write_note()
        return is_new

    def write_note(self, is_in_use: bool | None = None, problem: str | None = None) -> None:
        """Note whose the address is, if this object has the lock.

        :param is_in_use: see :meth:`AddressLock.note_use`; None for no change
        :param problem: see :meth:`AddressLock.note_problem`; None for no change
        """
        if is_in_use is not None:
            self._is_in_use = is_in_use
        if problem is not None:
            self._problem = ' '.join(problem.split())[:_MAX_PROBLEM]
        if self.is_held:
            use = _IN_USE * self._is_in_use
            owner = f'{self._description}, process {os.getpid()}'
            text = f'{self._key}\n{use}\n{self._problem}\n{owner}'
            self.write(text.encode(errors='replace'))

    def read_problem(self) -> str:
        """Return why the process of this application cannot start, as its last holder noted."""
        with suppress(OSError), open(self.path, encoding='utf-8', errors='replace') as file:
            key, _use, problem, *_owner = [*file.read().split('\n'), '', '', '']
            if key == self._key:
                return problem
        return ''

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
                use, _newline, text = text.partition('\n')
                _problem, _newline, description = text.partition('\n')
                if key == self._key:
                    if use != _IN_USE:
                        self._seen = seen
                        return None
                    description = _UNKNOWN
                fcntl.flock(file.fileno(), operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return description or _UNKNOWN  # it is being written
        except OSError:  # no such file; or it cannot be known now
            pass
        return None


class AddressLock:
    """Reserves the addresses of a process for an application, among all of this user and machine.

    Two applications cannot have addresses that overlap, see :meth:`Endpoint.overlaps`.

    :param endpoints: addresses; the first is that of its clients
    :param key: identifies the application, the same for all its processes
    :param description: what a user knows the application by
    :raises OSError: see `UserLock`
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

    def note_problem(self, problem: str) -> None:
        """Note why the process cannot start, for its clients; empty if it has started.

        It has an effect while this object has the lock. The note stays when it is released.

        :param problem: text without a secret
        """
        for part in self._parts:
            part.write_note(problem=problem)

    def find_problem(self) -> str:
        """Return why the process of this application cannot start; empty if it is not known."""
        return next(filter(None, (part.read_problem() for part in self._parts)), '')

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

    An address of all interfaces needs the port alone; other hosts share the port. A port that the
    system chooses needs none.
    """
    bound = endpoint.bound
    if bound.protocol != 'tcp':
        return {f'address {bound}': False}
    if not bound.port:
        return {}
    ports = [f'{version} port {bound.port}' for version in ('IPv4', 'IPv6')]
    if bound.host == '[::]':
        return dict.fromkeys(ports, False)
    if bound.host == ANY_HOST:
        return {ports[0]: False}
    return {ports[bound.is_ipv6]: True, f'address {bound}': False}
