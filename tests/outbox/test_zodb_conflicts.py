# SPDX-License-Identifier: ZPL-2.1
"""The outbox in a ZODB: the trees of messages cause almost no conflict, and none is lost."""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import pytest
from BTrees.OOBTree import OOBTree
from transaction import TransactionManager
from ZODB.POSException import ConflictError

from pyams_zmq.outbox.storage import Entry
from pyams_zmq.outbox.zodb import ZODBStorage
from zodb_databases import open_file, open_zeo, run_zeo

THREADS = 8
COMMITS = 75
"""Number of commits of a thread"""

SERVICES = ('convert', 'mail')


def commit_all(db, add, thread):
    """Commit transactions of an application, again after a conflict; count these by class."""
    rnd = random.Random(thread)
    manager = TransactionManager(explicit=True)
    connection = db.open(transaction_manager=manager)
    conflicts = Counter()
    for number in range(COMMITS):
        while True:
            manager.begin()
            connection.root()['index'][rnd.random()] = number
            add(thread, number, manager)
            try:
                manager.commit()
                break
            except ConflictError as error:
                manager.abort()
                conflicts[error.class_name] += 1
    connection.close()
    return conflicts


def drain(storage, sent, end):
    """Read and settle until an event, then all that is left."""
    is_last = False
    while not is_last:
        is_last = end.wait(0.01)
        for waiting in storage.read_waiting():
            while entries := storage.read('web', waiting.service, None, 50):
                sent.update(stored.entry.data for stored in entries)
                storage.settle([stored.key for stored in entries], [])


def run(db, add, drainer):
    """Let threads commit, and one drain; return the number of conflicts by class."""
    with db.transaction() as connection:
        connection.root()['index'] = OOBTree({random.random(): 0 for _ in range(20_000)})
    end = Event()
    with ThreadPoolExecutor(THREADS + 1) as pool:
        draining = pool.submit(drainer, end)
        try:
            conflicts = sum(pool.map(partial(commit_all, db, add), range(THREADS)), Counter())
        finally:
            end.set()
        draining.result()
    return conflicts


@pytest.fixture(params=['file', 'zeo'])
def open_db(request, tmp_path):
    if request.param == 'file':
        yield partial(open_file, tmp_path / 'Data.fs')
        return
    with run_zeo(tmp_path / 'Data.fs') as address:
        yield partial(open_zeo, address)


def test_conflicts(open_db):
    """Conflicts are counted by class: only the outbox has trees with the numbers of messages.

    How many there are with and without an outbox is a test of whole applications.
    """
    sent = Counter()
    with open_db() as db:
        storage = ZODBStorage('app', db=db)

        def add(thread, number, manager):
            service = SERVICES[number % 2]
            entry = Entry(service, 'take', f'{thread}.{number}'.encode())
            storage.add(entry, 'web', manager, None)

        conflicts = run(db, add, partial(drain, storage, sent))
        assert storage.read_waiting() == []
    print(f'{THREADS * COMMITS} commits: {conflicts}')
    assert sent == Counter(f'{t}.{n}'.encode() for t in range(THREADS) for n in range(COMMITS))
    # None is usual. Without shards and batches there are more than 30.
    assert sum(conflicts[f'BTrees.LOBTree.{name}'] for name in ('LOBTree', 'LOBucket')) <= 4
