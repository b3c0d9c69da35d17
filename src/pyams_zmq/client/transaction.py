# SPDX-License-Identifier: ZPL-2.1
"""Messages that are sent when a transaction is committed."""

import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from itertools import count
from typing import Any, Protocol

import transaction
from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface import implementer

from pyams_zmq.client import PREPARE_TIMEOUT
from pyams_zmq.client.job_info import check_keeps_jobs
from pyams_zmq.client.job_request import SubmittedJob, make_submission
from pyams_zmq.client.problem import EncodedMessage
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.log_fields import extra
from pyams_zmq.wire.message import MAX_MESSAGE_SIZE, encode_message, encode_request
from pyams_zmq.wire.multipart import to_frames
from pyams_zmq.wire.tracing import CREATE, RequestSpan, Tracing

LOGGER = logging.getLogger('PyAMS (zmq)')

_numbers = count()
_START = object()
"""Key of the time when the first message of a transaction began to wait"""

_GROUPS = object()
"""Key of the messages of a transaction, by the identity of their client"""


class Sender(Protocol):
    """Sends messages on commit: a :class:`~pyams_zmq.client.ZMQClient`, or a test double.

    If it has a method `reserve_all`, as ZMQClient has, that is called instead of `prepare`. A
    message with binary frames is posted with a third argument, the list of these; a job with a
    fourth one, True: it may be sent twice.

    If it has a method `join_transaction`, that adds a message to the transaction instead, and gets
    the transaction manager, the type, the JSON frame, the binary frames, and whether it is a job.

    If it has a method `on_join`, as a RecordingClient has, that is called with the data manager of
    each message that joins a transaction. It may set `on_end` of the data manager, a function that
    is called before the message is posted, and when it is dropped. After `abort(None)` of the data
    manager the message is not sent, although its transaction goes on.
    """

    def prepare(self, *, timeout: float) -> None:
        """Wait *timeout* seconds at most until messages can be posted; raise if they cannot."""

    def post(self, type: str, data: bytes) -> None:  # noqa: A002 - the name of the field
        """Accept an encoded message, without waiting."""


def send_on_commit(
    client: Sender,
    type: str,  # noqa: A002 - the name of the field
    args: Any = None,
    *,
    manager: Any = None,
    timeout: float = PREPARE_TIMEOUT,
    frames: Iterable[Any] | None = None,
) -> None:
    """Send a message when the current transaction is committed, and only then.

    The arguments are encoded now, and frames that are not bytes are copied; later changes to them
    have no effect. The service must be connected when the transaction votes; otherwise the
    transaction is aborted with a ZMQUnreachableError or ZMQRefusedError. So it is when the backlog
    of the client has no room for all messages of the transaction, see `ZMQClient.max_backlog`, with
    a ZMQBacklogError. The commit does not wait for the reply, see `ZMQClient.send`.

    :param client: client of the service
    :param type: type of the message
    :param args: arguments, any value with a JSON form
    :param manager: transaction manager, by default the one of this thread
    :param timeout: seconds that the commit waits for the service and for room, for all messages
        together
    :param frames: binary frames, see :meth:`.ZMQClient.call`
    :raises TypeError, ValueError: if the type is not a string, the arguments have no JSON form, or
        a frame is not bytes
    :raises ZMQMessageError: with status 413, if it is larger than `client.max_message_size`
    """
    binary = to_frames(frames)
    options = _trace(client, [type, args]).options
    data = encode_message(type, args, _max_size_of(client), binary, options)
    _join(manager, client, type, data, timeout, binary)


