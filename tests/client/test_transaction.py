# SPDX-License-Identifier: ZPL-2.1
"""Messages that are sent on commit: all of them, in their order, or none."""

import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import transaction
import zmq
from pyams_utils.transaction import TransactionClient, transactional
from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface.verify import verifyObject

from checks import open_fds, wait_until
from handlers import Handler, MessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import connection as connection_module
from pyams_zmq.client import sender as sender_module
from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.client.sender import SenderThread, SendQueue, sender_thread
from pyams_zmq.client.socket import get_context, zmq_response, zmq_socket
from pyams_zmq.client.transaction import MessageDataManager, is_under_way, send_on_commit
from pyams_zmq.exceptions import (
    ZMQClosedError,
    ZMQMessageError,
    ZMQRefusedError,
    ZMQUnreachableError,
)
from pyams_zmq.wire.message import DRAINING_REPLY, MAX_MESSAGE_SIZE

LOGGER_NAME = 'PyAMS (zmq)'


class RecordingHandler(Handler):
    """Keeps the arguments of its messages."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def note(self, args):
        self.notes.append(args)
        return [200, None]

    def slow_note(self, args):
        time.sleep(0.3)
        return self.note(args)

    def all_notes(self, args):
        return [200, self.notes]

    def status(self, status):
        return [status, 'the secret of the handler']

    def raw(self, value):
        return value


class RecordingMessageHandler(MessageHandler):
    """Serves RecordingHandler."""

    handler = RecordingHandler


class Journal:
    """A data manager that records the names of its calls."""

    transaction_manager = transaction.manager

    def __init__(self, key='journal', **hooks):
        self.key = key
        self.lines = []
        self.hooks = hooks

    def sortKey(self):  # noqa: N802 - the name that transactions ask for
        return self.key

    def __getattr__(self, name):
        if name not in ('abort', 'tpc_begin', 'commit', 'tpc_vote', 'tpc_finish', 'tpc_abort'):
            raise AttributeError(name)

        def write(txn):
            self.lines.append(name)
            self.hooks.get(name, lambda: None)()

        return write


@pytest.fixture(autouse=True)
def _abort():
    """Abort the transaction of each test."""
    transaction.abort()
    yield
    transaction.abort()


@pytest.fixture
def process(start):
    """Process with a recording handler."""
    return start(handler=RecordingMessageHandler)


@pytest.fixture
def client(process):
    """Client of the process."""
    with ZMQClient(process.bound_address) as client:
        yield client


@pytest.fixture
def errors(caplog):
    """Function that returns the texts of the logged errors."""
    caplog.set_level(logging.ERROR, LOGGER_NAME)
    return lambda: [record.getMessage() for record in caplog.records]


def notes(client):
    """Return the recorded arguments, after all messages have a reply."""
    wait_until(lambda: not len(client._queue.get()))
    return client.call('all_notes')


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
    assert open_fds() < before + 10
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
        ('note', {1, 2}, TypeError),
        ('note', float('nan'), ValueError),
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


def test_service_is_waited_for_before_the_commit(address):
    """Databases hold locks while they commit, and other transactions would wait, too."""
    begun = []
    journal = Journal(tpc_begin=lambda: begun.append(time.monotonic()))
    transaction.get().join(journal)
    with ZMQClient(address) as client:
        send_on_commit(client, 'note', 1, timeout=0.3)
        start = time.monotonic()
        with pytest.raises(ZMQUnreachableError):
            transaction.commit()
    assert begun[0] - start >= 0.3
    assert journal.lines[-1] == 'tpc_abort'


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


def test_message_is_sent_after_the_other_participants(client):
    seen = []
    journal = Journal(tpc_finish=lambda: seen.append(notes(client)))
    transaction.get().join(journal)
    send_on_commit(client, 'note', 1)
    transaction.commit()
    assert journal.lines == ['tpc_begin', 'commit', 'tpc_vote', 'tpc_finish']
    assert seen == [[]]
    assert notes(client) == [1]


def test_participant_that_commits_at_its_vote_comes_later(address):
    # As zope.sqlalchemy does with its usual transactions, of one phase.
    journal = Journal('~sqlalchemy:1')
    transaction.get().join(journal)
    with ZMQClient(address) as client:
        send_on_commit(client, 'note', 1, timeout=0.1)
        with pytest.raises(ZMQUnreachableError):
            transaction.commit()
    assert 'tpc_vote' not in journal.lines
    assert journal.lines[-1] == 'tpc_abort'


def test_another_participant_refuses(client, errors):
    def refuse():
        raise LookupError('no')

    transaction.get().join(Journal('~~', tpc_vote=refuse))
    send_on_commit(client, 'note', 1)
    with pytest.raises(LookupError):
        transaction.commit()
    transaction.abort()
    assert notes(client) == []
    assert errors() == []


def test_service_down(address, client):
    journal = Journal()
    transaction.get().join(journal)
    with ZMQClient(address) as other:
        send_on_commit(client, 'note', 1)
        send_on_commit(other, 'note', 2, timeout=0.2)
        start = time.monotonic()
        with pytest.raises(ZMQUnreachableError, match='No service has answered at ipc'):
            transaction.commit()
        assert 0.2 <= time.monotonic() - start < 5
        assert journal.lines == ['tpc_begin', 'commit', 'tpc_vote', 'tpc_abort']
        transaction.abort()
        assert notes(client) == []


def test_messages_share_the_time(address):
    with ZMQClient(address) as one, ZMQClient(address + '2') as two:
        managers = [
            MessageDataManager(transaction.manager, client, 'note', b'', 1) for client in (one, two)
        ]
        start = time.monotonic()
        for manager in managers:
            with pytest.raises(ZMQUnreachableError):
                manager.tpc_vote(transaction.get())
        assert time.monotonic() - start < 1.9


def test_send_without_a_service(address):
    with ZMQClient(address, timeout=0.1) as client, pytest.raises(ZMQUnreachableError):
        client.send('note', 1)


def test_service_comes_back(start, address):
    def serve():
        return start(address, RecordingMessageHandler)

    with ZMQClient(address) as client:
        with pytest.raises(ZMQUnreachableError):
            client.prepare(timeout=0.1)
        process = serve()
        client.send('note', 1)
        assert notes(client) == [1]
        process.stop()
        serve()
        send_on_commit(client, 'note', 2)
        transaction.commit()
        assert notes(client) == [2]


def test_service_is_restarted_between_vote_and_finish(start, address):
    processes = [start(address, RecordingMessageHandler)]

    def restart():
        processes[0].kill()
        processes[0].join()
        processes.append(start(address, RecordingMessageHandler))

    with ZMQClient(address) as client:
        transaction.get().join(Journal('~~', tpc_vote=restart))
        send_on_commit(client, 'note', 1)
        transaction.commit()
        assert notes(client) == [1]


def test_service_is_killed_between_vote_and_finish(process, errors):
    def kill():
        process.kill()
        process.join()
        wait_until(lambda: not client._queue.get().is_connected)

    with ZMQClient(process.bound_address, timeout=0.2) as client:
        journal = Journal('~~', tpc_vote=kill)
        transaction.get().join(journal)
        send_on_commit(client, 'note', 'secret')
        start = time.monotonic()
        transaction.commit()
        wait_until(errors)
    assert time.monotonic() - start < 10
    assert journal.lines[-1] == 'tpc_finish'
    assert errors() == [
        f"Message 'note' to {process.bound_address}: not sent, no service within 0.2 s"
    ]


def test_service_is_killed_before_its_reply(process, errors, tmp_path):
    path = tmp_path / 'busy'
    with ZMQClient(process.bound_address) as client:
        send_on_commit(client, 'wait_for', str(path))
        send_on_commit(client, 'wait_for', str(path))
        transaction.commit()
        wait_until(path.exists)
        process.kill()
        wait_until(errors)
    assert errors() == [
        f"Message 'wait_for' to {process.bound_address}: "
        'the connection was lost, it may have run or not (2 times)'
    ]


def test_client_is_closed_before_the_vote(client):
    send_on_commit(client, 'note', 1)
    client.close()
    with pytest.raises(ZMQClosedError):
        transaction.commit()


def test_client_is_closed_before_the_finish(client, errors):
    transaction.get().join(Journal('~~', tpc_vote=client.close))
    send_on_commit(client, 'note', 'secret')
    transaction.commit()
    assert errors() == ["Message 'note' of a committed transaction is lost"]


def test_sent_messages_survive_the_client(process, client):
    with ZMQClient(process.bound_address) as other:
        for number in range(10):
            other.send('slow_note' if not number else 'note', number)
    assert len(other._queue.get())
    wait_until(lambda: not len(other._queue.get()))
    assert notes(client) == list(range(10))


@pytest.mark.parametrize('auth', ['editor:wrong', None])
def test_refused(start, auth):
    process = start(handler=RecordingMessageHandler, auth='editor:secret')
    journal = Journal()
    with ZMQClient(process.bound_address, auth=auth) as client:
        for _ in range(2):
            transaction.get().join(journal)
            send_on_commit(client, 'note', 1)
            with pytest.raises(ZMQRefusedError):
                transaction.commit()
            transaction.abort()
        with pytest.raises(ZMQRefusedError):
            client.send('note', 1)
    assert journal.lines[-1] == 'abort'
    assert 'tpc_abort' in journal.lines
    with ZMQClient(process.bound_address, auth='editor:secret') as client:
        send_on_commit(client, 'note', 2)
        transaction.commit()
        assert notes(client) == [2]


@pytest.mark.parametrize(
    ('message', 'problem'),
    [
        (('status', 404), 'the reply has status 404'),
        (('status', 500), 'the reply has status 500'),
        (('no_such_method', None), 'the reply has status 404'),
        (('raises', 'ValueError'), 'the reply has status 500'),
        (('raw', 'the secret of the handler'), 'the reply is not [status, payload]'),
    ],
)
def test_bad_reply(client, errors, message, problem):
    send_on_commit(client, *message)
    transaction.commit()
    wait_until(errors)
    assert errors() == [f'Message {message[0]!r} to {client.address}: {problem}']


def test_a_server_that_hangs(client, process):
    os.kill(process.pid, signal.SIGSTOP)
    try:
        send_on_commit(client, 'note', 1, timeout=0.2)
        with pytest.raises(ZMQUnreachableError):  # connected, but without a handshake
            transaction.commit()
    finally:
        os.kill(process.pid, signal.SIGCONT)


def test_no_reply_in_time(process, errors, tmp_path):
    path = tmp_path / 'busy'
    with ZMQClient(process.bound_address, timeout=0.1) as client:
        client.send('wait_for', str(path))
        client.send('note', 'late')
        wait_until(lambda: len(errors()) == 2)
        assert errors() == [
            f'Message {name!r} to {client.address}: no reply within 0.1 s, it may have run or not'
            for name in ('wait_for', 'note')
        ]
        path.unlink()
        # The late replies are ignored.
        client.send('note', 'later')
        wait_until(lambda: not len(client._queue.get()))
        assert client.call('all_notes', timeout=5) == ['late', 'later']
    assert len(errors()) == 2


def test_more_messages_than_replies_are_waited_for(client, errors, monkeypatch):
    monkeypatch.setattr(sender_module, 'MAX_REPLIES', 10)
    for number in range(500):
        send_on_commit(client, 'note', number)
    transaction.commit()
    wait_until(lambda: not len(client._queue.get()))
    wait_until(lambda: len(client.call('all_notes')) == 500)
    assert all('no reply before 10 others were sent' in error for error in errors())


def test_too_many_messages(client, errors, tmp_path, monkeypatch):
    path = tmp_path / 'busy'
    client.send('wait_for', str(path))
    wait_until(path.exists)
    monkeypatch.setattr(sender_module, 'MAX_REPLIES', 2)
    client.send('note', 1)
    client.send('note', 2)
    wait_until(errors)
    path.unlink()
    assert errors() == [
        f"Message 'wait_for' to {client.address}: "
        'no reply before 2 others were sent, it may have run or not'
    ]
    assert notes(client) == [1, 2]


def test_too_many_bytes(client, errors, tmp_path, monkeypatch):
    path = tmp_path / 'busy'
    client.send('wait_for', str(path))
    wait_until(path.exists)
    monkeypatch.setattr(sender_module, 'MAX_BYTES', 1000)
    client.send('note', 'x' * 1000)
    with pytest.raises(ZMQUnreachableError, match=r'takes no messages: \d+ bytes wait for it'):
        client.send('note', 1)
    path.unlink()
    wait_until(lambda: not len(client._queue.get()))
    assert client._queue.get().size == 0
    client.send('note', 2)
    assert notes(client) == ['x' * 1000, 2]
    assert not errors()


def test_service_is_stopped_and_started(start, address, errors, tmp_path):
    """The next service receives the messages that a stopping one rejects."""
    done = threading.Event()
    paths = []

    def send():
        while not done.is_set():
            wait_until(lambda: len(client._queue.get()) < 50)  # the service is slower than this
            path = tmp_path / str(len(paths))
            client.send('touch', str(path))
            paths.append(path)

    with ZMQClient(address) as client, ThreadPoolExecutor(1) as pool:
        process = start(address)
        sender = pool.submit(send)
        for _ in range(3):
            enough = len(paths) + 100
            wait_until(lambda enough=enough: len(paths) > enough)
            process.stop()
            process = start(address)
        done.set()
        sender.result()
        wait_until(lambda: not len(client._queue.get()))
    assert len(list(filter(Path.exists, paths))) == len(paths)
    assert not errors()


def test_stopping_service_that_does_not_end(errors, monkeypatch):
    """A rejected message waits for the next service until its time-out."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        port = server.bind_to_random_port('tcp://127.0.0.1')
        with ZMQClient(f'127.0.0.1:{port}', timeout=0.3) as client:
            client.send('note', 1)
            client.send('note', 2)
            envelope = server.recv_multipart()[:-1]
            server.recv_multipart()
            server.send_multipart([*envelope, DRAINING_REPLY])
            wait_until(lambda: client._queue.get()._returned)
            client.timeout = (
                2  # the third message is still in time when the rejected one is given up
            )
            client.post('note', b'["note", 3]')
            wait_until(lambda: len(errors()) == 3)
            assert client._queue.get().size == 0
    ends = [
        'not sent, no service within 0.3 s',
        'no reply within 0.3 s, it may have run or not',
        'no reply within 2 s, it may have run or not',
    ]
    assert [error.partition(f'{port}: ')[2] for error in errors()] == ends


