# SPDX-License-Identifier: ZPL-2.1
"""The outbox of an application: adds messages to transactions, and manages dead letters."""

import atexit
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.util import Finalize
from typing import Any
from weakref import WeakMethod

from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQMessageError, ZMQOutboxError
from pyams_zmq.outbox.relay import PAGE, Relay
from pyams_zmq.outbox.storage import DeadLetter, Entry, Storage, Waiting
from pyams_zmq.outbox.transaction import join
from pyams_zmq.wire.environment import check_server_threads
from pyams_zmq.wire.fork import ForkLocal

DEAD_LETTERS = 100
"""Dead letters in a list, by default"""


class Outbox:
    """The outbox of an application, ``registry.zmq_outbox``.

    :param storage: its entries in the database of the application
    :param find_client: returns the client of a service
    :param application: name of the application, which no other one of the database has
    """

    def __init__(self, storage: Storage, find_client: Callable[[str], ZMQClient], application: str):
        self._storage = storage
        self._find_client = find_client
        self._application = application
        self._relay = ForkLocal(self._make_relay)

    def _make_relay(self) -> Relay:
        relay = Relay(self._storage, self._find_client, self._application)
        close = _Closing(relay)
        # Before the thread that sends ends; a child of multiprocessing runs no functions of atexit.
        atexit.register(close)
        Finalize(None, close, exitpriority=20)
        return relay

    def start(self) -> None:
        """Send from now on, too, what processes that have ended have left.

        :raises ZMQStartError: in a process of uWSGI without threads
        """
        check_server_threads('The outbox')
        self._relay.get().start()

    def close(self) -> None:
        """Stop sending in this process: wait for replies on their way; others keep the rest.

        The next commit, or `start`, begins again.
        """
        relay, self._relay = self._relay, ForkLocal(self._make_relay)
        relay.get().close()

    def add(self, entry: Entry, manager: Any, request: Any) -> None:
        """Add a message to the current transaction of a transaction manager.

        :param request: the request, or None
        :raises ZMQOutboxError: if the transaction is doomed, or no database takes part in it
        :raises ZMQMessageError: with status 413, if it is too large for the database
        :raises ZMQStartError: in a process of uWSGI without threads
        """
        current = manager.get()
        if current.isDoomed():
            raise ZMQOutboxError(
                f'Message {entry.type!r} to {entry.service!r} would never be sent: the transaction '
                'is doomed. Send it before, or in another transaction; a test includes '
                'pyams_zmq.testing'
            )
        self.check_size(entry)
        check_server_threads('The outbox')
        relay = self._relay.get()
        key = self._storage.add(entry, relay.owner, manager, request)
        join(manager, relay, key, entry)

    def check_size(self, entry: Entry) -> None:
        """Check that a message is not too large for the database.

        :raises ZMQMessageError: with status 413, if it is
        """
        limit = self._storage.max_size
        if limit is not None and entry.size > limit:
            raise _TooLargeError(
                413,
                f'Message is {entry.size} bytes; the limit of this outbox is {limit}: write the '
                'data to a file, and submit a job with its path',
            )

    # For operators

    def waiting(self) -> list[Waiting]:
        """Return how many messages wait, by process and service."""
        return self._storage.read_waiting()

    def dead_letters(
        self, limit: int = DEAD_LETTERS, *, after: str | None = None
    ) -> list[DeadLetter]:
        """Return messages that their service has refused, the oldest first.

        :param limit: number of them
        :param after: only those after this id
        """
        return self._storage.read_dead(limit, after)

    def count_waiting(self) -> dict[str, int]:
        """Return how many messages wait, by service."""
        numbers: Counter[str] = Counter()
        for each in self.waiting():
            numbers[each.service] += each.count
        return numbers

    def count_dead(self) -> dict[str, int]:
        """Return how many messages a service has refused, by service.

        A ZODB has to load each of them, so it counts the oldest thousand only.
        """
        return self._storage.count_dead()

    def retry(self, ids: Iterable[str]) -> int:
        """Send dead letters again, within five seconds; return how many there were.

        :param ids: their ids
        """
        return self._storage.retry(_as_ids(ids))

    def drop(self, ids: Iterable[str]) -> int:
        """Drop dead letters; return how many there were.

        :param ids: their ids
        """
        return self._storage.drop(_as_ids(ids))

    def discard(self, service: str) -> int:
        """Drop all messages that wait for a service, which runs no more; return their number.

        :param service: name of the service
        """
        number = 0
        for waiting in self._storage.read_waiting():
            after = None
            while waiting.service == service:
                page = self._storage.read(waiting.owner, service, after, PAGE)
                if not page:
                    break
                self._storage.settle([stored.key for stored in page], [])
                after = page[-1].key
                number += len(page)
        return number

    def others(self) -> dict[str, int]:
        """Return how many messages wait of other applications in the database, by their name."""
        return self._storage.read_others()


class _TooLargeError(ZMQMessageError, ZMQOutboxError):
    """A message that is too large for the outbox, but not for its service."""


def _as_ids(ids: Iterable[str]) -> Sequence[str]:
    return [ids] if isinstance(ids, str) else list(ids)


class _Closing:
    """Closes a relay at the end of its process, if it still exists; a fork does not do it."""

    def __init__(self, relay: Relay):
        self._close = WeakMethod(relay.close)
        self._pid = os.getpid()

    def __call__(self) -> None:
        close = self._close()
        if close is not None and self._pid == os.getpid():
            close()
