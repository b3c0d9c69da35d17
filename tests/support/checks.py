# SPDX-License-Identifier: ZPL-2.1
"""Waiting for a condition, and checks that several tests share."""

import json
import os
import time
from itertools import pairwise


def wait_until(condition, timeout=30):
    """Poll a condition that no event announces; fail after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f'not within {timeout} s'
        time.sleep(0.01)


def open_fds():
    """Return the number of open descriptors of this process."""
    return len(os.listdir('/proc/self/fd'))


def check_attempts(server, send_deadline):
    """Check what a ROUTER without replies receives of a call: two attempts within 0.6 s each."""
    deadlines = []
    for _ in range(2):
        assert server.poll(5000)
        name, args, *options = json.loads(server.recv_multipart()[-1])
        assert (name, args) == ('who', 1)
        assert bool(options) == send_deadline
        deadlines += [option['deadline'] for option in options]
    assert not server.poll(100)  # the call has ended: a further attempt would be here
    assert all(later - former > 0.5 for former, later in pairwise(deadlines))