def test_half_open_connection(process, monkeypatch):
    """As after a loss of power: the connection is not closed, but heartbeats are missing."""
    monkeypatch.setattr(connection_module, 'HEARTBEAT_IVL', 100)
    with ZMQClient(process.bound_address) as client:
        client.send('note', 1)
        client.call('echo')
        os.kill(process.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: not client._queue.get().is_connected)
            with pytest.raises(ZMQUnreachableError):
                client.prepare(timeout=0.1)
            with pytest.raises(ZMQUnreachableError):
                client.call('echo', timeout=0.2)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        assert notes(client) == [1]


def test_threads(client):
    def commit(number):
        manager = transaction.TransactionManager()
        for count in range(20):
            send_on_commit(client, 'note', [number, count], manager=manager)
            if count % 5 == 4:
                manager.commit()

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent = notes(client)
    assert len(sent) == 160
    for number in range(8):
        assert [count for thread, count in sent if thread == number] == list(range(20))
    assert [thread.name for thread in threading.enumerate()].count('PyAMS (zmq) sender') == 1


def test_threads_wait_side_by_side(address):
    def vote():
        start = time.monotonic()
        with pytest.raises(ZMQUnreachableError):
            client.prepare(timeout=1)
        times.append(time.monotonic() - start)

    times = []
    with ZMQClient(address) as client:
        threads = [threading.Thread(target=vote) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(times) == 5
    assert max(times) < 4


def in_fork(function):
    """Return the exit code of a fork that runs a function."""
    child = ForkProcess(target=function)
    child.start()
    child.join(10)
    return child.exitcode


def test_fork(client):
    def commit():
        send_on_commit(client, 'note', 'child')
        transaction.commit()
        client.close()
        with pytest.raises(ZMQClosedError):
            client.send('note')

    client.send('note', 'before')
    assert in_fork(commit) == 0  # whose end waits for the replies
    send_on_commit(client, 'note', 'after')
    transaction.commit()
    *others, last = notes(client)
    assert last == 'after'
    assert sorted(others) == ['before', 'child']  # each process has a connection of its own


def test_fork_in_a_transaction(client):
    send_on_commit(client, 'note', 'once')
    assert in_fork(transaction.abort) == 0
    transaction.commit()
    assert notes(client) == ['once']


def test_fork_while_the_lock_is_held(client):
    def commit():
        send_on_commit(client, 'note', 'child')
        transaction.commit()

    client.send('note', 'before')
    assert notes(client) == ['before']
    with sender_thread.get()._changed:
        assert in_fork(commit) == 0
    assert notes(client) == ['before', 'child']


@pytest.mark.parametrize('end', ['', 'sys.exit(1)', 'raise LookupError'])
def test_end_of_the_program(process, client, end):
    program = f"""
    import sys, transaction
    from pyams_zmq.client import ZMQClient
    from pyams_zmq.transaction import send_on_commit

    client = ZMQClient({process.bound_address!r})
    for number in range(1000):
        send_on_commit(client, 'note', number)
    transaction.commit()
    {end}
    """
    subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(program)],
        check=not end,
        timeout=30,
        stderr=subprocess.DEVNULL if end else None,
    )
    assert client.call('all_notes') == list(range(1000))


