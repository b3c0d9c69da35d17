# SPDX-License-Identifier: ZPL-2.1
"""The jobs of a broker: its journal, and the messages of clients about them."""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.job_messages import (
    Cancel,
    Wait,
    read_age,
    read_id,
    read_page,
    read_submission,
)
from pyams_zmq.jobs.journal import Journal
from pyams_zmq.jobs.records import CANCELLED, Accepted, Cancelled, Pruned
from pyams_zmq.jobs.writer import JournalWriter
from pyams_zmq.pool import protocol
from pyams_zmq.pool.job_book import JobBook
from pyams_zmq.pool.job_commands import kill_worker, send_command, send_job
from pyams_zmq.pool.job_run import JobRun
from pyams_zmq.pool.job_scheduler import JobScheduler
from pyams_zmq.pool.job_views import JobViews
from pyams_zmq.pool.protocol import SEPARATOR
from pyams_zmq.pool.queue import Call
from pyams_zmq.pool.scheduler import WorkerState
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.log_fields import extra
from pyams_zmq.wire.message import DRAINING, decode_reply, decode_request, encode

LOGGER = logging.getLogger('PyAMS (zmq)')

PREFIX = b'pyams_zmq.job'
"""The message types about jobs begin with it; a method name cannot contain a dot"""

SWITCH_INTERVAL = 0.001
"""Seconds after which a busy loop releases the interpreter to the thread that writes, which needs
it several times for each transaction; the default of Python is 0.005"""

DRAIN_TIME = 0.5
"""Seconds in which jobs that run may end when the broker does; others begin again, or go on when
only the broker is replaced"""

_LOCK_TIMEOUT = 5.0  # seconds for the end of a former broker that has the journal
_CLOSE_TIMEOUT = 2.0  # seconds to write what waits when the broker ends
_DAY = 86400.0


