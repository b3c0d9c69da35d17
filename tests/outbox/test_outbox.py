# SPDX-License-Identifier: ZPL-2.1
"""The outbox of an application: what it refuses, forks, and the end of its process."""

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
from transaction.interfaces import TransactionFailedError

import outbox_sender
from checks import TIMEOUT, wait_until
from outbox_sending import Service
from pyams_zmq.exceptions import ZMQMessageError, ZMQOutboxError, ZMQStartError
from pyams_zmq.outbox.catch_up import CatchUp
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.outbox.relay import CHECK_INTERVAL
from pyams_zmq.outbox.storage import Entry
from pyams_zmq.wire import fork_barrier
from transaction_checks import Journal

pytestmark = pytest.mark.usefixtures('patient')

RELAY_THREAD = 'PyAMS (zmq) outbox'

NAMES = [str(number) for number in range(20)]


def relay_threads():
    """Return the threads of relays."""
    return [thread for thread in threading.enumerate() if thread.name == RELAY_THREAD]


def test_doomed_transaction(any_sending):
    with any_sending.application.request() as request:
        request.tm.doom()
        with pytest.raises(ZMQOutboxError) as caught:
            any_sending.send(request, 'a')
        request.tm.abort()
    assert str(caught.value) == (
        "Message 'note' to 'messages' would never be sent: the transaction is doomed. Send it "
        'before, or in another transaction; a test includes pyams_zmq.testing'
    )
    assert any_sending.count() == 0


def test_message_that_is_too_large(sending, monkeypatch):
    monkeypatch.setattr(sending.storage, 'max_size', 100)
    fitting = 'x' * (100 - len('["note",""]'))
    with sending.application.request() as request:
        sending.send(request, fitting)
        for args, frames in ((fitting + 'x', None), ('x', [b'x' * 100])):
            with pytest.raises(ZMQMessageError) as caught:
                sending.send(request, args, frames=frames)
            assert caught.value.status == 413
            assert caught.value.text.endswith(
                'bytes; the limit of this outbox is 100: write the data to a file, and submit a '
                'job with its path'
            )
    assert sending.count() == 1


def test_storage_without_a_limit(sending, monkeypatch):
    monkeypatch.setattr(sending.storage, 'max_size', None)
    sending.outbox.check_size(Entry('messages', 'note', bytes(1000)))


def test_limits_of_the_client(sending):
    sending.clients['messages'].max_message_size = 100
    with sending.application.request() as request, pytest.raises(ZMQMessageError, match='100'):
        sending.send(request, 'x' * 100)
    assert sending.sender(None).keeps_jobs


def test_uwsgi_without_threads(sending, monkeypatch):
    monkeypatch.setitem(sys.modules, 'uwsgi', SimpleNamespace(has_threads=0))
    with sending.application.request() as request, pytest.raises(ZMQStartError, match='uWSGI'):
        sending.send(request, 'a')
    with pytest.raises(ZMQStartError, match='uWSGI'):
        sending.outbox.start()
    assert sending.count() == 0
    assert relay_threads() == []


def commit_with_failure(sending, key):
    """Commit a message with a participant that fails in its vote, in the order of its key."""

    def fail():
        raise LookupError('the vote fails')

    with sending.application.request() as request:
        sending.send(request, 'a')
        request.tm.get().join(Journal(key, tpc_vote=fail))


def test_participant_that_fails_after_the_commit_of_the_database(
    any_sending, service, quick_checks
):
    """The database has committed when it voted; the process need not be the first of its machine.

    A database with one phase cannot do otherwise. The message is sent, as the row is there.
    """
    first = any_sending.make_relay()
    first.step(time.monotonic() + CHECK_INTERVAL)
    assert first._adoption._lock._file_lock.is_held
    with service.run():
        any_sending.outbox.start()
        wait_until(lambda: not any_sending.relay._has_unknown)  # it has looked, and will not again
        with pytest.raises(LookupError, match='the vote fails'):
            commit_with_failure(any_sending, '~~~')
        any_sending.wait_until_empty()
    assert service.names() == ['a']


def test_participant_that_fails_before_the_commit_of_the_database(sending, service, quick_checks):
    with service.run():
        with pytest.raises(LookupError, match='the vote fails'):
            commit_with_failure(sending, '')
        assert sending.count() == 0
        sending.commit('b')
        sending.wait_until_empty()
    assert service.names() == ['b']


