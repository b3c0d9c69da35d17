# SPDX-License-Identifier: ZPL-2.1
"""Each change of the state of a job, in a transaction of its journal."""

import logging
import sqlite3
from collections import Counter
from collections.abc import Collection

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.counts import Key
from pyams_zmq.jobs.job_replies import UNKNOWN, refuse_result
from pyams_zmq.jobs.pruning import prune
from pyams_zmq.jobs.records import (
    CANCELLED,
    COLUMNS,
    DONE,
    ENDED,
    EXPIRED,
    FAILED,
    RUNNING,
    WAITING,
    Accepted,
    Cancelled,
    Claim,
    JobRecord,
    Pruned,
    Submission,
    pack_frames,
    unpack_frames,
)
from pyams_zmq.jobs.waiting import WaitingJobs
from pyams_zmq.wire.log_fields import extra
from pyams_zmq.wire.message import encode

LOGGER = logging.getLogger('PyAMS (zmq)')

MAX_REPLY_SIZE = 1024 * 1024
"""Bytes of the largest result of a job"""

MAX_ALIASES = 1000
"""Ids of later submissions that a job with a key has, at most; then the oldest one is forgotten"""

UNREADABLE = 'The message of the job is damaged in the journal: submit it again'
"""Text of the reply of a job that cannot begin"""

EXPIRED_STEP = 200
"""Jobs that expire, or cannot begin, in one transaction, at most"""

_CLAIMED = f'select {", ".join(COLUMNS)} from job where number = ?'  # noqa: S608 - constants


