# SPDX-License-Identifier: ZPL-2.1
"""The bound sockets of a server: limits, access, ipc locks, and what its forks inherit."""

import errno
import logging
import os
import re
import resource
import socket as network
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import ceil
from time import sleep
from typing import Any
from weakref import WeakKeyDictionary

import zmq

from pyams_zmq.auth import ZAP_DOMAIN, Access
from pyams_zmq.exceptions import ZMQBindError
from pyams_zmq.process.connections import Listener, open_null
from pyams_zmq.process.guard import ConnectionGuard
from pyams_zmq.process.ipc_file import (
    GROUP_MODE,
    NotInGroupError,
    check_mode,
    find_group,
    make_folder,
    open_listener,
)
from pyams_zmq.process.ipc_lock import IPCLock
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.context import (
    MAX_DESCRIPTORS,
    MAX_SUBSCRIPTION_SIZE,
    PUBLISHERS,
    check_descriptors,
)
from pyams_zmq.wire.keepalive import MAX_INT, keep_alive

LOGGER = logging.getLogger('PyAMS (zmq)')

LINGER = 1000
"""Milliseconds that a socket gets to send its last message"""

MAX_REPLIES = 100_000
"""Replies that wait to be sent, per peer whose bytes are counted. One more would be lost, and on a
loaded machine thousands wait until the I/O thread of libzmq runs again"""

SIZE_SLACK = 16 * 1024 * 1024
"""Bytes above `max_message_size` that still get the reply 413; beyond, the peer is disconnected"""

FILE_INTERVAL = 1.0
"""Seconds between two checks that the socket files of ipc addresses are still there"""

_RETRY_INTERVAL = 0.05
_ANY_PATH = '*'
_ZONE = re.compile(r'%[^]]+(?=]:\d+$)')  # of a link-local address: only libzmq returns it

_NOT_IN_GROUP = 'this user is not a member of ipc_group'
_FILE_OF_OTHERS = 'a file of another user is there, and this user may not remove it'

_ADVICE = {
    errno.EADDRINUSE: 'another process serves it, stop that one or choose another address',
    errno.EADDRNOTAVAIL: 'no interface of this machine has it',
    errno.ENODEV: 'it is neither an address nor an interface of this machine',
    errno.EEXIST: 'a file that is not a socket is there, remove it or choose another path',
    errno.EACCES: 'this user may not bind it',
    errno.ENOENT: 'its folder does not exist',
}


class SocketLimits:
    """Limits of the sockets of a server: class attributes, which a setting can override."""

    max_message_size: int = 16 * 1024 * 1024  #: Bytes of the largest message that is handled
    max_subscription_size: int = MAX_SUBSCRIPTION_SIZE  #: Bytes of a message to PUB and XPUB
    bind_timeout: float = 2.0  #: Seconds to wait, as a standby, for an address that is in use
    handshake_timeout: float = 5.0  #: Seconds until a peer without a handshake is disconnected
    heartbeat_interval: float = 5.0  #: Seconds of silence until the system checks that a host lives
    heartbeat_timeout: float = 5.0  #: Seconds until a host that does not answer is disconnected
    receive_hwm: int = 1000  #: Received messages that wait, per peer whose bytes are not counted
    receive_size: int = 64 * 1024 * 1024  #: Received bytes that wait, per peer
    send_hwm: int = 1000  #: Messages that wait to be sent, per peer whose bytes are not counted
    send_size: int = 64 * 1024 * 1024  #: Bytes that wait to be sent, per peer
    max_connections: int = 1000  #: Connections of an address; then idle ones are closed
    backlog: int = 100  #: Connections that wait to be accepted
    #: Mode of the socket file of an ipc address; None: 0777 without the bits of the umask, or 0660
    #: with `ipc_group`. Connecting needs the permission to write
    ipc_mode: int | None = None
    ipc_group: int | str | None = None  #: Name or id of the group of this file

    def apply_limits(self, socket: Any, max_size: int, *, counts: bool = False) -> None:
        """Set the options of a socket.

        :param max_size: bytes of a message above which libzmq disconnects the peer, -1 for no
            limit; a socket that receives subscriptions has `max_subscription_size` instead
        :param counts: true if the bytes that wait are counted. Then libzmq never stops reading: it
            aborts the process when it goes on with a connection that has ended meanwhile, if the
            peer has sent a heartbeat (`!_io_error`, libzmq issue 4841).
        """
        if socket.type in PUBLISHERS:
            max_size = self.max_subscription_size
        socket.linger = LINGER
        socket.maxmsgsize = min(max_size, sys.maxsize)
        socket.rcvhwm = 0 if counts else min(self.receive_hwm, MAX_INT)
        send_hwm = max(self.send_hwm, MAX_REPLIES) if counts else self.send_hwm
        socket.sndhwm = min(send_hwm, MAX_INT)
        socket.backlog = min(self.backlog, MAX_INT)
        socket.handshake_ivl = ceil(min(self.handshake_timeout * 1000, MAX_INT))
        keep_alive(socket, self.heartbeat_interval, self.heartbeat_timeout)


