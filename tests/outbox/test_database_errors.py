# SPDX-License-Identifier: ZPL-2.1
"""The database fails for a while: nothing is lost, and the log says it once."""

import logging
import sqlite3
import threading
import time
from contextlib import closing, contextmanager
from math import inf

import pytest
from sqlalchemy.exc import OperationalError

from checks import wait_until
from outbox_sending import Service
from pyams_zmq.outbox import relay as relay_module
from pyams_zmq.outbox import retry as retry_module
from pyams_zmq.outbox import sql_connection
from pyams_zmq.outbox.relay import CHECK_INTERVAL, SETTLE_DELAY
from pyams_zmq.outbox.retry import LOGGED_FROM, MAX_RETRY_DELAY, RETRY_DELAY
from pyams_zmq.outbox.storage import Entry

PREFIX = 'The outbox cannot use its database now, it tries again: '

PATIENT = pytest.mark.usefixtures('patient')

ENTRY = Entry('messages', 'note', b'["note", "a"]')

RECOVERED = ('INFO', 'The outbox can use its database again')

LOCKED = ('WARNING', f'{PREFIX}OperationalError: (sqlite3.OperationalError) database is locked')


@contextmanager
def locked(sending, how='IMMEDIATE'):
    """Lock the file of sqlite: with IMMEDIATE for writing, with EXCLUSIVE for reading, too."""
    path = sending.application.engine.url.database
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f'BEGIN {how}')
        yield
        connection.execute('ROLLBACK')


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Let the background give up soon while others have the lock of sqlite."""
    monkeypatch.setattr(sql_connection, '_BEGIN_TIMEOUT', 20)


@pytest.fixture
def quick_retries(monkeypatch):
    """Let relays try again soon."""
    monkeypatch.setattr(retry_module, 'RETRY_DELAY', 0.05)
    monkeypatch.setattr(retry_module, 'MAX_RETRY_DELAY', 0.1)


@pytest.fixture
def stepped(sending, service, monkeypatch):
    """Return a relay without a thread, which has the replies to two messages."""
    monkeypatch.setattr(threading.Thread, 'start', skip_relays(threading.Thread.start))
    relay = sending.relay
    with service.run():
        sending.commit('a')
        sending.commit('b')
        wait_until(lambda: len(relay._answers) == 2)
    assert sending.count() == 2
    return relay


def skip_relays(start):
    """Return a replacement of a method that starts threads, for all but those of relays."""

    def start_other(thread):
        if thread.name == 'PyAMS (zmq) outbox':
            raise RuntimeError("can't start new thread")
        start(thread)

    return start_other


def test_entries_are_tried_again_with_growing_pauses(sending, stepped, records):
    now = time.monotonic()
    assert stepped.step(now) == now + SETTLE_DELAY
    now += SETTLE_DELAY
    with locked(sending):
        pauses = []
        for _turn in range(8):
            stepped._checks_at = now + 1000  # not now
            due = stepped.step(now)
            assert due == stepped._settles_at
            assert stepped.step((now + due) / 2) == due  # not before
            pauses.append(round(due - now, 6))
            now = due
    growing = [RETRY_DELAY * 2**number for number in range(5)]
    assert pauses == [*growing, *[MAX_RETRY_DELAY] * 3]
    assert records() == [LOCKED]
    stepped.step(now)
    assert sending.count() == 0
    assert not stepped._known
    assert records(logging.INFO) == [LOCKED, RECOVERED]


def test_reading_pauses_longer_each_time(sending, records):
    """Also if the relay does something else in between."""
    relay = sending.make_relay()
    with sending.application.request() as request:
        sending.storage.add(ENTRY, relay.owner, request.tm, request)
    now = time.monotonic() + CHECK_INTERVAL
    relay.step(now)  # it finds the entry
    relay._checks_at = now + 1000  # not again
    catch_up = relay._catch_ups['messages']
    with locked(sending, 'EXCLUSIVE'):
        pauses = []
        for _turn in range(4):
            assert relay.step(now) == catch_up.reads_at
            relay.step((now + catch_up.reads_at) / 2)
            pauses.append(round(catch_up.reads_at - now, 6))
            now = catch_up.reads_at
    assert pauses == [RETRY_DELAY * 2**number for number in range(4)]
    assert records() == [LOCKED]
    relay.step(now)
    assert len(relay._known) == 1
    assert not catch_up.is_behind


def test_look_that_fails_is_repeated(sending):
    """Also by a relay that has nothing else to look for."""
    first, relay = sending.make_relay(), sending.make_relay()
    now = time.monotonic() + CHECK_INTERVAL
    first.step(now)
    with sending.application.request() as request:
        sending.storage.add(ENTRY, relay.owner, request.tm, request)
    with locked(sending, 'EXCLUSIVE'):
        relay.step(now)
    assert relay._catch_ups == {}
    relay.step(now + CHECK_INTERVAL)
    assert relay._catch_ups['messages'].is_behind


def test_error_of_one_use_is_not_forgotten_when_another_one_succeeds(
    sending, stepped, records, monkeypatch
):
    """A locked file of sqlite can be read; so can a full disk."""
    monkeypatch.setattr(relay_module, 'RENEWAL_AGE', inf)
    stepped.step(time.monotonic())
    now = time.monotonic() + CHECK_INTERVAL
    with locked(sending):
        for _turn in range(6):
            stepped.step(now)  # which settles, and looks for entries
            assert not stepped._check_retry.has_failed
            now = max(stepped._settles_at, stepped._checks_at)
    assert records(logging.INFO) == [LOCKED]
    assert stepped._settles_at - now <= 0
    with locked(sending):
        stepped.step(now)
    stepped.step(now + 100)
    assert sending.count() == 0
    assert records(logging.INFO) == [LOCKED, RECOVERED]


def settle_locked(sending, relay, now, turns):
    """Let a relay fail to drop entries some times; return when it tries again."""
    with locked(sending):
        for _turn in range(turns):
            relay._checks_at = now + 1000  # not now
            now = relay.step(now)
    return now


def test_short_lock_is_not_logged(sending, stepped, records):
    """Processes that use a file of sqlite lock it now and then."""
    now = time.monotonic()
    stepped.step(now)
    now = settle_locked(sending, stepped, now + SETTLE_DELAY, LOGGED_FROM - 1)
    stepped.step(now)
    assert sending.count() == 0
    assert records(logging.DEBUG) == []


def test_errors_in_a_row_are_counted(sending, stepped, service, records):
    """Those before a success do not count."""
    now = time.monotonic()
    for name in 'cd':
        stepped.step(now)
        now = settle_locked(sending, stepped, now + SETTLE_DELAY, LOGGED_FROM - 1)
        stepped.step(now)
        assert sending.count() == 0
        with service.run():
            sending.commit(name)
            wait_until(lambda: stepped._answers)
    assert records(logging.INFO) == []


def test_error_is_logged_again_after_it_has_ended(sending, stepped, service, records):
    now = time.monotonic()
    for name in 'cd':
        stepped.step(now)
        now = settle_locked(sending, stepped, now + SETTLE_DELAY, LOGGED_FROM)
        stepped.step(now)
        assert sending.count() == 0
        with service.run():
            sending.commit(name)
            wait_until(lambda: stepped._answers)
    assert records(logging.INFO) == [LOCKED, RECOVERED] * 2


def test_reading_is_tried_again(sending, service, records, quick_retries, quick_checks):
    """And those that come in meanwhile wait behind it."""
    sending.declare('messages', service.address, max_backlog=1)
    sending.commit('a', 'b', 'c')
    with locked(sending, 'EXCLUSIVE'):
        wait_until(lambda: records(logging.WARNING))
    with service.run():
        sending.commit('d')
        sending.wait_until_empty()
    assert service.names() == ['a', 'b', 'c', 'd']
    assert set(records()) == {LOCKED}
    wait_until(lambda: records(logging.INFO)[-1] == RECOVERED)


def test_parameters_are_not_logged(sending, stepped, records):
    """SQLAlchemy writes the statement with its parameters behind the first line."""

    def fail(sent, refused):
        raise OperationalError('DELETE', {'data': 'secret'}, ValueError('it fails'))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sending.storage, 'settle', fail)
        now = time.monotonic()
        for _turn in range(1 + LOGGED_FROM):
            stepped._checks_at = now + 1000  # not now
            now = stepped.step(now)
    assert records(logging.DEBUG) == [
        ('WARNING', f'{PREFIX}OperationalError: (builtins.ValueError) it fails')
    ]


@PATIENT
def test_memory_is_bounded_while_the_database_fails(sending, service, monkeypatch, quick_retries):
    """Messages of commits that succeed nevertheless are read later."""
    monkeypatch.setattr(relay_module, 'MAX_UNSETTLED', 3)
    settle = sending.storage.settle
    errors = [PermissionError('no right to delete')]

    def fail(sent, refused):
        for error in errors:
            raise error
        settle(sent, refused)

    monkeypatch.setattr(sending.storage, 'settle', fail)
    names = [str(number) for number in range(9)]
    with service.run():
        for number, name in enumerate(names):
            sending.commit(name)
            wait_until(lambda number=number: len(sending.relay._answers) == min(number + 1, 3))
        assert sending.count() == 9
        assert service.names() == names[:3]
        assert all(len(answer) == 4 for answer in sending.relay._answers)  # without the content
        errors.clear()
        sending.wait_until_empty()
    assert service.names() == names


@PATIENT
def test_many_replies_are_settled_at_once(sending, service, monkeypatch):
    monkeypatch.setattr(relay_module, 'SETTLE_DELAY', 1000)
    with service.run():
        sending.commit(*map(str, range(100)))
        sending.wait_until_empty()


def test_replies_that_arrive_during_settling(sending, stepped, service, monkeypatch):
    settle = sending.storage.settle

    def settle_late(sent, refused):
        settle(sent, refused)
        with service.run():
            sending.commit('c')
            wait_until(lambda: len(stepped._answers) == 3)

    now = time.monotonic()
    stepped.step(now)
    with monkeypatch.context() as patch:
        patch.setattr(sending.storage, 'settle', settle_late)
        assert stepped.step(now + 1) == now + 1 + SETTLE_DELAY
    stepped.step(now + 2)
    assert sending.count() == 0


def test_close_while_the_database_is_locked(sending, service, records, monkeypatch, quick_checks):
    """Its messages are sent again: none is lost."""
    with service.run():
        with monkeypatch.context() as patch:
            patch.setattr(relay_module, 'SETTLE_DELAY', 1000)
            sending.commit('a')
            service.wait_for(['a'])
            with locked(sending):
                sending.outbox.close()
        assert sending.count() == 1
        assert records() == []  # its first failure
        sending.outbox.start()
        wait_until(lambda: service.names() == ['a', 'a'])
        sending.wait_until_empty()


@PATIENT
def test_missing_table(
    sqlite_application, make_sending, service, records, quick_checks, quick_retries
):
    sending = make_sending(sqlite_application)
    table = sending.storage.table
    table.drop(sqlite_application.engine)
    sending.outbox.start()
    wait_until(records)
    [(level, text)] = records()
    assert level == 'WARNING'
    assert text.startswith(f'{PREFIX}ZMQOutboxError: The database has no table')
    table.create(sqlite_application.engine)
    with service.run():
        sending.commit('a')
        sending.wait_until_empty()
    assert len(records()) == 1


def test_server_that_is_stopped(
    postgresql, postgresql_application, make_sending, service, records, quick_retries, quick_checks
):
    """Messages that were sent meanwhile are dropped when it runs again; others are not lost."""
    sending = make_sending(postgresql_application)
    sending.commit('a', 'b')
    relay = sending.relay
    postgresql.stop('immediate')
    try:
        with service.run():
            wait_until(lambda: len(relay._answers) == 2)
            wait_until(lambda: relay._settle_retry.has_failed)
            with pytest.raises(OperationalError):
                sending.commit('c')
    finally:
        postgresql.start()
    postgresql_application.engine.dispose()
    sending.wait_until_empty()
    with service.run():
        sending.commit('d')
        sending.wait_until_empty()
    assert service.names() == ['a', 'b', 'd']
    texts = [text for _level, text in records()]
    assert len(texts) == len(set(texts)) <= 6  # while it starts, it gives other reasons
    assert all(text.startswith(PREFIX) and '\n' not in text for text in texts)


def test_undelivered_messages_survive_the_end_of_the_server(
    postgresql, postgresql_application, make_sending, service, quick_retries, quick_checks, tmp_path
):
    sending = make_sending(postgresql_application, other=Service(tmp_path, 'other').address)
    sending.commit('a')
    sending.clients['messages'].withdraw()  # it has to be read
    postgresql.stop('immediate')
    postgresql.start()
    postgresql_application.engine.dispose()
    sending.commit('b')
    with service.run():
        sending.wait_until_empty()
    assert sorted(service.names()) == ['a', 'b']
