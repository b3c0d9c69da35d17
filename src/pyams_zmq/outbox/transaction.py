# SPDX-License-Identifier: ZPL-2.1
"""The messages of one transaction that are in the outbox: posted when it is committed."""

from itertools import count
from typing import Any

from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface import implementer

from pyams_zmq.outbox.relay import Relay
from pyams_zmq.outbox.storage import Entry

_numbers = count()
_GROUP = object()
"""Key of the messages of a transaction"""


def join(manager: Any, relay: Relay, key: Any, entry: Entry) -> None:
    """Post an entry when the current transaction of a manager is committed.

    :param key: key of the entry in its storage
    """
    current = manager.get()
    message = StoredMessage(manager, relay, key, entry)
    current.join(message)
    try:
        group: list[StoredMessage] = current.data(_GROUP)
    except KeyError:
        group = []
        current.set_data(_GROUP, group)
        # After all participants have committed. If one fails, the database may have committed the
        # entry before; the relay looks for it then.
        current.addAfterCommitHook(_post, (group,))
    group.append(message)


def _post(is_committed: bool, messages: 'list[StoredMessage]') -> None:
    for message in messages:
        if is_committed:
            message.post()
        else:
            message.look()


@implementer(ISavepointDataManager, IDataManagerSavepoint)
class StoredMessage:
    """One message of a transaction; it is its own savepoint, because it never changes.

    The database drops its entry at a rollback or an abort, and this object is dropped then, too.
    """

    def __init__(self, manager: Any, relay: Relay, key: Any, entry: Entry):
        self.transaction_manager = manager
        self._relay = relay
        self._stored: tuple[Any, Entry] | None = (key, entry)
        self._key = f'~pyams_zmq:{next(_numbers):020}'

    def sortKey(self) -> str:  # noqa: N802 - the name of IDataManager
        """Return a key that sorts it after databases."""
        return self._key

    def savepoint(self) -> 'StoredMessage':
        """Return this object: the transaction itself drops the messages that were added later."""
        return self

    def rollback(self) -> None:
        """Keep the message; a rollback drops later ones only."""

    def abort(self, transaction: Any) -> None:
        """Drop the message: the transaction is aborted, or rolled back to an earlier savepoint."""
        self._stored = None

    tpc_abort = abort

    def tpc_begin(self, transaction: Any) -> None:
        """Do nothing: the database has the entry."""

    commit = tpc_vote = tpc_finish = tpc_begin

    def post(self) -> None:
        """Send the message, if it was not dropped."""
        if self._stored is not None:
            self._relay.post(*self._stored)

    def look(self) -> None:
        """Look for the message: the commit has failed, maybe after that of the database."""
        self._relay.look()