SOCKET_LIMITS = tuple(SocketLimits.__annotations__)
"""Names of the limits"""


class ServerSockets:
    """The bound sockets of one server, in the process that binds them.

    :param name: name of the server, for the log
    :param limits: its limits
    :param guard: watches the connections; None if the context does not have an authenticator
    :param before_retry: called before each further attempt to bind an address that is in use
    :ivar listeners: what the guard knows about each socket
    """

    def __init__(
        self,
        name: object,
        limits: SocketLimits,
        guard: ConnectionGuard | None = None,
        before_retry: Callable[[], None] = lambda: None,
    ):
        self._name = name
        self._limits = limits
        self._guard = guard
        self._before_retry = before_retry
        self._locks: dict[str, IPCLock] = {}
        self._folders: list[str] = []
        self._files: dict[str, _BoundFile] = {}
        self._uris: dict[Any, list[str]] = {}
        self.listeners: WeakKeyDictionary[Any, Listener] = WeakKeyDictionary()

    def bind(
        self,
        socket: Any,
        uri: str,
        access: Access,
        *,
        path: str | None = None,
        domain: bytes | None = ZAP_DOMAIN,
    ) -> str:
        """Bind a socket; wait up to `bind_timeout` for an address that is in use.

        :param uri: address, in the form of libzmq
        :param access: who may connect
        :param path: file of an ipc address, which gets locked
        :param domain: ZAP domain; None if the context does not have an authenticator
        :return: bound address, with the real port
        :raises ZMQBindError: it cannot be bound
        :raises ValueError: `ipc_mode` or `ipc_group` is not valid, or the address has no file
        """
        if domain is not None:
            access.protect(socket, domain)
        if self._guard is None or domain is None:
            return self._bind(socket, uri, access, path)
        if socket in self.listeners:
            bound = self._bind(socket, uri, access, path)
            self.listeners[socket].add_address(bound)
            return bound
        with self._guard.watch(socket, access) as add:
            bound = self._bind(socket, uri, access, path)
            self.listeners[socket] = add(bound)
        return bound

    def _bind(self, socket: Any, uri: str, access: Access, path: str | None) -> str:
        deadline = monotonic() + self._limits.bind_timeout
        is_closed = self._limits.ipc_mode is not None or self._limits.ipc_group is not None
        if is_closed and uri.startswith('ipc://@'):
            raise ValueError(
                f'{uri} has no file for ipc_mode and ipc_group: every user of the machine can '
                'connect to it; write the path of a file'
            )
        if path == _ANY_PATH:
            # Those who may connect must be able to enter it; the file says who they are.
            self._folders.append(make_folder(0o711 if is_closed else 0o700))
            path = f'{self._folders[-1]}/zmq'
            uri = f'ipc://{path}'
        lock = None if path is None else self._locks.get(path) or IPCLock(path)
        while True:
            try:
                if lock is not None:
                    lock.acquire()
                check_descriptors()
                self._bind_once(socket, uri, path)
                break
            except (OSError, zmq.ZMQError) as error:
                if lock is not None and lock.path not in self._locks:
                    lock.release()
                number = error.errno or 0
                if number == errno.ENODEV and not socket.ipv6:
                    socket.ipv6 = True  # an interface may have IPv6 addresses only
                    continue
                if number != errno.EADDRINUSE or monotonic() > deadline:
                    text, advice = zmq.strerror(number), _ADVICE.get(number)
                    if number == errno.EPERM and path is not None:
                        is_group = isinstance(error, NotInGroupError)
                        advice = _NOT_IN_GROUP if is_group else _FILE_OF_OTHERS
                    text = f'{text} ({advice})' if advice else text
                    raise ZMQBindError(number, text, uri) from None
            self._before_retry()
            sleep(_RETRY_INTERVAL)  # no event is sent when an address becomes free
        if lock is not None:
            self._locks[lock.path] = lock
            self._files[lock.path] = _BoundFile(socket, uri, lock.path)
        bound = os.fsdecode(socket.last_endpoint)
        self._uris = {key: uris for key, uris in self._uris.items() if not key.closed}
        self._uris.setdefault(socket, []).append(bound)
        access.warn_of_exposure(self._name, bound)
        return bound

    def _bind_once(self, socket: Any, uri: str, path: str | None) -> None:
        if path is None:
            socket.bind(os.fsencode(uri))
            return
        mode, group = self._limits.ipc_mode, self._limits.ipc_group
        if group is not None:
            group, mode = find_group(group), GROUP_MODE if mode is None else mode
        mode = None if mode is None else check_mode(mode)
        # libzmq would remove the file of a listener of its own when it closes that, see `restore`.
        with open_listener(path, mode, group, min(self._limits.backlog, MAX_INT)) as listener:
            socket.use_fd = os.dup(listener.fileno())
            try:
                socket.bind(os.fsencode(uri))
            finally:
                socket.use_fd = -1

    @property
    def has_files(self) -> bool:
        """True if an ipc address with a file was bound."""
        return bool(self._files)

    @property
    def has_lost_files(self) -> bool:
        """True if such a file was removed, or another program has replaced it."""
        return any(bound.is_missing for bound in self._files.values())

    def restore_files(self) -> bool:
        """Bind ipc addresses again whose file was removed, by a cleaner for instance; log that.

        :return: True if a socket was touched
        """
        is_touched = False
        for path, bound in list(self._files.items()):
            if not bound.is_missing:
                continue
            is_touched = True
            try:
                self._locks[path].acquire()
                new = bound.unbind_unused()
                self._bind_once(bound.socket, f'ipc://{new}', new)
            except (OSError, zmq.ZMQError) as error:
                if not bound.is_lost:
                    LOGGER.error(
                        '%s: the file of %s was removed, and no new client can connect, because it '
                        'cannot be made again: %s',
                        self._name,
                        bound.uri,
                        error,
                    )
                bound.is_lost = True
                continue
            bound.add(new)
            if bound.socket in self.listeners:
                self.listeners[bound.socket].add_address(f'ipc://{new}')
            LOGGER.error(
                '%s: the file of %s was removed, it is made again; let no program tidy its folder',
                self._name,
                bound.uri,
            )
        return is_touched

    @property
    def uris(self) -> list[str]:
        """Bound addresses, in the order of binding; those of closed sockets may be among them."""
        return [uri for uris in self._uris.values() for uri in uris]

    @property
    def local_uris(self) -> list[str]:
        """Names of the listeners in this process; some ipc paths are written in another way."""
        return [*self.uris, *(uri for bound in self._files.values() for uri in bound.listeners)]

    def uri_of(self, socket: Any) -> str | None:
        """Return the first bound address of a socket, None if it was not bound here."""
        return next(iter(self._uris.get(socket, ())), None)

    def release(self) -> None:
        """Release the locks of the ipc addresses, once the sockets are closed."""
        for lock in self._locks.values():
            lock.release()
        while self._folders:
            with suppress(OSError):
                os.rmdir(self._folders.pop())


