# SPDX-License-Identifier: ZPL-2.1
"""How the connections of clients share the queue, and the order within each."""

from random import Random

import pytest

from pyams_zmq.auth import Access
from pyams_zmq.pool.queue import Call, FairQueue
from pyams_zmq.process.connections import Connection, Envelope, Listener


def make_queue(limit=10, size_limit=1000, client_size_limit=1000):
    queue = FairQueue(limit, size_limit, client_size_limit)
    queue.listener = Listener('tcp://127.0.0.1:9', None, Access())
    return queue


def make_call(queue, client, number, size=1):
    """Make a call; the descriptor of the connection is the code of the last letter of *client*."""
    fd = ord(client[-1])
    envelope = Envelope([client.encode()])
    envelope.connection = queue.listener.connections.setdefault(fd, Connection(0.0))
    return Call(bytes([number]), envelope, b'', [], size, b'', None, 0.0)


def put(queue, client, *numbers, size=1):
    """Add calls; return the names of the refused ones."""
    return [
        name_of(refused)
        for number in numbers
        for refused in queue.put(make_call(queue, client, number, size))
    ]


def end(queue, *clients):
    for client in clients:
        queue.listener.note_end(ord(client[-1]))


def name_of(call):
    return f'{call.envelope[0].decode()}{call.key[0]}'


def take_all(queue):
    names = []
    while queue:
        names.append(name_of(queue.take()))
    assert queue.size == 0
    assert not queue._ended_sizes
    return names


def test_clients_take_turns():
    queue = make_queue()
    put(queue, 'a', 1, 2, 3)
    put(queue, 'b', 4, 5)
    put(queue, 'c', 6)
    assert (len(queue), queue.size) == (6, 6)
    assert take_all(queue) == ['a1', 'b4', 'c6', 'a2', 'b5', 'a3']


def test_turn_of_a_new_client():
    """It comes after one call of each other client, however many these have."""
    queue = make_queue(limit=1000)
    put(queue, 'a', *range(200))
    assert name_of(queue.take()) == 'a0'
    put(queue, 'b', 0)
    assert [name_of(queue.take()) for _ in range(3)] == ['a1', 'b0', 'a2']


def test_empty_queue():
    with pytest.raises(KeyError):
        make_queue().take()


def test_call_that_is_put_back():
    """It is the first one again, and those of its client stay in order."""
    queue = make_queue()
    put(queue, 'a', 1, 2, 3)
    put(queue, 'b', 4)
    taken = [queue.take() for _ in range(3)]
    assert [name_of(call) for call in taken] == ['a1', 'b4', 'a2']
    for call in taken:  # in any order
        queue.put_back(call)
    assert (len(queue), queue.size) == (4, 4)
    assert take_all(queue) == ['a1', 'b4', 'a2', 'a3']


def test_greedy_client_is_refused():
    queue = make_queue(limit=4)
    assert put(queue, 'a', 1, 2, 3, 4, 5, 6) == ['a5', 'a6']
    assert len(queue) == 4


def test_greedy_client_makes_room():
    """It loses its last calls, until the clients have equal shares."""
    queue = make_queue(limit=4)
    put(queue, 'a', 1, 2, 3, 4)
    assert put(queue, 'b', 5) == ['a4']
    assert put(queue, 'b', 6) == ['a3']
    assert put(queue, 'b', 7) == ['b7']
    assert put(queue, 'a', 8) == ['a8']
    assert len(queue) == 4
    assert take_all(queue) == ['a1', 'b5', 'a2', 'b6']


def test_more_clients_than_places():
    queue = make_queue(limit=2)
    put(queue, 'a', 1)
    put(queue, 'b', 2)
    assert put(queue, 'c', 3) == ['c3']
    assert take_all(queue) == ['a1', 'b2']


def test_bytes_are_shared():
    queue = make_queue(size_limit=100)
    put(queue, 'a', 1, 2, 3, 4, size=20)
    assert put(queue, 'b', 5, size=50) == ['a4', 'a3']
    assert queue.size == 90
    assert put(queue, 'b', 6, size=20) == ['b6']
    assert put(queue, 'a', 7, size=20) == ['a7']
    assert take_all(queue) == ['a1', 'b5', 'a2']


def test_client_that_loses_its_only_call():
    queue = make_queue(size_limit=100)
    put(queue, 'a', 1, size=90)
    assert put(queue, 'b', 2, size=50) == ['a1']
    assert take_all(queue) == ['b2']


def test_bytes_of_a_client():
    """It may always have one call, which the size of a message limits."""
    queue = make_queue(client_size_limit=50)
    assert put(queue, 'a', 1, size=60) == []
    assert put(queue, 'a', 2, size=1) == ['a2']
    assert put(queue, 'b', 3, 4, 5, size=25) == ['b5']
    assert queue.size == 110


def test_turn_of_ended_connections():
    """They have one together, and keep the order in which their calls came in."""
    queue = make_queue()
    put(queue, 'a', 1)
    put(queue, 'b', 2)
    put(queue, 'c', 3)
    put(queue, 'd', 4, 5, 6)
    put(queue, 'a', 7)
    end(queue, 'a', 'b', 'c')
    assert take_all(queue) == ['d4', 'a1', 'd5', 'b2', 'd6', 'c3', 'a7']


def test_share_of_ended_connections():
    """They have one together: when the queue is full, they make room as one client does."""
    queue = make_queue(limit=4)
    for number, client in enumerate('abcd'):
        put(queue, client, number)
    end(queue, 'a', 'b', 'c', 'd')
    assert put(queue, 'e', 4) == ['d3']
    assert put(queue, 'e', 5) == ['c2']
    assert put(queue, 'e', 6) == ['e6']
    assert (len(queue), queue.size) == (4, 4)
    assert take_all(queue) == ['a0', 'e4', 'b1', 'e5']


