# SPDX-License-Identifier: ZPL-2.1
"""Reading jobs, in the thread of the loop: each query is short."""

import sqlite3
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.job_replies import UNKNOWN_BEFORE
from pyams_zmq.jobs.records import COLUMNS, JobRecord

MAX_PAGE = 100
"""Jobs of the longest list"""

_SHORT = f'select {", ".join(COLUMNS)} from job'  # noqa: S608 - constants
_LONG = f'select {", ".join(COLUMNS)}, reply from job'  # noqa: S608 - constants
_STATE = 'select id, state, revision from job'
_BY_ID = 'where id = ?'
_BY_ALIAS = 'where number = (select number from alias where id = ?)'


class JournalReader:
    """Reads what has been committed, beside the thread that writes.

    All methods raise a ZMQMessageError with status 500 if the file cannot be read.

    :param db: a connection that only reads
    :ivar ahead: seconds by which the times in the file are ahead of the clock of the system
    """

    ahead = 0.0

    def __init__(self, db: sqlite3.Connection):
        self._db = db

    def get(self, job_id: str) -> JobRecord | None:
        """Return a job with its reply, or None.

        :param job_id: id of the job, or of a later submission with its key
        """
        found = self._find(_LONG, job_id)
        return JobRecord(*found[0]).set_back(self.ahead) if found else None

    def look(self, job_id: str) -> tuple[str, str, int] | None:
        """Return id, state and revision of a job, or None; its reply is not read.

        :param job_id: id of the job, or of a later submission with its key
        """
        found = self._find(_STATE, job_id)
        return tuple(found[0]) if found else None

    def _find(self, query: str, job_id: str) -> list[Any]:
        return self._query(f'{query} {_BY_ID}', job_id) or self._query(
            f'{query} {_BY_ALIAS}', job_id
        )

    def find_id(self, number: int) -> str:
        """Return the id of a job, empty if there is none."""
        found = self._query('select id from job where number = ?', number)
        return str(found[0][0]) if found else ''

    def page(
        self,
        state: str | None = None,
        type: str | None = None,  # noqa: A002 - the name of the field
        limit: int = MAX_PAGE,
        before: str | None = None,
    ) -> list[JobRecord]:
        """Return jobs without their replies, the newest ones first.

        :param state: state of the jobs, or None for all
        :param type: type of the jobs, or None for all
        :param limit: number of jobs, MAX_PAGE at most
        :param before: id of the last job of the page before, or None
        :raises ZMQMessageError: with status 404 if there is no job *before*
        """
        filters = {'state = ?': state, 'type = ?': type, 'number < ?': self._number(before)}
        given = {text: value for text, value in filters.items() if value is not None}
        where = f'where {" and ".join(given)}' if given else ''
        limit = max(0, min(limit, MAX_PAGE))
        found = self._query(f'{_SHORT} {where} order by number desc limit {limit}', *given.values())
        return [JobRecord(*row).set_back(self.ahead) for row in found]

    def running(self) -> list[JobRecord]:
        """Return the running jobs, the oldest one first."""
        found = self._query(f"{_SHORT} where state = 'running' order by number")
        return [JobRecord(*row).set_back(self.ahead) for row in found]

    def waiting_types(self) -> list[str]:
        """Return the types of the jobs that wait."""
        # The index is entered once for each type: `distinct` would read all jobs that wait.
        found = self._query(
            'with recursive found(type) as ('
            "select min(type) from job where state = 'waiting' union all "
            "select (select min(type) from job where state = 'waiting' and type > found.type) "
            'from found where found.type is not null) '
            'select type from found where type is not null'
        )
        return [name for (name,) in found]

    def last_time(self) -> float:
        """Return the time of the last event of which the time is known, as in the file, or 0."""
        [(seconds,)] = self._query(
            'select max('
            'coalesce((select created from job order by number desc limit 1), 0.0), '
            'coalesce((select max(max(started, coalesce(orphaned, 0.0))) from job '
            "where state = 'running'), 0.0), "
            'coalesce((select max(ended) from job where ended is not null), 0.0))'
        )
        return float(seconds)

    def _number(self, job_id: str | None) -> int | None:
        if job_id is None:
            return None
        found = self._query('select number from job where id = ?', job_id)
        if not found:
            raise ZMQMessageError(404, UNKNOWN_BEFORE)
        return int(found[0][0])

    def _query(self, query: str, *values: Any) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except (sqlite3.Error, ValueError, OverflowError) as error:
            raise ZMQMessageError(500, f'The journal cannot be read: {error}') from error
