# SPDX-License-Identifier: ZPL-2.1
"""Sends the entries of the outbox from this process, and drops them when the replies are there."""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

from pyams_zmq.client import ZMQClient
from pyams_zmq.client.problem import CheckedReply, QueuedMessage, write_log
from pyams_zmq.outbox.adoption import Adoption
from pyams_zmq.outbox.answer import Answer
from pyams_zmq.outbox.catch_up import CatchUp
from pyams_zmq.outbox.owner import identify_process
from pyams_zmq.outbox.retry import Database, Retry
from pyams_zmq.outbox.storage import Entry, Storage
from pyams_zmq.wire.clock import monotonic

CHECK_INTERVAL = 5.0
"""Seconds between two looks at the entries that wait, and until the first one"""

SETTLE_DELAY = 0.2
"""Seconds in which replies are collected, whose entries are dropped in one transaction"""

SETTLE_BATCH = 100
"""Replies after which that is done at once"""

MAX_UNSETTLED = 10_000
"""Replies to keep while the database does not answer; further entries are not sent then"""

PAGE = 200
"""Entries to read at a time"""

RENEWAL_AGE = 10.0
"""Seconds for which entries wait until they are renewed, for the relays of other machines"""

RENEWAL_INTERVAL = 15.0
"""Seconds between two renewals"""

CLOSE_TIMEOUT = 10.0
"""Seconds that `close` waits for the database, at most: the program may be about to end"""

RETURN_DELAY = 1.0
"""Seconds until an entry is read that the client has given back"""


