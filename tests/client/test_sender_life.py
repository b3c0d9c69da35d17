# SPDX-License-Identifier: ZPL-2.1
"""The sender thread: threads and forks that share it, its end, and what it leaves behind."""

import errno
import logging
import os
import re
import resource
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import ExitStack

import pytest
import transaction
import zmq

from checks import TIMEOUT, fail_to_start, in_fork, open_fds, running_threads, wait_until
from handlers import Handler, LoggedProcess, MessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import send_queue as send_queue_module
from pyams_zmq.client import sender as sender_module
from pyams_zmq.client import unanswered as unanswered_module
from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.client.problem import QueuedMessage
from pyams_zmq.client.send_queue import SendQueue
from pyams_zmq.client.sender import SenderThread, sender_thread
from pyams_zmq.client.socket import get_context
from pyams_zmq.client.transaction import send_on_commit
from pyams_zmq.exceptions import (
    ZMQClosedError,
    ZMQUnreachableError,
)
from pyams_zmq.socket import zmq_socket
from pyams_zmq.wire import hard_end
from pyams_zmq.wire.hard_end import end_hard
from pyams_zmq.wire.poll import wait_for
from scripted_service import end_queue
from transaction_checks import notes, without_ids


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


def test_no_descriptor(process):
    """The queue says so, and connects again later."""
    queue = SendQueue(ServiceAddress.parse(process.bound_address, None, None))
    get_context().socket(zmq.PAIR).close()  # its threads run from then on
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 1, before[1]))
    try:
        assert queue.step(time.monotonic()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert queue.error.errno == errno.EMFILE
    queue.retry()
    wait_until(lambda: not queue.step(time.monotonic()) and queue.is_connected)
    queue.close()


def test_context_that_was_terminated(address, monkeypatch):
    """That is for the thread of the queues to handle."""

    def fail(*args, **kwargs):
        raise zmq.ZMQError(zmq.ETERM)

    monkeypatch.setattr(send_queue_module, 'open_connection', fail)
    queue = SendQueue(ServiceAddress.parse(address, None, None))
    with pytest.raises(zmq.ZMQError, match='terminated'):
        queue.step(time.monotonic())


def test_reply_after_the_end_of_the_connection(monkeypatch):
    """The last replies may come in after the event of the loss."""

    def reply(sockets, timeout):
        router.send_multipart([*received[:-1], b'[200, null]'])
        return wait_for(sockets, TIMEOUT)

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.bind('tcp://127.0.0.1:*')
        queue = SendQueue(ServiceAddress.parse(router.last_endpoint.decode(), None, None))
        queue.add(QueuedMessage('note', b'["note", 1]'))
        wait_until(lambda: not queue.step(time.monotonic()) and router.poll(0))
        received = router.recv_multipart()
        monkeypatch.setattr(queue._monitor, 'read_events', lambda: True)
        monkeypatch.setattr(send_queue_module, 'wait_for', reply)
        assert queue.step(time.monotonic()) == []
        assert not len(queue)
        queue.close()


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


def test_sent_messages_survive_the_client(process, client):
    with ZMQClient(process.bound_address) as other:
        for number in range(10):
            other.send('slow_note' if not number else 'note', number)
    assert len(other._queue.get())
    wait_until(lambda: not len(other._queue.get()))
    assert notes(client) == list(range(10))


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


@pytest.mark.parametrize('makes_child', [False, True])
def test_first_message_at_the_end_of_a_program(process, client, tmp_path, makes_child):
    """The function of atexit was registered before this package was imported."""
    path = tmp_path / 'busy'
    client.send('wait_for', str(path))
    wait_until(path.exists)
    code = """
    import atexit, sys

    def send():
        print('sends', flush=True)
        for number in range(3):
            client.send('note', number)

    def run():
        Finalize(None, send, exitpriority=20)

    atexit.register(send)
    import multiprocessing
    from multiprocessing.util import Finalize
    from pyams_zmq.client import ZMQClient
    client = ZMQClient(sys.argv[1])
    if 'child' in sys.argv:
        atexit.unregister(send)
        child = multiprocessing.get_context('fork').Process(target=run)
        child.start()
    """
    arguments = ['-c', textwrap.dedent(code), process.bound_address]
    if makes_child:
        arguments.append('child')
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE) as program:
        assert program.stdout.readline() == b'sends\n'
        threading.Event().wait(0.3)  # the messages wait for the service
        path.unlink()
    assert notes(client) == [0, 1, 2]


@pytest.fixture
def lonely(monkeypatch):
    """Sender of a program that ends, and starts no thread any more, as in Python 3.12."""
    monkeypatch.setattr(threading.Thread, 'start', fail_to_start)
    monkeypatch.setattr(threading, 'main_thread', lambda: threading.Thread(target=int))
    return SenderThread()


