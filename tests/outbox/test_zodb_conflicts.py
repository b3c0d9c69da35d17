# SPDX-License-Identifier: ZPL-2.1
"""The outbox in a ZODB: how often transactions of requests conflict, and that none is lost."""

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
    """Commit transactions of an application, again after a conflict; return the conflicts."""
    rnd = random.Random(thread)
    manager = TransactionManager(explicit=True)
    connection = db.open(transaction_manager=manager)
    conflicts = 0
    for number in range(COMMITS):
        while True:
            manager.begin()
            connection.root()['index'][rnd.random()] = number
            add(thread, number, manager)
            try:
                manager.commit()
                break
            except ConflictError:
                manager.abort()
                conflicts += 1
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


def run(db, add, drainer=None):
    """Let threads commit, and one drain; return the number of conflicts."""
    with db.transaction() as connection:
        connection.root()['index'] = OOBTree({random.random(): 0 for _ in range(20_000)})
    end = Event()
    with ThreadPoolExecutor(THREADS + 1) as pool:
        draining = pool.submit(drainer, end) if drainer else None
        try:
            conflicts = sum(pool.map(partial(commit_all, db, add), range(THREADS)))
        finally:
            end.set()
        if draining:
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
    sent = Counter()
    with open_db() as db:
        without = run(db, lambda *args: None)
        storage = ZODBStorage('app', db=db)

        def add(thread, number, manager):
            service = SERVICES[number % 2]
            entry = Entry(service, 'take', f'{thread}.{number}'.encode())
            storage.add(entry, 'web', manager, None)

        conflicts = run(db, add, partial(drain, storage, sent))
        assert storage.read_waiting() == []
    print(f'{THREADS * COMMITS} commits: {without} conflicts without, {conflicts} with an outbox')
    assert sent == Counter(f'{t}.{n}'.encode() for t in range(THREADS) for n in range(COMMITS))
    # A list of all messages has one per commit. Most of these are those of the other tree.
    assert conflicts < without + 150