def test_close(any_sending, service, tmp_path):
    """It waits for the reply on its way, and leaves what is not sent in the database."""
    path = tmp_path / 'busy'
    os.mkfifo(path)
    other = Service(tmp_path, 'other')
    any_sending.declare('other', other.address)
    with service.run():
        any_sending.commit(['a', str(path)], type='hold')
        any_sending.commit('kept', service='other')
        service.wait_for(['a'])
        closing = threading.Thread(target=any_sending.outbox.close)
        closing.start()
        closing.join(0.3)
        assert closing.is_alive()
        path.write_text('')
        closing.join()
        assert relay_threads() == []
        assert [each.service for each in any_sending.outbox.waiting()] == ['other']
        any_sending.commit('b')  # in a new relay, with a thread
        wait_until(lambda: any_sending.count() == 1)
        any_sending.outbox.close()
    assert service.names() == ['a', 'b']
    assert other.names() == []


def test_transaction_that_is_open_during_the_close(sending, service):
    """Its message is sent by the next relay of the process."""
    with service.run():
        with sending.application.request() as request:
            sending.send(request, 'a')
            sending.outbox.close()
            sending.outbox.close()
        assert sending.count() == 1
        sending.outbox.start()
        relay = sending.relay
        relay._checks_at = 0
        relay._woken.set()
        sending.wait_until_empty()
    assert service.names() == ['a']


@pytest.fixture
def run_sender(sqlite_url, sending, service):
    """Run the program `outbox_sender` with a database; return it when it has committed."""
    programs = []

    def run(end, address=service.address):
        path = os.pathsep.join(
            filter(None, (str(Path(outbox_sender.__file__).parent), os.environ.get('PYTHONPATH')))
        )
        command = [sys.executable, '-W', 'ignore', outbox_sender.__file__, sqlite_url, address]
        program = subprocess.Popen(
            [*command, sending.name, end],
            env={**os.environ, 'PYTHONPATH': path},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        programs.append(program)
        assert program.stdout.readline() == b'committed\n'
        return program

    yield run
    for program in programs:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)  # its forks, too
        program.communicate()


@pytest.mark.parametrize('end', ['return', 'fork'])
def test_end_of_the_program(sending, service, run_sender, quick_checks, end):
    """Each message is sent once, also if a fork ends as Python does, while a lock was held."""
    with service.run():
        assert run_sender(end).wait(30) == 0
        sending.outbox.start()
        sending.wait_until_empty()
    assert service.names() == NAMES


@pytest.mark.parametrize(('end', 'code'), [('exit', 3), ('wait', -signal.SIGKILL)])
def test_hard_end_of_the_program(sending, service, run_sender, quick_checks, end, code, tmp_path):
    """It skips the end of Python, or is killed."""
    program = run_sender(end, Service(tmp_path, 'down').address)
    if end == 'wait':
        program.kill()
    assert program.wait(30) == code
    with service.run():
        sending.outbox.start()
        sending.wait_until_empty()
    assert service.names() == NAMES


def in_fork(sending, function):
    """Run a function in a process that is forked by multiprocessing; return its exit code."""

    def run():
        sending.in_fork()
        function()

    child = ForkProcess(target=run)
    child.start()
    child.join(30)
    return child.exitcode


def test_child_of_multiprocessing(any_sending, service, quick_checks):
    """Its end waits for replies on their way; its parent sends what is left, and goes on."""

    def commit():
        any_sending.commit(*NAMES)

    with service.run():
        any_sending.commit('before')
        service.wait_for(['before'])
        assert in_fork(any_sending, commit) == 0
        service.wait_for(['before', *NAMES])
        any_sending.commit('after')
        any_sending.wait_until_empty()
    assert service.names() == ['before', *NAMES, 'after']


def test_fork_drops_its_messages_while_it_runs(any_sending, service):
    """It has a relay of its own, with a thread."""

    def commit():
        assert relay_threads() == []
        any_sending.commit('child')
        any_sending.wait_until_empty()
        assert any_sending.relay.owner != owner
        assert len(relay_threads()) == 1

    with service.run():
        any_sending.outbox.start()
        owner = any_sending.relay.owner
        assert in_fork(any_sending, commit) == 0
        assert any_sending.relay.owner == owner
    assert service.names() == ['child']