@pytest.fixture
def make_queue():
    """Function that makes the queue for an address."""
    with ExitStack() as stack:

        def make(address):
            queue = SendQueue(ServiceAddress.parse(address, None, None))
            stack.callback(queue.close)
            return queue

        yield make


def test_program_that_starts_no_thread(process, client, lonely, make_queue, monkeypatch):
    """Whoever waits does the work of the thread."""
    queue = make_queue(process.bound_address)
    for number in range(100):
        lonely.prepare(queue, TIMEOUT, (10, 1000))
        lonely.post(queue, QueuedMessage('note', b'["note", %d]' % number))
    lonely.flush()
    lonely.post(queue, QueuedMessage('note', b'["note", 100]'))
    assert not len(queue)
    monkeypatch.undo()
    assert client.call('all_notes') == list(range(101))


def test_program_that_starts_no_thread_without_a_service(down, lonely, make_queue, monkeypatch):
    """It waits between the attempts to connect."""
    queue, steps = make_queue(down), []
    step = queue.step
    monkeypatch.setattr(queue, 'step', lambda now: steps.append(now) or step(now))
    with pytest.raises(ZMQUnreachableError):
        lonely.prepare(queue, 0.5)
    lonely.post(queue, QueuedMessage('note', b'["note", 1]'))
    lonely.flush()
    assert len(steps) < 300


def test_context_that_is_terminated_while_no_thread_is_started(
    process, lonely, make_queue, monkeypatch
):
    def fail(sockets, timeout):
        raise zmq.ContextTerminated

    queue = make_queue(process.bound_address)
    lonely.prepare(queue, TIMEOUT)
    monkeypatch.setattr(sender_module, 'wait_for', fail)
    lonely.post(queue, QueuedMessage('note', b'["note", 1]'))
    lonely.flush()
    assert not lonely._queues


def test_limit_of_threads(process, make_queue, monkeypatch):
    """It is an error while the program goes on."""
    monkeypatch.setattr(threading.Thread, 'start', fail_to_start)
    with pytest.raises(RuntimeError, match='start new thread'):
        SenderThread().prepare(make_queue(process.bound_address), TIMEOUT)


def test_functions_of_atexit_may_send(process, client):
    """Also those that run after that of the sender, because they were registered before it."""
    program = f"""
    import atexit
    from pyams_zmq.client import ZMQClient

    client = ZMQClient({process.bound_address!r})

    def send():
        for number in range(1, 100):
            client.send('note', number)

    atexit.register(send)
    client.send('note', 0)
    """
    subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(program)], check=True)
    assert client.call('all_notes') == list(range(100))


class Forwarder(Handler):
    """Sends messages to another service, and has no time to wait for the replies."""

    def forward(self, address):
        self.client = ZMQClient(address)
        for number in range(3):
            self.client.send('note', number)
        queue = self.client._queue.get()
        wait_until(lambda: len(queue._sent) == 3)
        return [200, os.getpid()]

    def forward_and_hang(self, args):
        address, path = args
        self.forward(address)
        with sender_thread.get()._changed:
            self.touch(path)
            threading.Event().wait()


class ForwarderHandler(MessageHandler):
    """Serves Forwarder."""

    handler = Forwarder


class Impatient(LoggedProcess):
    """Ends before a busy service has replied, and is left to end by itself."""

    drain_timeout = 0.5
    _stop_slack = TIMEOUT


@pytest.fixture
def no_hurry(monkeypatch):
    """Time for the log of a hard end on a loaded machine."""
    monkeypatch.setattr(hard_end, 'TIMEOUT', TIMEOUT)


def occupy(client, path):
    """Let the service of a client do nothing else until a file is removed."""
    client.send('wait_for', str(path))
    wait_until(path.exists)


def losses(path):
    """Return the lines about lost messages, without their ids."""
    texts = re.findall(r'.* before the program ended.*', path.read_text())
    return [re.sub(r' \(ids \d+\.\d+-\d+\.\d+\)', '', text) for text in texts]


@pytest.mark.usefixtures('no_hurry')
def test_hard_end(process, client, start, ask, tmp_path):
    """A service that has no time for the replies logs which messages have none."""
    occupy(client, tmp_path / 'busy')
    service = start(tmp_path / 'log', handler=ForwarderHandler, factory=Impatient)
    assert ask(service, ['forward', client.address]) == [200, service.pid]
    service.stop()
    (tmp_path / 'busy').unlink()
    assert losses(tmp_path / 'log') == [f"3 messages 'note' to {client.address}: {SENT}"]
    assert service.exitcode == 1