def submit_on_commit(
    client: Sender,
    type: str,  # noqa: A002 - the name of the field
    args: Any = None,
    *,
    manager: Any = None,
    commit_timeout: float = PREPARE_TIMEOUT,
    id: str | None = None,  # noqa: A002 - the name of the field
    key: str | None = None,
    delay: float | None = None,
    due: datetime | None = None,
    expires: float | None = None,
    priority: int = 0,
    timeout: float | None = None,
    retries: int | None = None,
    frames: Iterable[Any] | None = None,
) -> SubmittedJob:
    """Submit a job when the current transaction is committed, and only then.

    Its id is known now. The service gets the job a moment after the commit: until then, and after
    an abort, it does not know the id. The rules are those of `send_on_commit`, but the job is sent
    again if the connection is lost before the reply, or the disk of the service is full. Times
    such as a *delay* begin when the service gets it.

    The other arguments are those of :meth:`.ZMQClient.submit`. If another job has the *key*, no new
    one is made, and both ids are names of that job.

    :param commit_timeout: the *timeout* of `send_on_commit`
    :return: the job, with its id
    :raises: the errors of `send_on_commit`
    :raises ValueError: for a bad option
    :raises ZMQJobError: with status 501, if the service is declared without a journal
    """
    submission = make_submission(
        type,
        args,
        id=id,
        key=key,
        delay=delay,
        due=due,
        expires=expires,
        priority=priority,
        timeout=timeout,
        retries=retries,
    )
    check_keeps_jobs(client)
    binary = to_frames(frames)
    message = _trace(client, submission.message).message
    data = encode_request(message, max_size=_max_size_of(client), frames=binary)
    _join(manager, client, type, data, commit_timeout, binary, is_job=True)
    return SubmittedJob(submission.id)


def _trace(client: Sender, message: list[Any]) -> RequestSpan:
    """Return the span in which a message is made; the commit sends it later, in no span."""
    tracing: Tracing | None = getattr(client, 'tracing', None)
    if tracing is None:
        return RequestSpan(message)
    with tracing.request(client, message, CREATE) as span:
        return span


def _max_size_of(client: Sender) -> int:
    size: int = getattr(client, 'max_message_size', MAX_MESSAGE_SIZE)
    return size


def _join(
    manager: Any,
    client: Sender,
    type: str,  # noqa: A002 - the name of the field
    data: bytes,
    timeout: float,
    frames: Sequence[bytes],
    is_job: bool = False,
) -> None:
    """Add a message to the current transaction."""
    manager = transaction.manager if manager is None else manager
    join_transaction = getattr(client, 'join_transaction', None)
    if join_transaction is not None:
        join_transaction(manager, type, data, frames, is_job)
        return
    current = manager.get()
    message = MessageDataManager(manager, client, type, data, timeout, frames, is_job)
    current.join(message)
    try:
        groups = current.data(_GROUPS)
    except KeyError:
        groups = {}
        current.set_data(_GROUPS, groups)
    group = groups.setdefault(id(client), MessageGroup(client))
    group.add(message)
    current.addBeforeCommitHook(group.wait, (current,))
    on_join = getattr(client, 'on_join', None)
    if on_join is not None:
        on_join(message)


def is_under_way(manager: Any) -> bool:
    """Return True if a transaction has begun, without beginning one."""
    detector = _Detector()
    manager.registerSynch(detector)  # it calls `newTransaction` for the current transaction
    manager.unregisterSynch(detector)
    return detector.has_transaction


class _Detector:
    """Synchronizer that detects the current transaction."""

    has_transaction = False

    def newTransaction(self, transaction: Any) -> None:  # noqa: N802 - the name of ISynchronizer
        self.has_transaction = True


