# SPDX-License-Identifier: ZPL-2.1
"""What tests wait for, and what they check of this process."""

import json
import os
import time
from itertools import pairwise


def wait_until(condition, timeout=5):
    """Wait for a condition which no event announces; fail after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, 'it did not happen in time'
        time.sleep(0.01)  # a poll with a deadline, there is nothing to wait for


def open_fds():
    """Descriptors of this process, without the one that lists them."""
    return len(os.listdir('/proc/self/fd'))


def check_attempts(server, send_deadline):
    """Check what a silent ROUTER got of a call with one retry and a time-out of 0.6 seconds."""
    deadlines = []
    for _ in range(2):
        assert server.poll(5000)
        name, args, *options = json.loads(server.recv_multipart()[-1])
        assert (name, args) == ('who', 1)
        assert bool(options) == send_deadline
        deadlines += [option['deadline'] for option in options]
    assert not server.poll(100)  # a further attempt would have been before the end of the call
    assert all(later - former > 0.5 for former, later in pairwise(deadlines))
