# SPDX-License-Identifier: ZPL-2.1
"""How many jobs of a journal are in each state, by type."""

from collections import Counter
from collections.abc import Mapping

from pyams_zmq.jobs.records import STATES

MAX_TYPES = 100
"""Types of jobs that the statistics list, at most"""

OTHERS = '*'
"""Stands for the types after these; no method has this name"""

Key = tuple[str, str]
"""Type and state"""


class JobCounts:
    """Numbers of jobs, which a transaction replaces: another thread may read them meanwhile.

    A count of all rows would take longer, the more jobs are in the file.

    :param counts: number of jobs by type and state
    """

    def __init__(self, counts: Mapping[Key, int]):
        self._counts = dict(counts)

    def change(self, delta: Mapping[Key, int]) -> None:
        """Add what a transaction has changed."""
        counts = {**self._counts}
        for key, number in delta.items():
            counts[key] = counts.get(key, 0) + number
            if not counts[key]:
                del counts[key]
        self._counts = counts

    @property
    def states(self) -> dict[str, int]:
        """Number of jobs in each state."""
        found = dict.fromkeys(STATES, 0)
        for (_type, state), number in self._counts.items():
            found[state] += number
        return found

    @property
    def types(self) -> dict[str, dict[str, int]]:
        """Number of jobs of each type in each state, without zeros.

        The types after the first :data:`MAX_TYPES` in alphabetical order are counted together.
        """
        counts = self._counts
        listed = set(sorted({name for name, _state in counts})[:MAX_TYPES])
        found: dict[str, Counter[str]] = {}
        for (name, state), number in sorted(counts.items()):
            found.setdefault(name if name in listed else OTHERS, Counter())[state] += number
        return {name: dict(states) for name, states in found.items()}
