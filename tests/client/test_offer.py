# SPDX-License-Identifier: ZPL-2.1
"""Messages that are stored elsewhere until their reply: when they are sent, and what it says."""

import errno
import os
import resource
import signal
import threading
from math import inf

import pytest

from checks import fail_to_start, in_fork, wait_until
from handlers import Handler, MessageHandler, RecordingMessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import send_queue as send_queue_module
from pyams_zmq.client import unanswered as unanswered_module
from pyams_zmq.client.problem import CheckedReply
from pyams_zmq.client.sender import SenderThread, sender_thread
from pyams_zmq.client.socket import get_context
from pyams_zmq.exceptions import ZMQClosedError
from pyams_zmq.wire.message import DRAINING_REPLY
from scripted_service import OVERLOADED, StoredMessages, let_idle, until_late
from transaction_checks import notes

FULL = b'[507, "The disk of the service is full"]'
JOB = b'[200, {"id": "one"}]'


class Writer(Handler):
    """Appends numbers to a file."""

    def write(self, args):
        number, path = args
        with open(path, 'a', encoding='ascii') as file:
            file.write(f'{number}\n')
        return [200, None]


class WriterHandler(MessageHandler):
    """Serves Writer."""

    handler = Writer


# Replies


def test_replies(client, errors):
    """The queue logs none of them: what to do is for `on_reply`."""
    stored = StoredMessages(client.offer)
    assert stored.offer(1, 2) == [True, True]
    assert stored.offer(404, name='status') == [True]
    assert stored.offer(3, name='no_such_method') == [True]
    assert notes(client) == [1, 2]
    assert stored.replies == {
        1: [CheckedReply(200)],
        2: [CheckedReply(200)],
        404: [CheckedReply(404, 'the reply has status 404', '404 payload')],
        3: [
            CheckedReply(
                404, 'the reply has status 404', "404 Unknown message type 'no_such_method'"
            )
        ],
    }
    assert not errors()


def test_reply_that_is_not_json(service, stored):
    stored.offer(1)
    service.reply(service.receive(), b'hello')
    stored.wait(1)
    assert stored.replies == {1: [CheckedReply(0, 'the reply is not JSON')]}


@pytest.mark.usefixtures('soon')
def test_job(service, stored):
    """It is sent again while the disk of the service is full; a reply without an id is an error."""
    stored.offer(1, 2, is_job=True)
    first, second = service.receive(), service.receive()
    service.reply(first, FULL)
    service.reply(second)
    again = service.receive()
    assert again[1] == 1
    service.reply(again, JOB)
    stored.wait(2)
    assert stored.replies[1] == [CheckedReply(200)]
    [reply] = stored.replies[2]
    assert reply.problem.startswith('the service keeps no jobs')


def test_full_disk_is_a_reply_to_a_message(service, stored):
    stored.offer(1)
    service.reply(service.receive(), FULL)
    stored.wait(1)
    assert stored.statuses() == {1: 507}


@pytest.mark.usefixtures('soon')
@pytest.mark.parametrize('refusal', [OVERLOADED, DRAINING_REPLY])
def test_refused_messages_are_sent_again_in_their_order(service, stored, refusal, errors):
    stored.offer(*range(20))
    for message in [service.receive() for _ in range(20)]:
        service.reply(message, refusal)
    while len(service.run) < 20:
        service.reply(service.receive())
    stored.wait(20)
    assert service.run == list(range(20))
    assert stored.count_replies() == [1] * 20
    assert not errors()


# Services that are down


def test_service_that_is_down(start, address, errors):
    """The messages wait for it, together with others, and keep their order."""
    with ZMQClient(address) as client:
        stored = StoredMessages(client.offer)
        for number in range(0, 20, 2):
            assert stored.offer(number) == [True]
            client.post('note', b'["note", %d]' % (number + 1))
        queue = client._queue.get()
        assert len(queue) == 20
        assert not queue.is_connected
        start(address, RecordingMessageHandler)
        assert notes(client) == list(range(20))
    assert stored.count_replies() == [1] * 10
    assert queue.size == 0
    assert not errors()