def test_flush_waits_no_longer_than_it_may(client, errors, tmp_path, monkeypatch):
    monkeypatch.setattr(sender_module, 'FLUSH', 0.1)
    path = tmp_path / 'busy'
    client.send('wait_for', str(path))
    wait_until(path.exists)
    sender_thread.get().flush()
    start = time.monotonic()
    monkeypatch.setattr(sender_module, 'FLUSH', 30)
    sender_thread.get().flush()  # multiprocessing calls it, too
    assert time.monotonic() - start < 10
    path.unlink()
    assert errors() == [
        '1 messages may be lost: the program ends before they have a reply',
    ]


def test_nothing_is_left(process):
    with ZMQClient(process.bound_address) as client:
        client.call('echo')
    fds, threads = open_fds(), threading.active_count()
    for _ in range(3):
        with ZMQClient(process.bound_address) as client:
            for number in range(10):
                send_on_commit(client, 'note', number)
            transaction.commit()
        wait_until(lambda: threading.active_count() == threads)
        wait_until(lambda: open_fds() <= fds)


def test_nothing_is_left_of_a_failure(address):
    fds, threads = open_fds(), threading.active_count()
    with ZMQClient(address) as client:
        send_on_commit(client, 'note', 1, timeout=0.1)
        with pytest.raises(ZMQUnreachableError):
            transaction.commit()
    wait_until(lambda: threading.active_count() == threads)
    wait_until(lambda: open_fds() <= fds + 6)  # of the context


