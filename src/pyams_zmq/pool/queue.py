# SPDX-License-Identifier: ZPL-2.1
"""The calls that wait for a worker, divided among the connections of clients."""

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from pyams_zmq.process.connections import Listener

_ENDED = b''  # key of the queue for connections that have ended; a routing id is not empty
_key_of = attrgetter('key')


@dataclass(slots=True, eq=False)
class Call:
    """A request that has no reply yet.

    :ivar key: number of the call, `KEY_SIZE` bytes; later calls have higher ones
    :ivar envelope: frames in front of the reply; the first one is the routing id of the connection.
        In the broker, an :class:`~pyams_zmq.process.connections.Envelope`
    :ivar header: first frame for the worker, see :mod:`pyams_zmq.pool.protocol`
    :ivar body: frames of the message
    :ivar size: bytes of memory, with the envelope
    :ivar name: type of the message, see :func:`pyams_zmq.wire.message.peek_type`
    :ivar method: a :class:`~pyams_zmq.handler.statistics.MethodStats`
    :ivar received: time of the request
    :ivar attempts: number of workers that were lost during this call
    """

    key: bytes
    envelope: Any = field(repr=False)
    header: bytes = field(repr=False)
    body: list[Any] = field(repr=False)
    size: int
    name: bytes
    method: Any
    received: float
    attempts: int = 0


class _ClientQueue(deque[Call]):
    """The waiting calls of one connection, or of all that have ended, in their order.

    :ivar client: routing id of the connection, or `_ENDED`
    :ivar size: bytes of the calls
    """

    size = 0

    def __init__(self, client: bytes):
        super().__init__()
        self.client = client


class FairQueue:
    """Queue that the connections of clients share: they take turns, call by call.

    The limits count the calls of all clients. When one is reached, a client that holds less than an
    equal share of it can still add a call: that which holds most loses its last one.

    All connections that have ended count as one client: else a program that opens a connection for
    each call, and does not wait for the reply, would have most of the turns and shares.

    :param limit: number of calls
    :param size_limit: bytes of the calls
    :param client_size_limit: bytes of the calls of one connection, if it has more than one
    :ivar size: bytes of the calls
    :ivar listener: what is known about the connections; None if they are all open
    """

    listener: Listener | None = None

    def __init__(self, limit: int, size_limit: int, client_size_limit: int):
        self.limit = limit
        self.size_limit = size_limit
        self.client_size_limit = client_size_limit
        self.size = 0
        self._noted_ends = 0
        self._length = 0
        self._clients: OrderedDict[bytes, _ClientQueue] = OrderedDict()  # in the order of turns
        self._ended_sizes: dict[bytes, int] = {}  # bytes of each connection that has ended

    def __len__(self) -> int:
        return self._length

    def age(self, now: float) -> float:
        """Return the seconds for which the oldest call waits; 0 if none waits."""
        return max((now - calls[0].received for calls in self._clients.values()), default=0.0)

    def put(self, call: Call) -> list[Call]:
        """Add a call behind those of its client.

        :return: the calls that have to be refused because of the limits: this one, or others, which
            were removed
        """
        is_too_many = self._length >= self.limit
        is_too_large = self.size + call.size > self.size_limit
        if is_too_many or is_too_large:
            self._note_ends()
        client = self._find_client(call)
        calls = self._clients.get(client)
        length, size = (0, 0) if calls is None else (len(calls), calls.size)
        own_size = size if client else self._ended_sizes.get(call.envelope[0], 0)
        if own_size and own_size + call.size > self.client_size_limit:
            return [call]
        if is_too_many or is_too_large:
            clients = len(self._clients) + (calls is None)
            if (is_too_many and (length + 1) * clients > self.limit) or (
                is_too_large and (size + call.size) * clients > self.size_limit
            ):
                return [call]
        refused = []
        # As the share of this client is not used up, at least one other has more than its share.
        while self._length >= self.limit:
            refused.append(self._drop_last(max(self._clients.values(), key=len)))
        while self.size + call.size > self.size_limit:
            refused.append(self._drop_last(max(self._clients.values(), key=_size_of)))
        self._add(client, call)
        return refused

    def put_back(self, call: Call) -> None:
        """Add a call again that was taken, in the order of its client, whose turn is next."""
        client = self._find_client(call)
        self._add(client, call)
        self._clients.move_to_end(client, last=False)

    def take(self) -> Call:
        """Remove and return the first call of the client whose turn it is.

        :raises KeyError: the queue is empty
        """
        client, calls = self._clients.popitem(last=False)
        while client and not self._is_open(calls[-1]):
            self._merge(calls)
            client, calls = self._clients.popitem(last=False)
        call = calls.popleft()
        if calls:
            self._clients[client] = calls
        self._count(calls, call, -1)
        return call

    def take_types(self, names: Collection[bytes]) -> list[Call]:
        """Remove and return the calls of some types, in the order in which they came."""
        taken = []
        for calls in list(self._clients.values()):
            found = [call for call in calls if call.name in names]
            if not found:
                continue
            kept = [call for call in calls if call.name not in names]
            calls.clear()
            calls.extend(kept)
            for call in found:
                self._count(calls, call, -1)
            taken += found
            if not calls:
                del self._clients[calls.client]
        return sorted(taken, key=_key_of)

    def _is_open(self, call: Call) -> bool:
        if self.listener is None:
            return True
        connection = call.envelope.connection
        return connection is not None and not connection.is_ended

    def _find_client(self, call: Call) -> bytes:
        """Return the key of the queue for a call."""
        client: bytes = call.envelope[0]
        if client in self._ended_sizes:  # behind its other calls, whose connection has ended
            return _ENDED
        calls = self._clients.get(client)
        if self._is_open(call) or (calls and self._is_open(calls[-1])):
            return client
        if calls:
            self._merge(self._clients.pop(client))
        return _ENDED

    def _note_ends(self) -> None:
        """Merge the queues of all connections that have ended."""
        if self.listener is not None and self.listener.ends != self._noted_ends:
            self._noted_ends = self.listener.ends
            for client, calls in list(self._clients.items()):
                if client and not self._is_open(calls[-1]):
                    self._merge(self._clients.pop(client))

    def _merge(self, calls: _ClientQueue) -> None:
        """Add the calls of a connection that has ended to the queue for these."""
        for call in calls:
            self._length -= 1
            self.size -= call.size
            self._add(_ENDED, call)

    def _add(self, client: bytes, call: Call) -> None:
        calls = self._clients.get(client)
        if calls is None:
            calls = self._clients[client] = _ClientQueue(client)
        if calls and calls[-1].key > call.key:
            insort(calls, call, key=_key_of)
        else:
            calls.append(call)
        self._count(calls, call, 1)

    def _drop_last(self, calls: _ClientQueue) -> Call:
        call = calls.pop()
        if not calls:
            del self._clients[calls.client]
        self._count(calls, call, -1)
        return call

    def _count(self, calls: _ClientQueue, call: Call, number: int) -> None:
        """Count a call that was added (1) or removed (-1)."""
        size = number * call.size
        calls.size += size
        self.size += size
        self._length += number
        if calls.client == _ENDED:
            client = call.envelope[0]
            self._ended_sizes[client] = self._ended_sizes.get(client, 0) + size
            if not self._ended_sizes[client]:
                del self._ended_sizes[client]


def _size_of(calls: _ClientQueue) -> int:
    return calls.size