def test_service_that_is_killed(start, address, errors, tmp_path):
    """Each message runs at least once, and those that run for the first time keep their order."""
    path = tmp_path / 'numbers'
    path.touch()

    def written():
        return [int(line) for line in path.read_text().split()]

    with ZMQClient(address) as client:
        process = start(address, WriterHandler)
        stored = StoredMessages(client.offer)
        for number in range(1500):
            stored.offer(number, name='write', text=str(path))
            if number % 500 == 250:
                wait_until(lambda number=number: len(written()) > number - 200)
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                process = start(address, WriterHandler)
        stored.wait(1500)
        wait_until(lambda: not len(client._queue.get()))
    assert list(dict.fromkeys(written())) == list(range(1500))
    assert stored.count_replies() == [1] * 1500
    assert set(stored.statuses().values()) == {200}
    assert not errors()


def test_connection_that_is_lost(service, to_service, stored, errors):
    """Messages on their way are sent again, and others of `send` are lost."""
    stored.offer(1)
    to_service.send('note', 2)
    stored.offer(3)
    assert [service.receive()[1] for _ in range(3)] == [1, 2, 3]
    service.restart()
    for number in (1, 3):
        message = service.receive()
        assert message[1] == number
        service.reply(message)
    stored.wait(2)
    wait_until(errors)
    assert stored.count_replies() == [1, 1]
    [error] = errors()
    assert error.endswith('the connection was lost, it may have run or not')


def test_message_that_ends_its_service(service, stored, errors):
    """It gets a reply after five lost connections, and those behind it are sent."""
    stored.offer(1, 2)
    for _turn in range(send_queue_module.MAX_LOSSES):
        assert [service.receive()[1] for _message in range(2)] == [1, 2]
        service.restart()
    message = service.receive()
    assert message[1] == 2
    service.reply(message)
    stored.wait(2)
    assert stored.replies == {1: [send_queue_module.POISON], 2: [CheckedReply(200)]}
    assert errors() == []


def test_lost_connections_behind_another_message(service, to_service, stored):
    """They do not count for a message that may not have begun."""
    to_service.post('note', b'["note", 0]')
    stored.offer(1)
    assert [service.receive()[1] for _message in range(2)] == [0, 1]
    service.restart()
    for _turn in range(send_queue_module.MAX_LOSSES - 1):
        assert service.receive()[1] == 1
        service.restart()
    message = service.receive()
    service.reply(message)
    stored.wait(1)
    assert stored.replies == {1: [CheckedReply(200)]}


def test_service_that_refuses_the_connection(start, address, caplog, monkeypatch):
    """The messages wait until it has the right password."""
    monkeypatch.setattr(send_queue_module, 'SUSPENDED', 0.05)
    caplog.set_level('WARNING', 'PyAMS (zmq)')
    process = start(address, RecordingMessageHandler, auth='user:wrong')
    with ZMQClient(address, auth='user:right') as client:
        stored = StoredMessages(client.offer)
        stored.offer(1)
        wait_until(lambda: caplog.records)
        assert client._queue.get().error is not None
        assert stored.offer(2) == [True]
        process.stop()
        start(address, RecordingMessageHandler, auth='user:right')
        assert notes(client) == [1, 2]
    assert stored.count_replies() == [1, 1]
    [record] = caplog.records
    assert record.getMessage().startswith(f'1 messages wait for {address}: ')


# No room


def test_full_backlog(service, to_service, stored):
    to_service.max_backlog = 3
    assert stored.offer(*range(5)) == [True, True, True, False, False]
    assert [service.receive()[1] for _ in range(3)] == [0, 1, 2]
    assert not service.socket.poll(50)
    queue = to_service._queue.get()
    assert len(queue) == 3
    service.restart()
    service.reply(service.receive())
    stored.wait(1)
    assert stored.offer(3, 4) == [True, False]
    assert [len(stored.replies[number]) for number in (3, 4)] == [0, 0]


def test_large_messages(down):
    """One that is larger than the limit is taken alone."""
    with ZMQClient(down) as client:
        client.max_backlog_size = 100
        stored = StoredMessages(client.offer)
        assert stored.offer(1, text='x' * 1000) == [True]
        assert stored.offer(2) == [False]
        client.withdraw()
        assert stored.offer(3, text='x' * 20) == [True]
        assert stored.offer(4, text='x' * 60) == [False]
        assert stored.offer(5) == [True]
        client.withdraw()
    assert client._queue.get().size == 0


