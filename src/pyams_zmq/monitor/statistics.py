# SPDX-License-Identifier: ZPL-2.1
"""What the metrics need of a reply to `pyams_zmq.stats`."""

from typing import Any

import msgspec
from msgspec import Struct, field

MEBIBYTE = 1 << 20


class MethodStatistics(Struct):
    """The calls of one method; see :class:`Statistics`.

    :ivar mean: seconds that a call takes
    :ivar buckets: pairs of seconds, and the number of calls that have not taken longer
    """

    calls: int = 0
    errors: int = 0
    mean: float = 0.0
    buckets: list[tuple[float, int]] = field(default_factory=list)


class WorkerStatistics(Struct):
    """One worker of a service."""

    state: str = 'idle'
    memory: float | None = None


class JobStatistics(Struct):
    """The jobs of a service: their numbers, by type and state."""

    types: dict[str, dict[str, int]] = field(default_factory=dict)


class Statistics(Struct):
    """The statistics of one service.

    A member that is missing, because the service is older, has a default.

    :ivar oldest: seconds for which the oldest call waits
    :ivar memory: MiB of its process; None if the system does not say
    """

    kind: str = 'process'
    uptime: float = 0.0
    memory: float | None = None
    refused: int = 0
    repeated: int = 0
    lost: int = 0
    in_flight: int = 0
    queue: int = 0
    queue_bytes: int = 0
    oldest: float = 0.0
    methods: dict[str, MethodStatistics] = field(default_factory=dict)
    workers: list[WorkerStatistics] = field(default_factory=list)
    jobs: JobStatistics | None = None

    @property
    def bytes(self) -> int:
        """Bytes of its process, and for a pool those of the workers."""
        sizes = [self.memory]
        if self.kind == 'pool':  # a process lists itself as its worker
            sizes += [worker.memory for worker in self.workers]
        return int(MEBIBYTE * sum(size for size in sizes if size is not None))


def read_statistics(result: Any) -> Statistics | None:
    """Return the statistics in a reply; None if it has another form."""
    try:
        return msgspec.convert(result, Statistics)
    except msgspec.ValidationError:
        return None
