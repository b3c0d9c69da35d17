# SPDX-License-Identifier: ZPL-2.1
"""The outbox in a ZODB: what a transaction adds, and what runs in the background."""

import os
import pickletools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from transaction import TransactionManager
from ZODB.ActivityMonitor import ActivityMonitor
from ZODB.POSException import ConflictError

from checks import TIMEOUT
from pyams_zmq.exceptions import ZMQOutboxError
from pyams_zmq.outbox import lanes, zodb
from pyams_zmq.outbox.owner import identify_process
from pyams_zmq.outbox.storage import MAX_REASON, Entry, Refusal
from pyams_zmq.outbox.zodb import ROOT_KEY, ZODBStorage
from pyams_zmq.wire.clock import time
from zodb_databases import open_file, open_zeo, run_zeo

TAKE = Entry('camera', 'take', b'["take",1]')
REFUSED = Refusal(422, 'no film')
FOREIGN = 'elsewhere:1:2'
"""An owner on another machine"""


@pytest.fixture
def db(tmp_path):
    with open_file(tmp_path / 'Data.fs') as db:
        yield db


@pytest.fixture
def storage(db):
    return ZODBStorage('app', db=db)


@contextmanager
def transaction_of(db):
    """Yield a manager whose transaction is committed at the end."""
    manager = TransactionManager(explicit=True)
    connection = db.open(transaction_manager=manager)
    try:
        with manager:
            yield manager
    finally:
        connection.close()


def add(storage, db, *entries, owner='web'):
    """Add entries in a transaction; return their keys."""
    with transaction_of(db) as manager:
        return [storage.add(entry, owner, manager, None) for entry in entries or [TAKE]]


def number(*numbers, service='camera'):
    """Return entries that have numbers as their data."""
    return [Entry(service, 'take', b'%d' % each) for each in numbers]


def read(storage, owner='web', service='camera', after=None, limit=100):
    """Return the numbers of the entries that wait."""
    return [int(each.entry.data) for each in storage.read(owner, service, after, limit)]


def lanes_of(db, application='app'):
    """Return the owners of the lanes."""
    with db.transaction() as connection:
        return [lane.owner for lane in connection.root()[ROOT_KEY][application].lanes.values()]


def messages_in(db):
    """Return how many messages are in the trees, with those that are sent."""
    with db.transaction() as connection:
        found = connection.root()[ROOT_KEY]['app'].lanes.values()
        return sum(len(tree) for lane in found for tree in lane.trees.values())


@pytest.fixture
def dead_owner():
    """Return a process that has ended."""
    code = 'from pyams_zmq.outbox.owner import identify_process; print(identify_process())'
    return subprocess.check_output([sys.executable, '-c', code], text=True).strip()


def test_empty(storage):
    assert storage.read_waiting() == []
    assert read(storage) == []
    assert storage.read_dead(10) == []
    assert storage.read_others() == {}
    storage.settle([('lane', 1)], [(('lane', 2), REFUSED)])
    assert not storage.adopt('web', 'heir')
    storage.renew('web')
    assert storage.retry(['1']) == storage.drop(['1']) == 0
    storage.close()
    assert storage.max_size == 64 * 1024


@pytest.mark.parametrize('is_remote', [False, True], ids=['file', 'zeo'])
def test_add_read_settle(is_remote, tmp_path):
    job = Entry('lab', 'develop', b'["develop",{}]', (b'raw', b''), is_job=True)
    path = tmp_path / 'Data.fs'
    with ExitStack() as stack:
        opened = open_zeo(stack.enter_context(run_zeo(path))) if is_remote else open_file(path)
        db = stack.enter_context(opened)
        storage = ZODBStorage('app')
        start = time()
        keys = add(storage, db, TAKE, job)
        keys += add(storage, db)
        assert keys == sorted(set(keys))
        camera, lab = storage.read_waiting()
        assert (camera.owner, camera.service, camera.count) == ('web', 'camera', 2)
        assert (lab.owner, lab.service, lab.count, lab.renewals) == ('web', 'lab', 1, 0)
        assert start <= camera.since <= lab.since <= time()
        [stored] = storage.read('web', 'lab', None, 10)
        assert (stored.key, stored.entry) == (keys[1], job)
        storage.settle(keys[:2], [])
        assert storage.read('web', 'lab', None, 10) == []
        [stored] = storage.read('web', 'camera', None, 10)
        assert (stored.key, stored.entry) == (keys[2], TAKE)
        [camera] = storage.read_waiting()
        assert camera.count == 1
        assert storage.read('other', 'camera', None, 10) == []


