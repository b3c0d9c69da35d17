# SPDX-License-Identifier: ZPL-2.1
"""The rules of a ZAP handler, under the names of pyzmq's ThreadAuthenticator."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import RLock
from types import MappingProxyType
from typing import Any

from zmq.auth import CURVE_ALLOW_ANY
from zmq.auth.thread import ThreadAuthenticator

from pyams_zmq.auth.access import Access
from pyams_zmq.auth.credentials import Users
from pyams_zmq.auth.curve import read_keys
from pyams_zmq.auth.keys import AnyKey, AskedKeys
from pyams_zmq.auth.policy import ZAP_DOMAIN, AccessPolicy, parse_clients

LOGGER = logging.getLogger('PyAMS (zmq)')


class Rules(ThreadAuthenticator):
    """The rules of a ZAP handler, which act on its policies.

    They have the methods of :class:`zmq.auth.thread.ThreadAuthenticator`. Each of them takes effect
    at once, in any thread, before and after the start. What cannot be done raises an error; a rule
    is never ignored.

    A *domain* is the ZAP domain of sockets: `'*'`, or the name of their own domain, for those of a
    process; another name for sockets of your own that have this `zap_domain`.

    :param context: ØMQ context
    :param policy: policy of all ZAP domains that are not in `policies`
    :ivar policies: policies by ZAP domain
    :ivar log: logger of what this ZAP handler does
    """

    thread: Any
    pipe: Any
    zap_socket: Any

    def __init__(self, context: Any, policy: AccessPolicy):
        # Without the constructor of the base class: it assigns rules of its own.
        self.context = context
        self.policy = policy
        self.policies: dict[bytes, AccessPolicy] = {}
        self.log = LOGGER
        self._lock = RLock()
        self._has_allowed = False
        self.zap_socket = self.pipe = self.thread = None
        self.pipe_endpoint = f'inproc://pyams_zmq.authenticator-{id(self)}'

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if 'curve_user_id' in vars(cls):
            raise TypeError('A user of CURVE is its key: curve_user_id cannot be overridden')

    # Addresses

    def allow(self, *addresses: str) -> None:
        """Allow addresses, in addition to the `clients` of a process; all others are refused.

        :param addresses: addresses or networks, see :func:`parse_clients`
        :raises ValueError: for another address, for no address, and after `deny`
        """
        _check_addresses(addresses)
        with self._lock:
            if any(policy.denied for policy in self._all_policies):
                raise ValueError('Use allow or deny, not both')
            for policy in self._all_policies:
                policy.allow(*addresses)
            self._has_allowed = True

    def deny(self, *addresses: str) -> None:
        """Refuse addresses, also those in the `clients` of a process.

        :param addresses: addresses or networks, see :func:`parse_clients`
        :raises ValueError: for another address, for no address, and after `allow`
        """
        _check_addresses(addresses)
        with self._lock:
            if self._has_allowed:
                raise ValueError('Use allow or deny, not both')
            for policy in self._all_policies:
                policy.deny(*addresses)

    # Credentials

    def configure_plain(self, domain: str = '*', passwords: Users = None) -> None:
        """Let these users connect with PLAIN, instead of those that were configured before.

        Messages of other users are refused on open connections, too.

        :param passwords: passwords by user name, which can be changed later; or another value that
            :func:`parse_users` reads
        :raises ValueError: if the users are empty or cannot be parsed, or the peers of the domain
            need keys; also if the sockets of a process are bound without PLAIN: then all peers are
            refused
        """
        self._configure(domain, lambda policy: policy.require_users(passwords))

    def configure_curve(self, domain: str = '*', location: str | os.PathLike[str] = '.') -> None:
        """Let the clients with these public keys connect with CURVE, instead of former ones.

        Messages of other clients are refused on open connections, too. `reload` of the process
        reads the folder again.

        :param location: folder of `.key` files, or `CURVE_ALLOW_ANY` for all clients
        :raises ValueError: if no key is found, one cannot be read, or the peers of the domain need
            passwords; also if the sockets of a process are bound without CURVE: then all peers are
            refused
        """
        if location == CURVE_ALLOW_ANY:
            self._configure(domain, lambda policy: policy.require_keys(AnyKey()))
            return
        read = partial(read_keys, location)
        keys = read()
        self._configure(
            domain,
            lambda policy: (
                policy.require_keys(keys, read)
                if isinstance(policy, Access)
                else policy.require_keys(keys)
            ),
        )

    def configure_curve_callback(self, domain: str = '*', credentials_provider: Any = None) -> None:
        """Let the clients connect with CURVE whose public keys an object accepts.

        Messages of clients that it has not accepted are refused on open connections, too. All other
        handshakes wait until it returns.

        :param credentials_provider: object with a method ``callback(domain, key)``, where *domain*
            is that of this call, and *key* the public key (Z85, bytes); it returns true, or an
            awaitable of it, if the client may connect
        :raises TypeError: the object has no such method
        :raises ValueError: see `configure_curve`
        """
        keys = AskedKeys(domain, credentials_provider)
        self._configure(domain, lambda policy: policy.require_keys(keys))

    def configure_gssapi(self, domain: str = '*', location: str | None = None) -> None:
        """Raise a NotImplementedError: peers that use GSSAPI are refused."""
        raise NotImplementedError('GSSAPI is not supported: use PLAIN or CURVE')

    @property
    def passwords(self) -> Mapping[str, Mapping[str, str]]:  # type: ignore[override] # read-only
        """Passwords by domain and user name."""
        return self._by_domain(lambda policy: policy.users)

    @property
    def certs(self) -> Mapping[str, Mapping[bytes, bool]]:  # type: ignore[override] # read-only
        """Listed public keys of clients (Z85), by domain; each has the value True."""
        return self._by_domain(
            lambda policy: (
                MappingProxyType({key.encode(): True for key in policy.keys})
                if isinstance(policy.keys, frozenset)
                else None
            )
        )

    @property
    def credentials_providers(self) -> Mapping[str, Any]:  # type: ignore[override] # read-only
        """Objects that accept keys, by domain."""
        return self._by_domain(
            lambda policy: policy.keys.provider if isinstance(policy.keys, AskedKeys) else None
        )

    @property
    def allow_any(self) -> bool:  # type: ignore[override] # read-only
        """True if the clients of a process may have any key."""
        return isinstance(self.policy.keys, AnyKey)

    @property
    def encoding(self) -> str:  # type: ignore[override] # read-only
        """Encoding of user names and passwords."""
        return 'utf-8'

    def _by_domain(self, value_of: Callable[[AccessPolicy], Any]) -> Mapping[str, Any]:
        policies = {b'*': self.policy, **self.policies}
        values = {domain.decode(): value_of(policy) for domain, policy in policies.items()}
        return MappingProxyType({domain: value for domain, value in values.items() if value})

    @property
    def _all_policies(self) -> list[AccessPolicy]:
        return list({id(each): each for each in (self.policy, *self.policies.values())}.values())

    def _configure(self, domain: str, configure: Callable[[Any], None]) -> None:
        if not isinstance(domain, str):
            raise TypeError(f'Bad domain ({type(domain).__name__}): write a string')  # may be users
        key = domain.encode()
        with self._lock:
            policy = self.policy if domain in ('', '*') else self.policies.get(key)
            if policy is None and key == ZAP_DOMAIN:
                policy = self.policy
            if policy is None:
                policy = AccessPolicy({}, self.policy.networks, denied=self.policy.denied)
            configure(policy)
            if policy is not self.policy:
                self.policies[key] = policy


def _check_addresses(addresses: Sequence[str]) -> None:
    if not parse_clients(addresses):
        raise ValueError('Name at least one address')
