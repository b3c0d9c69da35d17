# SPDX-License-Identifier: ZPL-2.1
"""Adopts the entries of processes that have ended, for one relay of the machine."""

import logging
from collections.abc import Iterable
from math import inf

from pyams_zmq.client.problem import write_log
from pyams_zmq.outbox.owner import is_alive
from pyams_zmq.outbox.silence import SilenceWatch
from pyams_zmq.outbox.storage import Storage, Waiting
from pyams_zmq.process.name_lock import NameLock

OTHERS_TIME = 60.0
"""Seconds after which entries of other applications are logged, if they are still there"""


class Adoption:
    """Looks at the entries of other processes, if no other relay of the machine does.

    :param storage: the entries of the application
    :param application: name of the application
    :param heir: the owner that gets the entries
    """

    def __init__(self, storage: Storage, application: str, heir: str):
        self._storage = storage
        self._application = application
        self._heir = heir
        self._lock: NameLock | None = None
        self._silence = SilenceWatch()
        self._others: dict[str, int] | None = None  # entries of other applications
        self._others_at = -inf

    def acquire(self) -> bool:
        """Return True if this relay looks at other processes; one of a machine does."""
        try:
            if self._lock is None:
                self._lock = NameLock(f'outbox of {self._application}')
            return self._lock.acquire()
        except OSError:  # from the folder of the locks: it costs reading, and nothing else
            return True

    def release(self) -> None:
        """Let another relay look at other processes."""
        if self._lock is not None:
            self._lock.release()

    def step(self, waiting: Iterable[Waiting], now: float) -> set[str]:
        """Adopt the entries of processes that have ended, or of machines that are silent.

        :param waiting: all entries that wait
        :param now: the time, in the seconds of `time.monotonic`
        :return: the services of the entries that were adopted
        """
        owners: dict[str, list[Waiting]] = {}
        for each in waiting:
            if each.owner != self._heir:
                owners.setdefault(each.owner, []).append(each)
        self._silence.forget_others(owners)
        services = set()
        for owner, entries in owners.items():
            is_live = is_alive(owner)
            if is_live is None:
                is_live = not self._silence.is_over(owner, entries, now)
            if not is_live and self._storage.adopt(owner, self._heir):
                write_log(
                    logging.INFO,
                    'The outbox sends %d messages of a process that has ended',
                    sum(each.count for each in entries),
                )
                services |= {each.service for each in entries}
        return services

    def look_at_others(self, now: float) -> None:
        """Warn once of entries that may be those of this application under another name.

        :param now: the time, in the seconds of `time.monotonic`
        """
        if now < self._others_at:
            return
        others = self._storage.read_others()
        if self._others is None:
            self._others, self._others_at = others, now + OTHERS_TIME
            return
        self._others_at = inf
        left = [f'{name!r} has {number}' for name, number in others.items() if name in self._others]
        if left:
            write_log(
                logging.WARNING,
                'The database of the outbox has messages of other applications (%s): if that is a '
                'former name of this one, set pyams_zmq.application to it',
                ', '.join(sorted(left)),
            )
