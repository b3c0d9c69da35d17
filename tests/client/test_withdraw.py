# SPDX-License-Identifier: ZPL-2.1
"""The end of a program, or of its outbox: it keeps the messages that are stored elsewhere."""

import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import inf

import pytest

from checks import AT_ONCE, TIMEOUT, fail_to_start, wait_until
from peers import timed
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import send_queue as send_queue_module
from pyams_zmq.client import unanswered as unanswered_module
from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.client.send_queue import SendQueue
from pyams_zmq.client.sender import SenderThread, sender_thread
from scripted_service import OVERLOADED, StoredMessages, end_queue, let_idle, until_late
from transaction_checks import notes

LIMITS = (inf, inf)


@pytest.fixture
def one_at_a_time(monkeypatch):
    """Send a message after the reply to the former one."""
    monkeypatch.setattr(unanswered_module, 'WINDOW_SIZE', 1)  # bytes


def test_service_that_is_down(down):
    """All are given back at once, and those of `send` are kept."""
    with ZMQClient(down) as client:
        stored = StoredMessages(client.offer)
        stored.offer(*range(5))
        client.post('note', b'["note", 5]')
        _result, seconds = timed(client.withdraw)
        assert seconds < AT_ONCE
        queue = client._queue.get()
        assert [message.data for message in queue] == [b'["note", 5]']
        assert queue.size == len(b'["note", 5]')
        client.withdraw()
        end_queue(queue)
    assert stored.replies == {number: [None] for number in range(5)}


def test_unused_client(down):
    with ZMQClient(down) as client:
        client.withdraw()


@pytest.mark.usefixtures('one_at_a_time')
def test_messages_on_their_way(service, to_service, stored):
    """Their replies are awaited, while the others are given back."""
    stored.offer(1, 2, 3)
    to_service.send('note', 4)
    message = service.receive()
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(to_service.withdraw)
        stored.wait(2)
        assert stored.replies == {1: [], 2: [None], 3: [None]}
        assert not end.done()
        service.reply(message)
        end.result(TIMEOUT)
    assert stored.statuses() == {1: 200, 2: None, 3: None}
    assert stored.count_replies() == [1, 1, 1]
    service.reply(service.receive())
    wait_until(lambda: not len(to_service._queue.get()))
    assert to_service._queue.get().size == 0
    assert service.run == [1, 4]


def test_reply_that_takes_longer(service, to_service, stored):
    """It is still read, as long as the connection lasts."""
    to_service.flush_timeout = 0.1
    stored.offer(1)
    message = service.receive()
    _result, seconds = timed(to_service.withdraw)
    assert 0.1 <= seconds < AT_ONCE
    assert stored.replies == {1: []}
    service.reply(message)
    stored.wait(1)
    assert stored.statuses() == {1: 200}


def test_time_is_for_all_clients_together(service, to_service, stored):
    to_service.flush_timeout = TIMEOUT
    stored.offer(1)
    message = service.receive()
    _result, seconds = timed(to_service.withdraw, start=time.monotonic() - TIMEOUT)
    assert seconds < AT_ONCE
    service.reply(message)
    stored.wait(1)


@pytest.mark.usefixtures('one_at_a_time')
def test_connection_that_is_lost_after_that(service, to_service, stored, errors):
    """The message on its way is given back once, and not sent again."""
    to_service.flush_timeout = 0.1
    stored.offer(1, 2)
    service.receive()
    to_service.withdraw()
    assert stored.replies == {1: [], 2: [None]}
    service.restart()
    stored.wait(2)
    assert stored.replies == {1: [None], 2: [None]}
    to_service.send('note', 3)
    message = service.receive()
    assert message[1] == 3
    service.reply(message)
    wait_until(lambda: not len(to_service._queue.get()))
    assert to_service._queue.get().size == 0
    assert stored.count_replies() == [1, 1]
    assert not errors()


def test_last_loss_after_that(service, to_service, stored, monkeypatch, errors):
    """It does not count as the reply: the next process sends the message again."""
    monkeypatch.setattr(send_queue_module, 'MAX_LOSSES', 2)
    to_service.flush_timeout = 0.1
    stored.offer(1)
    service.receive()
    service.restart()
    service.receive()
    to_service.withdraw()
    to_service.post('note', b'["note", 2, {"id": "two"}]', None, True)  # a job
    service.restart()
    stored.wait(1)
    assert stored.replies == {1: [None]}
    service.reply(service.receive(), b'[200, {"id": "two"}]')
    wait_until(lambda: not len(to_service._queue.get()))
    assert to_service._queue.get().size == 0
    assert not errors()


@pytest.mark.usefixtures('soon')
def test_message_that_is_refused_after_that(service, to_service, stored):
    """It is given back, and not sent again."""
    to_service.flush_timeout = 0.1
    stored.offer(1)
    message = service.receive()
    to_service.withdraw()
    service.reply(message, OVERLOADED)
    stored.wait(1)
    assert stored.replies == {1: [None]}
    to_service.send('note', 2)
    message = service.receive()
    assert message[1] == 2
    service.reply(message)