def test_an_idle_connection_is_closed(client, monkeypatch):
    threads = threading.active_count()
    monkeypatch.setattr(sender_module, 'IDLE', 0.1)
    for number in range(2):
        client.send('note', number)
        wait_until(lambda: threading.active_count() == threads)
    assert client.call('all_notes') == [0, 1]


def test_terminated_context(process, errors, tmp_path):
    """After the context was terminated, lost messages are logged."""
    path = tmp_path / 'busy'
    with ZMQClient(process.bound_address) as client:
        client.send('wait_for', str(path))
        wait_until(path.exists)
        get_context().term()
        wait_until(errors)
        path.unlink()
        assert errors() == [f"Message 'wait_for' to {client.address}: {zmq.strerror(zmq.ETERM)}"]
        client.send('note', 1)
        assert notes(client) == [1]


def test_failing_log(client, caplog):
    class Broken(logging.Handler):
        def emit(self, record):
            raise OSError('no space left on device')

    logger = logging.getLogger(LOGGER_NAME)
    broken = Broken()
    logger.addHandler(broken)
    try:
        client.send('status', 404)
        wait_until(lambda: not len(client._queue.get()))
        client.send('note', 1)
        assert notes(client) == [1]
    finally:
        logger.removeHandler(broken)


@pytest.fixture
def queue(down):
    """Queue of a client without a service."""
    return SendQueue(ServiceAddress.parse(down, None, None))