def test_room_of_a_transaction(to_service, stored):
    """It is not for others."""
    to_service.max_backlog = 2
    to_service.prepare()
    reservation = to_service.reserve('note', b'["note",1]')
    assert stored.offer(1, 2) == [True, False]
    reservation.cancel()
    assert stored.offer(2) == [True]


def test_closed_client(down):
    client = ZMQClient(down)
    client.close()
    stored = StoredMessages(client.offer)
    with pytest.raises(ZMQClosedError, match='make another one'):
        stored.offer(1)
    client.withdraw()
    assert stored.count_replies() == [0]


def test_message_that_cannot_be_sent(client, errors):
    """Its data is not bytes: it is given back, and the others are sent."""

    def offer(message):
        message.data = 'text'
        return client.offer(message)

    stored = StoredMessages(offer)
    assert stored.offer(1) == [True]
    client.send('note', 2)
    assert notes(client) == [2]
    assert stored.replies == {1: [None]}
    assert client._queue.get().size == 0
    assert not errors()


def test_limit_of_threads(to_service, monkeypatch):
    """It is an error, and the message is not in the queue."""
    monkeypatch.setattr(threading.Thread, 'start', fail_to_start)
    queue = to_service._queue.get()
    stored = StoredMessages(lambda message: SenderThread().offer(queue, message, (inf, inf)))
    with pytest.raises(RuntimeError, match='start new thread'):
        stored.offer(1)
    assert not len(queue)
    assert stored.count_replies() == [0]


def test_no_descriptor(down):
    """It is an error of the system, and the message is not in the queue."""

    def offer():
        with open(os.devnull) as file:
            limit = file.fileno() + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        with pytest.raises(OSError, match='Too many open files') as caught:
            stored.offer(1)
        assert caught.value.errno == errno.EMFILE
        assert not len(client._queue.get())

    with ZMQClient(down) as client:
        stored = StoredMessages(client.offer)
        assert in_fork(offer) == 0


def test_fork(client):
    """It has none of the messages of its parent, and may offer its own."""

    def offer():
        own = StoredMessages(client.offer)
        own.offer(3)
        own.wait(1)
        assert stored.count_replies() == [0, 0]

    stored = StoredMessages(client.offer)
    queue = client._queue.get()
    with sender_thread.get()._changed:  # they are not sent before the fork
        stored.offer(1, 2)
        assert len(queue) == 2
        assert in_fork(offer) == 0
    assert notes(client) == [3, 1, 2]
    assert stored.count_replies() == [1, 1]


def test_context_that_is_terminated(process, errors, tmp_path):
    """All messages are given back, and not logged as lost."""
    path = tmp_path / 'busy'
    with ZMQClient(process.bound_address) as client:
        client.send('wait_for', str(path))
        wait_until(path.exists)
        stored = StoredMessages(client.offer)
        stored.offer(*range(150))  # more than are sent before their replies
        get_context().term()
        stored.wait(150)
        path.unlink()
        wait_until(errors)
        assert client._queue.get().size == 0
        stored.offer(200)
        stored.wait(151)
    assert stored.count_replies() == [1] * 151
    assert stored.statuses() == {**dict.fromkeys(range(150)), 200: 200}
    assert [text for text in errors() if 'note' in text] == []


# Late replies: a device stays when the service behind it dies


@pytest.fixture
def make_late(to_service, service, stored, warnings):
    """Function that offers messages and lets them become late; it returns them."""

    def make(*numbers, **options):
        stored.offer(*numbers, **options)
        to_service.send('note', 'later')
        messages = [service.receive() for _ in numbers]
        later = service.receive()
        until_late(to_service)
        service.reply(later)
        wait_until(warnings)
        assert len(warnings()) == 1
        return messages

    return make


