# SPDX-License-Identifier: ZPL-2.1
"""What a job does in all queues: it writes to a log that it has begun, and that it has ended.

A module of a contender has `open_client()`, which returns a function that submits the job of a
number and returns when it is accepted. Its workers call `run`.
"""

import os
import time
from pathlib import Path

FOLDER = Path(os.environ.get('QUEUE_FOLDER', '.'))
SECONDS = float(os.environ.get('QUEUE_SECONDS', '0'))

BEGUN, ENDED = 'begun', 'ended'
WIDTH = 8
"""Bytes of a line: a number, and in the log of begun jobs the pid after it"""


def note(name, number):
    """Add a line to a log; other processes may do so at the same time."""
    fd = os.open(FOLDER / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f'{number:7}\n'.encode())
    os.close(fd)


def run(number):
    """Do the work of a job."""
    if SECONDS:
        note(f'{BEGUN}.{os.getpid()}', number)
        time.sleep(SECONDS)
    note(ENDED, number)
    return number


def read(path):
    """Return the numbers in a log."""
    try:
        return [int(line) for line in path.read_bytes().split()]
    except FileNotFoundError:
        return []
