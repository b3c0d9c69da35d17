# SPDX-License-Identifier: ZPL-2.1
"""The outbox in a ZODB: a FileStorage, or ZEO.

Each process adds its messages to a lane of its own, because transactions that insert into one tree
conflict more often. The transaction of a request writes nothing else. What is sent is marked beside
the lane, and removed in batches, far from where messages are added: so an application with an
outbox has about as many conflicts as without.

A process may add to a lane while another one takes it for dead, and adopts or drops the lane. That
changes the lane itself, so that one of both transactions conflicts; the process then uses a new
lane.
"""

import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, TypeVar

from transaction import TransactionManager

try:
    from BTrees.OOBTree import OOBTree

    from pyams_zmq.outbox.lanes import SHARDS, Application, DeadMessage, Lane, Message, TreeKey
    from pyams_zmq.outbox.zodb_connection import ConnectionFinder
except ImportError as error:
    raise ImportError(f'An outbox in a ZODB needs the package ZODB: {error}') from error

from pyams_zmq.exceptions import ZMQOutboxError
from pyams_zmq.outbox.owner import is_alive
from pyams_zmq.outbox.storage import MAX_REASON, DeadLetter, Entry, Refusal, StoredEntry, Waiting
from pyams_zmq.wire.clock import time
from pyams_zmq.wire.fork import ForkLocal
from pyams_zmq.wire.uuid7 import make_uuid7

ROOT_KEY = 'pyams_zmq.outbox'
"""Key of the applications in the root of a database"""

MAX_ENTRY_SIZE = 64 * 1024
"""Bytes of the largest entry: a database keeps all that was written, until it is packed"""

ATTEMPTS = 5
"""How often a transaction is tried that conflicts with others"""

MAX_COUNTED = 1000
"""Dead letters that are counted: each of them must be loaded"""

IDLE = 3600.0
"""Seconds after which a lane of another machine is dropped if nothing in it waits"""

Result = TypeVar('Result')
Key = tuple[str, int]


