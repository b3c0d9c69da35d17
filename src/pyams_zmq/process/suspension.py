# SPDX-License-Identifier: ZPL-2.1
"""How a process finds out that it was suspended: by SIGSTOP, with its container or its machine."""

import resource
import sys

SUSPENDED = 1.0
"""Seconds by which a wait ends late from which on a process is considered to have been suspended"""

_MIN_SWITCH_INTERVAL = 0.005  # seconds, the default: a shorter one is not kept
_LATENCY = 4  # times its interval at most until a thread wakes up on a busy machine


def count_switches() -> int:
    """Return how often the present thread has given up the processor to wait."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def was_suspended(late: float, switches: int) -> bool:
    """Return True if this process was suspended while one of its threads waited.

    The wait also ends late if a native call holds the GIL. But a thread that waits for the GIL
    wakes up once in each switch interval to ask for it. In a suspended process it does not. The
    processor time tells less: on a busy machine a call that computes gets little of it, and one
    that sleeps with the GIL uses none.

    :param late: seconds by which the wait ended late
    :param switches: increase of `count_switches` during the wait
    """
    waited_for_gil = switches * max(sys.getswitchinterval(), _MIN_SWITCH_INTERVAL) * _LATENCY
    return late - waited_for_gil > SUSPENDED
