# SPDX-License-Identifier: ZPL-2.1
"""The messages of processes that have ended are sent by one relay of the machine."""

import logging
import os
import signal
import time
from multiprocessing.context import ForkProcess

import pytest

from checks import wait_until
from outbox_sending import Service
from pyams_zmq.outbox import relay as relay_module
from pyams_zmq.outbox.adoption import OTHERS_TIME
from pyams_zmq.outbox.relay import CHECK_INTERVAL
from pyams_zmq.outbox.silence import ORPHAN_TIME
from pyams_zmq.outbox.storage import Entry

pytestmark = pytest.mark.usefixtures('patient')

ELSEWHERE = 'another machine:1:1'
"""Owner that this machine cannot examine"""

ENTRY = Entry('messages', 'note', b'["note", "a"]')


def commit_in_fork(sending, *names):
    """Commit messages in a process that is killed then."""

    def run():
        sending.in_fork()
        sending.commit(*names)
        os.kill(os.getpid(), signal.SIGKILL)

    child = ForkProcess(target=run)
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL


def add(sending, *owners):
    """Commit the entry for some owners, without a relay."""
    with sending.application.request() as request:
        return [sending.storage.add(ENTRY, owner, request.tm, request) for owner in owners]


def owners(sending):
    """Return the owners of the messages that wait."""
    return sorted(each.owner for each in sending.outbox.waiting())


def test_process_that_was_killed(any_sending, service, quick_checks, records):
    commit_in_fork(any_sending, 'a', 'b')
    commit_in_fork(any_sending, 'c')
    assert any_sending.count() == 3
    assert any_sending.count(any_sending.relay.owner) == 0
    any_sending.outbox.start()
    with service.run():
        any_sending.wait_until_empty()
    assert sorted(service.names()) == ['a', 'b', 'c']
    assert service.names().index('a') < service.names().index('b')
    texts = [text for level, text in records(logging.INFO) if level == 'INFO']
    assert sorted(texts) == [
        f'The outbox sends {number} messages of a process that has ended' for number in (1, 2)
    ]
    assert records() == []


def test_messages_of_a_live_process_are_left_alone(any_sending, service):
    """However old they are."""

    def run():
        any_sending.in_fork()
        any_sending.commit('a')
        os.kill(os.getpid(), signal.SIGSTOP)

    relay = any_sending.make_relay()
    child = ForkProcess(target=run)
    child.start()
    try:
        wait_until(lambda: any_sending.count() == 1)
        [owner] = owners(any_sending)
        now = time.monotonic()
        for number in range(1, 40):
            relay.step(now + number * CHECK_INTERVAL)
        assert owners(any_sending) == [owner] != [relay.owner]
    finally:
        child.kill()
        child.join()
    relay.step(now + 40 * CHECK_INTERVAL)
    assert owners(any_sending) == [relay.owner]


def test_process_of_another_machine_that_is_silent(sending):
    add(sending, ELSEWHERE, ELSEWHERE)
    relay = sending.make_relay()
    now = time.monotonic() + CHECK_INTERVAL
    for seconds in (0, 5, ORPHAN_TIME - 0.1):
        relay.step(now + seconds)
        assert owners(sending) == [ELSEWHERE]
    relay.step(now + ORPHAN_TIME + 5)
    assert owners(sending) == [relay.owner]


def test_process_of_another_machine_that_renews_its_messages(sending):
    """Or sends some, or has new ones."""
    keys = add(sending, ELSEWHERE, ELSEWHERE)
    relay = sending.make_relay()
    now = time.monotonic() + CHECK_INTERVAL
    changes = [
        lambda: sending.storage.renew(ELSEWHERE),
        lambda: sending.storage.settle(keys[:1], []),
        lambda: add(sending, ELSEWHERE),
        lambda: sending.storage.renew(ELSEWHERE),
    ]
    for change in changes:
        relay.step(now)
        relay.step(now + ORPHAN_TIME - CHECK_INTERVAL)
        change()
        now += ORPHAN_TIME
        relay.step(now)
        assert owners(sending) == [ELSEWHERE]
    relay.step(now + ORPHAN_TIME + 1)
    assert owners(sending) == [relay.owner]


def test_process_of_another_machine_that_has_sent_all_in_between(sending):
    keys = add(sending, ELSEWHERE)
    relay = sending.make_relay()
    now = time.monotonic() + CHECK_INTERVAL
    relay.step(now)
    sending.storage.settle(keys, [])
    relay.step(now + 10)
    add(sending, ELSEWHERE)
    relay.step(now + ORPHAN_TIME)
    assert owners(sending) == [ELSEWHERE]


