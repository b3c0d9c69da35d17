# SPDX-License-Identifier: ZPL-2.1
"""Messages that wait for the end of their transaction."""

from functools import partial
from typing import Any

from pyams_zmq.client.transaction import MessageDataManager


class PendingMessages:
    """The messages of transactions that have not ended, of one or more clients.

    Transactions of several threads may share it.
    """

    def __init__(self) -> None:
        # In order; without a lock, because each operation of a dictionary is atomic.
        self._messages: dict[MessageDataManager, Any] = {}

    def add(self, message: MessageDataManager, sent: Any) -> None:
        """Add a message until it is sent or dropped.

        :param message: its data manager
        :param sent: the :class:`Sent` that describes it
        """
        message.on_end = partial(self._messages.pop, message, None)
        self._messages[message] = sent

    def read(self) -> list[Any]:
        """Return the :class:`Sent` messages, in the order in which they were added."""
        return list(self._messages.values())

    def reset(self) -> None:
        """Forget the messages: they are not sent if their transaction is committed later."""
        for message in list(self._messages):
            message.abort(None)