def test_read_after_a_key(storage, db):
    keys = [add(storage, db, *number(each))[0] for each in range(10)]
    assert read(storage, limit=4) == [0, 1, 2, 3]
    assert read(storage, after=keys[3]) == [4, 5, 6, 7, 8, 9]
    assert read(storage, after=keys[3], limit=2) == [4, 5]
    assert read(storage, after=keys[9]) == []
    storage.settle([keys[5]], [])
    assert read(storage, after=keys[3], limit=2) == [4, 6]


def test_threads_have_one_order(storage, db):
    """Each of the threads adds to its own tree."""
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for each in range(6):
            pool = (first, second)[each % 2]
            pool.submit(add, storage, db, *number(each)).result()
    keys = [stored.key for stored in storage.read('web', 'camera', None, 10)]
    assert keys == sorted(keys)
    assert read(storage) == [*range(6)]
    assert lanes_of(db) == ['web']
    [waiting] = storage.read_waiting()
    assert waiting.count == 6


def test_abort(storage, db):
    with transaction_of(db) as manager:
        storage.add(TAKE, 'web', manager, None)
        manager.abort()
        manager.begin()
    assert storage.read_waiting() == []


def test_savepoint(storage, db):
    zero, one, two, three = number(0, 1, 2, 3)
    with transaction_of(db) as manager:
        early = manager.savepoint()
        storage.add(three, 'web', manager, None)
        early.rollback()
        storage.add(zero, 'web', manager, None)
        late = manager.savepoint()
        storage.add(two, 'web', manager, None)
        late.rollback()
        storage.add(one, 'web', manager, None)
    assert read(storage) == [0, 1]


def test_applications_are_apart(storage, db):
    other = ZODBStorage('other', db=db)
    add(storage, db)
    [key, _] = add(other, db, TAKE, Entry('lab', 'develop', b'[]'))
    assert storage.read_others() == {'other': 2}
    assert other.read_others() == {'app': 1}
    storage.settle([key], [])
    assert len(other.read('web', 'camera', None, 10)) == 1
    other.settle([], [(key, REFUSED)])
    assert storage.read_dead(10) == []
    assert len(other.read_dead(10)) == 1
    assert storage.read_others() == {'other': 1}


def test_renewals(storage, db):
    add(storage, db)
    storage.renew('web')
    storage.renew('web')
    add(storage, db, owner='other')
    assert {each.owner: each.renewals for each in storage.read_waiting()} == {'web': 2, 'other': 0}
    storage.renew('nothing')
    assert storage.adopt('web', 'other')
    [waiting] = storage.read_waiting()
    assert (waiting.owner, waiting.count, waiting.renewals) == ('other', 2, 2)


def test_unknown_keys(storage, db):
    [key, later] = add(storage, db, *number(0, 1))
    lane, last = later
    storage.settle([(lane, last + 1), ('lane', 0)], [((lane, 99), REFUSED), (('', 0), REFUSED)])
    assert read(storage) == [0, 1]
    storage.settle([key], [])
    storage.settle([key], [(key, REFUSED)])
    assert read(storage) == [1]
    assert storage.read_dead(10) == []


def test_sent_entries_are_removed_in_batches(storage, db):
    keys = add(storage, db, *number(*range(100)))
    for key in keys[: lanes.BATCH]:
        storage.settle([key], [])
    assert messages_in(db) == 100
    storage.settle([keys[50]], [])  # not the first that waits
    assert messages_in(db) == 100 - lanes.BATCH
    assert read(storage) == [*range(30, 50), *range(51, 100)]
    storage.settle(keys, [])
    assert messages_in(db) == 1
    assert storage.read_waiting() == []
    add(storage, db, *number(100))
    assert read(storage) == [100]
    assert storage.adopt('web', 'heir')
    assert read(storage, 'heir') == [100]  # none that is sent


def test_dead_letters(storage, db):
    keys = add(storage, db, *number(0, 1, 2, 3))
    start = storage.read_waiting()[0].since
    storage.settle(keys[3:], [(keys[1], REFUSED), (keys[0], Refusal(0, 'x' * 2000))])
    storage.settle([], [(keys[2], REFUSED)])
    assert storage.read_waiting() == []
    long, short, last = storage.read_dead(10)
    assert [each.entry.data for each in (long, short, last)] == [b'0', b'1', b'2']
    assert (short.status, short.reason) == (422, 'no film')
    assert (long.status, long.reason) == (0, 'x' * MAX_REASON)
    assert start <= long.since <= last.since <= time()
    assert storage.read_dead(2) == [long, short]
    assert storage.read_dead(2, short.id) == [last]
    assert storage.read_dead(2, last.id) == []
    assert storage.drop([short.id, short.id, 'unknown']) == 1
    assert storage.read_dead(10) == [long, last]


