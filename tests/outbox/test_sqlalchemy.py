# SPDX-License-Identifier: ZPL-2.1
"""The entries of an outbox in a database: how they are read, settled and adopted."""

import threading
from hashlib import sha256

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError

from checks import TIMEOUT
from databases import ENTRY
from pyams_zmq.outbox.storage import MAX_REASON, DeadLetter, Entry, Refusal, StoredEntry, Waiting
from pyams_zmq.wire.clock import time

OTHER = Entry('archive', 'store', b'["store", 2]')
REFUSAL = Refusal(404, 'unknown')


def test_entry_is_stored_as_it_is(application):
    entries = [
        Entry('converter', 'convert', b'["convert", "\xc3\xa9"]', (b'', b'\0\xff' * 9), True),
        Entry('converter', 'h\xe9 \U0001f600' * 999, b'{}'),
    ]
    keys = application.add(*entries)
    assert application.storage.read('owner', 'converter', None, 9) == [
        StoredEntry(key, entry) for key, entry in zip(keys, entries, strict=True)
    ]


def test_large_entry(application):
    entry = Entry('converter', 'convert', b'x' * 2**22, (b'\0' * 2**22,))
    application.add(entry)
    [stored] = application.storage.read('owner', 'converter', None, 1)
    assert stored.entry == entry
    assert entry.size < application.storage.max_size


def test_read_is_in_order_and_limited(application):
    keys = application.add(ENTRY, OTHER, ENTRY, ENTRY)
    application.add(ENTRY, owner='other')
    assert all(isinstance(key, int) for key in keys)
    assert keys == sorted(set(keys))
    assert application.keys() == [keys[0], *keys[2:]]

    def read(after, limit):
        return [each.key for each in application.storage.read('owner', 'converter', after, limit)]

    assert read(None, 2) == [keys[0], keys[2]]
    assert read(keys[0], 9) == keys[2:]
    assert read(keys[3], 9) == []


def test_key_is_not_used_again(application):
    [first] = application.add(ENTRY)
    application.storage.settle([first], [])
    [second] = application.add(ENTRY)
    assert second > first


def test_waiting(application):
    start = time()
    assert application.storage.read_waiting() == []
    application.add(ENTRY, ENTRY, OTHER)
    middle = time()
    application.add(ENTRY, owner='')
    end = time()
    found = sorted(application.storage.read_waiting(), key=lambda each: (each.owner, each.service))
    assert found == [
        Waiting('', 'converter', 1, found[0].since, 0),
        Waiting('owner', 'archive', 1, found[1].since, 0),
        Waiting('owner', 'converter', 2, found[2].since, 0),
    ]
    assert start <= found[2].since <= middle <= found[0].since <= end


def test_settle(application):
    keys = application.add(*[ENTRY] * 5)
    application.storage.settle(keys[:2], [(keys[2], REFUSAL), (keys[3], Refusal(0, ''))])
    assert application.keys() == keys[4:]
    assert [each.id for each in application.storage.read_dead(9)] == [str(keys[2]), str(keys[3])]
    application.storage.settle([], [])
    application.storage.settle([keys[0], 10**9], [(keys[0], REFUSAL), (10**9, REFUSAL)])
    assert application.keys() == keys[4:]


def test_entry_that_another_process_has_sent_is_not_a_dead_letter(application):
    """A process that was taken for dead sends what its heir sends, too."""
    [key] = application.add(ENTRY)
    application.storage.settle([], [(key, REFUSAL)])
    application.storage.settle([], [(key, Refusal(500, 'later'))])
    assert [each.reason for each in application.storage.read_dead(9)] == ['unknown']
    application.storage.settle([key], [])
    assert application.storage.read_dead(9) == []


def test_many_keys(application):
    """A statement has a limited number of parameters."""
    keys = application.add(*[ENTRY] * 1201)
    application.storage.settle(keys[:1200], [])
    assert application.keys() == keys[1200:]


def test_renewals(application):
    application.add(ENTRY, ENTRY, OTHER)
    application.add(ENTRY, owner='other')

    def renewals():
        return {
            (each.owner, each.service): each.renewals for each in application.storage.read_waiting()
        }

    application.storage.renew('owner')
    application.storage.renew('unknown')
    expected = {('owner', 'converter'): 1, ('owner', 'archive'): 1, ('other', 'converter'): 0}
    assert renewals() == expected
    application.storage.renew('owner')
    assert renewals()['owner', 'converter'] == 2


def test_adopt(application):
    keys = application.add(ENTRY, OTHER, ENTRY, ENTRY)
    application.storage.settle([], [(keys[0], REFUSAL)])
    assert application.storage.adopt('owner', 'heir')
    assert application.keys() == []
    assert application.keys('heir') == keys[2:]
    assert not application.storage.adopt('owner', 'heir')


def test_adopt_entries_whose_oldest_one_another_process_adopts(postgresql_application):
    application = postgresql_application
    table = application.storage.table
    keys = application.add(ENTRY, ENTRY)
    with application.engine.connect() as connection:
        oldest = select(table).order_by(table.c.n).limit(1).with_for_update()
        assert connection.execute(oldest).first().n == keys[0]
        assert not application.storage.adopt('owner', 'heir')
        connection.execute(update(table).values(owner='other'))
        assert not application.storage.adopt('owner', 'heir')
        connection.commit()
    assert not application.storage.adopt('owner', 'heir')
    assert application.keys('other') == keys


