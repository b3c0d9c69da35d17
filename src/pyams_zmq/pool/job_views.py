# SPDX-License-Identifier: ZPL-2.1
"""Jobs as clients see them, and the clients that wait until one has changed."""

import logging
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from math import inf
from typing import Any

import zmq

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs.job_messages import Wait, describe_job
from pyams_zmq.jobs.job_replies import UNKNOWN
from pyams_zmq.jobs.reader import JournalReader
from pyams_zmq.jobs.records import ENDED, JobRecord
from pyams_zmq.jobs.watchers import Watcher, Watchers
from pyams_zmq.pool.job_run import JobRun
from pyams_zmq.wire.clock import monotonic, time
from pyams_zmq.wire.message import DRAINING_REPLY, encode

LOGGER = logging.getLogger('PyAMS (zmq)')

_TURN = 0.001  # seconds for replies to those who wait, until other messages have their turn


class JobViews:
    """Jobs as clients see them.

    :param reader: reads the journal
    :param send_reply: sends the frames of a reply with an envelope
    :param find_run: returns a job in hand, from its id; or None
    :param post: calls a function when other messages had their turn
    """

    def __init__(
        self,
        reader: JournalReader,
        send_reply: Callable[[Any, list[Any]], None],
        find_run: Callable[[str], JobRun | None],
        post: Callable[[Callable[[], None]], object],
    ):
        self._reader = reader
        self._send_reply = send_reply
        self._find_run = find_run
        self._post = post
        self._watchers = Watchers()
        self._replies: deque[tuple[Any, Callable[[], Any]]] = deque()  # that are to be sent

    def __len__(self) -> int:
        """Return the number of clients that wait."""
        return len(self._watchers)

    def find(self, job_id: str) -> JobRecord:
        """Return a job.

        :raises ZMQMessageError: with status 404 if it is unknown
        """
        record = self._reader.get(job_id)
        if record is None:
            raise ZMQMessageError(404, UNKNOWN)
        return record

    def describe(self, job_id: str, record: JobRecord | None = None) -> dict[str, Any]:
        """Return a job as clients get it, with the id by which they ask for it.

        :param record: the job, if it is at hand
        :raises ZMQMessageError: with status 404 if it is unknown
        """
        record = record or self.find(job_id)
        run = self._find_run(record.id) if record.state not in ENDED else None
        return {**describe_job(record, time(), run), 'id': job_id}

    def wait(self, envelope: Any, wait: Wait) -> None:
        """Reply at the next change of a job that the client does not know.

        :raises ZMQMessageError: with status 404 if one of the jobs is unknown
        """
        seen = {job_id: self._look(job_id) for job_id in wait.ids}
        new = self._find_new(wait, seen)
        if new is not None:
            self._send_reply(envelope, [encode([200, self.describe(new)])])
            return
        ids = {asked: job_id for asked, (job_id, *_state) in seen.items()}
        until = monotonic() + wait.timeout
        for refused in self._watchers.add(Watcher(wait, ids, envelope, until)):
            text = f'The service is overloaded: {len(self._watchers)} messages wait for jobs'
            self._send_reply(refused.envelope, [encode([503, text])])

    def _look(self, job_id: str) -> tuple[str, int, bool]:
        """Return id and revision of a job, and whether it has ended; its reply is not read.

        :raises ZMQMessageError: with status 404 if it is unknown
        """
        found = self._reader.look(job_id)
        if found is None:
            raise ZMQMessageError(404, UNKNOWN)
        job_id, state, revision = found
        has_ended = state in ENDED
        run = None if has_ended else self._find_run(job_id)
        return job_id, revision if run is None else max(revision, run.revision), has_ended

    def _find_new(self, wait: Wait, seen: dict[str, tuple[str, int, bool]]) -> str | None:
        """Return the id of the job that has changed first, of those that are new to the client."""
        new = [
            (revision, asked)
            for asked, (_job_id, revision, has_ended) in seen.items()
            if wait.is_new(asked, revision, has_ended)
        ]
        return min(new)[1] if new else None

    def notify(self, job_id: str) -> None:
        """Send a job that has changed to those who wait for it."""
        watchers = self._watchers.watchers_of(job_id)
        if not watchers:
            return
        try:
            _job_id, revision, has_ended = self._look(job_id)
        except ZMQMessageError:  # they get the reason when their time is over
            return
        changed: dict[str, list[Watcher]] = defaultdict(list)
        for watcher in watchers:
            asked = watcher.find(job_id, revision, has_ended)
            if asked is not None:
                changed[asked].append(watcher)
        for asked, group in changed.items():
            encode_once = cache(partial(self._encode_frame, asked))
            for watcher in group:
                self._watchers.remove(watcher)
                self._reply_soon(watcher, encode_once)

    def notify_number(self, number: int) -> None:
        """Do the same for a job of which the number is known."""
        if len(self):  # its id is only for those who wait
            with suppress(ZMQMessageError):  # as in `notify`
                self.notify(self._reader.find_id(number))

    def notify_all(self, ids: list[str]) -> None:
        """Send jobs that have changed to those who wait for them."""
        for job_id in ids:
            self.notify(job_id)

    def reply_late(self, now: float) -> None:
        """Send the present state to those who have waited for long enough.

        :param now: present time in seconds
        """
        for watcher in self._watchers.take_late(now):
            self._reply_soon(watcher, partial(self._encode_late, watcher.wait))

    def end(self) -> None:
        """Let nobody wait any more."""
        for watcher in self._watchers.take_all():
            self._replies.append((watcher.envelope, lambda: DRAINING_REPLY))
        self._send_until(inf)

    # Replies that are sent in steps, so that many large ones do not hold up other messages

    def _reply_soon(self, watcher: Watcher, encode_reply: Callable[[], Any]) -> None:
        if not self._replies:
            self._post(self._send_some)
        self._replies.append((watcher.envelope, encode_reply))

    def _send_some(self) -> None:
        self._send_until(monotonic() + _TURN)
        if self._replies:
            self._post(self._send_some)

    def _send_until(self, deadline: float) -> None:
        while self._replies:
            envelope, encode_reply = self._replies.popleft()
            try:
                self._send_reply(envelope, [encode_reply()])
            except Exception:  # the others get theirs
                LOGGER.exception('A client that waits for a job gets no reply')
            if monotonic() > deadline:
                break

    def _encode(self, job_id: str) -> bytes:
        try:
            return encode([200, self.describe(job_id)])
        except ZMQMessageError as error:  # it was removed meanwhile
            return encode([error.status, error.text])

    def _encode_frame(self, job_id: str) -> zmq.Frame:
        # Messages with a Frame share its memory.
        return zmq.Frame(self._encode(job_id), copy=True)

    def _encode_late(self, wait: Wait) -> bytes:
        new = None
        with suppress(ZMQMessageError):
            new = self._find_new(wait, {job_id: self._look(job_id) for job_id in wait.ids})
        return self._encode(new or wait.ids[0])
