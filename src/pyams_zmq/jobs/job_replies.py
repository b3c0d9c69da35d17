# SPDX-License-Identifier: ZPL-2.1
"""Replies about jobs that their methods do not make. Workers import this: no sqlite3 here."""

from pyams_zmq.wire.message import encode

UNKNOWN = 'Unknown job id'
"""Text of status 404 for a question about a job"""

UNKNOWN_BEFORE = 'Unknown job id in "before"'
"""The same for a page of the list of jobs"""

DAMAGED = (500, 'The reply of the job is damaged in the journal')
"""What clients get for a reply that cannot be read"""


def refuse_result(size: int, limit: int) -> bytes:
    """Return the reply of a job that fails because of its large result; it is not tried again.

    :param size, limit: bytes
    """
    text = f'The result of the job has {size} bytes; the limit is {limit}: '
    return encode([413, text + 'store it in a file, and return its path'])