class ZODBStorage:
    """The entries of one application in a ZODB.

    Each transaction that runs in the background has a connection of its own. A fork does not use a
    database that its parent has opened, because that breaks the files and connections of both:
    there, the background begins when a transaction of the fork has added an entry.

    :param application: name of the application
    :param db: the database, or a callable that returns it, for the background; by default the one
        in which the first entry is added
    :param database: name of the database in a multi-database, by default the primary one
    :param connection: name of the attribute of a request that has the connection, or a callable
        that returns the connection of a request; by default it is the one that takes part in the
        transaction, or that of pyramid_zodbconn
    """

    max_size: int | None = MAX_ENTRY_SIZE

    def __init__(
        self,
        application: str,
        *,
        db: Any = None,
        database: str | None = None,
        connection: str | Callable[[Any], Any] | None = None,
    ):
        self._application = application
        self._db = db
        self._database = database
        self._pid = os.getpid()
        self._finder = ConnectionFinder(database, connection)
        self._local = ForkLocal(_ProcessState)

    def add(self, entry: Entry, owner: str, manager: Any, request: Any) -> Key:
        """Add an entry; see :meth:`.Storage.add`.

        The first one of a process to a service conflicts with another first one at the same time.
        """
        state = self._local.get()
        connection = self._finder.find(manager, request, self._find_db())
        state.db = connection.db()
        applications = connection.root().get(ROOT_KEY)
        if applications is None:
            applications = connection.root()[ROOT_KEY] = OOBTree()
        application = applications.get(self._application)
        if application is None:
            application = applications[self._application] = Application()
        lane_id, lane = state.find_lane(application, owner)
        if lane is None:
            lane = application.lanes[lane_id] = Lane(owner)
        number = next(state.numbers)
        lane.add(number, Message(entry, time()), state.get_shard())
        return lane_id, number

    def read_waiting(self) -> list[Waiting]:
        """Return how many entries wait, by owner and service."""
        return self._run_own(_read_waiting)

    def read(self, owner: str, service: str, after: Key | None, limit: int) -> list[StoredEntry]:
        """Return entries of an owner; see :meth:`.Storage.read`."""

        def read(application: Application) -> list[StoredEntry]:
            return list(islice(_read(application, owner, service, after), limit))

        return self._run_own(read)

    def settle(self, sent: Sequence[Key], refused: Sequence[tuple[Key, Refusal]]) -> None:
        """Drop entries and make dead letters; see :meth:`.Storage.settle`.

        The first time, it drops lanes that dead processes have left without waiting entries.
        """
        outcomes: dict[str, dict[int, Refusal | None]] = defaultdict(dict)
        for lane_id, number in sent:
            outcomes[lane_id][number] = None
        for (lane_id, number), refusal in refused:
            outcomes[lane_id][number] = refusal
        state = self._local.get()
        attempts = count()

        def settle(application: Application) -> None:
            own = state.list_lane_ids()
            is_first = next(attempts) == 0
            for lane_id, lane in _list_lanes(application):
                if lane_id in outcomes:
                    _settle(application, lane, outcomes[lane_id])
                    if is_first:  # may conflict with what is added; then the next call does it
                        lane.remove_sent()
                elif state.has_cleaned or not _is_abandoned(lane):
                    continue
                if lane_id not in own and not lane.has_waiting():
                    _drop_lane(application, lane_id)

        self._run_own(settle)
        state.has_cleaned = True

    def adopt(self, owner: str, heir: str) -> bool:
        """Give all entries of an owner to another one; see :meth:`.Storage.adopt`."""

        def adopt(application: Application) -> bool:
            adopted = [item for item in _list_lanes(application) if item[1].owner == owner]
            for lane_id, lane in adopted:
                if lane.has_waiting():
                    lane.owner = heir
                else:
                    _drop_lane(application, lane_id)
            return any(lane.owner == heir for _, lane in adopted)

        return self._run_own(adopt)

    def renew(self, owner: str) -> None:
        """Count one more renewal of the entries of an owner."""

        def renew(application: Application) -> None:
            for _, lane in _list_lanes(application):
                if lane.owner == owner and lane.has_waiting():
                    lane.progress.renewals += 1

        self._run_own(renew)

    def read_dead(self, limit: int, after: str | None = None) -> list[DeadLetter]:
        """Return dead letters, those first that were refused first; see :meth:`.Storage.read_dead`.

        :param limit: number of them
        :param after: only those after this id
        """

        def read_dead(application: Application) -> list[DeadLetter]:
            items = application.dead.items(after, excludemin=after is not None)
            return [dead.to_letter(letter_id) for letter_id, dead in islice(items, limit)]

        return self._run_own(read_dead)

    def count_dead(self) -> dict[str, int]:
        """Return how many of the oldest dead letters there are, by service."""

        def count_dead(application: Application) -> dict[str, int]:
            return Counter(
                dead.message.service for dead in islice(application.dead.values(), MAX_COUNTED)
            )

        return self._run_own(count_dead)

    def retry(self, ids: Sequence[str]) -> int:
        """Let dead letters be sent again, without an owner; return how many there were."""

        def retry(application: Application) -> int:
            found = [dead for each in ids if (dead := application.dead.pop(each, None))]
            if found:
                lane = _get_free_lane(application)
                for number, dead in enumerate(found, lane.next_number()):
                    lane.add(number, dead.message)
            return len(found)

        return self._run_own(retry)

    def drop(self, ids: Sequence[str]) -> int:
        """Drop dead letters; return how many there were."""

        def drop(application: Application) -> int:
            return sum(application.dead.pop(each, None) is not None for each in ids)

        return self._run_own(drop)

    def read_others(self) -> dict[str, int]:
        """Return how many entries other applications have in the same database, by their name."""

        def read_others(applications: Any) -> dict[str, int]:
            return {
                name: number
                for name, application in applications.items()
                if name != self._application
                and (number := sum(waiting.count for waiting in _read_waiting(application)))
            }

        return self._run(read_others)

    def close(self) -> None:
        """Do nothing: each method closes its connection.

        The lane of this process stays; if it has no waiting entries, another process drops it.
        """

    def _run_own(self, work: Callable[[Application], Result]) -> Result:
        """Run a function with this application, in a transaction of its own."""

        def run(applications: Any) -> Result:
            return work(applications.get(self._application) or Application())

        return self._run(run)

    def _run(self, work: Callable[[Any], Result]) -> Result:
        """Run a function with all applications, in a transaction of its own.

        :raises ConflictError: after the last attempt
        """
        manager = TransactionManager(explicit=True)
        connection = self._get_db().open(transaction_manager=manager)

        def outbox() -> Result:  # the description of the transaction
            return work(connection.root().get(ROOT_KEY, {}))

        try:
            result: Result = manager.run(outbox, ATTEMPTS)
            return result
        finally:
            connection.close()

    def _get_db(self) -> Any:
        """Return the database; raise if this process has none."""
        db = self._find_db()
        if db is not None:
            return db
        if os.getpid() != self._pid:
            raise ZMQOutboxError(
                f'The outbox was set up by process {self._pid}, and this is a fork, which cannot '
                'use the database of its parent: it uses the one in which the first of its own '
                'transactions adds a message'
            )
        raise ZMQOutboxError(
            'The database of the outbox is not known before a transaction adds a message: give it '
            'as the argument "db"'
        )

    def _find_db(self) -> Any:
        """Return the database, None if it is not known yet."""
        seen = self._local.get().db
        if seen is not None or os.getpid() != self._pid:
            return seen
        db = self._db() if callable(self._db) else self._db
        if db is None or self._database is None:
            return db
        if self._database not in db.databases:
            raise ZMQOutboxError(
                f'The ZODB database {self._database!r} of the outbox is not one of '
                f'{", ".join(map(repr, db.databases))}: correct the name'
            )
        return db.databases[self._database]


