# SPDX-License-Identifier: ZPL-2.1
"""Messages that are sent on commit: all of them, in their order, or none."""

import pytest
import transaction
from pyams_utils.transaction import TransactionClient, transactional
from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface.verify import verifyObject

from checks import open_fds
from handlers import RecordingMessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.client.sender import sender_thread
from pyams_zmq.client.socket import zmq_response, zmq_socket
from pyams_zmq.client.transaction import MessageDataManager, is_under_way, send_on_commit
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.wire.message import MAX_MESSAGE_SIZE
from transaction_checks import notes


def test_interfaces(client):
    manager = MessageDataManager(transaction.manager, client, 'note', b'', 1)
    assert verifyObject(ISavepointDataManager, manager)
    assert verifyObject(IDataManagerSavepoint, manager.savepoint())


def test_commit(client):
    send_on_commit(client, 'note', 1)
    assert notes(client) == []
    transaction.commit()
    assert notes(client) == [1]
    transaction.commit()
    assert notes(client) == [1]


def test_no_arguments(client):
    send_on_commit(client, 'note')
    transaction.commit()
    assert notes(client) == [None]


def test_abort(client):
    send_on_commit(client, 'note', 1)
    transaction.abort()
    transaction.commit()
    assert notes(client) == []


def test_nothing_is_connected_without_commit():
    with ZMQClient('127.0.0.1:1') as client:
        send_on_commit(client, 'note', 1)
        transaction.abort()
    assert client._queue.get() not in sender_thread.get()._queues


def test_other_manager(client):
    manager = transaction.TransactionManager(explicit=True)
    with pytest.raises(transaction.interfaces.NoTransaction):
        send_on_commit(client, 'note', 1, manager=manager)
    with manager:
        send_on_commit(client, 'note', 2, manager=manager)
        transaction.abort()
    assert notes(client) == [2]


def test_order(client):
    for number in range(100):
        send_on_commit(client, 'note', number)
    transaction.commit()
    assert notes(client) == list(range(100))


def test_order_of_transactions(client):
    for number in range(50):
        send_on_commit(client, 'note', number)
        transaction.commit()
        client.send('note', number + 0.5)
    assert notes(client) == [number / 2 for number in range(100)]


def test_many_messages(client):
    before = open_fds()
    for number in range(3000):
        send_on_commit(client, 'note', number)
    transaction.commit()
    assert len(open_fds() - before) < 10
    assert notes(client) == list(range(3000))


def test_arguments_are_encoded_at_once(client):
    args = {'path': '/a'}
    send_on_commit(client, 'note', args)
    args['path'] = '/b'
    transaction.commit()
    assert notes(client) == [{'path': '/a'}]


@pytest.mark.parametrize(
    ('type_', 'args', 'error'),
    [
        ('note', object(), TypeError),
        ('note', {(1, 2): 3}, TypeError),
        ('note', '\ud800', ValueError),
        (None, 1, TypeError),
        ('note', 'x' * (MAX_MESSAGE_SIZE + 1), ZMQMessageError),
    ],
)
def test_bad_message(client, type_, args, error):
    with pytest.raises(error):
        send_on_commit(client, type_, args)
    with pytest.raises(error):
        client.send(type_, args)
    transaction.commit()
    assert notes(client) == []


def test_savepoints(client):
    send_on_commit(client, 'note', 1)
    first = transaction.savepoint()
    send_on_commit(client, 'note', 2)
    second = transaction.savepoint()
    send_on_commit(client, 'note', 3)
    second.rollback()
    send_on_commit(client, 'note', 4)
    second.rollback()
    send_on_commit(client, 'note', 5)
    transaction.commit()
    assert notes(client) == [1, 2, 5]
    assert not first.valid


def test_dropped_message_needs_no_service(address):
    with ZMQClient(address) as client:
        savepoint = transaction.savepoint()
        send_on_commit(client, 'note', 1)
        savepoint.rollback()
        transaction.commit()


@pytest.mark.parametrize(
    'manager',
    [transaction.ThreadTransactionManager(), transaction.TransactionManager(explicit=True)],
    ids=['implicit', 'explicit'],
)
def test_is_under_way(manager):
    for end in ('commit', 'abort'):
        assert not is_under_way(manager)
        manager.begin()
        assert is_under_way(manager)
        getattr(manager, end)()
    assert not is_under_way(manager)


def test_first_savepoint(client):
    savepoint = transaction.savepoint()
    send_on_commit(client, 'note', 1)
    transaction.savepoint()
    send_on_commit(client, 'note', 2)
    savepoint.rollback()
    transaction.commit()
    assert notes(client) == []


def test_two_services(start):
    processes = [start(handler=RecordingMessageHandler) for _ in range(2)]
    with ZMQClient(processes[0].bound_address) as one, ZMQClient(processes[1].bound_address) as two:
        for number in range(10):
            send_on_commit(one, 'note', number)
            send_on_commit(two, 'note', -number)
        transaction.commit()
        assert notes(one) == list(range(10))
        assert notes(two) == [-number for number in range(10)]


def test_client_of_pyams_utils(client):
    """Code that uses it works without changes."""

    class Indexer(TransactionClient):
        uncommitted = ()

        @transactional
        def index(self, document):
            socket = zmq_socket(client.address)
            socket.send_json(['note', document])
            assert zmq_response(socket) == [200, None]

    indexer = Indexer()
    indexer.index('aborted')
    transaction.abort()
    indexer.index('first')
    send_on_commit(client, 'note', 'second')
    transaction.commit()
    assert sorted(notes(client)) == ['first', 'second']
