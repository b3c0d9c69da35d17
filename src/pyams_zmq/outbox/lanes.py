# SPDX-License-Identifier: ZPL-2.1
"""What the outbox keeps in a ZODB.

Databases contain the path of this module and the names of these classes and attributes: none of
them may change. The ZEO server needs none of them, because it resolves conflicts of BTrees only.
"""

from collections.abc import Iterable, Iterator
from heapq import merge

from BTrees.LOBTree import LOBTree
from BTrees.OOBTree import OOBTree
from persistent import Persistent

from pyams_zmq.outbox.storage import DeadLetter, Entry

SHARDS = 8
"""Trees for one service in a lane, as many as threads usually add at the same time"""

BATCH = 30
"""Sent messages that are removed from a tree at once, at least: half of a bucket of BTrees"""

TreeKey = tuple[str, int]
"""The name of a service, and a shard"""


class Application(Persistent):
    """The outbox of one application.

    :ivar lanes: the lanes by their ids, which sort by time
    :ivar dead: the dead letters by their ids, which sort by time
    """

    def __init__(self) -> None:
        self.lanes = OOBTree()
        self.dead = OOBTree()


class Lane(Persistent):
    """The messages that one process has added.

    A transaction that adds a message conflicts with each change of this object, but not with those
    of `progress`.

    :ivar owner: the process that sends them; empty if none does
    :ivar trees: the messages by their numbers, in trees by the name of the service and a shard.
        Each thread adds to its own shard: of transactions that insert into the same tree, some
        conflict when a bucket is split. No tree is removed: one that adds to it would not notice.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.trees = OOBTree()
        self.progress = Progress()

    def add(self, number: int, message: 'Message', shard: int = 0) -> None:
        """Add a message; `owner` must be current when the transaction is committed."""
        if self._p_jar is not None:
            self._p_jar.readCurrent(self)
        key = message.service, shard
        tree = self.trees.get(key)
        if tree is None:
            tree = self.trees[key] = LOBTree()
        tree[number] = message

    def next_number(self) -> int:
        """Return a number that is larger than all here."""
        return 1 + max((tree.maxKey() for tree in self.trees.values()), default=-1)

    def list_services(self) -> list[str]:
        """Return the names of services."""
        return sorted({service for service, _ in self.trees})

    def list_waiting(self, service: str, after: int = -1) -> Iterator[tuple[int, TreeKey]]:
        """Yield the numbers of messages that wait, without loading these, and their trees.

        :param after: only larger numbers
        """
        keys = self._list_keys(service)
        return merge(*(self._list_tree(key, after) for key in keys))

    def _list_keys(self, service: str) -> list[TreeKey]:
        return [key for key in self.trees if key[0] == service]

    def _list_tree(self, key: TreeKey, after: int) -> Iterator[tuple[int, TreeKey]]:
        sent = frozenset(self.progress.sent.get(key, ()))
        for number in self.trees[key].keys(after, excludemin=True):
            if number not in sent:
                yield number, key

    def count(self, service: str) -> int:
        """Return how many messages to a service wait, without loading these."""
        return sum(
            len(self.trees[key]) - len(self.progress.sent.get(key, ()))
            for key in self._list_keys(service)
        )

    def has_waiting(self) -> bool:
        """Return True if a message waits."""
        return any(True for key in self.trees for _ in self._list_tree(key, -1))

    def find(self, number: int) -> TreeKey | None:
        """Return the tree in which a message waits; None if its number is unknown."""
        for key, tree in self.trees.items():
            if number in tree and number not in self.progress.sent.get(key, ()):
                service, shard = key
                return service, shard
        return None

    def mark_sent(self, key: TreeKey, numbers: Iterable[int]) -> None:
        """Remember that messages of a tree need not be sent again."""
        sent = sorted({*self.progress.sent.get(key, ()), *numbers})
        self.progress.sent = {**self.progress.sent, key: tuple(sent)}

    def remove_sent(self) -> None:
        """Remove messages that are sent, when it is a batch.

        The first one stays: BTrees do not resolve a conflict if the first key of a bucket is
        removed while another is added. A tree that is drained in time has one bucket.
        """
        for key, sent in self.progress.sent.items():
            if len(sent) > BATCH:
                for number in sent[1:]:
                    del self.trees[key][number]
                self.progress.sent = {**self.progress.sent, key: sent[:1]}


class Progress(Persistent):
    """What is written while messages are added: an object of its own, so that this never conflicts.

    :ivar sent: by tree, the numbers of messages that are sent and not yet removed
    :ivar renewals: how often the owner of the lane has said that it still has it
    """

    def __init__(self) -> None:
        self.sent: dict[TreeKey, tuple[int, ...]] = {}
        self.renewals = 0


class Message(Persistent):
    """A message: an object of its own, so that the buckets of trees stay small.

    The attributes are those of an :class:`~pyams_zmq.outbox.storage.Entry`.

    :ivar created: when it was made, in the seconds of `time.time`
    """

    def __init__(self, entry: Entry, created: float) -> None:
        self.service = entry.service
        self.type = entry.type
        self.data = entry.data
        self.frames = tuple(entry.frames)
        self.is_job = entry.is_job
        self.created = created

    def to_entry(self) -> Entry:
        """Return the message."""
        return Entry(self.service, self.type, self.data, self.frames, self.is_job)


class DeadMessage(Persistent):
    """A message that its service has refused, and the reply."""

    def __init__(self, message: Message, status: int, reason: str) -> None:
        self.message = message
        self.status = status
        self.reason = reason

    def to_letter(self, letter_id: str) -> DeadLetter:
        """Return the message and the reply."""
        message = self.message
        return DeadLetter(letter_id, message.to_entry(), self.status, self.reason, message.created)
