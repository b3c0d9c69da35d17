# SPDX-License-Identifier: ZPL-2.1
"""Removing jobs that have ended, in steps of some milliseconds."""

import sqlite3
from collections import Counter

from pyams_zmq.jobs.counts import Key

PRUNED_STEP = 100
"""Jobs that are removed in one transaction, at most"""

PRUNED_SIZE = 4 * 1024 * 1024
"""Bytes of messages and results after which no further job is removed in a transaction"""


def prune(db: sqlite3.Connection, before: float) -> tuple[Counter[Key], bool]:
    """Remove some jobs that ended before a time; in a transaction.

    :param before: time in the file, in seconds since the epoch
    :return: how many jobs of each type and state were removed, and True if there may be more
    """
    found = db.execute(
        'select number, type, state, coalesce(length(frames), 0) + coalesce(length(reply), 0) '
        'from job left join request using (number) where ended < ? order by ended limit ?',
        (before, PRUNED_STEP),
    ).fetchall()
    removed: Counter[Key] = Counter()
    numbers = []
    size = 0
    for number, job_type, state, length in found:
        if size > PRUNED_SIZE:
            break
        numbers.append((number,))
        removed[job_type, state] += 1
        size += length
    db.executemany('delete from job where number = ?', numbers)
    db.executemany('delete from request where number = ?', numbers)
    db.executemany('delete from alias where number = ?', numbers)
    return removed, len(found) == PRUNED_STEP or len(numbers) < len(found)
