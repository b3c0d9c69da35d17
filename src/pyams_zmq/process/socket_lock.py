# SPDX-License-Identifier: ZPL-2.1
"""A name without a file, which one process has."""

import logging
import os
import socket
import struct
from contextlib import suppress

from pyams_zmq.process.lock_folder import digest, identify_mounts
from pyams_zmq.wire.fork import close_in_forks

LOGGER = logging.getLogger('PyAMS (zmq)')

_BACKLOG = 4096  # connections of standbys, and of others, until the next refresh
_CREDENTIALS = struct.Struct('=iII')  # see SO_PEERCRED in unix(7): pid, user, group


class SocketLock:
    """Reserves a name without a file, among the processes of this user that have the same `/tmp`.

    A socket has the name in the abstract namespace, see unix(7), which is that of the network
    namespace. If a program of another user has it, to be in the way, the lock can be taken
    nevertheless. A standby keeps a connection to the holder, which ends with that.

    :param name: any text
    """

    def __init__(self, name: str):
        self._address = f'\0pyams_zmq-{os.geteuid()}-{digest(name + identify_mounts())}'.encode()
        self._socket: socket.socket | None = None
        self._holder: socket.socket | None = None  # connection to it
        self._has_warned = False
        self._pid = 0
        close_in_forks(self)

    def acquire(self) -> bool:
        """Try to take the name. Calling it again has no effect.

        :return: False if another process of this user, or another lock of this one, has it
        """
        if self._pid != os.getpid():
            self.close()
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
        self.close()
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
        is_ours = False
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
            is_ours = True
        except OSError:  # it has ended, or does not listen
            pass
        probe.close()
        return is_ours

    def release(self) -> None:
        """Give the name back, if this object has it; forks may have its socket."""
        if self._socket is not None and self._pid == os.getpid():
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._end_connections(self._socket)  # the socket of a fork would keep them
        self.close()

    def close(self) -> None:
        """Close the sockets; forks that have inherited them keep the name."""
        sockets = self._socket, self._holder
        self._socket = self._holder = None
        for each in sockets:
            if each is not None:
                each.close()
