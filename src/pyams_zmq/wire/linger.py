# SPDX-License-Identifier: ZPL-2.1
"""How long a closed socket sends what it still has."""

CLOSE_LINGER = 1000
"""Milliseconds until a socket that is closed drops what it has not sent, at least.

libzmq 4.3.5 aborts the process if the connection of a socket ends just after that time, while a
message of several frames is half sent (`session_base.cpp`, `clean_pipes`). So its peer must have
time to end first: a program on a loaded machine may wait for a processor for a tenth of a second,
and then the thread of libzmq finds both at once.
"""


def lengthen(linger: int) -> int:
    """Return a linger period in milliseconds that is safe; -1 means for ever, as in libzmq."""
    return linger if linger < 0 else max(linger, CLOSE_LINGER)
