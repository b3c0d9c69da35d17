#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#


"""PyAMS_zmq.transaction module: messages that are sent when a transaction is committed."""

import logging
from itertools import count
from time import monotonic
from typing import Any, Protocol

import transaction
from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface import implementer

from pyams_zmq.client import PREPARE_TIMEOUT
from pyams_zmq.message import encode_message

__docformat__ = 'restructuredtext'

LOGGER = logging.getLogger('PyAMS (zmq)')

_numbers = count()
_VOTE = object()
"""Key of the time when the first message of a transaction has voted"""


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
    manager.get().join(MessageDataManager(manager, client, type, data, timeout))


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
        """Drop the message."""

    def tpc_begin(self, transaction: Any) -> None:
        """Nothing is to be done before the vote."""

    def commit(self, transaction: Any) -> None:
        """Nothing is to be done before the vote."""

    def tpc_vote(self, transaction: Any) -> None:
        """Make sure that the service is there, and lets us in."""
        now = monotonic()
        try:
            start = transaction.data(_VOTE)
        except KeyError:
            start = now
            transaction.set_data(_VOTE, start)
        self._client.prepare(timeout=max(0, start + self._timeout - now))

    def tpc_finish(self, transaction: Any) -> None:
        """Hand the message over; whatever happens, the transaction is committed."""
        try:
            self._client.post(self._type, self._data)
        except Exception:
            LOGGER.exception('Message %r of a committed transaction is lost', self._type)

    def tpc_abort(self, transaction: Any) -> None:
        """Drop the message."""