def test_retry_of_dead_letters(storage, db):
    keys = add(storage, db, *number(0, 1, 2, 3))
    storage.settle([], [(key, REFUSED) for key in keys])
    ids = [each.id for each in storage.read_dead(10)]
    since = storage.read_dead(1)[0].since
    assert storage.retry([ids[0], 'unknown']) == 1
    assert storage.retry([ids[0], ids[1]]) == 1
    assert read(storage, '') == [0, 1]
    [waiting] = storage.read_waiting()
    assert (waiting.owner, waiting.count, waiting.since) == ('', 2, since)
    assert storage.adopt('', 'web')
    assert storage.retry(ids) == 2
    assert (read(storage), read(storage, '')) == ([0, 1], [2, 3])
    [refused] = storage.read('web', 'camera', None, 1)
    storage.settle([], [(refused.key, REFUSED)])
    assert [each.entry.data for each in storage.read_dead(10)] == [b'0']
    assert (read(storage), read(storage, '')) == ([1], [2, 3])


def test_adoption(storage, db):
    first, second = ZODBStorage('app', db=db), ZODBStorage('app', db=db)
    sent, *keys = add(storage, db, *number(0, 1, 2))
    storage.settle([sent], [])
    add(first, db, *number(3), owner='heir')
    assert first.adopt('web', 'heir')
    assert not second.adopt('web', 'other')
    assert read(first, 'heir') == [1, 2, 3]
    assert read(first, 'heir', after=keys[0]) == [2, 3]
    assert read(storage) == []
    # It lives, after all.
    add(storage, db, *number(4))
    assert read(storage) == [4]
    assert lanes_of(db) == ['heir', 'heir', 'web']
    first.settle(keys, [])  # which drops the lane, but not that of the process
    assert lanes_of(db) == ['heir', 'web']
    assert read(first, 'heir') == [3]


def test_adoption_of_what_was_sent(storage, db):
    """The lane is dropped, and the owner makes it again."""
    storage.settle(add(storage, db), [])
    assert not ZODBStorage('app', db=db).adopt('web', 'heir')
    assert lanes_of(db) == []
    add(storage, db, *number(1))
    assert read(storage) == [1]


@pytest.mark.parametrize('is_sent', [False, True], ids=['adopted', 'dropped'])
def test_entry_is_added_while_its_lane_is_adopted(storage, db, is_sent):
    keys = add(storage, db, *number(0))
    if is_sent:
        storage.settle(keys, [])
    with transaction_of(db) as manager:
        storage.add(TAKE, 'web', manager, None)
        assert storage.adopt('web', 'heir') != is_sent
        with pytest.raises(ConflictError):
            manager.commit()
        manager.abort()
        manager.begin()
    add(storage, db, *number(1))
    assert read(storage) == [1]
    assert read(storage, 'heir') == ([] if is_sent else [0])


def test_entry_is_added_while_others_are_settled(storage, db):
    keys = add(storage, db, *number(*range(lanes.BATCH + 1)))
    with transaction_of(db) as manager:
        storage.add(*number(100), 'web', manager, None)
        storage.settle(keys, [])
        storage.renew('web')
    assert read(storage) == [100]
    assert messages_in(db) == 2


def test_lanes_of_dead_processes_are_dropped(storage, db, dead_owner, monkeypatch):
    for owner in (dead_owner, 'dead', identify_process(), FOREIGN):
        storage.settle(add(storage, db, owner=owner), [])
    add(storage, db, owner=f'{dead_owner}0')  # it waits
    old = ZODBStorage('app', db=db)
    old.settle([], [])
    assert lanes_of(db) == [identify_process(), FOREIGN, f'{dead_owner}0']
    monkeypatch.setattr(zodb, 'time', lambda: time() + zodb.IDLE + 1)
    old.settle([], [])  # only the first time
    assert len(lanes_of(db)) == 3
    ZODBStorage('app', db=db).settle([], [])
    assert lanes_of(db) == [identify_process(), f'{dead_owner}0']


def test_conflict_with_a_removal(storage, db, monkeypatch):
    """The removal waits for the next call, so that what is sent is marked at once."""
    keys = add(storage, db, *number(*range(lanes.BATCH + 2)))
    remove_sent = lanes.Lane.remove_sent

    def remove(lane):
        remove_sent(lane)
        with db.transaction() as connection:
            [lane] = connection.root()[ROOT_KEY]['app'].lanes.values()
            del lane.trees['camera', 0][keys[0][1]]

    monkeypatch.setattr(lanes.Lane, 'remove_sent', remove)
    storage.settle(keys[1:], [])
    assert storage.read_waiting() == []
    assert messages_in(db) == lanes.BATCH + 1


