# SPDX-License-Identifier: ZPL-2.1
"""Messages in a two-phase commit: other participants, and what fails before or after the vote."""

import errno
import os
import signal
import time

import pytest
import transaction
import zmq

from checks import TIMEOUT, freeze, wait_until
from handlers import RecordingMessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import sender as sender_module
from pyams_zmq.client.transaction import MessageDataManager, send_on_commit
from pyams_zmq.exceptions import (
    ZMQClosedError,
    ZMQRefusedError,
    ZMQUnreachableError,
)
from transaction_checks import Journal, notes


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


class SlowSender:
    """Records how long it may take to prepare, and takes some time for it."""

    def __init__(self):
        self.timeouts = []

    def prepare(self, *, timeout):
        self.timeouts.append(timeout)
        time.sleep(min(timeout, 0.1))

    def post(self, name, data):
        pass


def test_messages_share_the_time():
    senders = one, two = SlowSender(), SlowSender()
    for sender in senders:
        send_on_commit(sender, 'note', timeout=1)
    transaction.commit()
    assert one.timeouts == [pytest.approx(1), 0]  # before the commit, and in the vote
    assert two.timeouts[0] <= 1 - 0.1
    assert two.timeouts[1:] == [0]


def test_a_server_that_hangs(client, process):
    freeze(process.pid)
    try:
        send_on_commit(client, 'note', 1, timeout=0.2)
        with pytest.raises(ZMQUnreachableError):  # connected, but without a handshake
            transaction.commit()
    finally:
        os.kill(process.pid, signal.SIGCONT)


@pytest.mark.parametrize('auth', ['editor:wrong', None])
def test_refused(start, auth):
    process = start(handler=RecordingMessageHandler, auth='editor:secret')
    journal = Journal()
    with ZMQClient(process.bound_address, auth=auth) as client:
        for _ in range(2):
            transaction.get().join(journal)
            # Without credentials, libzmq reports the refusal only in some of the attempts.
            send_on_commit(client, 'note', 1, timeout=TIMEOUT)
            with pytest.raises(ZMQRefusedError):
                transaction.commit()
            transaction.abort()
        with pytest.raises(ConnectionError):
            client.send('note', 1)
    assert journal.lines[-1] == 'abort'
    assert 'tpc_abort' in journal.lines
    with ZMQClient(process.bound_address, auth='editor:secret') as client:
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


def test_service_is_killed_between_vote_and_finish(start, address, errors):
    """The message waits for the next one."""

    def kill():
        process.kill()
        process.join()
        wait_until(lambda: not client._queue.get().is_connected)

    process = start(address, RecordingMessageHandler)
    with ZMQClient(address, timeout=0.2) as client:
        journal = Journal('~~', tpc_vote=kill)
        transaction.get().join(journal)
        send_on_commit(client, 'note', 'secret')
        transaction.commit()
        assert journal.lines[-1] == 'tpc_finish'
        assert len(client._queue.get()) == 1
        start(address, RecordingMessageHandler)
        wait_until(lambda: not len(client._queue.get()))
        assert client.call('all_notes', timeout=10) == ['secret']
    assert errors() == []


def test_client_is_closed_before_the_vote(client):
    send_on_commit(client, 'note', 1)
    client.close()
    with pytest.raises(ZMQClosedError):
        transaction.commit()


def test_client_is_closed_before_the_finish(client, errors):
    transaction.get().join(Journal('~~', tpc_vote=client.close))
    send_on_commit(client, 'note', 'secret')
    transaction.commit()
    assert errors() == []
    with ZMQClient(client.address) as other:
        wait_until(lambda: other.call('all_notes') == ['secret'])


def test_no_descriptor_is_left(client, errors, monkeypatch):
    def fail():
        raise zmq.ZMQError(errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(sender_module, 'open_wakeup_pair', fail)
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            client.send('note', 1)
        transaction.get().join(MessageDataManager(transaction.manager, client, 'note', b'', 1))
        transaction.get()._resources[0].tpc_finish(transaction.get())
        transaction.abort()
    assert errors() == [f"Message 'note' to {client.address} of a committed transaction is lost"]
    client.send('note', 2)
    assert notes(client) == [2]