class _ProcessState:
    """What one process knows.

    :ivar db: the database of the last entry that was added
    :ivar numbers: the numbers of entries; those of aborted transactions are not used again
    :ivar has_cleaned: true if lanes that dead processes have left were dropped
    """

    def __init__(self) -> None:
        self.db: Any = None
        self.numbers = count()
        self.has_cleaned = False
        self._lane_ids: dict[str, str] = {}  # by owner
        self._lock = threading.Lock()
        self._shards = count()
        self._thread = threading.local()

    def get_shard(self) -> int:
        """Return the shard to which this thread adds."""
        shard: int | None = getattr(self._thread, 'shard', None)
        if shard is None:
            shard = self._thread.shard = next(self._shards) % SHARDS
        return shard

    def find_lane(self, application: Application, owner: str) -> tuple[str, Lane | None]:
        """Return the id and the lane to which this process adds; None if it is to be made."""
        lane_id = self._get_lane_id(owner)
        while (lane := application.lanes.get(lane_id)) is not None and lane.owner != owner:
            lane_id = self._get_lane_id(owner, adopted=lane_id)
        return lane_id, lane

    def list_lane_ids(self) -> set[str]:
        """Return the ids of lanes to which this process adds."""
        with self._lock:
            return {*self._lane_ids.values()}

    def _get_lane_id(self, owner: str, adopted: str | None = None) -> str:
        """Return the id of a lane, one for all threads; another one if this one was adopted."""
        with self._lock:
            if self._lane_ids.get(owner) == adopted:
                self._lane_ids[owner] = make_uuid7()
            return self._lane_ids[owner]


def _list_lanes(application: Application) -> list[tuple[str, Lane]]:
    return list(application.lanes.items())


def _get_free_lane(application: Application) -> Lane:
    """Return the lane without an owner."""
    for _, lane in _list_lanes(application):
        if not lane.owner:
            return lane
    lane = application.lanes[make_uuid7()] = Lane('')
    return lane


def _drop_lane(application: Application, lane_id: str) -> None:
    lane = application.lanes.pop(lane_id)
    lane._p_changed = True  # a transaction that adds an entry to it conflicts


def _is_abandoned(lane: Lane) -> bool:
    """Return True if the owner of a lane has ended; a guess for those of other machines."""
    is_known = is_alive(lane.owner)
    if is_known is None:
        return bool(lane.progress._p_mtime < time() - IDLE)
    return not is_known


def _read_waiting(application: Application) -> list[Waiting]:
    """Return how many entries of an application wait."""
    found: dict[tuple[str, str], Waiting] = {}
    for _, lane in _list_lanes(application):
        for service in lane.list_services():
            for number, key in islice(lane.list_waiting(service), 1):
                waiting = Waiting(
                    lane.owner,
                    service,
                    lane.count(service),
                    lane.trees[key][number].created,
                    lane.progress.renewals,
                )
                former = found.get((lane.owner, service))
                found[lane.owner, service] = waiting if former is None else _merge(former, waiting)
    return list(found.values())


def _merge(first: Waiting, second: Waiting) -> Waiting:
    return Waiting(
        first.owner,
        first.service,
        first.count + second.count,
        min(first.since, second.since),
        max(first.renewals, second.renewals),
    )


def _read(
    application: Application, owner: str, service: str, after: Key | None
) -> Iterator[StoredEntry]:
    """Yield the waiting entries of an owner for a service."""
    last_lane, last_number = after or (None, -1)
    for lane_id, lane in application.lanes.items(last_lane):
        if lane.owner == owner:
            first = last_number if lane_id == last_lane else -1
            for number, key in lane.list_waiting(service, first):
                yield StoredEntry((lane_id, number), lane.trees[key][number].to_entry())


def _settle(application: Application, lane: Lane, outcomes: dict[int, Refusal | None]) -> None:
    """Mark messages as sent, and make dead letters of those that were refused."""
    settled: dict[TreeKey, list[int]] = defaultdict(list)
    for number, refusal in sorted(outcomes.items()):
        key = lane.find(number)
        if key is None:
            continue
        settled[key].append(number)
        if refusal is not None:
            message = lane.trees[key][number]
            dead = DeadMessage(message, refusal.status, refusal.reason[:MAX_REASON])
            application.dead[make_uuid7()] = dead
    for key, numbers in settled.items():
        lane.mark_sent(key, numbers)
