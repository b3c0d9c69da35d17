# SPDX-License-Identifier: ZPL-2.1
"""The TCP port of the loopback interface at which the workers of a machine reach their broker."""

import socket as network
from secrets import token_hex
from typing import Any

from pyams_zmq.auth import Access

_USER = 'worker'
_HOST = '127.0.0.1'
_WORKER_CONNECTIONS = 4  # two for each worker, and two for the one that replaces it
_SPARE_CONNECTIONS = 16  # for statistics, and those that have ended a moment ago


class LocalSecret:
    """The credentials of the workers that a pool starts itself; its forks inherit them.

    :ivar auth: user and password (RFC 24/PLAIN)
    """

    def __init__(self) -> None:
        self.auth = f'{_USER}:{token_hex(32)}'

    def apply(self, socket: Any) -> None:
        """Let a socket connect with the credentials."""
        user, _colon, password = self.auth.partition(':')
        socket.plain_username, socket.plain_password = user.encode(), password.encode()

    def make_access(self) -> Access:
        """Return the access rules of the port."""
        return Access(self.auth, _HOST)


class LocalPort:
    """A listening TCP socket, which the supervisor of a pool opens and its brokers inherit.

    So a new broker has the port of the former one, and no other program can take it in between. It
    is not an ipc address: libzmq aborts the process when it accepts such a connection and no
    descriptor is free (`ipc_listener.cpp`); a program that has no access to the folder of the
    address cannot connect there, and here one without the secret is refused.

    :param secret: credentials of the workers
    :param workers: number of the workers
    :ivar uri: address in the form of libzmq
    :ivar max_connections: limit of its connections
    """

    def __init__(self, secret: LocalSecret, workers: int):
        self.secret = secret
        self.max_connections = workers * _WORKER_CONNECTIONS + _SPARE_CONNECTIONS
        self._socket = network.create_server((_HOST, 0), backlog=self.max_connections)
        # libzmq expects it: a peer may be gone before it is accepted.
        self._socket.setblocking(False)
        self.uri = f'tcp://{_HOST}:{self._socket.getsockname()[1]}'

    def fileno(self) -> int:
        """Return the descriptor of the listener."""
        return self._socket.fileno()

    def hand_over(self, socket: Any) -> None:
        """Let a ØMQ socket, which is bound to `uri` next, own the listener of this process."""
        socket.use_fd = self._socket.detach()

    def close(self) -> None:
        """Close the listener in this process; other processes that have inherited it keep it."""
        self._socket.close()
