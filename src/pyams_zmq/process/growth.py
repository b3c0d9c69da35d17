# SPDX-License-Identifier: ZPL-2.1
"""How much of the memory of a process libzmq has taken for messages that wait."""

import os
from contextlib import suppress

_TASKS = '/proc/self/task'
_IO_THREAD = b'(ZMQbg/IO/'  # beginning of the name of an I/O thread of libzmq
_MINOR_FAULTS = 7  # index of the field behind the name, see proc_pid_stat(5)


class ReceivedMemory:
    """Measures the memory that the I/O threads of libzmq take for what they receive.

    A frame takes at least 64 bytes in libzmq, and only two on the wire. The kernel counts for each
    thread how often it has touched a page of new memory, so what a handler takes does not count.
    """

    def __init__(self) -> None:
        self._base: tuple[int, int, int] | None = None
        self._most = 0

    def reset(self) -> None:
        """Begin again."""
        self._base = None

    def measure_overhead(self, memory: int, waiting: int) -> int:
        """Return the bytes that I/O threads have taken beyond those that waited to be read.

        :param memory: resident bytes of this process
        :param waiting: bytes that wait to be read; when there are none, it begins again
        """
        received, total = _count_faults()
        if self._base is None or memory < self._base[0] or waiting == 0:
            self._base = memory, received, total
            self._most = 0
        self._most = max(self._most, waiting)
        base = self._base
        growth = (memory - base[0]) * (received - base[1]) / max(1, total - base[2])
        return int(growth) - self._most


def _count_faults() -> tuple[int, int]:
    """Return the minor page faults of the I/O threads, and of all threads."""
    received = total = 0
    with suppress(OSError):  # /proc is not mounted, or all descriptors are used
        for task in os.listdir(_TASKS):
            with suppress(OSError), open(f'{_TASKS}/{task}/stat', 'rb') as file:
                name, _, rest = file.read().partition(b' ')[2].rpartition(b') ')
                faults = int(rest.split(maxsplit=_MINOR_FAULTS + 1)[_MINOR_FAULTS])
                total += faults
                received += faults if name.startswith(_IO_THREAD) else 0
    return received, total
