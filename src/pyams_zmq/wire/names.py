# SPDX-License-Identifier: ZPL-2.1
"""Host names that have IPv6 addresses only.

libzmq looks up IPv4 addresses of a name, or those of IPv6 if the socket has `zmq.IPV6`. With that
option it connects to no IPv4 address of a name that has both, `localhost` for instance. So a socket
gets it only for names without an IPv4 address, which libzmq does not find out.
"""

import socket as network
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from math import inf
from threading import Thread

from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.fork import ForkLocal

LOOKUP_TIMEOUT = 1.0
"""Seconds to wait for an answer, once; without one, a name counts as one of IPv4 until it comes"""

LIFETIME = 30.0
"""Seconds for which an answer is used"""

RETRY = 1.0
"""Seconds after which a name that was not found is looked up again"""

_MAX_NAMES = 1000
"""Names whose answer is remembered"""


class _Lookup(Thread):
    """Looks up a name, in a thread because that can take long.

    :param name: the name
    :param assumed: see below
    :ivar answer: gets True if the name has IPv6 addresses only
    :ivar assumed: what counts until the answer comes; None to wait for the answer
    :ivar is_found: true if the name was found
    :ivar expires: time from which on the answer is not used
    """

    def __init__(self, name: str, assumed: bool | None = None):
        super().__init__(name='pyams_zmq lookup', daemon=True)
        self._host = name
        self.assumed = assumed
        self.is_found = False
        self.answer: Future[bool] = Future()
        self.answer.set_running_or_notify_cancel()
        self.expires = inf

    def run(self) -> None:
        families, lifetime = set(), RETRY
        with suppress(OSError, UnicodeError):  # it is not found, or not the name of a host
            found = network.getaddrinfo(self._host, None, type=network.SOCK_STREAM)
            families, lifetime = {family for family, *_ in found}, LIFETIME
            self.is_found = True
        self.expires = monotonic() + lifetime
        self.answer.set_result(families == {network.AF_INET6})

    @property
    def is_awaited(self) -> bool:
        """True if the answer is worth waiting for."""
        return self.assumed is None and not self.answer.done()

    def get(self) -> bool:
        """Return the answer, or what counts until it comes."""
        return self.answer.result() if self.answer.done() else bool(self.assumed)

    def renew(self) -> '_Lookup':
        """Return another look-up of the name; until its answer comes, the last one counts.

        A name that was not found may be there now, so its answer is awaited, unless that took too
        long the last time.
        """
        return _Lookup(self._host, self.answer.result() if self.is_found else self.assumed)


_lookups: ForkLocal[dict[str, _Lookup]] = ForkLocal(dict)


def look_up(name: str) -> _Lookup:
    """Begin to look up a host name, unless its answer is known."""
    lookups = _lookups.get()
    lookup = lookups.get(name)
    if lookup is None or monotonic() >= lookup.expires:
        lookup = _Lookup(name) if lookup is None else lookup.renew()
        try:
            lookup.start()
        except RuntimeError:  # the limit of threads, or the end of the program
            lookup.answer.set_result(lookup.get())
            return lookup
        if len(lookups) >= _MAX_NAMES:
            lookups.clear()
        lookups[name] = lookup
    return lookup


def needs_ipv6(endpoint: Endpoint, timeout: float = LOOKUP_TIMEOUT) -> bool:
    """Return True if a socket needs `zmq.IPV6` to connect to an endpoint.

    :param timeout: seconds to wait for the answer about a host name; 0 to take what is known
    """
    if endpoint.name is None:
        return endpoint.is_ipv6
    lookup = look_up(endpoint.name)
    if timeout > 0 and lookup.is_awaited:
        try:
            lookup.answer.result(timeout)
        except FutureTimeoutError:
            lookup.assumed = False  # nobody waits for it again
    return lookup.get()