def test_forks_wait_for_the_database(sending, service, monkeypatch):
    """A fork does not inherit the locks of a driver that a thread uses."""
    entered, forking = threading.Event(), threading.Event()
    barrier, settle, done = sending.relay._database.barrier, sending.storage.settle, []
    before_fork = barrier.before_fork

    def settle_slowly(sent, refused):
        entered.set()
        assert forking.wait(TIMEOUT)
        settle(sent, refused)
        done.append(sent)

    def note_fork():
        forking.set()
        before_fork()

    def check():
        assert len(done) == 1

    monkeypatch.setattr(fork_barrier, 'TIMEOUT', TIMEOUT)
    monkeypatch.setattr(sending.storage, 'settle', settle_slowly)
    monkeypatch.setattr(barrier, 'before_fork', note_fork)
    with service.run():
        sending.commit('a')
        assert entered.wait(TIMEOUT)
        assert in_fork(sending, check) == 0


def test_system_that_starts_no_thread(sending, service, monkeypatch):
    """A commit succeeds; the messages are dropped when a thread can be started, or at the end."""
    start = threading.Thread.start

    def fail(thread):
        if thread.name == RELAY_THREAD:
            raise RuntimeError("can't start new thread")
        start(thread)

    with service.run():
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, 'start', fail)
            with pytest.raises(RuntimeError):
                sending.outbox.start()
            sending.commit('a')
            service.wait_for(['a'])
            wait_until(lambda: sending.relay._answers)
        assert sending.count() == 1
        sending.commit('b')
        sending.wait_until_empty()
    assert service.names() == ['a', 'b']


class LookedAt(CatchUp):
    """While a relay looks at it, another thread sends to a service that is new to it."""

    def __init__(self, relay):
        self._relay = relay
        super().__init__()

    @property
    def is_behind(self):
        number = len(self._relay._catch_ups)
        thread = threading.Thread(target=self._relay._catch_up_of, args=(str(number),))
        thread.start()
        thread.join()
        return False

    @is_behind.setter
    def is_behind(self, value):
        """It is never behind."""


def test_service_that_is_new_to_the_relay(sending):
    relay = sending.make_relay()
    relay._catch_ups['0'] = LookedAt(relay)
    now = time.monotonic() + CHECK_INTERVAL
    assert relay.step(now) == now + CHECK_INTERVAL
    assert not relay._check_retry.has_failed
    assert len(relay._catch_ups) == 4


class SendingHandler(logging.Handler):
    """A handler of the log that sends each record through the outbox, and fails then."""

    def __init__(self, sending):
        super().__init__(logging.ERROR)
        self.sending = sending

    def emit(self, record):
        self.sending.commit(record.levelname)
        raise OSError('no space left on device')


def test_handler_of_the_log_that_sends_messages(sending, service):
    """Its errors end neither the thread nor a commit, and its commits need the same lock."""
    start = time.monotonic()
    logger = logging.getLogger('PyAMS (zmq)')
    handler = SendingHandler(sending)
    logger.addHandler(handler)
    try:
        with service.run():
            sending.commit('a', type='unknown')  # refused: logged by the thread
            sending.commit_to('nowhere', 'b')  # logged at its commit
            wait_until(lambda: sending.count() == 1)
            service.wait_for(['ERROR', 'ERROR'])
            sending.outbox.discard('nowhere')
    finally:
        logger.removeHandler(handler)
    assert len(relay_threads()) == 1
    assert time.monotonic() - start < TIMEOUT  # an error of the time limit would be dropped


def test_outbox_that_is_dropped(sending):
    """Its relay is not kept for the end of the program."""
    outbox = Outbox(sending.storage, sending.find_client, sending.name)
    relay = weakref.ref(outbox._relay.get())
    del outbox
    gc.collect()
    assert relay() is None


def test_failed_commit_is_not_the_last_one(sending, service):
    with sending.application.request() as request:
        sending.send(request, 'a')
        request.tm.get().join(Journal('', tpc_begin=lambda: int('x')))
        with pytest.raises(ValueError, match='invalid literal'):
            request.tm.commit()
        with pytest.raises(TransactionFailedError):
            sending.send(request, 'b')
        request.tm.abort()
    assert sending.count() == 0