@pytest.mark.usefixtures('no_hurry')
def test_hard_end_while_the_lock_is_held(process, client, start, tmp_path):
    """The thread that hangs may hold the lock of the sender."""
    occupy(client, tmp_path / 'busy')
    path = tmp_path / 'hangs'
    service = start(tmp_path / 'log', handler=ForwarderHandler, factory=Impatient)
    with zmq_socket(service.bound_address) as socket:
        socket.send_json(['forward_and_hang', [client.address, str(path)]])
        wait_until(path.exists)
        service.stop()
    (tmp_path / 'busy').unlink()
    assert losses(tmp_path / 'log') == [f"3 messages 'note' to {client.address}: {SENT}"]
    assert service.exitcode == 1


def test_hard_end_of_a_fork(process, client, tmp_path):
    """It has not sent the messages of its parent."""
    path = tmp_path / 'log'

    def end():
        logging.getLogger().handlers[:] = [logging.FileHandler(path)]
        end_hard(3)

    occupy(client, tmp_path / 'busy')
    assert in_fork(end) == 3
    (tmp_path / 'busy').unlink()
    assert path.read_text() == ''


SENT = 'no reply before the program ended, it may have run or not'
UNSENT = 'not sent before the program ended'


def test_flush_waits_no_longer_than_it_may(process, client, errors, tmp_path, monkeypatch, flush):
    monkeypatch.setattr(unanswered_module, 'WINDOW_SIZE', 1)  # bytes: one message at a time
    path = tmp_path / 'busy'
    with ZMQClient(process.bound_address) as other:
        other.flush_timeout = 0.1
        other.send('wait_for', str(path))
        wait_until(path.exists)
        other.send('note', 1)
        other.send('note', 2)
        flush()
        sent, unsent = without_ids(errors())
        assert sent == f"Message 'wait_for' to {client.address}: {SENT}"
        assert unsent == f"2 messages 'note' to {client.address}: {UNSENT}"
        flush()  # multiprocessing calls it, too
        assert len(errors()) == 2
        other.send('note', 3)  # by an exit hook
        assert without_ids(errors()[2:]) == [f"Message 'note' to {client.address}: {UNSENT}"]
        path.unlink()
        wait_until(lambda: not len(other._queue.get()))
    assert client.call('all_notes') == [1, 2, 3]  # this program goes on


def test_flush_waits_for_a_busy_service(client, errors, tmp_path, monkeypatch, flush):
    """While it is connected, however long it does not reply."""
    monkeypatch.setattr(send_queue_module, 'FLUSH', 0.01)
    path = tmp_path / 'busy'
    client.flush_timeout = 60
    client.send('wait_for', str(path))
    wait_until(path.exists)
    client.send('note', 1)
    timer = threading.Timer(0.5, path.unlink)
    timer.start()
    flush()
    timer.join()
    assert client.call('all_notes') == [1]
    assert not errors()


def test_flush_does_not_wait_for_a_service_that_is_gone(process, errors, monkeypatch, flush):
    monkeypatch.setattr(send_queue_module, 'FLUSH', 0.01)
    with ZMQClient(process.bound_address) as client:
        client.flush_timeout = 3600
        client.prepare()
        process.stop()
        process.join()
        wait_until(lambda: not client._queue.get().is_connected)
        client.post('note', b'["note", 1]')
        flush()
        assert without_ids(errors()) == [f"Message 'note' to {client.address}: {UNSENT}"]
        end_queue(client._queue.get())


def test_an_idle_connection_is_closed(client, monkeypatch):
    threads = running_threads()
    monkeypatch.setattr(send_queue_module, 'IDLE', 0.1)
    for number in range(2):
        client.send('note', number)
        wait_until(lambda: running_threads() <= threads)
    assert client.call('all_notes') == [0, 1]


def test_nothing_is_left(process):
    with ZMQClient(process.bound_address) as client:
        client.call('echo')
    fds, threads = open_fds(), running_threads()
    for _ in range(3):
        with ZMQClient(process.bound_address) as client:
            for number in range(10):
                send_on_commit(client, 'note', number)
            transaction.commit()
        wait_until(lambda: running_threads() <= threads)
        wait_until(lambda: open_fds() <= fds)


def test_nothing_is_left_of_a_failure(address):
    fds, threads = open_fds(), running_threads()
    with ZMQClient(address) as client:
        send_on_commit(client, 'note', 1, timeout=0.1)
        with pytest.raises(ZMQUnreachableError):
            transaction.commit()
    wait_until(lambda: running_threads() <= threads)
    wait_until(lambda: len(open_fds() - fds) <= 6)  # of the context


def test_terminated_context(process, errors, tmp_path):
    """After the context was terminated, lost messages are logged."""
    path = tmp_path / 'busy'
    with ZMQClient(process.bound_address) as client:
        client.send('wait_for', str(path))
        wait_until(path.exists)
        get_context().term()
        wait_until(errors)
        path.unlink()
        [error] = without_ids(errors())
        assert error == f"Message 'wait_for' to {client.address}: {zmq.strerror(zmq.ETERM)}"
        client.send('note', 1)
        assert notes(client) == [1]


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
