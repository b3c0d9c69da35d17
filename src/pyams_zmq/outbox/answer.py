# SPDX-License-Identifier: ZPL-2.1
"""What became of an entry that was sent."""

from typing import Any, NamedTuple

from pyams_zmq.client.problem import CheckedReply
from pyams_zmq.outbox.storage import MAX_REASON, Refusal


class Answer(NamedTuple):
    """The reply to an entry; it does not keep the content of the entry.

    :ivar key: key of the entry
    :ivar service: its service
    :ivar type: its type
    :ivar reply: the reply; None if the client has given the entry back
    """

    key: Any
    service: str
    type: str
    reply: CheckedReply | None

    @property
    def is_good(self) -> bool:
        """True if the service has accepted the entry."""
        return self.reply is not None and self.reply.problem is None

    @property
    def refusal(self) -> Refusal | None:
        """What makes the entry a dead letter, if the service has refused it."""
        if self.reply is None or self.reply.problem is None:
            return None
        text = self.reply.text or self.reply.problem
        reason = text.removeprefix(f'{self.reply.status} ')[:MAX_REASON]
        return Refusal(self.reply.status, reason)