class _BoundFile:
    """The file of an ipc address that was just bound.

    A listener whose file was removed may have connections, which would end with it. So libzmq gets
    another listener for the new file; its path is written in another way, as the former one cannot
    be unbound alone otherwise.

    :ivar is_lost: true if it was removed, and could not be made again
    :ivar listeners: addresses of the listeners, as libzmq knows them
    """

    def __init__(self, socket: Any, uri: str, path: str):
        self.socket, self.uri = socket, uri
        self.listeners: list[str] = []
        self._path = path
        self.add(path)

    def add(self, path: str) -> None:
        """Note that a listener was bound at the file.

        :param path: the path, as `unbind_unused` returned it
        """
        self.is_lost = False
        self.listeners.append(f'ipc://{path}')
        self._identity = self._identify()

    def unbind_unused(self) -> str:
        """Unbind the listeners without connections; return the path for another one."""
        found = [_inspect(fd) for fd in _possible_descriptors()]
        used = {names[0] for names, is_listening in found if names and not is_listening}
        for uri in set(self.listeners) - used:
            with suppress(zmq.ZMQError):
                self.socket.unbind(os.fsencode(uri))
            self.listeners.remove(uri)
        folder, slash, name = self._path.rpartition('/')
        paths = (f'{folder}{slash * number}{name}' for number in range(1, zmq.IPC_PATH_MAX_LEN))
        return next(path for path in paths if f'ipc://{path}' not in self.listeners)

    @property
    def is_missing(self) -> bool:
        """True if it is not at its path any more, although its socket is bound."""
        return not self.socket.closed and self._identify() != self._identity

    def _identify(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino


@contextmanager
def closed_on_error(socket: Any) -> Iterator[Any]:
    """Close a socket without linger if the block raises."""
    try:
        yield socket
    except BaseException:
        socket.close(0)
        raise


def close_inherited_listeners(
    kept: Collection[int] = (), uris: Collection[str] | None = None
) -> None:
    """Close listeners that a forked process has inherited, and the connections accepted by them.

    The fork can outlive its parent: no other process could bind the addresses, and the peers would
    keep connections that no process serves.

    :param kept: descriptors to leave open
    :param uris: addresses of the listeners, as libzmq returned them; None for all listeners
    """
    local_uris: dict[int, list[str]] = {}
    listening = set()
    for fd in _possible_descriptors():
        if fd not in kept:
            local_uris[fd], is_listening = _inspect(fd)
            if is_listening:
                listening.update(local_uris[fd][:1])
    closed = listening if uris is None else {_ZONE.sub('', uri) for uri in uris}
    replaced = [fd for fd, names in local_uris.items() if not closed.isdisjoint(names)]
    if replaced:
        null = open_null()
        for fd in replaced:
            # Not closed: objects of the parent would close the number when another file has it.
            os.dup2(null, fd)
        os.close(null)


def _possible_descriptors() -> Iterable[int]:
    """Return the numbers that open descriptors of this process have, and maybe others."""
    try:
        return [int(name) for name in os.listdir('/proc/self/fd')]
    except OSError:  # /proc is not mounted, or all descriptors are used
        soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return range(MAX_DESCRIPTORS if soft < 0 else min(soft, MAX_DESCRIPTORS))  # < 0: unlimited


def _inspect(fd: int) -> tuple[list[str], bool]:
    """Return the addresses that the listener of a socket can have, and whether it is a listener.

    :param fd: any descriptor; if it is not a bound socket, the list is empty
    """
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return [], False
        socket = network.socket(fileno=fd)
        try:
            if socket.type == network.SOCK_DGRAM:  # a port of UDP is another one
                return [], False
            name = socket.getsockname()
            is_listening = bool(socket.getsockopt(network.SOL_SOCKET, network.SO_ACCEPTCONN))
        finally:
            socket.detach()
    except OSError:  # closed meanwhile
        return [], False
    if isinstance(name, tuple):
        host, port = name[:2]
        hosts = (f'[{host}]' if ':' in str(host) else host, '0.0.0.0', '[::]')  # noqa: S104 - to compare
        return [f'tcp://{each}:{port}' for each in hosts], is_listening
    path = '@' + os.fsdecode(name[1:]) if isinstance(name, bytes) else name
    return ([f'ipc://{path}'] if path else []), is_listening
