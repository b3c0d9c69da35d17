# SPDX-License-Identifier: ZPL-2.1
"""Waiting for descriptors."""

import os
import time
from math import inf

from pyams_zmq.wire.poll import wait_readable


def test_wait_readable():
    reader, writer = os.pipe()
    try:
        start = time.monotonic()
        assert wait_readable([], 0.05) == set()
        assert wait_readable([reader], 0.05) == set()
        assert time.monotonic() - start >= 0.1
        os.write(writer, b'1')
        for timeout in (0, 1, None, inf, 1e9):
            assert wait_readable([reader], timeout) == {reader}
    finally:
        os.close(reader)
        os.close(writer)


def test_wait_readable_rounds_up():
    """Otherwise a wait would be repeated many times in its last millisecond."""
    start = time.monotonic()
    wait_readable([], 0.0101)
    assert time.monotonic() - start >= 0.0101