class Relay:
    """The part of the outbox that sends, in one process.

    After a commit, `post` hands the entries of the transaction to the client of their service,
    which keeps their order. A thread drops those that have a reply. It reads entries from the
    storage that were not posted: more than the backlog of the client takes, those that it has given
    back, and those of processes that have ended, which one relay of the machine adopts.

    :param storage: the entries of the application
    :param find_client: returns the client of a service
    :param application: name of the application
    """

    def __init__(self, storage: Storage, find_client: Callable[[str], ZMQClient], application: str):
        self.owner = identify_process()
        self._storage = storage
        self._database = Database()
        self._find_client = find_client
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._is_ended = False
        self._known: dict[Any, str] = {}  # services of the entries that are posted, by their keys
        self._clients: dict[str, ZMQClient] = {}
        self._catch_ups: dict[str, CatchUp] = {}
        # Only the thread that sends adds to it, and only the thread of this object removes.
        self._answers: deque[Answer] = deque()
        self._settles_at = inf
        self._settle_retry = Retry()
        self._has_unknown = True  # if the storage may have entries of this process to look for
        self._checks_at = monotonic() + CHECK_INTERVAL
        self._check_retry = Retry()
        self._renews_at = inf
        self._adoption = Adoption(storage, application, self.owner)
        # Logged without the lock: a handler of the log may commit messages itself.
        self._unlogged: deque[tuple[str, str]] = deque()

    def start(self) -> None:
        """Start the thread, if it does not run yet.

        :raises RuntimeError: if the system starts no thread
        """
        with self._lock:
            if self._thread is None and not self._is_closed:
                thread = threading.Thread(target=self._run, name='PyAMS (zmq) outbox', daemon=True)
                thread.start()
                self._thread = thread

    def post(self, key: Any, entry: Entry) -> None:
        """Send an entry of a transaction that was committed just now, without waiting."""
        self._has_unknown = True
        self._ensure_thread()
        with self._lock:
            if key in self._known:
                return  # it was read meanwhile
            catch_up = self._catch_up_of(entry.service)
            was_behind = catch_up.is_behind
            if not was_behind and self._offer(key, entry):
                return
            catch_up.miss(key)
        self._log_unsendable()
        if not was_behind:
            self._woken.set()

    def look(self) -> None:
        """Look for entries at the next check: the database may have some of a failed commit."""
        self._has_unknown = True
        self._ensure_thread()

    def _ensure_thread(self) -> None:
        # At the limit of threads, and where Python starts none at its end, entries are sent
        # nevertheless. They are dropped later, or sent again by another process.
        if self._thread is None:
            with suppress(RuntimeError):
                self.start()

    def close(self) -> None:
        """Stop: wait for replies on their way, and drop their entries; others keep the rest."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            clients = list(self._clients.values())
        start = monotonic()  # the time is for all together
        for client in clients:
            client.withdraw(start=start)
        self._is_ended = True
        thread, self._thread = self._thread, None
        if thread is None:
            self._end()
        else:
            self._woken.set()
            thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        while not self._is_ended:
            wakes_at = self.step(monotonic())
            self._woken.wait(max(0, wakes_at - monotonic()))
            self._woken.clear()
        self._end()

    def _end(self) -> None:
        """Drop the last entries that have a reply, and close the storage."""
        self._settle(inf)
        self._adoption.release()
        with self._database.barrier.hold():
            self._storage.close()

    def step(self, now: float) -> float:
        """Drop entries that have a reply, read others, and look at those of other processes.

        :return: when the next step is due
        """
        self._settle(now)
        for service, catch_up in list(self._catch_ups.items()):
            if not catch_up.is_due(now):
                continue  # not an attempt
            read = partial(self._read, service, catch_up, now)
            if not self._database.use(now, catch_up.retry, read):
                catch_up.postpone(catch_up.retry.at)
            self._log_unsendable()
        if now >= self._checks_at:
            self._database.use(now, self._check_retry, partial(self._check, now))
            self._checks_at = max(now + CHECK_INTERVAL, self._check_retry.at)
        # A list: other threads add services.
        reads_at = [each.reads_at for each in list(self._catch_ups.values()) if each.is_behind]
        return min(self._checks_at, self._settles_at, *reads_at)

    def _log_unsendable(self) -> None:
        while self._unlogged:
            service, text = self._unlogged.popleft()
            write_log(
                logging.ERROR,
                'Messages to %r wait in the outbox: %s',
                service,
                text,
                service=service,
            )

    def _catch_up_of(self, service: str) -> CatchUp:
        return self._catch_ups.setdefault(service, CatchUp())

    def _offer(self, key: Any, entry: Entry) -> bool:
        """Hand an entry to the client of its service; return False if that does not take it."""
        if self._is_closed or len(self._answers) >= MAX_UNSETTLED:
            return False
        catch_up = self._catch_up_of(entry.service)
        try:
            client = self._clients[entry.service] = self._find_client(entry.service)
            is_taken = client.offer(
                QueuedMessage(
                    entry.type,
                    entry.data,
                    entry.frames,
                    entry.is_job,
                    partial(self._handle_reply, key, entry.service, entry.type),
                )
            )
        except Exception as error:  # noqa: BLE001 - after the commit, which must not fail
            if catch_up.note_problem(str(error)):
                self._unlogged.append((entry.service, str(error)))
            return False
        catch_up.note_problem(None)
        if is_taken:
            self._known[key] = entry.service
        return is_taken

    def _handle_reply(self, key: Any, service: str, type_: str, reply: CheckedReply | None) -> None:
        """Keep a reply; runs in the thread that sends, which must not wait."""
        self._answers.append(Answer(key, service, type_, reply))
        if len(self._answers) in (1, SETTLE_BATCH):
            self._woken.set()

    def _settle(self, now: float) -> None:
        """Drop the entries that have a good reply; make dead letters of the others."""
        if not self._answers:
            return
        if self._settles_at == inf:
            self._settles_at = now + SETTLE_DELAY
        is_full = len(self._answers) >= SETTLE_BATCH and not self._settle_retry.has_failed
        if now < self._settles_at and not is_full:
            return
        answers = list(self._answers)
        sent = [answer.key for answer in answers if answer.is_good]
        refused = [(each.key, refusal) for each in answers if (refusal := each.refusal)]
        if (sent or refused) and not self._database.use(
            now, self._settle_retry, partial(self._storage.settle, sent, refused)
        ):
            self._settles_at = self._settle_retry.at
            return
        self._settles_at = inf
        for _each in answers:
            self._answers.popleft()
        with self._lock:
            for answer in answers:
                self._known.pop(answer.key, None)
                if answer.reply is None:  # given back
                    self._catch_up_of(answer.service).miss(reads_at=now + RETURN_DELAY)
        _log_refused(answers)
        if self._answers:
            self._settles_at = now + SETTLE_DELAY

    def _read(self, service: str, catch_up: CatchUp, now: float) -> None:
        """Post entries of this process that were not posted after their commit."""
        while catch_up.is_due(now) and not self._is_closed:
            misses = catch_up.misses
            page = self._storage.read(self.owner, service, catch_up.after, PAGE)
            with self._lock:
                for stored in page:
                    if stored.key not in self._known and not self._offer(stored.key, stored.entry):
                        catch_up.wait(now)
                        return
                    catch_up.pass_by(stored.key)
                if len(page) < PAGE:
                    catch_up.finish(misses)

    def _check(self, now: float) -> None:
        """Look for entries that were not posted, and for those of processes that have ended."""
        is_first = self._adoption.acquire()
        is_behind = any(each.is_behind for each in list(self._catch_ups.values()))
        if not (is_first or is_behind or self._has_unknown or self._known):
            return
        self._has_unknown = False
        try:
            waiting = self._storage.read_waiting()
        except Exception:
            self._has_unknown = True
            raise
        with self._lock:
            known = Counter(self._known.values())
            for each in waiting:
                if each.owner == self.owner and each.count > known[each.service]:
                    self._catch_up_of(each.service).begin()
        if not any(each.owner == self.owner for each in waiting):
            self._renews_at = inf
        elif self._renews_at == inf:
            self._renews_at = now + RENEWAL_AGE
        elif now >= self._renews_at:
            self._renews_at = now + RENEWAL_INTERVAL
            self._storage.renew(self.owner)
        if is_first:
            adopted = self._adoption.step(waiting, now)
            with self._lock:
                for service in adopted:
                    self._catch_up_of(service).miss()
            self._adoption.look_at_others(now)


def _log_refused(answers: list[Answer]) -> None:
    for answer in answers:
        if answer.refusal is not None and answer.reply is not None:
            fields = {'service': answer.service, 'method': answer.type}
            write_log(
                logging.ERROR,
                'Message %r of the outbox to %r: %s; it is a dead letter now: see "pyams_zmq '
                'outbox INI"',
                answer.type,
                answer.service,
                answer.reply.problem,
                **fields,
            )
            write_log(logging.DEBUG, 'Reply of a service: %s', answer.reply.text, **fields)
