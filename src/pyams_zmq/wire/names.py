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
"""Seconds to wait for an answer; without one, a name counts as one of IPv4"""

LIFETIME = 30.0
"""Seconds for which an answer is used"""

RETRY = 1.0
"""Seconds after which a name that was not found is looked up again"""

_MAX_NAMES = 1000
"""Names whose answer is remembered"""


class _Lookup(Thread):
    """Looks up a name, in a thread because that can take long.

    :ivar answer: gets True if the name has IPv6 addresses only
    :ivar expires: time from which on the answer is not used
    """

    def __init__(self, name: str):
        super().__init__(name='pyams_zmq lookup', daemon=True)
        self._host = name
        self.answer: Future[bool] = Future()
        self.answer.set_running_or_notify_cancel()
        self.expires = inf

    def run(self) -> None:
        families, lifetime = set(), RETRY
        with suppress(OSError, UnicodeError):  # it is not found, or not the name of a host
            found = network.getaddrinfo(self._host, None, type=network.SOCK_STREAM)
            families, lifetime = {family for family, *_ in found}, LIFETIME
        self.expires = monotonic() + lifetime
        self.answer.set_result(families == {network.AF_INET6})


_lookups: ForkLocal[dict[str, _Lookup]] = ForkLocal(dict)


def look_up(name: str) -> 'Future[bool]':
    """Return the answer to the question if a host name has IPv6 addresses only.

    :return: the answer, which may come later
    """
    lookups = _lookups.get()
    lookup = lookups.get(name)
    if lookup is None or monotonic() >= lookup.expires:
        lookup = _Lookup(name)
        try:
            lookup.start()
        except RuntimeError:  # the limit of threads, or the end of the program
            lookup.answer.set_result(False)
            return lookup.answer
        if len(lookups) >= _MAX_NAMES:
            lookups.clear()
        lookups[name] = lookup
    return lookup.answer


def needs_ipv6(endpoint: Endpoint, timeout: float = LOOKUP_TIMEOUT) -> bool:
    """Return True if a socket needs `zmq.IPV6` to connect to an endpoint.

    :param timeout: seconds to wait for the answer about a host name
    """
    if endpoint.name is None:
        return endpoint.is_ipv6
    with suppress(FutureTimeoutError):
        return look_up(endpoint.name).result(timeout)
    return False