def test_a_connection_that_takes_nothing(queue):
    """This can happen between the end of a connection and its event."""
    assert queue.step(time.monotonic()) == []
    queue._monitor.state.is_connected = True
    queue.add(sender_module.QueuedMessage('note', b'', 1))
    assert queue.step(time.monotonic()) == []
    assert 0 < queue.wakes_at() - time.monotonic() <= sender_module.RETRY
    assert len(queue) == 1
    [problem] = queue.fail(LookupError('why'))
    assert problem == f"Message 'note' to {queue.address}: why"


def test_an_unknown_error_does_not_stop_the_others(queue, client, errors, monkeypatch):
    def fail(now):
        raise LookupError('why')

    monkeypatch.setattr(queue, 'step', fail)
    sender_thread.get().post(queue, sender_module.QueuedMessage('note', b'', 1))
    client.send('note', 1)
    assert notes(client) == [1]
    with pytest.raises(LookupError):
        sender_thread.get().prepare(queue, 5)
    assert errors() == [f"Message 'note' to {queue.address}: why"]


def test_no_descriptor_is_left(client, errors, monkeypatch):
    def fail():
        raise zmq.ZMQError(errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(sender_module, 'open_wakeup_pair', fail)
        with pytest.raises(zmq.ZMQError):
            client.send('note', 1)
        transaction.get().join(MessageDataManager(transaction.manager, client, 'note', b'', 1))
        transaction.get()._resources[0].tpc_finish(transaction.get())
        transaction.abort()
    assert errors() == ["Message 'note' of a committed transaction is lost"]
    client.send('note', 2)
    assert notes(client) == [2]


def test_gevent(process, client):
    pytest.importorskip('gevent')
    program = f"""
    from gevent import monkey
    monkey.patch_all()
    import gevent, transaction
    from pyams_zmq.client import ZMQClient
    from pyams_zmq.exceptions import ZMQUnreachableError
    from pyams_zmq.transaction import send_on_commit

    ticks = 0

    def tick():
        global ticks
        while True:
            gevent.sleep(0.01)
            ticks += 1

    gevent.spawn(tick)
    with ZMQClient({process.bound_address!r}) as client:
        for number in range(100):
            send_on_commit(client, 'note', number)
        transaction.commit()
    send_on_commit(ZMQClient('127.0.0.1:1'), 'note', timeout=0.5)
    try:
        transaction.commit()
    except ZMQUnreachableError:
        assert ticks > 10, ticks
    else:
        raise AssertionError
    """
    subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(program)], check=True, timeout=30
    )
    assert client.call('all_notes') == list(range(100))


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


def test_close_without_messages(queue):
    SenderThread().close(queue)
