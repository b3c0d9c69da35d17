# SPDX-License-Identifier: ZPL-2.1
"""Messages that are sent when a transaction is committed."""

import logging
from itertools import count
from time import monotonic
from typing import Any, Protocol

import transaction
from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface import implementer

from pyams_zmq.client import PREPARE_TIMEOUT
from pyams_zmq.wire.message import encode_message

LOGGER = logging.getLogger('PyAMS (zmq)')

_numbers = count()
_START = object()
"""Key of the time when the first message of a transaction began to wait"""


class Sender(Protocol):
    """What sends on commit: :class:`~pyams_zmq.client.ZMQClient`, or one that stands for it."""

    def prepare(self, *, timeout: float) -> None:
        """Make sure that messages can be posted, or raise; *timeout* is in seconds."""

    def post(self, type: str, data: bytes) -> None:  # noqa: A002 - the name of the field
        """Take an encoded message, without waiting for anything."""


def send_on_commit(
    client: Sender,
    type: str,  # noqa: A002 - the name of the field
    args: Any = None,
    *,
    manager: Any = None,
    timeout: float = PREPARE_TIMEOUT,
) -> None:
    """Send a message when the current transaction is committed, and only then.

    The message is what it is now, whatever happens to the arguments later. The service has to be
    there when the transaction votes; if it is not, the transaction is aborted with a
    ZMQUnreachableError or ZMQRefusedError. The reply is not waited for, see `ZMQClient.send`.

    :param client: client of the service
    :param type: type of the message
    :param args: its arguments, anything that JSON can say
    :param manager: transaction manager, by default the one of this thread
    :param timeout: seconds that the commit may wait for the service, for all messages together
    :raises TypeError, ValueError: for a type which is no text, or arguments that JSON cannot say
    :raises ZMQMessageError: with status 413, for more than 32 MiB
    """
    data = encode_message(type, args)
    manager = transaction.manager if manager is None else manager
    under_way = manager.get()
    message = MessageDataManager(manager, client, type, data, timeout)
    under_way.join(message)
    under_way.addBeforeCommitHook(message.wait, (under_way,))


def is_under_way(manager: Any) -> bool:
    """Tell if somebody has begun a transaction, without beginning one.

    :param manager: transaction manager
    """
    look = _Look()
    manager.registerSynch(look)
    manager.unregisterSynch(look)
    return look.has_seen_one


class _Look:
    """Synchronizer, which is told of the transaction that is under way."""

    has_seen_one = False

    def newTransaction(self, transaction: Any) -> None:  # noqa: N802 - the name of ISynchronizer
        self.has_seen_one = True


@implementer(ISavepointDataManager, IDataManagerSavepoint)
class MessageDataManager:
    """One message of a transaction; it is its own savepoint, for it never changes."""

    def __init__(
        self,
        manager: Any,
        client: Sender,
        type: str,  # noqa: A002 - the name of the field
        data: bytes,
        timeout: float,
    ):
        self.transaction_manager = manager
        self._client = client
        self._type = type
        self._data = data
        self._timeout = timeout
        self._is_dropped = False
        self._error: Exception | None = None
        # After databases, so that messages tell of what is committed; but before zope.sqlalchemy
        # ("~sqlalchemy"), which commits when it votes: nobody may say no after it.
        self._key = f'~pyams_zmq:{next(_numbers):020}'

    def sortKey(self) -> str:  # noqa: N802 - the name that transactions ask for
        """Keep the order of the messages."""
        return self._key

    def savepoint(self) -> 'MessageDataManager':
        """Return what a rollback needs: the transaction itself drops the messages added later."""
        return self

    def rollback(self) -> None:
        """Stay, when later messages are dropped."""

    def abort(self, transaction: Any) -> None:
        """Drop the message, with the transaction or by a rollback to an earlier savepoint."""
        self._is_dropped = True

    def wait(self, transaction: Any) -> None:
        """Wait for the service, before the commit begins: databases lock while they commit."""
        if self._is_dropped:
            return
        now = monotonic()
        try:
            start = transaction.data(_START)
        except KeyError:
            start = now
            transaction.set_data(_START, start)
        try:
            self._client.prepare(timeout=max(0, start + self._timeout - now))
        except Exception as error:  # noqa: BLE001 - whatever it is, the vote raises it
            self._error = error

    def tpc_begin(self, transaction: Any) -> None:
        """Nothing is to be done before the vote."""

    def commit(self, transaction: Any) -> None:
        """Nothing is to be done before the vote."""

    def tpc_vote(self, transaction: Any) -> None:
        """Say no if the service was not there, or is not any more."""
        if self._error is not None:
            raise self._error
        self._client.prepare(timeout=0)

    def tpc_finish(self, transaction: Any) -> None:
        """Hand the message over; whatever happens, the transaction is committed."""
        try:
            self._client.post(self._type, self._data)
        except Exception:
            LOGGER.exception('Message %r of a committed transaction is lost', self._type)

    def tpc_abort(self, transaction: Any) -> None:
        """Drop the message."""
