# SPDX-License-Identifier: ZPL-2.1
"""What a person watches: only a terminal that can move its cursor shows it."""

import os
import sys


def is_live() -> bool:
    """Return True if the standard output is a terminal that can write over its lines."""
    if sys.stdout is None or not sys.stdout.isatty():
        return False
    return os.environ.get('TERM', 'dumb') != 'dumb'


def has_rich() -> bool:
    """Return True if rich is installed, the extra ``pyams_zmq[cli]``."""
    try:
        import rich.live  # noqa: F401, PLC0415 - an extra
    except ImportError:
        return False
    return True