@implementer(ISavepointDataManager, IDataManagerSavepoint)
class MessageDataManager:
    """One message of a transaction; it is its own savepoint, because it never changes.

    :ivar encoded: the message
    :ivar is_dropped: true after a rollback or an abort
    :ivar on_end: called before the message is posted, and when it is dropped
    :ivar reservation: room in the backlog of the client, from the beginning of the commit
    :ivar error: the error if the queue has no room
    """

    def __init__(
        self,
        manager: Any,
        client: Sender,
        type: str,  # noqa: A002 - the name of the field
        data: bytes,
        timeout: float,
        frames: Sequence[bytes] = (),
        is_repeatable: bool = False,
    ):
        self.transaction_manager = manager
        self._client = client
        self.type = type
        # Without what it has not, for clients of others that know no frames.
        self.encoded: EncodedMessage = (type, data, frames) if frames else (type, data)
        if is_repeatable:
            self.encoded = (type, data, frames, True)
        self.timeout = timeout
        self.is_dropped = False
        self.on_end: Callable[[], object] = lambda: None
        self.reservation: Any = None
        self.error: Exception | None = None
        # After databases, so that a message refers to committed data; but before zope.sqlalchemy
        # ("~sqlalchemy"), which commits when it votes: no later participant may refuse.
        self._key = f'~pyams_zmq:{next(_numbers):020}'

    def sortKey(self) -> str:  # noqa: N802 - the name of IDataManager
        """Return the key that keeps the order of the messages."""
        return self._key

    def savepoint(self) -> 'MessageDataManager':
        """Return this object: the transaction itself drops the messages that were added later."""
        return self

    def rollback(self) -> None:
        """Keep the message; a rollback drops later ones only."""

    def abort(self, transaction: Any) -> None:
        """Drop the message: the transaction is aborted, or rolled back to an earlier savepoint."""
        self.is_dropped = True
        self.on_end()
        reservation, self.reservation = self.reservation, None
        if reservation is not None:
            reservation.cancel()

    tpc_abort = abort

    def tpc_begin(self, transaction: Any) -> None:
        """Do nothing before the vote."""

    commit = tpc_begin

    def tpc_vote(self, transaction: Any) -> None:
        """Raise if the service was unreachable before the commit, or is now; keep room otherwise.

        From then on the message is not dropped.
        """
        if self.is_dropped:  # by its client, see `on_join` of Sender
            return
        if self.error is not None:
            raise self.error
        if self.reservation is not None:
            self.reservation.check()
            return
        # Added after the hooks, by a synchronizer for example.
        reserve_all = getattr(self._client, 'reserve_all', None)
        if reserve_all is None:
            self._client.prepare(timeout=0)
        else:
            [self.reservation] = reserve_all([self.encoded])

    def tpc_finish(self, transaction: Any) -> None:
        """Post the message; an error is only logged, because the transaction is committed."""
        if self.is_dropped:
            return
        self.on_end()
        reservation, self.reservation = self.reservation, None
        try:
            if reservation is None:
                self._client.post(*self.encoded)
            else:
                reservation.post()
        except Exception:
            LOGGER.exception(
                'Message %r to %s of a committed transaction is lost',
                self.type,
                getattr(self._client, 'address', self._client),
                extra=extra(service=getattr(self._client, 'service_name', None), method=self.type),
            )


class MessageGroup:
    """The messages of one transaction to one client.

    :param client: the client
    """

    def __init__(self, client: Sender):
        self._client = client
        self._messages: list[MessageDataManager] = []
        self._number = 0

    def add(self, message: MessageDataManager) -> None:
        """Add a message."""
        self._messages.append(message)

    def wait(self, transaction: Any) -> None:
        """Wait for the service, and for room for all messages that have none yet.

        This is before the commit, because databases hold locks during it.
        """
        new = [message for message in self._messages[self._number :] if not message.is_dropped]
        self._number = len(self._messages)
        if not new:
            return
        now = monotonic()
        try:
            start = transaction.data(_START)
        except KeyError:
            start = now
            transaction.set_data(_START, start)
        timeout = max(0, start + max(message.timeout for message in new) - now)
        reserve_all = getattr(self._client, 'reserve_all', None)
        try:
            if reserve_all is None:
                self._client.prepare(timeout=timeout)
                return
            held = sum(message.reservation is not None for message in self._messages)
            data = [message.encoded for message in new]
            reservations = reserve_all(data, timeout=timeout, held=held)
        except Exception as error:  # noqa: BLE001 - the vote raises it
            for message in new:
                message.error = error
        else:
            for message, reservation in zip(new, reservations, strict=True):
                message.reservation = reservation