def test_conflicts_without_end(storage, db, monkeypatch):
    add(storage, db)
    has_waiting = lanes.Lane.has_waiting
    attempts = []

    def conflict(lane):
        attempts.append(lane)
        with db.transaction() as connection:
            [other] = connection.root()[ROOT_KEY]['app'].lanes.values()
            other.progress.renewals += 1
        return has_waiting(lane)

    monkeypatch.setattr(lanes.Lane, 'has_waiting', conflict)
    with pytest.raises(ConflictError):
        storage.renew('web')
    assert len(attempts) == zodb.ATTEMPTS
    monkeypatch.undo()
    assert storage.read_waiting()[0].renewals == zodb.ATTEMPTS


def test_waiting_entries_are_counted_without_loading_them(storage, db):
    storage.settle(add(storage, db, *number(*range(20))), [])
    add(storage, db, *number(*range(1000)))
    db.cacheMinimize()
    monitor = ActivityMonitor()
    db.setActivityMonitor(monitor)
    [waiting] = storage.read_waiting()
    assert waiting.count == 1000
    [(_, loads, _)] = monitor.log
    assert 30 < loads < 60  # the buckets, with 30 entries each


def test_database_contains_plain_data(storage, db):
    keys = add(storage, db, TAKE, Entry('lab', 'develop', b'[]', (b'raw',), is_job=True))
    storage.settle(keys[:1], [(keys[1], REFUSED)])
    found = set()
    for transaction in db.storage.iterator():
        for record in transaction:
            names = []
            for code, value, _ in pickletools.genops(record.data + b''):
                if code.name == 'GLOBAL':
                    names.append(value.replace(' ', '.'))
            found |= {*names}
    own = {f'pyams_zmq.outbox.lanes.{name}' for name in 'Application Lane Progress Message'.split()}
    assert found == {
        'persistent.mapping.PersistentMapping',
        'BTrees.OOBTree.OOBTree',
        'BTrees.LOBTree.LOBTree',
        'pyams_zmq.outbox.lanes.DeadMessage',
        *own,
    }


def test_database_is_not_known(db):
    storage = ZODBStorage('app')
    with pytest.raises(ZMQOutboxError, match='give it as the argument "db"'):
        storage.read_waiting()
    add(storage, db)
    assert len(storage.read_waiting()) == 1


def test_callable_that_returns_the_database(db):
    found = []
    storage = ZODBStorage('app', db=lambda: found[0] if found else None)
    with pytest.raises(ZMQOutboxError, match='not known'):
        storage.read_waiting()
    found.append(db)
    assert storage.read_waiting() == []


def test_name_of_a_database_of_the_background(tmp_path):
    databases = {}
    with (
        open_file(tmp_path / 'main', database_name='main', databases=databases) as main,
        open_file(tmp_path / 'mail', database_name='mail', databases=databases) as mail,
    ):
        add(ZODBStorage('app', db=mail), mail)
        storage = ZODBStorage('app', db=main, database='mail')
        assert len(storage.read_waiting()) == 1
        add(storage, main)
        assert storage.read_waiting()[0].count == 2
        storage = ZODBStorage('app', db=main, database='other')
        with pytest.raises(ZMQOutboxError, match="'other' .*not one of 'main', 'mail': correct"):
            storage.read_waiting()


def test_fork_uses_its_own_database_only(tmp_path):
    with run_zeo(tmp_path / 'Data.fs') as address, open_zeo(address) as db:
        storages = [
            ZODBStorage('app'),
            ZODBStorage('app', db=db),
            ZODBStorage('app', db=lambda: db),
        ]
        for storage in storages:
            add(storage, db)
        pid = os.fork()
        if not pid:
            os._exit(check_in_fork(storages, address))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert sorted((each.owner, each.count) for each in storage.read_waiting()) == [
            ('fork', 3),
            ('web', 3),
        ]


def check_in_fork(storages, address):
    """Return 0 if storages refuse the database of the parent, and use that of this process."""
    try:
        for storage in storages:
            with pytest.raises(ZMQOutboxError, match=f'by process {os.getppid()}.* a fork'):
                storage.read_waiting()
        with open_zeo(address) as db:
            for storage in storages:
                add(storage, db, owner='fork')
                assert len(storage.read_waiting()) == 2
    except BaseException as error:
        print(error, file=sys.stderr)
        raise
    return 0


def test_without_zodb():
    code = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == 'BTrees':
            raise ImportError(f'No module named {name!r}')

sys.meta_path.insert(0, Finder())
try:
    import pyams_zmq.outbox.zodb
except ImportError as error:
    print(error)
"""
    output = subprocess.check_output([sys.executable, '-c', code], text=True, timeout=TIMEOUT)
    assert output == "An outbox in a ZODB needs the package ZODB: No module named 'BTrees'\n"
