# SPDX-License-Identifier: ZPL-2.1
"""A program with a pool whose clock can be set: `python clock_service.py ADDRESS JOURNAL SHIFT`.

SHIFT is a file with the seconds by which the clock of all its processes is wrong.
"""

import sys
import time as system
from pathlib import Path

from pyams_zmq.wire import clock

ADDRESS, JOURNAL, SHIFT = sys.argv[1:]


def shifted_time():
    return system.time() + float(Path(SHIFT).read_text())


clock.time = shifted_time  # before others import it

from job_handlers import JobPool, Jobs  # noqa: E402 - behind the clock
from pyams_zmq.supervisor import Supervisor  # noqa: E402 - behind the clock


class ClockPool(JobPool):
    """Pool of the tests, with a journal."""

    journal = JOURNAL


if __name__ == '__main__':
    sys.exit(Supervisor({'jobs': lambda: ClockPool(ADDRESS, Jobs, workers=2)}).run())