class JobService:
    """The jobs of a broker.

    :param pool: has `journal`, `journal_size`, `keep`, `jobs`, `workers` and `cancel_grace`
    :param scheduler: the scheduler of the broker
    :param post: calls a function in the thread of the loop, which may use the sockets
    :param reply: sends a reply with an envelope
    :param is_local: returns True if a worker runs on this machine
    :param check_access: raises ZMQMessageError 403 if a user at an address may not see the jobs of
        others
    :raises ZMQJournalError: if the journal cannot be used
    """

    def __init__(
        self,
        pool: Any,
        scheduler: JobScheduler,
        *,
        post: Callable[[Callable[[], None]], object],
        reply: Callable[[Any, list[Any]], None],
        is_local: Callable[[WorkerState], bool],
        check_access: Callable[[str, str], None],
        json_load: int,
    ):
        sys.setswitchinterval(SWITCH_INTERVAL)
        self._reply_with = reply
        self._check_access = check_access
        self._json_load = json_load
        self._warned: set[str] = set()
        self._drain_until = 0.0
        self._scheduler = scheduler
        self._journal = Journal(
            os.fspath(pool.journal),
            pool.keep * _DAY,
            size=pool.journal_size,
            lock_timeout=_LOCK_TIMEOUT,
        )
        self._reader = self._journal.reader
        self._views = JobViews(self._reader, reply, self._find_run, post)
        self._writer = JournalWriter(self._journal, post, self._views.notify_all)
        self.book = scheduler.book = JobBook(
            self._writer,
            scheduler,
            send=send_job,
            acknowledge=partial(send_command, protocol.ACK),
            cancel=partial(send_command, protocol.CANCEL, force=b'0'),
            kill=lambda run: kill_worker(run, is_local=is_local(run.worker)),
            on_change=self._views.notify,
            on_late_end=self._views.notify_number,
            limit=pool.jobs,
            cancel_grace=pool.cancel_grace,
        )
        scheduler.submit = self._submit_queued
        scheduler.is_local = is_local
        self.book.add_orphans(self._reader.running())

    def _find_run(self, job_id: str) -> JobRun | None:
        return self.book.find(job_id)

    def handles(self, name: bytes) -> bool:
        """Return True for the message types about jobs, and those that are jobs."""
        return name.startswith(PREFIX) or name.decode() in self.book.policies

    def handle(self, envelope: Any, name: bytes, body: list[Any], user: str, address: str) -> None:
        """Handle a message of a client.

        :raises ZMQMessageError: if it is refused
        """
        if self.book.is_draining:
            raise ZMQMessageError(*DRAINING)
        frames = [bytes(frame) for frame in body]
        if not name.startswith(PREFIX):
            self._submit(envelope, frames, user, address)
            return
        _name, args = decode_request(frames[self._json_load])
        match name:
            case b'pyams_zmq.job':
                self._reply(envelope, 200, self._views.describe(read_id(args)))
            case b'pyams_zmq.job.wait':
                self._views.wait(envelope, Wait(args))
            case b'pyams_zmq.job.cancel':
                cancel = Cancel(args)
                job_id = self._find_own(cancel.id, user, address)
                callback = partial(self._on_cancelled, envelope, job_id, cancel.force)
                self._writer.cancel(job_id, callback, envelope.connection)
            case b'pyams_zmq.job.retry':
                job_id = self._find_own(read_id(args), user, address)
                callback = partial(self._on_retried, envelope, job_id)
                self._writer.retry(job_id, callback, envelope.connection)
            case b'pyams_zmq.jobs':
                self._check_access(user, address)
                page = self._reader.page(**read_page(args))
                jobs = [self._views.describe(record.id, record) for record in page]
                self._reply(envelope, 200, jobs)
            case b'pyams_zmq.jobs.prune':
                self._check_access(user, address)
                callback = partial(self._on_pruned, envelope)
                self._writer.prune(read_age(args), callback, envelope.connection)
            case _:
                raise ZMQMessageError(404, f'Unknown message type {name.decode()!r}')

    def _reply(self, envelope: Any, status: int, payload: Any) -> None:
        self._reply_with(envelope, [encode([status, payload])])

    def _reply_error(self, envelope: Any, error: ZMQMessageError) -> None:
        self._reply(envelope, error.status, error.text)

    # What clients ask for

    def _submit(self, envelope: Any, frames: list[bytes], user: str, address: str) -> None:
        job = read_submission(frames, self._json_load, user, address)
        self._writer.accept(job, partial(self._on_accepted, envelope), envelope.connection)
        if not job.delay:  # the same transaction may begin it
            self.book.expect(0.0)
            self.book.claim()

    def _submit_queued(self, call: Call) -> None:
        user, _separator, address = call.header[protocol.KEY_SIZE :].rpartition(SEPARATOR)
        try:
            frames = [bytes(frame) for frame in call.body]
            self._submit(call.envelope, frames, user.decode(), address.decode())
        except ZMQMessageError as error:
            self._reply_error(call.envelope, error)

    def _on_accepted(self, envelope: Any, outcome: Accepted | ZMQMessageError) -> None:
        if isinstance(outcome, ZMQMessageError):
            self._reply_error(envelope, outcome)
            return
        self._reply(envelope, 202 if outcome.is_new else 200, {'id': outcome.id})
        if outcome.is_new:
            self.book.expect(outcome.wait)
            self.book.claim()

    def _find_own(self, job_id: str, user: str, address: str) -> str:
        """Return the id of a job that a user may change, and that may have the given one, too."""
        record = self._views.find(job_id)
        if record.user != user:
            self._check_access(user, address)
        return record.id

    def _on_cancelled(
        self, envelope: Any, job_id: str, force: bool, outcome: Cancelled | ZMQMessageError
    ) -> None:
        if isinstance(outcome, ZMQMessageError):
            self._reply_error(envelope, outcome)
            return
        if outcome.state == CANCELLED:
            self._views.notify(job_id)
        else:
            self.book.cancel(outcome, force)
        self._reply(envelope, 200, None)

    def _on_retried(self, envelope: Any, job_id: str, outcome: str | ZMQMessageError) -> None:
        if isinstance(outcome, ZMQMessageError):
            self._reply_error(envelope, outcome)
            return
        self._reply(envelope, 200, None)
        self._views.notify(job_id)
        self.book.expect(0.0)
        self.book.claim()

    def _on_pruned(self, envelope: Any, outcome: Pruned | ZMQMessageError) -> None:
        if isinstance(outcome, ZMQMessageError):
            self._reply_error(envelope, outcome)
            return
        payload = {'removed': outcome.removed, 'has_more': outcome.has_more}
        self._reply(envelope, 200, payload)

    # Workers

    def handle_progress(self, key: bytes, data: bytes) -> None:
        """Publish how far a job is."""
        run = self.book.live.get(key)
        if run is not None:
            run.publish(*decode_reply(data))
            self._views.notify(run.record.id)

    def warn_of_unknown_types(self) -> None:
        """Log which jobs wait because no worker knows their types, once until one does."""
        known = self._scheduler.job_types
        unknown = set(self._reader.waiting_types()) - known
        for name in sorted(unknown - self._warned):
            LOGGER.warning(
                'Jobs of the type %r wait in %s: no worker has a method of this name that is a '
                'job; they begin when one has it again',
                name,
                self._journal.path,
                extra=extra(method=name),
            )
        self._warned = (self._warned | unknown) - known

    # Life

    def check(self, now: float) -> None:
        """Do what is due.

        :param now: present time in seconds
        """
        self._views.reply_late(now)
        self.book.check(now)

    def drain(self) -> None:
        """Begin no more jobs, and let nobody wait any more."""
        self._drain_until = monotonic() + DRAIN_TIME
        self.book.drain()
        self._views.end()

    @property
    def is_busy(self) -> bool:
        """True while short jobs may end, and replies or the ends of jobs wait for the disk."""
        if self._writer.unanswered or (self.book.live and monotonic() < self._drain_until):
            return True
        return self.book.unrecorded > 0 and not self._writer.is_stuck

    def close(self) -> None:
        """Write what waits, and close the journal."""
        if self._writer.close(_CLOSE_TIMEOUT):
            self._journal.close()

    def stats(self) -> dict[str, Any]:
        """Return the statistics, as JSON types."""
        return {
            'states': self._journal.counts.states,
            'types': self._journal.counts.types,
            'in_hand': len(self.book.live),
            'watchers': len(self._views),
            'problem': self._writer.problem,
        }
