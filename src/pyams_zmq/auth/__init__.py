# SPDX-License-Identifier: ZPL-2.1
"""Who may connect.

libzmq asks one ZAP handler per context (RFC 27/ZAP) about each connection to a socket which has
a ZAP domain. :class:`AccessPolicy` decides, :class:`Authenticator` only runs it.
"""

import hmac
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from pyams_zmq.wire.frames import MORE, NOBLOCK, POLLIN, receive, send_frame

LOGGER = logging.getLogger('PyAMS (zmq)')

ZAP_DOMAIN = b'pyams_zmq'
ZAP_VERSION = b'1.0'
ZAP_ENDPOINT = 'inproc://zeromq.zap.01'

MAX_CREDENTIAL = 254
"""Bytes of a user name and of a password; RFC 24 allows one more, which pyzmq does not read back"""

_LOCALHOST = ('127.0.0.0/8', '::1')

ANONYMOUS = 'anonymous'
"""User of a peer that had no credentials to present"""

Network = IPv4Network | IPv6Network
Users = str | Sequence[str] | Mapping[str, str] | os.PathLike[str] | None


class Verdict(NamedTuple):
    """Answer to a connection: a status and a text of RFC 27, and the user who connected."""

    status: bytes
    text: bytes
    user: str = ''


class Peer(NamedTuple):
    """Who sent a message.

    :ivar user: name of a PLAIN user, public key (Z85) of a CURVE client, else `anonymous`
    :ivar address: IP address; for ipc `localhost`, user, group and process id, with colons
    """

    user: str
    address: str


def parse_users(auth: Users) -> dict[str, str]:
    """Read the users that may connect with PLAIN.

    :param auth: `'user:password'`, where the password may contain colons; several as the lines
        of a text, a sequence, a mapping of users to passwords, or a file (a path object) whose
        empty lines and lines with `#` in front are skipped; None for no user
    :return: passwords by user name
    :raises ValueError: for anything else; its text does not repeat a secret
    """
    if auth is None or auth == '':
        return {}
    where = f' in {os.fspath(auth)!r}' if isinstance(auth, os.PathLike) else ''
    if isinstance(auth, Mapping):
        users = dict(auth)
    else:
        pairs = [
            line.partition(':') if isinstance(line, str) else ('', '', '') for line in _lines(auth)
        ]
        users = {user: password for user, _colon, password in pairs}
        if len(users) < len(pairs):
            raise ValueError(f'Bad credentials{where}: a user is there twice')
    if not users or not all(
        _is_credential(text) for credentials in users.items() for text in credentials
    ):
        raise ValueError(
            f"Bad credentials{where}: write auth='user:password', each of 1 to {MAX_CREDENTIAL} "
            'bytes, or several of them'
        )
    return users


def _lines(auth: Any) -> Sequence[Any]:
    if isinstance(auth, os.PathLike):
        path = os.fspath(auth)
        try:
            auth = Path(path).read_text('utf-8-sig')
        except (OSError, ValueError) as error:
            reason = getattr(error, 'strerror', None) or 'it is not UTF-8, or has a bad name'
            raise ValueError(f'Credentials file {path!r}: {reason}') from None
        lines = [line.removesuffix('\r') for line in auth.split('\n')]
        return [line for line in lines if line.strip() and not line.lstrip().startswith('#')]
    if isinstance(auth, str):
        # One user is taken literally: a password may have blanks around it.
        return (
            [line for line in map(str.strip, auth.split('\n')) if line and line[0] != '#']
            if '\n' in auth
            else [auth]
        )
    return auth if isinstance(auth, Sequence) and not isinstance(auth, bytes) else ()


def _is_credential(text: Any) -> bool:
    try:
        return 0 < len(text.encode()) <= MAX_CREDENTIAL
    except (AttributeError, UnicodeEncodeError):  # whose text would show the secret
        return False


def parse_clients(clients: str | Iterable[str] | None) -> tuple[Network, ...]:
    """Read the addresses that may connect.

    :param clients: string of IPv4 or IPv6 addresses or networks, separated by blanks, commas or
        lines, or a sequence of them; `localhost` stands for all loopback addresses
    :return: networks; empty when everybody may
    :raises ValueError: for anything else, a host name for instance; its text quotes it
    """
    if isinstance(clients, str):
        clients = clients.replace(',', ' ').split()
    elif clients is not None and not isinstance(clients, Iterable):
        clients = [clients]
    networks: list[Network] = []
    for client in clients or ():
        try:
            names = _LOCALHOST if client == 'localhost' else (client,)
            networks.extend(_parse_network(str(name)) for name in names)
        except ValueError:
            raise ValueError(
                f'Bad client address {client!r}: write IPv4 or IPv6 addresses, networks as '
                f"10.0.0.0/8, or 'localhost'"
            ) from None
    return tuple(networks)


def _parse_network(text: str) -> Network:
    if '%' in text:
        raise ValueError('a network has no zone, it would hold for all interfaces')
    network = ip_network(text)
    address = network.network_address
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return network if mapped is None else IPv4Network((mapped, max(0, network.prefixlen - 96)))


