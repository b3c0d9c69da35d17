# SPDX-License-Identifier: ZPL-2.1
"""The clocks of the system, which tests that freeze the time of a program do not stop.

freezegun, for instance, replaces the functions of :mod:`time` in all modules: a loop that waits for
a deadline would never end, also in processes forked meanwhile.
"""

import time as clocks
from collections.abc import Callable
from functools import partial
from time import CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime

monotonic: Callable[[], float] = partial(clock_gettime, CLOCK_MONOTONIC)
"""Return the seconds of a clock that never goes back, as `time.monotonic` does"""

boottime: Callable[[], float] = partial(
    clock_gettime, getattr(clocks, 'CLOCK_BOOTTIME', CLOCK_MONOTONIC)
)
"""Return the seconds of a clock that never goes back, and goes on while the machine sleeps"""

time: Callable[[], float] = partial(clock_gettime, CLOCK_REALTIME)
"""Return the seconds since the epoch, as `time.time` does"""
