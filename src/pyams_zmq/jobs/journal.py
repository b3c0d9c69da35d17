# SPDX-License-Identifier: ZPL-2.1
"""The journal: jobs on disk."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pyams_zmq.exceptions import ZMQJournalError, ZMQMessageError
from pyams_zmq.jobs import schema
from pyams_zmq.jobs.counts import JobCounts
from pyams_zmq.jobs.job_table import JobTable
from pyams_zmq.jobs.journal_file import JournalFile
from pyams_zmq.jobs.reader import JournalReader
from pyams_zmq.jobs.upkeep import PRAGMAS, Upkeep
from pyams_zmq.wire.clock import monotonic, time
from pyams_zmq.wire.job_limits import JOURNAL_SIZE
from pyams_zmq.wire.message import check_timeout

KEEP = 7 * 86400.0
"""Seconds that ended jobs are kept, by default"""

CLOCK_SLACK = 0.5
"""Seconds by which the clock has to be set, to be noticed"""

_CHECK_TIME = 1.0  # seconds for the check of a large file
_CHECK_STEPS = 10_000  # instructions of sqlite between two looks at the clock


class Journal:
    """The jobs of a service, in a sqlite file that one broker at a time uses.

    One thread at a time uses it, beside another one with the `reader`. Open it in the process that
    uses it: neither connections to sqlite nor locks may go through a fork.

    Its times go on as if the clock of the system had never been set: the file says by how much
    they are ahead of that.

    :param path: path of the file, which is made if it is missing
    :param keep: seconds that ended jobs are kept
    :param size: bytes of jobs above which no further ones are accepted; 0 for no limit
    :param lock_timeout: seconds to wait for a former broker that has not closed the file yet
    :param now: present time, in seconds since the epoch, by default that of the system
    :ivar path: path of the file, without symbolic links
    :ivar reader: reads jobs in the thread of the loop
    :ivar counts: the :class:`~pyams_zmq.jobs.counts.JobCounts`, as of the last transaction
    :raises ZMQJournalError: if the file cannot be used
    :raises ValueError: for a bad *keep*
    """

    def __init__(
        self,
        path: str,
        keep: float = KEEP,
        *,
        size: int = JOURNAL_SIZE,
        lock_timeout: float = 0.0,
        now: float | None = None,
    ):
        self._size = size
        try:
            self.keep = check_timeout(keep)
        except ValueError:
            raise ValueError(f'Bad keep {keep!r}: write a number of seconds above 0') from None
        self._connections: list[sqlite3.Connection] = []
        self._is_full: bool | None = None
        self._file = JournalFile(path, lock_timeout)
        self.path = self._file.path
        try:
            self._db = self._connect('rw')
            self._open(time() if now is None else now)
        except (sqlite3.Error, OSError, ZMQMessageError) as error:
            self.close()
            raise ZMQJournalError(self.path, _explain(error)) from error
        except BaseException:
            self.close()
            raise

    def _connect(self, mode: str) -> sqlite3.Connection:
        db = self._file.connect(mode)
        self._connections.append(db)
        return db

    def _open(self, now: float) -> None:
        db = self._db
        if schema.check(db, self.path):
            db.execute('pragma auto_vacuum = incremental')  # writes, which a full disk refuses
        self._check_content()
        for pragma in PRAGMAS:
            db.execute(pragma)
        (mode,) = db.execute('pragma journal_mode = wal').fetchone()
        if mode != 'wal':
            raise ZMQJournalError(
                self.path, 'its file system has no shared memory: name a file on another disk'
            )
        schema.migrate(db)
        self._jobs, self._upkeep = JobTable(db), Upkeep(db)
        found = db.execute('select type, state, count(*) from job group by state, type')
        self.counts = JobCounts({(name, state): number for name, state, number in found})
        self.reader = JournalReader(self._connect('ro'))
        (self._ahead,) = db.execute('select coalesce(max(ahead), 0.0) from clock').fetchone()
        ahead = self.reader.last_time() - now  # more than that, if the clock was set back
        self.ahead = ahead if ahead > self._ahead + CLOCK_SLACK else self._ahead
        # On a full disk, the service has to start: it answers calls, and the writer tries again.
        with suppress(sqlite3.OperationalError), self.transaction(now, is_durable=False) as jobs:
            jobs.mark_orphans()

    @property
    def ahead(self) -> float:
        """Seconds by which the times in the file are ahead of the clock of the system.

        The next transaction writes a new value.
        """
        return self.reader.ahead

    @ahead.setter
    def ahead(self, seconds: float) -> None:
        self.reader.ahead = seconds

    def _check_content(self) -> None:
        """Check the pages of the file, as many as can be checked in a second."""
        deadline = monotonic() + _CHECK_TIME
        self._db.set_progress_handler(lambda: monotonic() > deadline, _CHECK_STEPS)
        try:
            (found,) = self._db.execute('pragma quick_check(1)').fetchone()
        except sqlite3.OperationalError as error:
            if str(error) != 'interrupted':
                raise
        else:
            if found != 'ok':
                raise sqlite3.DatabaseError(found.splitlines()[-1])
        finally:
            self._db.set_progress_handler(None, 0)

    def close(self) -> None:
        """Close the file and give it back. Calling it again has no effect; a fork must not call it.

        The thread that writes must have ended.
        """
        while self._connections:
            self._file.disconnect(self._connections.pop())  # the one that writes is the last one
        self._file.close()

    @contextmanager
    def transaction(self, now: float, is_durable: bool = True) -> Iterator[JobTable]:
        """Write all changes of the block, or none of them if it raises.

        :param now: present time of the system, in seconds since the epoch
        :param is_durable: False if the last changes may be lost when the machine, and not only this
            process, ends suddenly
        :raises sqlite3.Error, OSError: if they cannot be written
        """
        db, jobs = self._db, self._jobs
        self._file.check()
        if is_durable != self._is_full:
            db.execute(f'pragma synchronous = {"full" if is_durable else "normal"}')
            self._is_full = is_durable
        ahead = self.ahead
        jobs.begin(now, ahead)
        db.execute('begin immediate')
        try:
            if ahead != self._ahead:
                db.execute('update clock set ahead = ?', (ahead,))
            yield jobs
            db.execute('commit')
        except BaseException:
            with suppress(sqlite3.Error):  # sqlite has rolled it back, after some errors
                db.execute('rollback')
            raise
        self._ahead = ahead
        self.counts.change(jobs.delta)

    def check_size(self, part: float = 1.0) -> None:
        """Check that the jobs have not reached the limit of the size.

        :param part: part of the limit that they must not reach
        :raises OSError: EDQUOT, if they have
        :raises sqlite3.Error: if the file cannot be read
        """
        used = self._upkeep.used
        if used >= self._size * part > 0:
            raise OSError(
                errno.EDQUOT,
                f'its jobs take {used} bytes, and the limit is {self._size}: raise journal_size, '
                'or lower keep',
            )

    def check_room(self) -> None:
        """Check that the disk has room for new jobs, and for what becomes of all jobs after that.

        :raises OSError: ENOSPC, if it has not
        """
        self._file.check_room()

    def tidy(self, now: float) -> tuple[list[str], bool]:
        """Let jobs expire and remove old ones, some at a time.

        :param now: present time of the system, in seconds since the epoch
        :return: ids of the jobs that have expired, and True if there may be more to do
        :raises sqlite3.Error, OSError: if it cannot be written
        """
        until = now + self.ahead
        due = self._db.execute(
            'select exists (select 1 from job indexed by job_expires '
            "where state = 'waiting' and expires <= ?) "
            'or exists (select 1 from job where ended < ?)',
            (until, until - self.keep),
        ).fetchone()
        if due == (0,):
            return [], self._upkeep.vacuum()
        with self.transaction(now, is_durable=False) as jobs:
            has_more = jobs.expire()
            pruned = jobs.prune(self.keep)
        return jobs.expired, has_more or pruned.has_more

    def checkpoint(self) -> None:
        """Copy the write-ahead log to the file if it has become long, so that it stays bounded.

        :raises sqlite3.Error: if it cannot be written
        """
        if self._upkeep.checkpoint(self._jobs.size):
            self._jobs.size = 0

    def make_room(self) -> None:
        """Free some space on a full disk, as far as that is possible."""
        with suppress(sqlite3.Error):
            self._upkeep.make_room()


def _explain(error: Exception) -> str:
    if isinstance(error, sqlite3.OperationalError | OSError):
        return (
            f'{error}; let this user be able to write to the file and its folder, on a disk that '
            'is not full, and let no other program lock the file'
        )
    return (
        f'it is damaged, or not a journal ({error}): move it away with its -wal file, and restore '
        'a backup'
    )
