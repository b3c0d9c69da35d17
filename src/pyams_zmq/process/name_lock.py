# SPDX-License-Identifier: ZPL-2.1
"""One live process per name."""

import logging

from pyams_zmq.process.lock_folder import UserLock, describe_folder_error
from pyams_zmq.process.socket_lock import SocketLock

LOGGER = logging.getLogger('PyAMS (zmq)')


class NameLock:
    """Reserves a name for this process, among all of this user and machine.

    It has a :class:`UserLock` and a :class:`SocketLock`: nobody can remove the socket, and others
    cannot be in the way of the file.

    :param name: any text
    :raises OSError: see :class:`UserLock`
    :ivar path: path of the file
    """

    def __init__(self, name: str):
        self._file_lock = UserLock(name)
        self.path = self._file_lock.path
        self._socket_lock = SocketLock(name)
        self._has_failed = False

    def acquire(self) -> bool:
        """Try to take the name; an error of the file system is logged once.

        :return: False if another process, or another lock of this one, has it
        """
        try:
            if not self._file_lock.acquire():
                return False
        except OSError as error:
            if not self._has_failed:
                LOGGER.error('A lock is held without its file: %s', describe_folder_error(error))
            self._has_failed = True
        if self._socket_lock.acquire():
            return True
        self._file_lock.release()
        return False

    def release(self) -> None:
        """Give the name back, if this object has it."""
        self._file_lock.release()
        self._socket_lock.release()
