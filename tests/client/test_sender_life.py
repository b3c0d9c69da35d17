# SPDX-License-Identifier: ZPL-2.1
"""The sender thread: threads and forks that share it, its end, and what it leaves behind."""

import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing.context import ForkProcess

import pytest
import transaction
import zmq

from checks import open_fds, running_threads, wait_until
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import sender as sender_module
from pyams_zmq.client.sender import sender_thread
from pyams_zmq.client.socket import get_context
from pyams_zmq.client.transaction import send_on_commit
from pyams_zmq.exceptions import (
    ZMQClosedError,
    ZMQUnreachableError,
)
from transaction_checks import notes


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


def test_an_idle_connection_is_closed(client, monkeypatch):
    threads = running_threads()
    monkeypatch.setattr(sender_module, 'IDLE', 0.1)
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
        assert errors() == [f"Message 'wait_for' to {client.address}: {zmq.strerror(zmq.ETERM)}"]
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
