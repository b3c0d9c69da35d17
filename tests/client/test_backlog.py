# SPDX-License-Identifier: ZPL-2.1
"""Messages that wait in a client: refused ones, limits, and what transactions keep room for."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import ForkProcess

import pytest
import transaction

from checks import AT_ONCE, wait_until
from handlers import RecordingMessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import pace as pace_module
from pyams_zmq.client import send_queue as send_queue_module
from pyams_zmq.client import unanswered as unanswered_module
from pyams_zmq.client.problem import Problem, QueuedMessage, describe
from pyams_zmq.client.sender import sender_thread
from pyams_zmq.client.transaction import MessageDataManager, send_on_commit
from pyams_zmq.exceptions import ZMQBacklogError, ZMQUnreachableError
from pyams_zmq.wire.message import DRAINING_REPLY
from scripted_service import OVERLOADED, until_late
from transaction_checks import Journal, notes, without_ids


@contextmanager
def client_of(service):
    with ZMQClient(service.address) as client:
        yield client
        wait_until(lambda: not len(client._queue.get()))


# Status 503


@pytest.mark.usefixtures('soon')
@pytest.mark.parametrize('refusal', [OVERLOADED, DRAINING_REPLY])
def test_refused_messages_are_sent_again_in_their_order(service, errors, refusal):
    with client_of(service) as client:
        for number in range(150):
            client.send('note', number)
        first = [service.receive() for _ in range(100)]
        assert [argument for _envelope, argument in first] == list(range(100))
        for message in (first[3], *first[:3], *first[4:]):  # in any order
            service.reply(message, refusal)
        probe = service.receive()
        assert probe[1] == 0
        assert not service.socket.poll(100)  # nothing else until its reply
        service.reply(probe, refusal)
        while len(service.run) < 150:
            service.reply(service.receive())
        assert service.run == list(range(150))
    assert not errors()


@pytest.mark.usefixtures('soon')
def test_refusal_by_the_last_service_behind_a_device(service, errors):
    """It does not mean that the next one has not run what has no reply when the device ends."""
    with client_of(service) as client:
        client.send('note', 0)
        service.reply(service.receive(), DRAINING_REPLY)
        service.reply(service.receive())
        client.send('note', 1)
        assert service.receive()[1] == 1
        service.socket.close()
        wait_until(lambda: not len(client._queue.get()))
    assert service.run == [0]
    wait_until(lambda: len(errors()) == 1)


@pytest.mark.usefixtures('soon')
def test_messages_that_were_not_refused_are_not_repeated(service):
    with client_of(service) as client:
        for number in range(4):
            client.send('note', number)
        messages = [service.receive() for _ in range(4)]
        for number, message in enumerate(messages):
            service.reply(message, OVERLOADED if number in (0, 2) else b'[200, null]')
        while len(service.run) < 4:
            service.reply(service.receive())
    assert service.run == [1, 3, 0, 2]


def test_refused_messages_wait_for_a_reply_to_the_first(service, monkeypatch):
    """A first message without a reply does not stop the others for longer than a moment."""
    monkeypatch.setattr(pace_module, 'GROWTH', 0.05)
    monkeypatch.setattr(pace_module, 'FIRST_DELAY', 0.01)
    with client_of(service) as client:
        for number in range(8):
            client.send('note', number)
        for message in [service.receive() for _ in range(8)]:
            service.reply(message, OVERLOADED)
        messages = [service.receive() for _ in range(8)]
        assert [argument for _envelope, argument in messages] == list(range(8))
        for message in messages:
            service.reply(message)


@pytest.mark.usefixtures('soon')
def test_long_refusal_is_logged_once(service, caplog, monkeypatch):
    monkeypatch.setattr(pace_module, 'MAX_DELAY', 0.015)
    caplog.set_level('WARNING', 'PyAMS (zmq)')
    with client_of(service) as client:
        client.send('note', 'secret')
        for _ in range(9):
            service.reply(service.receive(), OVERLOADED)
        service.reply(service.receive())
    assert [record.getMessage() for record in caplog.records] == [
        f'1 messages wait for {client.address}: the replies have status 503'
    ]


def test_only_refused_messages_are_sent_to_the_next_service(service, errors):
    """Another service behind the same device may have run those that were sent later."""
    with ZMQClient(service.address) as client:
        for number in range(4):
            client.send('note', number)
        messages = [service.receive() for _ in range(4)]
        service.reply(messages[1], DRAINING_REPLY)
        wait_until(lambda: client._queue.get()._refused)
        service.restart()
        wait_until(errors)
        service.reply(service.receive())
        wait_until(lambda: not len(client._queue.get()))
        assert client._queue.get().size == 0
    assert service.run == [1]
    assert without_ids(errors()) == [
        f"3 messages 'note' to {client.address}: the connection was lost, it may have run or not"
    ]


def test_last_replies_after_the_loss(service, errors, monkeypatch):
    """They may arrive a moment after the event of the loss."""
    monkeypatch.setattr(send_queue_module, 'SETTLE', AT_ONCE)
    with client_of(service) as client:
        client.send('note', 1)
        message = service.receive()
        queue = client._queue.get()
        monkeypatch.setattr(queue._monitor, 'read_events', lambda: len(queue._sent) > 0)
        timer = threading.Timer(0.05, service.reply, [message])
        timer.start()
        wait_until(lambda: not len(queue))
        timer.join()
    assert not errors()


def test_large_message_to_a_service_that_takes_it(service, errors):
    """The limit is that of the client, not the usual one of a socket."""
    with client_of(service) as client:
        client.max_message_size = 64 * 2**20
        for text in ('a', 'x' * 40 * 2**20, 'b'):
            client.send('note', text)
        while len(service.run) < 3:
            service.reply(service.receive())
    assert list(map(len, service.run)) == [1, 40 * 2**20, 1]
    assert not errors()


class SendingHandler(logging.Handler):
    """Handler of the log that sends each record with a client, as one for a log service does.

    :ivar is_locked: for each record of the sender, whether it was made under the sender's lock
    """

    def __init__(self, client):
        super().__init__()
        self.client = client
        self.is_locked = []

    def emit(self, record):
        if threading.current_thread().name == 'PyAMS (zmq) sender':
            self.is_locked.append(sender_thread.get()._changed._is_owned())
        self.client.send('note', record.getMessage())


@pytest.mark.usefixtures('soon')
def test_log_that_sends_messages(service, client, monkeypatch):
    """Other threads hold its lock while they wait for that of the sender."""
    monkeypatch.setattr(pace_module, 'MAX_DELAY', 0.015)
    logger = logging.getLogger('PyAMS (zmq)')
    handler = SendingHandler(client)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    client.prepare()
    try:
        with client_of(service) as other:
            other.send('note', 1)
            service.reply(service.receive(), OVERLOADED)
            service.reply(service.receive(), b'[500, "why"]')
        wait_until(lambda: len(handler.is_locked) == 3)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert not any(handler.is_locked)
    warning, debug, error = notes(client)
    assert warning.endswith('the replies have status 503')
    assert debug == 'Reply of a service: 500 why'
    assert error.endswith('the reply has status 500')


# A device that stays when the service behind it dies


LATE = (
    'no reply for 0.1 s while later messages have one: it takes long, or was lost behind a device'
)


@pytest.mark.usefixtures('impatient')
def test_messages_that_were_overtaken(service, warnings):
    """They are logged, make room for others, and their late replies are read."""
    with client_of(service) as client:
        for number in range(102):
            client.send('note', number)
        messages = [service.receive() for _ in range(100)]
        until_late(client)
        service.reply(messages[2])
        wait_until(warnings)
        for message in messages[3:]:
            service.reply(message)
        for _ in range(2):
            service.reply(service.receive())
        wait_until(lambda: client._queue.get()._sent.size == 0)
        service.reply(messages[0], b'[500, null]')
        service.reply(messages[1], OVERLOADED)
        service.reply(service.receive())
        wait_until(lambda: len(warnings()) == 2)
        wait_until(lambda: not len(client._queue.get()))
        assert client._queue.get().size == 0
    assert service.run == [*range(2, 102), 1]
    assert warnings() == [
        f"WARNING: 2 messages 'note' to {client.address}: {LATE}",
        f"ERROR: Message 'note' to {client.address}: the reply has status 500",
    ]


@pytest.mark.usefixtures('impatient')
def test_probe_when_no_reply_comes(service, warnings):
    """All messages on their way are gone: one more is sent, and its reply shows that."""
    with client_of(service) as client:
        for number in range(103):
            client.send('note', number)
        for _ in range(100):
            service.receive()
        probe = service.receive()
        assert not service.socket.poll(500)  # there is no second one without a reply
        service.reply(probe)
        while len(service.run) < 3:
            service.reply(service.receive())
        wait_until(warnings)
    assert service.run == [100, 101, 102]
    wait_until(lambda: sum('100 messages' in text for text in warnings()) == 1)


@pytest.mark.usefixtures('impatient')
def test_no_probe_beyond_the_bytes_of_the_window(service, errors, monkeypatch):
    """A busy service that has not read so many closes the connection."""
    monkeypatch.setattr(unanswered_module, 'WINDOW_SIZE', 1000)
    with client_of(service) as client:
        for number in range(5):
            client.send('note', [number, 'x' * 400])
        first = [service.receive() for _ in range(2)]
        assert not service.socket.poll(500)
        for message in first:
            service.reply(message)
        while len(service.run) < 5:
            service.reply(service.receive())
    assert [number for number, _text in service.run] == list(range(5))
    assert not errors()


@pytest.mark.usefixtures('impatient')
def test_late_replies_are_not_waited_for_without_end(service, warnings, monkeypatch):
    monkeypatch.setattr(unanswered_module, 'MAX_LATE', 1)
    with client_of(service) as client:
        for number in range(3):
            client.send('note', number)
        messages = [service.receive() for _ in range(3)]
        until_late(client)
        service.reply(messages[2])
        wait_until(warnings)
        for message in messages[:2]:
            service.reply(message, b'[500, null]')
        wait_until(lambda: len(warnings()) == 2)
    assert warnings()[0].startswith('WARNING: 2 messages')


@pytest.mark.usefixtures('impatient', 'soon')
def test_data_of_late_messages_is_limited(service, warnings, monkeypatch):
    """A message whose data was dropped is logged as lost when its late reply is a refusal."""
    monkeypatch.setattr(unanswered_module, 'MAX_LATE_SIZE', 1500)
    with client_of(service) as client:
        for number in range(3):
            client.send('note', [number, 'x' * 1000])
        messages = [service.receive() for _ in range(3)]
        until_late(client)
        service.reply(messages[2])
        wait_until(warnings)
        queue = client._queue.get()
        assert sum(len(late.data) for late in queue._sent._late.values()) < 1500
        for message in messages[:2]:
            service.reply(message, OVERLOADED)
        service.reply(service.receive())
        wait_until(lambda: len(warnings()) == 2)
        wait_until(lambda: not len(queue))
        assert queue.size == 0
    assert [number for number, _text in service.run] == [2, 1]
    assert warnings()[1] == (
        f"ERROR: Message 'note' to {client.address}: "
        'lost: it was refused so late that its data was dropped'
    )


# Limits of the backlog


@pytest.mark.parametrize(
    ('limits', 'sizes'),
    [({'max_backlog': 3}, [1, 1, 1]), ({'max_backlog_size': 1000}, [1, 940])],
)
def test_limit(service, limits, sizes):
    with client_of(service) as client:
        for name, value in limits.items():
            setattr(client, name, value)
        for size in sizes:
            client.send('note', 'x' * size)
        size = sum(sizes) + 11 * len(sizes)
        reason = f'{len(sizes)} messages of {size} bytes wait in it; the limits are '
        transaction.get().join(Journal())
        for _ in range(2):
            send_on_commit(client, 'note', 'x' * 100, timeout=0.01)
            with pytest.raises(
                ZMQBacklogError, match=f'client of tcp://{service.address}.*{reason}'
            ):
                transaction.commit()
            transaction.abort()
        client.timeout = 0.01
        with pytest.raises(ZMQUnreachableError, match=reason):
            client.send('note', 'x' * 100)
        for _ in sizes:
            service.reply(service.receive())
        client.timeout = 10
        client.send('note', 'x' * 2000)  # larger than the limit, and alone
        service.reply(service.receive())


def test_sender_waits_for_room(service):
    with client_of(service) as client:
        client.max_backlog = 1
        client.send('note', 1)
        thread = threading.Thread(target=client.send, args=('note', 2))
        thread.start()
        service.reply(service.receive())
        service.reply(service.receive())
        thread.join()
    assert service.run == [1, 2]


def test_transactions_keep_room(service):
    """From the vote to the finish, or to the abort."""

    def vote(number):
        manager = transaction.TransactionManager()
        message = MessageDataManager(manager, client, 'note', b'["note",%d]' % number, 1)
        message.tpc_vote(None)
        return message

    with client_of(service) as client:
        client.max_backlog = 2
        client.prepare()
        one, two = vote(1), vote(2)
        queue = client._queue.get()
        assert (queue.reserved, queue.size) == (2, 20)
        with pytest.raises(ZMQBacklogError, match='2 messages of 20 bytes'):
            vote(3)
        one.tpc_abort(None)
        one.abort(None)  # the room is given up once
        assert (queue.reserved, queue.size) == (1, 10)
        three = vote(3)
        for message in (two, three):
            message.tpc_finish(None)
            message.abort(None)
        assert (len(queue), queue.size) == (2, 20)
        for _ in range(2):
            service.reply(service.receive())
        wait_until(lambda: not len(queue))
        assert queue.size == 0
    assert service.run == [2, 3]


def test_commit_waits_for_the_room_of_all_its_messages(service):
    with client_of(service) as client, ThreadPoolExecutor(1) as pool:
        client.max_backlog = 3
        for number in range(3):
            client.send('note', number)
        manager = transaction.TransactionManager()
        for number in range(3, 6):
            send_on_commit(client, 'note', number, manager=manager, timeout=30)
        commit = pool.submit(manager.commit)
        for number in range(6):
            message = service.receive()
            assert commit.done() == (number >= 3)
            service.reply(message)
            if number == 2:
                commit.result()
    assert service.run == list(range(6))


def test_transaction_that_is_larger_than_the_limit(service):
    """It passes if nothing else waits, also if a hook adds a message to it."""
    with client_of(service) as client:
        client.max_backlog = 2
        for number in range(3):
            send_on_commit(client, 'note', number)
        transaction.get().addBeforeCommitHook(send_on_commit, (client, 'note', 3))
        transaction.commit()
        while len(service.run) < 4:
            service.reply(service.receive())
    assert service.run == [0, 1, 2, 3]


class LateWriter:
    """Synchronizer that adds a message after the hooks have run."""

    def __init__(self, client):
        self.client = client

    def newTransaction(self, txn):  # noqa: N802 - the name of ISynchronizer
        pass

    def afterCompletion(self, txn):  # noqa: N802 - as above
        pass

    def beforeCompletion(self, txn):  # noqa: N802 - as above
        send_on_commit(self.client, 'note', 'late')


def test_message_that_is_added_after_the_hooks(service):
    """It is too late to wait for room."""
    with client_of(service) as client:
        writer = LateWriter(client)
        transaction.manager.registerSynch(writer)
        try:
            client.prepare()
            transaction.commit()
            client.max_backlog = 1
            transaction.begin()
            with pytest.raises(ZMQBacklogError):
                transaction.commit()
        finally:
            transaction.manager.unregisterSynch(writer)
        service.reply(service.receive())
    assert service.run == ['late']


def test_room_of_many_threads(process):
    """Transactions of threads, half of which are aborted after the vote."""

    def refuse():
        raise LookupError

    def use(number):
        manager = transaction.TransactionManager()
        for count in range(20):
            send_on_commit(client, 'note', [number, count], manager=manager)
            if count % 2:
                savepoint = manager.savepoint()
                send_on_commit(client, 'note', 'dropped', manager=manager)
                savepoint.rollback()
                manager.get().join(Journal('~~', tpc_vote=refuse))
                with pytest.raises(LookupError):
                    manager.commit()
                manager.abort()
            else:
                manager.commit()

    with ZMQClient(process.bound_address) as client:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sent = notes(client)
        assert client._queue.get().size == client._queue.get().reserved == 0
    for number in range(8):
        assert [count for thread, count in sent if thread == number] == list(range(0, 20, 2))


def test_room_is_of_one_process(client):
    """A fork between the vote and the finish sends with its own queue."""
    client.prepare()
    one, two = client.reserve('note', b'["note",1]'), client.reserve('note', b'["note",2]')

    def use():
        one.cancel()
        two.post()
        wait_until(lambda: not len(client._queue.get()))
        assert client._queue.get().size == 0

    child = ForkProcess(target=use)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    queue = client._queue.get()
    assert (queue.reserved, queue.size) == (2, 20)
    one.post()
    two.cancel()
    assert notes(client) == [2, 1]
    assert queue.size == 0


# The service is down


def test_messages_wait_for_a_refusing_service(start, address, caplog, monkeypatch):
    """It comes back with another password, and later with the right one."""
    monkeypatch.setattr(send_queue_module, 'SUSPENDED', 0.05)
    caplog.set_level('WARNING', 'PyAMS (zmq)')

    def serve(password):
        return start(address, RecordingMessageHandler, auth=f'user:{password}')

    process = serve('right')
    with ZMQClient(address, auth='user:right') as client:
        client.send('note', 1)
        assert notes(client) == [1]
        process.stop()
        wait_until(lambda: not client._queue.get().is_connected)
        client.post('note', b'["note", 2]')
        process = serve('wrong')
        wait_until(lambda: caplog.records)
        process.stop()
        serve('right')
        assert notes(client) == [2]
    [record] = caplog.records
    assert record.getMessage().startswith(f'1 messages wait for {address}: ')
    assert 'Connection refused' in record.getMessage()


def test_ids_of_messages():
    def problem(number):
        message = QueuedMessage('note', b'')
        message.number = number
        return Problem('tcp://here', message, 'why')

    [(_level, text, _fields)] = describe(map(problem, [5, 1, 2, 3, 7]))
    pid, _, _ = text.partition('(ids ')[2].partition('.')
    expected = f'{pid}.1-{pid}.3, {pid}.5, {pid}.7'
    assert text == f"5 messages 'note' (ids {expected}) to tcp://here: why"
