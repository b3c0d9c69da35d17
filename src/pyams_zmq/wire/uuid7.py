# SPDX-License-Identifier: ZPL-2.1
"""Ids that grow with the time, for what a client makes and a server must not make twice.

Python 3.14 has them, and the packages that make them for older versions would be a dependency for
ten lines.
"""

import os
import threading
from uuid import UUID

from pyams_zmq.wire.clock import time
from pyams_zmq.wire.fork import ForkLocal

_RANDOM_BITS = 74
_LOW_BITS = 62
_VERSION, _VARIANT = 7 << 76, 0b10 << 62


class _Generator:
    """Makes the ids of one process; each is larger than the last, also if the clock goes back."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may need an id, too
        self._last = 0

    def make(self) -> UUID:
        fresh = int(time() * 1000) << _RANDOM_BITS | _random(_RANDOM_BITS)
        step = 1 + _random(64)  # large: nobody guesses the next id
        with self._lock:
            number = self._last = max(fresh, self._last + step)
        milliseconds, rest = divmod(number, 1 << _RANDOM_BITS)
        high, low = divmod(rest, 1 << _LOW_BITS)
        return UUID(int=milliseconds << 80 | _VERSION | high << 64 | _VARIANT | low)


def _random(bits: int) -> int:
    return int.from_bytes(os.urandom(10), 'big') >> (80 - bits)


_generator = ForkLocal(_Generator)


def make_uuid7() -> str:
    """Return a new UUID of version 7 (RFC 9562): 36 characters, which sort by time.

    Within a process they are monotonic (section 6.2, method 2), and nobody can guess them.
    """
    return str(_generator.get().make())
