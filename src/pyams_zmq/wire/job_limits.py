# SPDX-License-Identifier: ZPL-2.1
"""Limits of jobs: clients check those of the options, and the broker does for all other clients."""

import re

JOURNAL_SIZE = 4 * 1024 * 1024 * 1024
"""Bytes of a journal, by default: some millions of small jobs, and a fraction of common disks"""

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
