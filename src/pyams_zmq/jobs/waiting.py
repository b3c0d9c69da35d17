# SPDX-License-Identifier: ZPL-2.1
"""Which of the jobs that wait begin next.

A job is ready as soon as it is due, whatever the clock says later. Delayed jobs are in an index of
their own, so that a claim does not read them. sqlite would choose other indexes, which lead to all
jobs that wait.
"""

import sqlite3
from collections.abc import Collection

PROMOTED_STEP = 1000
"""Delayed jobs that become ready at a time, at most"""


class WaitingJobs:
    """The jobs that wait.

    :param db: connection with the tables of :mod:`pyams_zmq.jobs.schema`
    """

    def __init__(self, db: sqlite3.Connection):
        self._db = db

    def promote(self, now: float) -> None:
        """Make delayed jobs ready that are due."""
        self._db.execute(
            'update job set ready = 1 where number in ('
            'select number from job indexed by job_delayed '
            "where state = 'waiting' and ready = 0 and due <= ? order by due limit ?)",
            (now, PROMOTED_STEP),
        )

    def find_ready(
        self, count: int, types: Collection[str]
    ) -> list[tuple[int, int, str, float | None]]:
        """Return the jobs that are next, in their order; those of other types are not read.

        :return: of each, the negative priority, number, id, and when it expires
        """
        found: list[tuple[int, int, str, float | None]] = []
        for name in types:
            found += self._db.execute(
                'select -priority, number, id, expires from job indexed by job_ready '
                "where state = 'waiting' and ready = 1 and type = ? "
                'order by priority desc, number limit ?',
                (name, count),
            )
        return sorted(found)[:count]

    def wait(self, now: float) -> float | None:
        """Return the seconds until a delayed job is due, or None."""
        (due,) = self._db.execute(
            "select min(due) from job indexed by job_delayed where state = 'waiting' and ready = 0"
        ).fetchone()
        return None if due is None else max(0.0, due - now)