class AccessPolicy:
    """Decides who may connect; does no input nor output.

    :param users: passwords by user name; empty for no PLAIN
    :param networks: networks of the peers; empty for all of them
    :param keys: public keys (Z85) of the clients; empty for no CURVE
    """

    def __init__(
        self, users: Mapping[str, str], networks: Sequence[Network], keys: Collection[str] = ()
    ):
        self.users = users
        self.networks = networks
        self.keys = keys

    def check(self, address: str, mechanism: bytes, credentials: Sequence[bytes]) -> Verdict:
        """Give the verdict on one connection.

        :param address: IP address of the peer; of an ipc peer libzmq says something else, and
            it is taken as local
        :param mechanism: NULL, PLAIN or CURVE
        :param credentials: what the mechanism carries: user name and password for PLAIN, the
            public key for CURVE
        """
        if self.networks and not self._is_allowed(address):
            return Verdict(b'400', b'Address not allowed')
        user = self._authenticate(mechanism, credentials)
        if user is None:
            return Verdict(b'400', b'Bad credentials')
        return Verdict(b'200', b'OK', user)

    def admits(self, user: str) -> bool:
        """Tell if a user who was let in would still be, as far as the name or key goes."""
        return user in self.users or user in self.keys or not (self.users or self.keys)

    def _authenticate(self, mechanism: bytes, credentials: Sequence[bytes]) -> str | None:
        if mechanism != (b'CURVE' if self.keys else b'PLAIN' if self.users else b'NULL'):
            return None
        if mechanism == b'NULL':
            return ANONYMOUS
        if mechanism == b'CURVE':
            [key] = credentials
            user = z85.encode(key).decode()
            return user if user in self.keys else None
        name, password = credentials
        user = name.decode()
        expected = self.users.get(user)
        # An unknown user takes as long as a wrong password.
        equal = hmac.compare_digest((expected or '').encode(), password)
        return user if equal and expected is not None else None

    def _is_allowed(self, address: str) -> bool:
        if address.startswith('localhost:'):  # an ipc peer, with uid, gid and pid
            address = '127.0.0.1'
        peer = ip_address(address.partition('%')[0])
        if isinstance(peer, IPv6Address) and peer.ipv4_mapped is not None:
            peer = peer.ipv4_mapped
        return any(peer in network for network in self.networks)


class Authenticator(ThreadAuthenticator):
    """ZAP handler of a context: asks a policy, in a thread of its own.

    :param context: ØMQ context
    :param policy: it decides
    :param enter: called first in the thread
    :ivar policies: policies of ZAP domains that have their own, by domain
    """

    thread: Any
    pipe: Any

    def __init__(
        self, context: Any, policy: AccessPolicy, enter: Callable[[], None] = lambda: None
    ):
        super().__init__(context, log=LOGGER)
        self.policy = policy
        self.policies: dict[bytes, AccessPolicy] = {}
        self._enter = enter

    def start(self) -> None:
        """Start the thread.

        It polls: the thread of the base class runs an asyncio loop, which takes longer to wake up
        than a whole handshake.
        """
        super(ThreadAuthenticator, self).start()
        self.pipe = self.context.socket(zmq.PAIR)
        self.pipe.linger = 1
        self.pipe.bind(self.pipe_endpoint)
        self.thread = Thread(target=self._run, name='pyams_zmq authenticator', daemon=True)
        try:
            self.thread.start()
        except RuntimeError:  # no more threads; a stop would wait for this one
            self.pipe.close()
            self.pipe = None
            raise

    def _run(self) -> None:
        self._enter()
        with self.context.socket(zmq.PAIR) as pipe:
            pipe.connect(self.pipe_endpoint)
            while True:
                try:
                    return self._serve(pipe)
                except BaseException as error:  # noqa: BLE001 - else nobody could connect
                    _log(
                        logging.CRITICAL,
                        'Access control died (%s), it starts again; until then nobody gets in',
                        type(error).__name__,
                    )
                # It owes libzmq a reply, without which the connection in question is not let in.
                # Only unbinding gives the endpoint back at once.
                self.zap_socket.unbind(ZAP_ENDPOINT)
                self.zap_socket.close(0)
                super(ThreadAuthenticator, self).start()

    def _serve(self, pipe: Any) -> None:
        socket: Any = self.zap_socket
        sockets = [(pipe, POLLIN), (socket, POLLIN)]
        while pipe not in dict(zmq.zmq_poll(sockets)):
            msg = receive(socket)
            if msg is not None:
                *frames, last = self.answer(msg)
                for frame in frames:
                    send_frame(socket, frame, MORE)
                send_frame(socket, last, NOBLOCK)

    def answer(self, msg: list[bytes]) -> list[bytes]:
        """Turn a request of libzmq into the reply; anything unforeseen is a no."""
        try:
            _version, _id, domain, address, _identity, mechanism, *credentials = msg
            policy = self.policies.get(domain, self.policy)
            status, text, name = policy.check(address.decode(), mechanism, credentials)
            user = name.encode()
        except Exception as error:  # noqa: BLE001 - its text might repeat the credentials
            status, text, user = b'500', b'Access control failed', b''
            _log(logging.ERROR, 'Access control failed (%s)', type(error).__name__)
        if status != b'200':
            said = b' '.join([*msg[3:4], text]).decode(errors='replace')  # address and reason
            _log(logging.INFO, 'Connection refused: %s', said)
        return [ZAP_VERSION, msg[1], status, text, user, b'']


def _log(level: int, text: str, argument: str) -> None:
    with suppress(Exception):  # a broken log would end the thread, and with it all handshakes
        LOGGER.log(level, text, argument)
