# SPDX-License-Identifier: ZPL-2.1
"""Clients that wait for a change of a job: the long poll ``pyams_zmq.job.wait``."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.job_messages import Wait

MAX_WATCHERS = 10_000
"""Messages that wait at a time"""


class Watcher:
    """A message that waits.

    :ivar wait: its arguments
    :ivar ids: ids of the jobs, by the ids in the arguments
    :ivar envelope: where its reply goes
    :ivar until: time when it gets a reply in any case
    """

    __slots__ = ('envelope', 'ids', 'until', 'wait')

    def __init__(self, wait: Wait, ids: dict[str, str], envelope: Any, until: float):
        self.wait = wait
        self.ids = ids
        self.envelope = envelope
        self.until = until

    def find(self, job_id: str, revision: int, has_ended: bool) -> str | None:
        """Return the id by which a changed job was asked for; None if the client knows it so."""
        for asked, found in self.ids.items():
            if found == job_id and self.wait.is_new(asked, revision, has_ended):
                return asked
        return None


class Watchers:
    """The messages that wait, by the ids of their jobs; no I/O, and times are arguments."""

    def __init__(self) -> None:
        self._by_id: dict[str, set[Watcher]] = defaultdict(set)
        self._all: set[Watcher] = set()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, watcher: Watcher) -> None:
        """Let a message wait.

        :raises ZMQMessageError: with status 503, if too many do
        """
        if len(self._all) >= MAX_WATCHERS:
            raise ZMQMessageError(
                503, f'The service is overloaded: {MAX_WATCHERS} messages wait for jobs'
            )
        self._all.add(watcher)
        for job_id in watcher.ids.values():
            self._by_id[job_id].add(watcher)

    def watchers_of(self, job_id: str) -> list[Watcher]:
        """Return the messages that wait for a job."""
        return list(self._by_id.get(job_id, ()))

    def remove(self, watcher: Watcher) -> None:
        """Remove a message that gets its reply."""
        self._all.discard(watcher)
        for job_id in set(watcher.ids.values()):
            self._by_id[job_id].discard(watcher)
            if not self._by_id[job_id]:
                del self._by_id[job_id]

    def take_late(self, now: float) -> Iterable[Watcher]:
        """Remove and return the messages that have waited for as long as they want."""
        late = [watcher for watcher in self._all if watcher.until <= now]
        for watcher in late:
            self.remove(watcher)
        return late

    def take_all(self) -> Iterable[Watcher]:
        """Remove and return all messages."""
        found = list(self._all)
        self._all.clear()
        self._by_id.clear()
        return found