@pytest.mark.usefixtures('impatient', 'soon')
def test_late_replies(service, to_service, stored, make_late, warnings):
    """They are waited for, and a refused message is sent again."""
    good, bad, refused = make_late(1, 2, 3)
    queue = to_service._queue.get()
    assert (len(queue), queue.size) == (0, 0)
    service.reply(good)
    service.reply(bad, b'[404, "missing"]')
    service.reply(refused, OVERLOADED)
    again = service.receive()
    assert again[1] == 3
    service.reply(again)
    stored.wait(3)
    wait_until(lambda: not len(queue))
    assert queue.size == 0
    assert stored.statuses() == {1: 200, 2: 404, 3: 200}
    assert stored.count_replies() == [1, 1, 1]
    assert [text.partition(' messages')[0] for text in warnings()] == ['WARNING: 3']


@pytest.mark.usefixtures('impatient')
def test_end_of_a_connection_with_late_messages(service, to_service, stored, make_late, warnings):
    """They are given back: their replies cannot come any more."""
    make_late(1, 2)
    service.restart()
    stored.wait(2)
    assert stored.replies == {1: [None], 2: [None]}
    assert to_service._queue.get().size == 0
    assert len(warnings()) == 1


@pytest.mark.usefixtures('impatient')
def test_close_with_late_messages(to_service, stored, make_late):
    """The connection of a closed client does not wait for them."""
    make_late(1)
    to_service.close()
    stored.wait(1)
    assert stored.replies == {1: [None]}


@pytest.mark.usefixtures('impatient')
def test_limit_of_late_messages(service, stored, make_late, monkeypatch):
    """The oldest one is given back; its reply may come later, and is ignored."""
    monkeypatch.setattr(unanswered_module, 'MAX_LATE', 1)
    first, second = make_late(1, 2)
    stored.wait(1)
    assert stored.replies == {1: [None], 2: []}
    service.reply(first)
    service.reply(second)
    stored.wait(2)
    assert stored.statuses() == {1: None, 2: 200}


@pytest.mark.usefixtures('impatient', 'soon')
def test_late_messages_without_their_data(service, to_service, stored, make_late, monkeypatch):
    """One that is refused is given back, the other one has its reply."""
    monkeypatch.setattr(unanswered_module, 'MAX_LATE_SIZE', 1500)
    first, second, third = make_late(1, 2, 3, text='x' * 1000)
    service.reply(first, OVERLOADED)
    service.reply(second)
    service.reply(third, OVERLOADED)
    service.reply(service.receive())
    stored.wait(3)
    assert stored.statuses() == {1: None, 2: 200, 3: 200}
    assert stored.count_replies() == [1, 1, 1]
    wait_until(lambda: not len(to_service._queue.get()))
    assert to_service._queue.get().size == 0


@pytest.mark.usefixtures('impatient')
def test_connection_with_late_messages_stays_open(
    service, to_service, stored, make_late, monkeypatch
):
    """The thread waits for their replies, and does nothing meanwhile."""
    [message] = make_late(1)
    queue = to_service._queue.get()
    steps = let_idle(queue, monkeypatch)
    assert not service.socket.poll(300)
    assert len(steps) < 10
    assert queue.is_connected
    service.reply(message)
    stored.wait(1)
    wait_until(lambda: queue._socket is None)
    assert stored.statuses() == {1: 200}


@pytest.mark.usefixtures('impatient')
def test_late_messages_of_send_do_not_keep_it_open(service, to_service, warnings, monkeypatch):
    for number in range(2):
        to_service.send('note', number)
    _first, second = service.receive(), service.receive()
    until_late(to_service)
    service.reply(second)
    wait_until(warnings)
    queue = to_service._queue.get()
    let_idle(queue, monkeypatch)
    wait_until(lambda: queue._socket is None)


def test_reserved_room_keeps_the_connection_open(service, to_service, monkeypatch):
    """Of a transaction that takes long; the thread does nothing meanwhile."""
    to_service.prepare()
    reservation = to_service.reserve('note', b'["note",1]')
    queue = to_service._queue.get()
    steps = let_idle(queue, monkeypatch)
    assert not service.socket.poll(300)
    assert len(steps) < 10
    assert queue.is_connected
    reservation.cancel()
    wait_until(lambda: queue._socket is None)
