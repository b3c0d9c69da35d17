# SPDX-License-Identifier: ZPL-2.1
"""The sender thread: bad and missing replies, limits, and services that end."""

import logging
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transaction
import zmq

from checks import wait_until
from handlers import BrokenLog, RecordingMessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import connection as connection_module
from pyams_zmq.client import sender as sender_module
from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.client.sender import SenderThread, SendQueue, sender_thread
from pyams_zmq.client.transaction import send_on_commit
from pyams_zmq.exceptions import ZMQUnreachableError
from pyams_zmq.wire.message import DRAINING_REPLY
from transaction_checks import notes


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


def test_failing_log(client):
    logger = logging.getLogger('PyAMS (zmq)')
    broken = BrokenLog()
    logger.addHandler(broken)
    try:
        client.send('status', 404)
        wait_until(lambda: not len(client._queue.get()))
        client.send('note', 1)
        assert notes(client) == [1]
    finally:
        logger.removeHandler(broken)


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


def test_stopping_service_that_does_not_end(errors):
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
            # The third message is still in time when the rejected one is given up.
            client.timeout = 2
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


def test_close_without_messages(queue):
    thread = SenderThread()
    thread.close(queue)
    assert queue.is_closed
    assert thread._thread is None
