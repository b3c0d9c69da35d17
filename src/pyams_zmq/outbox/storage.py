# SPDX-License-Identifier: ZPL-2.1
"""The contract between the outbox and the database that has its entries."""

from collections.abc import Sequence
from typing import Any, Protocol

from msgspec import Struct

MAX_REASON = 1000
"""Characters of the reason why a message is a dead letter"""


class Entry(Struct, frozen=True):
    """A message in the outbox.

    :ivar service: name of the service
    :ivar type: type of the message
    :ivar data: its JSON frame
    :ivar frames: its binary frames
    :ivar is_job: true if it submits a job
    """

    service: str
    type: str
    data: bytes
    frames: tuple[bytes, ...] = ()
    is_job: bool = False

    @property
    def size(self) -> int:
        """Bytes of all frames."""
        return len(self.data) + sum(map(len, self.frames))

    def __repr__(self) -> str:
        return f'<Entry {self.type!r} to {self.service!r}, {self.size} bytes>'  # not its content


class StoredEntry(Struct, frozen=True):
    """An entry of a committed transaction.

    :ivar key: its key, which grows in the order of an owner; only its storage knows what it is
    """

    key: Any
    entry: Entry


class Waiting(Struct, frozen=True):
    """The entries of one owner for one service that are not sent, or have no reply.

    :ivar owner: text that identifies the process that sends them; empty if none does
    :ivar count: number of entries
    :ivar since: when the oldest one was made, in the seconds of `time.time`
    :ivar renewals: how often the owner has said that it still has them, see `Storage.renew`
    """

    owner: str
    service: str
    count: int
    since: float
    renewals: int


class DeadLetter(Struct, frozen=True):
    """A message that the service has refused.

    :ivar id: identifies it for an operator
    :ivar status: status of the reply; 0 if the reply was not JSON
    :ivar reason: what the service has said, at most 1,000 characters
    :ivar since: when the message was made, in the seconds of `time.time`
    """

    id: str
    entry: Entry
    status: int
    reason: str
    since: float


class Refusal(Struct, frozen=True):
    """The reply that makes an entry a dead letter; see :class:`DeadLetter`."""

    status: int
    reason: str


class Storage(Protocol):
    """The entries of one application in its database.

    `add` runs in the transaction of a request. Each other method runs a transaction of its own, in
    another thread; it may raise any error of the database, and is called again later then.

    :ivar max_size: bytes of the largest entry; None without a limit of its own
    """

    max_size: int | None

    def add(self, entry: Entry, owner: str, manager: Any, request: Any) -> Any:
        """Add an entry in the current transaction of a transaction manager; return its key.

        :param owner: the process that sends it after the commit
        :param request: the request, or None
        :raises ZMQOutboxError: if no database takes part in the transaction
        """

    def read_waiting(self) -> list[Waiting]:
        """Return how many entries wait, by owner and service."""

    def read(self, owner: str, service: str, after: Any, limit: int) -> list[StoredEntry]:
        """Return entries of an owner that wait, ordered by their keys.

        :param after: only those with a larger key; None for all
        :param limit: number of entries
        """

    def settle(self, sent: Sequence[Any], refused: Sequence[tuple[Any, Refusal]]) -> None:
        """Drop entries that were sent, and make dead letters of others; ignore unknown keys.

        :param sent: keys
        :param refused: keys with the replies
        """

    def adopt(self, owner: str, heir: str) -> bool:
        """Give all entries of an owner to another one, in their order.

        :return: False if they have another owner meanwhile
        """

    def renew(self, owner: str) -> None:
        """Count one more renewal of the entries of an owner."""

    def read_dead(self, limit: int, after: str | None = None) -> list[DeadLetter]:
        """Return dead letters, the oldest first.

        :param limit: number of them
        :param after: only those after this id
        """

    def count_dead(self) -> dict[str, int]:
        """Return how many dead letters there are, by service; a large number may be too low."""

    def retry(self, ids: Sequence[str]) -> int:
        """Let dead letters be sent again, without an owner; return how many there were."""

    def drop(self, ids: Sequence[str]) -> int:
        """Drop dead letters; return how many there were."""

    def read_others(self) -> dict[str, int]:
        """Return how many entries other applications have in the same database, by their name."""

    def close(self) -> None:
        """Close what it has opened; the next use opens it again."""