@pytest.mark.usefixtures('impatient')
def test_late_messages(service, to_service, stored, warnings):
    """They are given back at once; a message of `send` still has its reply."""
    stored.offer(1)
    to_service.send('note', 2)
    to_service.send('note', 3)
    first, second, third = [service.receive() for _ in range(3)]
    until_late(to_service)
    service.reply(third)
    wait_until(warnings)
    _result, seconds = timed(to_service.withdraw)
    assert seconds < AT_ONCE
    assert stored.replies == {1: [None]}
    service.reply(first)
    service.reply(second, b'[500, null]')
    wait_until(lambda: len(warnings()) == 2)
    assert stored.replies == {1: [None]}


@pytest.mark.usefixtures('impatient')
def test_messages_that_are_late_after_that(service, to_service, stored, warnings, monkeypatch):
    """They do not keep the connection open."""
    to_service.flush_timeout = 0
    stored.offer(1)
    to_service.send('note', 2)
    _first, second = service.receive(), service.receive()
    to_service.withdraw()
    until_late(to_service)
    service.reply(second)
    wait_until(warnings)
    let_idle(to_service._queue.get(), monkeypatch)
    stored.wait(1)
    assert stored.replies == {1: [None]}


def test_others_wait_for_the_room(service, to_service, stored, monkeypatch):
    """Also if nothing else happens in the client."""
    to_service.max_backlog = 2
    to_service.flush_timeout = 0
    stored.offer(1)
    service.receive()
    queue = to_service._queue.get()
    monkeypatch.setattr(queue, '_send', lambda now, records: None)
    monkeypatch.setattr(queue, 'wakes_at', lambda: inf)
    stored.offer(2)
    thread = sender_thread.get()

    def is_waiting():
        with thread._changed:
            return thread._changed._waiters and not thread._is_woken

    with ThreadPoolExecutor(1) as pool:
        prepared = pool.submit(to_service.prepare, timeout=TIMEOUT)
        wait_until(is_waiting)
        to_service.withdraw()
        prepared.result(TIMEOUT / 2)
    monkeypatch.undo()
    end_queue(queue)


def test_closed_client(down):
    """Its connection is closed when the messages are given back."""
    client = ZMQClient(down)
    stored = StoredMessages(client.offer)
    stored.offer(1)
    client.close()
    queue, queues = client._queue.get(), sender_thread.get()._queues
    assert queue in queues
    client.withdraw()
    assert stored.replies == {1: [None]}
    wait_until(lambda: queue not in queues)


# The end of a program


def test_end_of_the_program(service, to_service, stored, errors, flush):
    """No further message is taken; those that are left are not logged, and not waited for."""
    to_service.flush_timeout = TIMEOUT
    stored.offer(1)
    message = service.receive()
    _result, seconds = timed(flush)
    assert seconds < AT_ONCE
    assert stored.offer(2) == [False]
    service.reply(message)
    stored.wait(1)
    assert stored.statuses() == {1: 200}
    assert not errors()


def test_hard_end(process, errors, tmp_path, flush):
    """Only the messages of `send` are logged as lost."""
    path = tmp_path / 'busy'
    with ZMQClient(process.bound_address) as client:
        client.send('wait_for', str(path))
        wait_until(path.exists)
        stored = StoredMessages(client.offer)
        stored.offer(*range(150))  # more than are sent before their replies
        sender_thread.get().report_lost()
        [error] = errors()
        path.unlink()
        stored.wait(150)
    assert "Message 'wait_for' " in error
    assert set(stored.statuses().values()) == {200}


def test_program_that_ends(process, client):
    """It waits for the replies to messages on their way, and sends the others no more."""
    program = f"""
    import atexit
    from pyams_zmq.client import ZMQClient
    from pyams_zmq.client.problem import QueuedMessage

    def offer(number):
        data = b'["slow_note", %d]' % number
        message = QueuedMessage('slow_note', data, on_reply=replies.append)
        return client.offer(message)

    def end():
        assert offer(2)
        client.withdraw()
        print(len(replies), all(reply.status == 200 for reply in replies if reply), flush=True)

    def end_later():
        print(offer(3), len(replies), flush=True)

    replies = []
    atexit.unregister(flush := __import__('pyams_zmq.client.sender').client.sender._flush)
    atexit.register(end_later)
    atexit.register(flush)
    atexit.register(end)
    client = ZMQClient({process.bound_address!r})
    offer(1)
    """
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(program)],
        check=True,
        timeout=TIMEOUT,
        stdout=subprocess.PIPE,
    )
    assert done.stdout.splitlines() == [b'2 True', b'False 2']
    assert notes(client) in ([1, 2], [1], [])


def test_program_that_starts_no_thread(process, client, monkeypatch):
    """What waits does the work of the thread, as in Python 3.12."""
    monkeypatch.setattr(threading.Thread, 'start', fail_to_start)
    monkeypatch.setattr(threading, 'main_thread', lambda: threading.Thread(target=int))
    thread = SenderThread()
    queue = SendQueue(ServiceAddress.parse(process.bound_address, None, None))
    stored = StoredMessages(lambda message: thread.offer(queue, message, LIMITS))
    thread.prepare(queue, TIMEOUT)
    assert stored.offer(1) == [True]
    queue.step(time.monotonic())
    thread.withdraw(queue)
    queue.close()
    monkeypatch.undo()
    assert stored.statuses() == {1: 200}
    assert notes(client) == [1]
