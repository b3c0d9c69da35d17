# SPDX-License-Identifier: ZPL-2.1
"""Clients that wait for a change of a job: the long poll ``pyams_zmq.job.wait``."""

from collections import defaultdict
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from pyams_zmq.jobs.job_messages import Wait

MAX_SIZE = 32 * 1024 * 1024
"""Bytes of memory for the messages that wait, approximately: some 15,000 that wait for one job"""

_OVERHEAD = 1500  # bytes of memory for a message, approximately
_FRAME_OVERHEAD = 64  # for each frame of its envelope
_ID_OVERHEAD = 500  # for each of its ids


class Watcher:
    """A message that waits.

    :ivar wait: its arguments
    :ivar ids: ids of the jobs, by the ids in the arguments
    :ivar envelope: where its reply goes, an :class:`~pyams_zmq.process.connections.Envelope`
    :ivar until: time when it gets a reply in any case
    :ivar size: bytes of memory
    """

    __slots__ = ('envelope', 'ids', 'size', 'until', 'wait')

    def __init__(self, wait: Wait, ids: dict[str, str], envelope: Any, until: float):
        self.wait = wait
        self.ids = ids
        self.envelope = envelope
        self.until = until
        self.size = _OVERHEAD + len(ids) * _ID_OVERHEAD
        self.size += sum(len(frame) + _FRAME_OVERHEAD for frame in envelope)

    def find(self, job_id: str, revision: int, has_ended: bool) -> str | None:
        """Return the id by which a changed job was asked for; None if the client knows it so."""
        for asked, found in self.ids.items():
            if found == job_id and self.wait.is_new(asked, revision, has_ended):
                return asked
        return None


class _Share(dict[Watcher, None]):
    """The messages of one connection, in their order.

    :ivar size: their bytes
    """

    size = 0


class Watchers:
    """The messages that wait, by the ids of their jobs; no I/O, and times are arguments.

    The connections of clients share the memory for them as they share the queue of calls, see
    :class:`~pyams_zmq.pool.queue.FairQueue`.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, set[Watcher]] = defaultdict(set)
        self._shares: dict[Any, _Share] = defaultdict(_Share)  # by connection
        self._size = 0

    def __len__(self) -> int:
        return sum(map(len, self._shares.values()))

    def add(self, watcher: Watcher) -> list[Watcher]:
        """Let a message wait.

        :return: the messages that have to be refused because of the limit: this one, or others of
            connections that have more than their share, which were removed
        """
        connection = watcher.envelope.connection
        if self._size + watcher.size > MAX_SIZE:
            self._forget_ended()
            connections = len(self._shares) + (connection not in self._shares)
            own_size = self._shares.get(connection, _Share()).size + watcher.size
            if self._size + watcher.size > MAX_SIZE and own_size * connections > MAX_SIZE:
                return [watcher]
        refused = []
        # As the share of this connection is not used up, at least one other has more.
        while self._size + watcher.size > MAX_SIZE:
            last = next(reversed(max(self._shares.values(), key=attrgetter('size'))))
            self.remove(last)
            refused.append(last)
        share = self._shares[connection]
        share[watcher] = None
        share.size += watcher.size
        self._size += watcher.size
        for job_id in watcher.ids.values():
            self._by_id[job_id].add(watcher)
        return refused

    def watchers_of(self, job_id: str) -> list[Watcher]:
        """Return the messages that wait for a job."""
        return list(self._by_id.get(job_id, ()))

    def remove(self, watcher: Watcher) -> None:
        """Remove a message that gets its reply."""
        connection = watcher.envelope.connection
        share = self._shares[connection]
        del share[watcher]
        share.size -= watcher.size
        self._size -= watcher.size
        if not share:
            del self._shares[connection]
        for job_id in set(watcher.ids.values()):
            self._by_id[job_id].discard(watcher)
            if not self._by_id[job_id]:
                del self._by_id[job_id]

    def _forget_ended(self) -> None:
        for connection, share in list(self._shares.items()):
            if connection is not None and connection.is_ended:
                for watcher in list(share):
                    self.remove(watcher)

    def take_late(self, now: float) -> Iterable[Watcher]:
        """Remove and return the messages that have waited for as long as they want.

        Those of connections that have ended are forgotten.
        """
        self._forget_ended()
        late = [each for share in self._shares.values() for each in share if each.until <= now]
        for watcher in late:
            self.remove(watcher)
        return late

    def take_all(self) -> Iterable[Watcher]:
        """Remove and return all messages."""
        found = [watcher for share in self._shares.values() for watcher in share]
        self._shares.clear()
        self._by_id.clear()
        self._size = 0
        return found
