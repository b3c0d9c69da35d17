# SPDX-License-Identifier: ZPL-2.1
"""Limits of the options of a job: clients check them, and the broker does for all other clients."""

import re

from pyams_zmq.wire.message import encode

MAX_DELAY = 10 * 366 * 86400
"""Seconds of the longest delay: ten years"""

MAX_ATTEMPT = 1e8
"""Seconds of the longest attempt: three years"""

MAX_BACKOFF = 3600.0
"""Seconds between two attempts, at most"""

MAX_RETRIES = 1000
"""Further attempts of a job, at most"""

MAX_PRIORITY = 1000
"""The highest priority; the lowest one is its negative"""

MAX_KEY_SIZE = 255
"""Bytes of the longest key"""

MAX_IDS = 100
"""Jobs that a message may ask for"""

is_job_id = re.compile(r'[A-Za-z0-9_.-]{1,64}').fullmatch
"""Matches a text that may be the id of a job"""


def refuse_result(size: int, limit: int) -> bytes:
    """Return the reply of a job that fails because of its large result; it is not tried again.

    :param size, limit: bytes
    """
    text = f'The result of the job has {size} bytes; the limit is {limit}: '
    return encode([413, text + 'store it in a file, and return its path'])