@pytest.mark.parametrize('is_declared', [True, False])
def test_messages_that_wait_are_renewed(sending, monkeypatch, is_declared):
    """For the relays of other machines: each 15 s, after the first 10 s."""
    if not is_declared:
        del sending.clients['messages']
    monkeypatch.setattr(relay_module, 'RENEWAL_AGE', 0)
    first = sending.make_relay()
    relay = sending.make_relay()
    now = time.monotonic() + CHECK_INTERVAL
    first.step(now)  # of two relays, this one looks at other processes
    with sending.application.request() as request:
        sending.storage.add(ENTRY, relay.owner, request.tm, request)
    found = []
    for number in range(7):
        relay.step(now + number * CHECK_INTERVAL)
        found += [each.renewals for each in sending.outbox.waiting()]
    assert found == [0, 1, 1, 1, 2, 2, 2]


def test_messages_that_are_young_are_not_renewed(sending):
    relay = sending.make_relay()
    add(sending, relay.owner)
    relay.step(time.monotonic() + CHECK_INTERVAL)
    assert [each.renewals for each in sending.outbox.waiting()] == [0]


def test_one_relay_of_a_machine_adopts(sending):
    first, second = sending.make_relay(), sending.make_relay()
    now = time.monotonic() + CHECK_INTERVAL
    first.step(now)
    add(sending, '')
    second.step(now)
    assert owners(sending) == ['']
    first.close()  # the next one takes its place
    second.step(now + CHECK_INTERVAL)
    assert owners(sending) == [second.owner]


def test_relay_without_work_does_not_use_the_database(sending, monkeypatch):
    first, second = sending.make_relay(), sending.make_relay()
    now = time.monotonic() + CHECK_INTERVAL
    first.step(now)
    second.step(now)  # it looks once
    sending.application.metadata.drop_all(sending.application.engine)
    second.step(now + CHECK_INTERVAL)
    assert not second._check_retry.has_failed
    first.step(now + CHECK_INTERVAL)
    assert first._check_retry.has_failed
    sending.application.metadata.create_all(sending.application.engine)


def test_folder_of_the_locks_that_cannot_be_used(sending, lock_folder, records):
    """Then each relay of the machine looks."""
    lock_folder.parent.rmdir()
    lock_folder.parent.touch()
    try:
        first, second = sending.make_relay(), sending.make_relay()
        now = time.monotonic() + CHECK_INTERVAL
        first.step(now)
        add(sending, '')
        second.step(now)
        assert owners(sending) == [second.owner]
        assert records() == []
    finally:
        lock_folder.parent.unlink()
        lock_folder.parent.mkdir()


def test_another_process_is_faster(sending, monkeypatch, records):
    """Two relays may look at the same time, on two machines for instance."""
    add(sending, '')
    relay = sending.make_relay()
    read = sending.storage.read_waiting

    def read_and_lose():
        waiting = read()
        assert sending.storage.adopt('', ELSEWHERE)
        return waiting

    monkeypatch.setattr(sending.storage, 'read_waiting', read_and_lose)
    relay.step(time.monotonic() + CHECK_INTERVAL)
    monkeypatch.undo()
    assert owners(sending) == [ELSEWHERE]
    assert relay._catch_ups == {}
    assert records(logging.INFO) == []


def test_order_of_adopted_messages(sending, service, tmp_path):
    """Adopted messages are older; those of the heir that were posted are not sent twice."""
    other = Service(tmp_path, 'other')
    sending.declare('messages', other.address)  # it does not run
    commit_in_fork(sending, 'a', 'b')
    sending.declare('messages', service.address)
    relay = sending.make_relay()
    add(sending, relay.owner)
    now = time.monotonic() + CHECK_INTERVAL
    with service.run():
        for number in range(3):
            relay.step(now + number * CHECK_INTERVAL)
        service.wait_for(['a', 'b', 'a'])
        wait_until(lambda: len(relay._answers) == 3)
        relay.step(now + 15)
        relay.step(now + 16)
    assert sending.count() == 0


def test_entries_of_another_application(sending, records):
    """They may be those of this one, from before it got another name; one warning says so."""
    other = sending.application.make_storage('former name')
    with sending.application.request() as request:
        other.add(ENTRY, '', request.tm, request)
    relay = sending.make_relay()
    now = time.monotonic() + CHECK_INTERVAL
    relay.step(now)
    assert records() == []
    for seconds in (OTHERS_TIME, 2 * OTHERS_TIME, 3 * OTHERS_TIME):
        relay.step(now + seconds)
    assert records() == [
        (
            'WARNING',
            "The database of the outbox has messages of other applications ('former name' has 1): "
            'if that is a former name of this one, set pyams_zmq.application to it',
        )
    ]
    other.close()


def test_entries_of_another_application_that_runs(sending, records):
    """No warning: within a minute, it has sent what was there, or something else is there."""
    relay = sending.make_relay()
    now = time.monotonic() + CHECK_INTERVAL
    relay.step(now)
    other = sending.application.make_storage('another name')
    with sending.application.request() as request:
        other.add(ENTRY, '', request.tm, request)
    relay.step(now + OTHERS_TIME)
    relay.step(now + 2 * OTHERS_TIME)
    assert records() == []
    other.close()
