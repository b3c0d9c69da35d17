# SPDX-License-Identifier: ZPL-2.1
"""The sender thread: bad and missing replies, limits, and services that end."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transaction
import zmq

from checks import TIMEOUT, wait_until
from handlers import BrokenLog, RecordingMessageHandler
from peers import raw_server
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import send_queue as send_queue_module
from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.client.problem import QueuedMessage, describe
from pyams_zmq.client.send_queue import SendQueue
from pyams_zmq.client.sender import SenderThread, sender_thread
from pyams_zmq.client.transaction import send_on_commit
from pyams_zmq.exceptions import ZMQTimeoutError, ZMQUnreachableError
from transaction_checks import notes, without_ids


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
    ],
)
def test_bad_reply(client, errors, message, problem):
    send_on_commit(client, *message)
    transaction.commit()
    wait_until(errors)
    assert without_ids(errors()) == [f'Message {message[0]!r} to {client.address}: {problem}']


def test_reply_without_a_status(client, errors):
    """It is a result of another form, and not an error."""
    for reply in (None, 'text', [404], {'status': 500}, [600, 'x']):
        client.send('raw', reply)
    client.send('status', 404)
    wait_until(errors)
    assert without_ids(errors()) == [
        f"Message 'status' to {client.address}: the reply has status 404"
    ]


def test_reply_that_is_not_json(errors):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        port = server.bind_to_random_port('tcp://127.0.0.1')
        with ZMQClient(f'127.0.0.1:{port}') as client:
            client.send('note', 1)
            server.send_multipart([*server.recv_multipart()[:-1], b'hello'])
            wait_until(errors)
    assert without_ids(errors()) == [f"Message 'note' to {client.address}: the reply is not JSON"]


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


def test_log_that_sends(client, process):
    """A handler of the log sends through another client, from the thread that connects it."""

    class Alarm(logging.Handler):
        def emit(self, record):
            alarm.send('note', 'alarm')

    logger, handler = logging.getLogger('PyAMS (zmq)'), Alarm(logging.ERROR)
    with ZMQClient(process.bound_address, timeout=TIMEOUT) as alarm:
        logger.addHandler(handler)
        try:
            client.send('status', 404)
            begin = time.monotonic()
            wait_until(lambda: notes(client) == ['alarm'])
            assert time.monotonic() - begin < TIMEOUT / 2  # the first send has not waited
        finally:
            logger.removeHandler(handler)


def test_message_that_cannot_be_sent(client, errors):
    """Only this message is dropped, not the others of the client."""
    client.send('note', 1)
    client.post('note', 'not encoded')
    client.send('note', 2)
    assert notes(client) == [1, 2]
    [error] = without_ids(errors())
    assert error.startswith(f"Message 'note' to {client.address}: ")
    assert client._queue.get().size == 0


def test_reply_may_take_longer_than_the_timeout(process, errors, tmp_path):
    path = tmp_path / 'busy'
    with ZMQClient(process.bound_address, timeout=0.1) as client:
        client.send('wait_for', str(path))
        for number in range(300):  # more than are sent before their replies
            client.send('note', number)
        wait_until(path.exists)  # the process is busy
        with pytest.raises(ZMQTimeoutError):
            client.call('echo')
        path.unlink()
        wait_until(lambda: not len(client._queue.get()))
        assert client.call('all_notes', timeout=10) == list(range(300))
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
    assert without_ids(errors()) == [
        f"2 messages 'wait_for' to {process.bound_address}: "
        'the connection was lost, it may have run or not'
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


@pytest.fixture
def queue(down):
    """Queue of a client without a service."""
    return SendQueue(ServiceAddress.parse(down, None, None))


def test_a_connection_that_takes_nothing():
    """This can happen between the end of a connection and its event."""
    with raw_server(lambda connection: None) as address:
        queue = SendQueue(ServiceAddress.parse(address, None, None))
        assert queue.step(time.monotonic()) == []
        queue._socket.sndhwm = 1
        queue._socket.send(b'')
        queue._monitor.state.is_connected = True
        queue.add(QueuedMessage('note', b''))
        assert queue.step(time.monotonic()) == []
        assert 0 < queue.wakes_at() - time.monotonic() <= send_queue_module.RETRY
        assert len(queue) == 1
        [(_level, text, _fields)] = describe(queue.fail(LookupError('why')))
        assert without_ids([text]) == [f"Message 'note' to {queue.address}: why"]


def test_an_unknown_error_does_not_stop_the_others(queue, client, errors, monkeypatch):
    def fail(now):
        raise LookupError('why')

    monkeypatch.setattr(queue, 'step', fail)
    sender_thread.get().post(queue, QueuedMessage('note', b''))
    client.send('note', 1)
    assert notes(client) == [1]
    with pytest.raises(LookupError):
        sender_thread.get().prepare(queue, 5)
    assert without_ids(errors()) == [f"Message 'note' to {queue.address}: why"]


def test_close_without_messages(queue):
    thread = SenderThread()
    thread.close(queue)
    assert queue.is_closed
    assert thread._thread is None
