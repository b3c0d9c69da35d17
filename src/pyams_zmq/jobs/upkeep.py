# SPDX-License-Identifier: ZPL-2.1
"""Work on the file of a journal that nobody waits for, in steps of some milliseconds."""

import sqlite3

WAL_SIZE = 4 * 1024 * 1024
"""Bytes of the write-ahead log that stay on the disk"""

_FREE_PAGES = 1000  # the file keeps these, or a quarter of its pages, to use them again
_VACUUMED = 200  # pages given back to the file system at a time
_VACUUMED_WHEN_FULL = 20  # each of them may need room in the log before
_CHANGES = 500  # rows after which the log is copied; each of them writes some pages of 4 KiB
_WAL_PAGES = 10_000  # of a long log

PRAGMAS = (
    'pragma wal_autocheckpoint = 0',  # a client would wait for it
    f'pragma journal_size_limit = {WAL_SIZE}',
    'pragma secure_delete = fast',  # some builds write all pages that become free
    'pragma temp_store = memory',
    'pragma trusted_schema = off',
)


class Upkeep:
    """Keeps the file of a journal, and its write-ahead log, small.

    :param db: connection that writes
    """

    def __init__(self, db: sqlite3.Connection):
        self._db = db
        self._changes = db.total_changes
        self._pages = 0
        self._page_size: int
        (self._page_size,) = db.execute('pragma page_size').fetchone()

    @property
    def used(self) -> int:
        """Bytes of the file that are in use."""
        free, pages = self._count_pages()
        return (pages - free) * self._page_size

    def _count_pages(self) -> tuple[int, int]:
        """Return how many pages are free, and how many there are."""
        (free,) = self._db.execute('pragma freelist_count').fetchone()
        (pages,) = self._db.execute('pragma page_count').fetchone()
        return free, pages

    def vacuum(self) -> bool:
        """Give some free pages back to the file system, if many are free; outside transactions.

        :return: True if it has
        """
        free, pages = self._count_pages()
        if free < max(_FREE_PAGES, pages // 4):
            return False
        # `execute` would stop after the first page.
        self._db.executescript(f'pragma incremental_vacuum({_VACUUMED})')
        return True

    def make_room(self) -> None:
        """Make the write-ahead log empty, and give some free pages back; outside transactions."""
        self._db.execute('pragma wal_checkpoint(truncate)')
        self._db.executescript(f'pragma incremental_vacuum({_VACUUMED_WHEN_FULL})')
        self._db.execute('pragma wal_checkpoint(truncate)')

    def checkpoint(self, size: int) -> bool:
        """Copy the write-ahead log to the file, if it may be long; outside transactions.

        :param size: bytes of messages and results since the last time
        :return: True if it has
        """
        changes = self._db.total_changes
        if changes - self._changes < _CHANGES and size < WAL_SIZE:
            return False
        self._changes = changes
        # A reader in its way is waited for only if the log has become long.
        mode = 'restart' if self._pages > _WAL_PAGES else 'passive'
        _busy, self._pages, _copied = self._db.execute(f'pragma wal_checkpoint({mode})').fetchone()
        return True