class JobTable:
    """The jobs, for those changes of one transaction at a time.

    Each change that raises leaves the transaction as it was before.

    :param db: connection with the tables of :mod:`pyams_zmq.jobs.schema`
    :ivar now: time of the transaction, in seconds since the epoch
    :ivar ahead: seconds by which that is ahead of the clock of the system
    :ivar delta: by how much it changes the number of jobs by type and state
    :ivar expired: ids of the jobs that it lets expire, or that fail without having begun
    :ivar size: bytes of messages and results that were written
    """

    now = 0.0
    ahead = 0.0

    def __init__(self, db: sqlite3.Connection):
        self._db = db
        self._waiting = WaitingJobs(db)
        self.delta: Counter[Key] = Counter()
        self.expired: list[str] = []
        self.size = 0

    def begin(self, now: float, ahead: float = 0.0) -> None:
        """Begin a transaction; the caller does it in the database.

        :param now: present time of the system, in seconds since the epoch
        :param ahead: seconds by which the times in the file are ahead of it
        """
        self.now, self.ahead = now + ahead, ahead
        self.delta.clear()
        self.expired = []

    @property
    def _revision(self) -> int:
        return int((self.now - self.ahead) * 1000)

    # What clients ask for

    def accept(self, job: Submission) -> Accepted:
        """Add a job, unless its id is known, or its key is that of an unfinished job.

        In the latter case its id becomes another name of that job, for those who know only it. Keys
        count for a type and a user: else one user could keep the jobs of another one away.

        :raises TypeError, ValueError, OverflowError, sqlite3.Error: if it cannot be written
        """
        frames = pack_frames(job.frames)
        wait = max(0.0, job.delay)
        cursor = self._db.execute(
            'insert into job(id, type, user, address, key, priority, ready, due, expires, retries, '
            'timeout, created, revision) select ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ? '
            'where not exists (select 1 from alias where id = ?) on conflict do nothing',
            (
                *(job.id, job.type, job.user, job.address, job.key, job.priority),
                not wait,
                self.now + wait if wait else None,
                None if job.expires is None else self.now + job.expires,
                *(job.retries, job.timeout, self.now, self._revision, job.id),
            ),
        )
        if cursor.rowcount:
            try:
                self._db.execute('insert into request values(?, ?)', (cursor.lastrowid, frames))
            except (sqlite3.DataError, OverflowError):  # too long for sqlite
                self._db.execute('delete from job where number = ?', (cursor.lastrowid,))
                raise
            self.size += len(frames)
            self.delta[job.type, WAITING] += 1
            return Accepted(job.id, True, wait)
        known, number = self._db.execute(
            'select id, number from job where id = ? union all '
            'select job.id, number from alias join job using (number) where alias.id = ? union all '
            'select id, number from job '
            'where type = ? and user = ? and key = ? and ended is null',
            (job.id, job.id, job.type, job.user, job.key),
        ).fetchone()
        if known != job.id:
            self._add_alias(job.id, number)
        return Accepted(known, False, wait)

    def _add_alias(self, job_id: str, number: int) -> None:
        self._db.execute('insert or ignore into alias(id, number) values(?, ?)', (job_id, number))
        self._db.execute(
            'delete from alias where row in ('
            'select row from alias where number = ? order by row desc limit -1 offset ?)',
            (number, MAX_ALIASES),
        )

    def cancel(self, job_id: str) -> Cancelled:
        """Cancel a job that waits; note the time of the request for one that runs.

        :raises ZMQMessageError: with status 404 if it is unknown, 409 if it has ended
        """
        number, state, attempt = self._find(job_id)
        if state in ENDED:
            raise ZMQMessageError(409, f'The job has ended, it is {state}')
        if state == WAITING:
            self._end(number, state, CANCELLED)
            return Cancelled(CANCELLED, number, attempt)
        self._db.execute(
            'update job set cancel = coalesce(cancel, ?) where number = ?', (self.now, number)
        )
        return Cancelled(RUNNING, number, attempt)

    def retry(self, job_id: str) -> str:
        """Let a job that has ended without success begin again, at once.

        :return: its state, `waiting`
        :raises ZMQMessageError: with status 404 if it is unknown, 409 if it is done, if it has not
            ended, and if another one with its key has not ended
        """
        number, state, _attempt = self._find(job_id)
        if state not in ENDED or state == DONE:
            raise ZMQMessageError(409, f'The job is {state}: only a job without success is retried')
        try:
            self._db.execute(
                "update job set state = 'waiting', ready = 1, due = null, expires = null, "
                'failures = 0, deaths = 0, ended = null, reply = null, '
                'revision = max(revision + 1, ?) where number = ?',
                (self._revision, number),
            )
        except sqlite3.IntegrityError:
            raise ZMQMessageError(409, 'Another job with its key has not ended') from None
        self._count(self._type_of(number), state, WAITING)
        return WAITING

    # What becomes of a job

    def claim(self, count: int, types: Collection[str], owner: str | None = None) -> Claim:
        """Let jobs begin: those with the highest priority, and of these the oldest ones.

        A job whose message cannot be read fails, and changes nothing for the others.

        :param count: number of jobs, at most
        :param types: types of the jobs; others wait
        :param owner: text that describes what runs them
        """
        jobs: list[JobRecord] = []
        limit = len(self.expired) + EXPIRED_STEP
        self._waiting.promote(self.now)
        while len(jobs) < count and len(self.expired) < limit:
            found = self._waiting.find_ready(count - len(jobs), types)
            if not found:
                return Claim(jobs, self._waiting.wait(self.now))
            for _priority, number, job_id, expires in found:
                if expires is not None and expires <= self.now:
                    self._expire(number, job_id)
                elif (frames := self._read_frames(number)) is None:
                    LOGGER.error(
                        'The message of the job %s in the journal is damaged',
                        job_id,
                        extra=extra(job=job_id),
                    )
                    self._end(number, WAITING, FAILED, encode([500, UNREADABLE]))
                    self.expired.append(job_id)
                else:
                    jobs.append(self._begin(number, owner, frames))
        return Claim(jobs, 0.0)

    def assign(self, number: int, attempt: int, owner: str) -> bool:
        """Note what runs an attempt, for the next broker; return False if it does not run.

        It has begun in time, so it does not expire any more.

        :param owner: any text
        """
        if self._state_of(number, attempt) != RUNNING:
            return False
        self._db.execute(
            'update job set owner = ?, orphaned = null, expires = null where number = ?',
            (owner, number),
        )
        return True

    def end(
        self,
        number: int,
        attempt: int,
        state: str,
        reply: bytes | None,
        failures: int | None = None,
        deaths: int | None = None,
        revision: int = 0,
    ) -> bool:
        """Record the end of a job.

        A success also counts if its attempt was given up, and the next one has not begun yet.

        :param state: `done`, `failed` or `cancelled`
        :param reply: JSON text of the reply, or None; if it is larger than MAX_REPLY_SIZE, the job
            has failed
        :param failures: new number of failed attempts, or None
        :param deaths: new weight of the attempts whose worker has died, or None
        :param revision: a revision that clients have seen, of a progress; the new one is higher
        :return: False if the attempt is not the last one, or the job has ended
        """
        former = self._state_of(number, attempt)
        if former is None or not (former == RUNNING or (former, state) == (WAITING, DONE)):
            return False
        if reply is not None and len(reply) > MAX_REPLY_SIZE:
            state, reply = FAILED, refuse_result(len(reply), MAX_REPLY_SIZE)
        self._end(number, former, state, reply, failures, deaths, revision)
        self.size += len(reply or b'')
        return True

    def change(
        self,
        number: int,
        attempt: int,
        delay: float = 0.0,
        failures: int | None = None,
        deaths: int | None = None,
        revision: int = 0,
    ) -> str | None:
        """Let a running job wait for another attempt.

        :param delay: seconds until it may begin
        :param failures: new number of failed attempts, or None
        :param deaths: new weight of the attempts whose worker has died, or None
        :param revision: a revision that clients have seen, of a progress; the new one is higher
        :return: its state: `waiting`; `cancelled`, if that was asked for; None if the attempt is
            not the last one, or does not run
        """
        if self._state_of(number, attempt) != RUNNING:
            return None
        query = 'select cancel from job where number = ?'
        if self._db.execute(query, (number,)).fetchone() != (None,):
            self._end(number, RUNNING, CANCELLED, None, failures, deaths, revision)
            return CANCELLED
        self._db.execute(
            "update job set state = 'waiting', ready = ?, due = ?, owner = null, orphaned = null, "
            'failures = coalesce(?, failures), deaths = coalesce(?, deaths), '
            'revision = max(revision + 1, ?) where number = ?',
            (
                delay <= 0,
                self.now + delay if delay > 0 else None,
                *(failures, deaths, max(self._revision, revision + 1), number),
            ),
        )
        self._count(self._type_of(number), RUNNING, WAITING)
        return WAITING

    def expire(self) -> bool:
        """End some of the jobs that may not begin any more; return True if there may be more."""
        found = self._db.execute(
            'select number, id from job indexed by job_expires '
            "where state = 'waiting' and expires <= ? limit ?",
            (self.now, EXPIRED_STEP),
        ).fetchall()
        for number, job_id in found:
            self._expire(number, job_id)
        return len(found) == EXPIRED_STEP

    # What happens to the whole journal

    def prune(self, age: float) -> Pruned:
        """Remove some of the jobs that have ended, the oldest ones first.

        :param age: seconds since their end, at least
        """
        removed, has_more = prune(self._db, self.now - age)
        self.delta.subtract(removed)
        return Pruned(removed.total(), has_more)

    def mark_orphans(self) -> None:
        """Note for the running jobs of a former broker since when they have none."""
        self._db.execute(
            "update job set orphaned = ? where state = 'running' and orphaned is null", (self.now,)
        )

    def _read_frames(self, number: int) -> list[bytes] | None:
        """Return the message of a job; None if it is damaged."""
        found = self._db.execute('select frames from request where number = ?', (number,))
        try:
            return unpack_frames(found.fetchone()[0])
        except (TypeError, ValueError):  # also if the row is missing
            return None

    def _begin(self, number: int, owner: str | None, frames: list[bytes]) -> JobRecord:
        self._db.execute(
            "update job set state = 'running', attempt = attempt + 1, started = ?, owner = ?, "
            'orphaned = null, cancel = null, '
            'revision = max(revision + 1, ?) where number = ?',
            (self.now, owner, self._revision, number),
        )
        row = self._db.execute(_CLAIMED, (number,)).fetchone()
        record = JobRecord(*[*row, None, frames])
        self._count(record.type, WAITING, RUNNING)
        return record.set_back(self.ahead)

    def _expire(self, number: int, job_id: str) -> None:
        self._end(number, WAITING, EXPIRED)
        self.expired.append(job_id)

    def _end(
        self,
        number: int,
        former: str,
        state: str,
        reply: bytes | None = None,
        failures: int | None = None,
        deaths: int | None = None,
        revision: int = 0,
    ) -> None:
        self._db.execute(
            'update job set state = ?, reply = ?, ended = ?, owner = null, orphaned = null, '
            'failures = coalesce(?, failures), deaths = coalesce(?, deaths), '
            'revision = max(revision + 1, ?) where number = ?',
            (state, reply, self.now, failures, deaths, max(self._revision, revision + 1), number),
        )
        self._count(self._type_of(number), former, state)

    def _find(self, job_id: str) -> tuple[int, str, int]:
        found: tuple[int, str, int] | None = self._db.execute(
            'select number, state, attempt from job where id = ?', (job_id,)
        ).fetchone()
        if found is None:
            raise ZMQMessageError(404, UNKNOWN)
        return found

    def _state_of(self, number: int, attempt: int) -> str | None:
        """Return the state of a job; None if the attempt is not its last one, or not begun."""
        found = self._db.execute(
            'select state from job where number = ? and attempt = ?', (number, attempt)
        ).fetchone()
        return None if found is None else found[0]

    def _type_of(self, number: int) -> str:
        found = self._db.execute('select type from job where number = ?', (number,))
        return str(found.fetchone()[0])

    def _count(self, job_type: str, former: str, state: str) -> None:
        self.delta[job_type, former] -= 1
        self.delta[job_type, state] += 1
