# SPDX-License-Identifier: ZPL-2.1
"""A change of a job that waits to be written."""

import logging
import sqlite3
from collections.abc import Callable
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.job_table import JobTable

LOGGER = logging.getLogger('PyAMS (zmq)')

_OVERHEAD = 1000  # bytes of memory for a change, approximately
_FILE_ERRORS = (sqlite3.Error, OSError, MemoryError)  # of a journal that cannot be written
_ROW_ERRORS = (
    *(sqlite3.IntegrityError, sqlite3.DataError),
    *(sqlite3.ProgrammingError, sqlite3.InterfaceError),
)

Callback = Callable[[Any], object]


class Change:
    """A change that waits to be written.

    :ivar call: the method of JobTable, with its arguments
    :ivar is_kept: True if it is written later when the journal cannot be written, False if it fails
    :ivar is_durable: True if it has to be on disk before the outcome is known
    :ivar is_new: True if it adds a job
    :ivar size: bytes
    :ivar client: who has asked for it, any hashable object
    """

    __slots__ = (
        *('call', 'callback', 'client', 'is_claim', 'is_durable', 'is_kept', 'is_new', 'size'),
    )

    def __init__(
        self,
        call: Callable[[JobTable], Any],
        callback: Callback | None,
        *,
        is_kept: bool = False,
        is_durable: bool = True,
        is_claim: bool = False,
        is_new: bool = False,
        size: int = 0,
        client: Any = None,
    ):
        self.call = call
        self.callback = callback
        self.is_kept = is_kept
        self.is_durable = is_durable
        self.is_claim = is_claim
        self.is_new = is_new
        self.size = size + _OVERHEAD
        self.client = client

    def run(self, jobs: JobTable) -> Any:
        """Return the outcome of the change; one that cannot be written does not fail the others.

        :param jobs: the jobs, in a transaction
        :raises sqlite3.Error, OSError, MemoryError: if nothing can be written
        """
        try:
            return self.call(jobs)
        except ZMQMessageError as error:
            return error
        except Exception as error:
            if isinstance(error, _FILE_ERRORS) and not isinstance(error, _ROW_ERRORS):
                raise
            LOGGER.warning('A job cannot be written: %s', error)
            return ZMQMessageError(400, f'The job cannot be written: {error}')
