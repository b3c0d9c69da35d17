# SPDX-License-Identifier: ZPL-2.1
"""Durations in the arguments of a command."""

import re
from argparse import ArgumentTypeError

from pyams_zmq.wire.job_limits import MAX_DELAY

_UNITS = {'': 1, 's': 1, 'm': 60, 'min': 60, 'h': 3600, 'd': 86400, 'w': 7 * 86400}
_DURATION = re.compile(r'(\d+(?:\.\d+)?) ?([a-z]*)')


def read_duration(text: str) -> float:
    """Return the seconds of a duration: `90`, `90s`, `5min`, `12h`, `7d` or `2w`.

    :raises ArgumentTypeError: for anything else, and for more than ten years
    """
    match = _DURATION.fullmatch(text)
    if match is not None and match[2] in _UNITS:
        seconds = float(match[1]) * _UNITS[match[2]]
        if seconds <= MAX_DELAY:
            return seconds
    raise ArgumentTypeError(
        f'bad value {text!r}: write a number with s, min, h, d or w, at most ten years'
    )
