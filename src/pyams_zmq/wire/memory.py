# SPDX-License-Identifier: ZPL-2.1
"""The memory of this process."""

import mmap
import resource

_MIB = 1024 * 1024


def read_memory() -> float:
    """Return the resident memory of this process in MiB, see proc_pid_statm(5).

    :raises OSError: if no descriptor is free
    """
    try:
        with open('/proc/self/statm', 'rb', buffering=0) as file:
            return int(file.read(256).split()[1]) * mmap.PAGESIZE / _MIB
    except (FileNotFoundError, PermissionError):  # no /proc for us: the peak is a substitute
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