def test_calls_of_some_types():
    queue = make_queue()
    for number, (client, name) in enumerate(['ax', 'ay', 'bx', 'bz', 'cx', 'ax', 'dx', 'by']):
        call = make_call(queue, client, number)
        call.name = name.encode()
        queue.put(call)
        if number == 5:
            end(queue, 'c', 'd')
    assert queue.take_types({b'w'}) == []
    taken = queue.take_types({b'x', b'y'})
    assert [name_of(call) for call in taken] == ['a0', 'a1', 'b2', 'c4', 'a5', 'd6', 'b7']
    assert (len(queue), queue.size) == (1, 1)
    assert take_all(queue) == ['b3']


def test_calls_of_some_types_are_not_searched():
    """Each is looked at once: it does not matter how many others there are."""

    class Unequal(Call):
        __hash__ = None

        def __eq__(self, other):
            raise AssertionError('a search')

    queue = make_queue()
    for number, name in enumerate('xyxyxy'):
        call = make_call(queue, 'a', number)
        queue.put(Unequal(call.key, call.envelope, b'', [], 1, name.encode(), None, 0.0))
    assert [name_of(call) for call in queue.take_types({b'y'})] == ['a1', 'a3', 'a5']
    assert take_all(queue) == ['a0', 'a2', 'a4']


def test_bytes_of_ended_connections():
    queue = make_queue(size_limit=100)
    for number, client in enumerate('abcd'):
        put(queue, client, number, size=25)
    end(queue, 'a', 'b', 'c', 'd')
    assert put(queue, 'e', 4, size=40) == ['d3', 'c2']
    assert queue.size == 90
    assert take_all(queue) == ['a0', 'e4', 'b1']


def test_call_of_an_ended_connection():
    """It may be read later than the end is noticed, and another connection may have the number."""
    queue = make_queue(limit=3)
    late = [make_call(queue, 'a', 1), make_call(queue, 'b', 2), make_call(queue, 'c', 3)]
    late[1].envelope.connection = None
    end(queue, 'a', 'c')
    assert [queue.put(call) for call in late] == [[], [], []]
    assert put(queue, 'd', 4) == ['c3']
    assert put(queue, 'a', 5) == ['a5']
    assert take_all(queue) == ['a1', 'd4', 'b2']


def test_order_of_a_connection_that_ends():
    """Its calls that are read after its end come behind the others, in any case."""
    queue = make_queue()
    put(queue, 'a', 1, 2)
    last = [make_call(queue, 'a', number) for number in (3, 4)]
    last[1].envelope.connection = Connection(1.0)  # an open one, which has got the descriptor
    put(queue, 'b', 5)
    end(queue, 'a')
    for call in last:
        queue.put(call)
    assert take_all(queue) == ['b5', 'a1', 'a2', 'a3', 'a4']
    put(queue, 'a', 6)
    put(queue, 'b', 7)
    assert take_all(queue) == ['a6', 'b7']


def test_client_that_connects_again():
    """It has its name from before; the calls of its former connection are not behind the new."""
    queue = make_queue()
    put(queue, 'a', 1, 2)
    taken = queue.take()
    end(queue, 'a')
    put(queue, 'a', 3)
    put(queue, 'b', 4)
    queue.put_back(taken)
    assert take_all(queue) == ['a1', 'b4', 'a2', 'a3']


def test_call_of_an_ended_connection_that_is_put_back():
    """It is the first one of all that have ended, whose turn is next."""
    queue = make_queue()
    put(queue, 'a', 1)
    put(queue, 'b', 2, 3)
    put(queue, 'c', 4, 5)
    taken = [queue.take() for _ in range(3)]
    end(queue, 'a', 'b')
    for call in taken[:2]:
        queue.put_back(call)
    assert take_all(queue) == ['a1', 'c5', 'b2', 'b3']


def test_bytes_of_one_ended_connection():
    """Each is limited as before its end."""
    queue = make_queue(client_size_limit=50)
    put(queue, 'a', 1, size=40)
    put(queue, 'b', 2, size=40)
    last = [make_call(queue, client, 3, size=20) for client in 'ab']
    end(queue, 'a', 'b')
    assert [queue.put(call) for call in last] == [[last[0]], [last[1]]]
    assert take_all(queue) == ['a1', 'b2']


@pytest.mark.parametrize('seed', range(20))
def test_limits_hold(seed):
    """No call is lost, the limits hold, and each client keeps its order."""
    random = Random(seed)
    queue = make_queue(limit=20, size_limit=200, client_size_limit=80)
    put_in, refused, taken, held = [], [], [], []
    for number in range(250):
        call = make_call(queue, random.choice('aaaabcd'), number, random.randint(1, 40))
        if random.random() < 0.1:
            end(queue, random.choice('abcd'))
        put_in.append(call)
        refused += queue.put(call)
        assert len(queue) <= 20
        assert queue.size <= 200
        if random.random() < 0.6 and queue:
            held.append(queue.take())
        if random.random() < 0.2 and held:
            queue.put_back(held.pop())
            taken += held
            held.clear()
            if len(queue) > 20 or queue.size > 200:  # a call that is put back has no limit
                taken.append(queue.take())
    taken += held
    while queue:
        taken.append(queue.take())
    assert sorted(map(name_of, taken + refused)) == sorted(map(name_of, put_in))
    for client in 'abcd':
        keys = [call.key for call in taken if call.envelope == [client.encode()]]
        assert keys == sorted(keys)
