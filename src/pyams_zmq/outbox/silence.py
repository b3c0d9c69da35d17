# SPDX-License-Identifier: ZPL-2.1
"""How long the processes of other machines have not changed their entries."""

from collections.abc import Collection, Sequence
from typing import Any

from pyams_zmq.outbox.storage import Waiting

ORPHAN_TIME = 60.0
"""Seconds without a change after which a process of another machine counts as ended"""


class SilenceWatch:
    """The entries of owners whose processes cannot be examined, and since when they are the same.

    A live process drops or renews them (`Storage.renew`). The clocks of the machines are not
    compared.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Any, float]] = {}

    def is_over(self, owner: str, entries: Sequence[Waiting], now: float) -> bool:
        """Return True if an owner has been silent for a minute.

        :param entries: what waits for each service
        :param now: the time, in the seconds of `time.monotonic`
        """
        found = {(each.service, each.count, each.since, each.renewals) for each in entries}
        former, since = self._seen.get(owner, (None, now))
        if former != found:
            since = now
        self._seen[owner] = found, since
        return now - since >= ORPHAN_TIME

    def forget_others(self, owners: Collection[str]) -> None:
        """Forget owners that have no entries any more."""
        for owner in self._seen.keys() - set(owners):
            del self._seen[owner]