def test_entries_are_not_divided_between_heirs(postgresql_application):
    application = postgresql_application
    rounds = 40
    heirs = {name: application.make_storage(engine=application.engine) for name in 'ab'}
    barrier = threading.Barrier(3)
    results = {}

    def adopt(heir):
        for number in range(rounds):
            barrier.wait(TIMEOUT)
            results[heir, number] = heirs[heir].adopt(f'dead {number}', heir)
            barrier.wait(TIMEOUT)

    threads = [threading.Thread(target=adopt, args=(heir,)) for heir in heirs]
    for thread in threads:
        thread.start()
    for number in range(rounds):
        keys = application.add(*[ENTRY] * 20, owner=f'dead {number}')
        barrier.wait(TIMEOUT)
        barrier.wait(TIMEOUT)
        [heir] = [heir for heir in heirs if results[heir, number]]
        assert application.keys(heir) == keys
        application.storage.settle(keys, [])
    for thread in threads:
        thread.join()


def test_dead_letters(application):
    entry = Entry('converter', 'convert', b'{}', (b'frame',), True)
    before = time()
    ids = application.bury(ENTRY, entry, OTHER, refusal=REFUSAL)
    first, second, third = application.storage.read_dead(9)
    assert second == DeadLetter(ids[1], entry, 404, 'unknown', second.since)
    assert before <= first.since <= second.since <= time()
    assert (first.entry, third.entry) == (ENTRY, OTHER)
    assert application.storage.read_dead(1) == [first]
    assert application.storage.read_dead(9, ids[0]) == [second, third]
    assert application.storage.read_dead(9, ids[2]) == []
    assert application.storage.read_dead(9, 'unknown') == [first, second, third]


@pytest.mark.parametrize(
    ('refusal', 'status', 'reason'),
    [
        (Refusal(500, '\xe9' * 2 * MAX_REASON), 500, '\xe9' * MAX_REASON),
        (Refusal(500, 'nul \0 and \ud800'), 500, 'nul \ufffd and ?'),
        (Refusal(10**12, ''), 2**31 - 1, ''),
        (Refusal(-(10**12), ''), 1 - 2**31, ''),
    ],
    ids=['long', 'not a text', 'large status', 'negative status'],
)
def test_strange_refusal(application, refusal, status, reason):
    """It would otherwise be read from the service again and again."""
    application.bury(ENTRY, refusal=refusal)
    [letter] = application.storage.read_dead(9)
    assert (letter.status, letter.reason) == (status, reason)


def test_retry(application):
    ids = application.bury(ENTRY, ENTRY, refusal=REFUSAL)
    [since, _] = [each.since for each in application.storage.read_dead(9)]
    [waiting] = map(str, application.add(ENTRY))
    assert application.storage.retry([ids[0], ids[0], waiting]) == 1
    assert application.keys('') == [int(ids[0])]
    assert Waiting('', 'converter', 1, since, 0) in application.storage.read_waiting()
    assert [each.id for each in application.storage.read_dead(9)] == ids[1:]
    with application.engine.connect() as connection:
        table = application.storage.table
        row = connection.execute(select(table).where(table.c.n == int(ids[0]))).one()
    assert (row.status, row.reason) == (None, None)


def test_drop(application):
    ids = application.bury(ENTRY, ENTRY, refusal=REFUSAL)
    [waiting] = application.add(ENTRY)
    assert application.storage.drop([ids[0], str(waiting)]) == 1
    assert [each.id for each in application.storage.read_dead(9)] == ids[1:]
    assert application.keys() == [waiting]


@pytest.mark.parametrize('change', ['retry', 'drop'])
def test_unknown_ids(application, change):
    [known] = application.bury(ENTRY, refusal=REFUSAL)
    change = getattr(application.storage, change)
    unknown = ['', 'x', '-1', '1.0', f'0{known}', f' {known}', '\u0661', '9' * 18, '9' * 9999]
    assert change(unknown) == change([]) == 0
    assert change([*unknown, known]) == 1


def test_other_applications(application):
    other = application.make_storage('other', engine=application.engine)
    [key] = application.add(ENTRY)
    [letter] = application.bury(ENTRY, refusal=REFUSAL)
    assert other.read_waiting() == other.read_dead(9) == []
    assert application.keys(storage=other) == []
    assert other.retry([letter]) == other.drop([letter]) == 0
    assert not other.adopt('owner', 'heir')
    other.renew('owner')
    other.settle([key], [(key, REFUSAL)])
    assert other.read_others() == {'app': 1}
    application.add(ENTRY, ENTRY, storage=other)
    assert application.storage.read_others() == {'other': 2}
    [waiting] = application.storage.read_waiting()
    assert (waiting.owner, waiting.count, waiting.renewals) == ('owner', 1, 0)


def test_long_name_of_an_application(application):
    names = ['\xe9' * 200, '\xe9' * 201]
    for name in names:
        storage = application.make_storage(name, engine=application.engine)
        keys = application.add(ENTRY, storage=storage)
        assert application.keys(storage=storage) == keys
    assert set(application.storage.read_others()) == {
        names[0],
        sha256(names[1].encode()).hexdigest(),
    }


def test_clean_shutdown_is_not_needed(postgresql, postgresql_application):
    """What was committed is there after a crash; the first use finds the connection closed."""
    application = postgresql_application
    keys = application.add(ENTRY)
    assert application.keys() == keys
    postgresql.stop('immediate')
    postgresql.start()
    with pytest.raises(OperationalError, match='terminating connection|closed'):
        application.keys()
    assert application.keys() == keys
    with application.engine.connect() as connection:
        connection.execute(text('SELECT 1'))
