# SPDX-License-Identifier: ZPL-2.1
"""The locks by which one application of several has an address."""

import errno
import os
import shutil
from itertools import product

import pytest

from locks import locks_of
from pyams_zmq.exceptions import ZMQBindError
from pyams_zmq.process.address_lock import AddressLock
from pyams_zmq.wire.endpoint import Endpoint


def test_address_lock(address, lock_folder):
    """Others can read whose the address is, while that application has it."""
    first, same, other = locks_of(address, *'ααβ')
    client, other_client = locks_of(address, *'αβ')
    assert first.find_other_owner() is None
    assert first.acquire()
    assert first.acquire()
    assert not same.acquire()
    assert not other.acquire()
    assert (client.find_other_owner(), same.find_other_owner()) == (None, None)
    owner = f'application α, process {os.getpid()}'
    assert other.find_other_owner() == other_client.find_other_owner() == owner
    assert client.find_other_owner() is None  # from its memory
    first.release()
    assert other_client.find_other_owner() is None
    assert other.acquire()
    assert other.find_other_owner() is None
    assert client.find_other_owner() == f'application β, process {os.getpid()}'
    for path in lock_folder.glob('*.lock'):
        path.unlink()  # a cleaner of temporary files
    assert client.find_other_owner() is None
    other.release()


ADDRESSES = [
    '127.0.0.1:1',
    '127.0.0.1:0',
    '127.0.0.2:1',
    '127.0.0.1:2',
    '*:1',
    '[::1]:1',
    '[0:0::1]:1',
    '[::]:1',
    '[::ffff:127.0.0.1]:1',
    'ipc:///tmp/one',
    'ipc:///tmp/../tmp/one',
    'ipc:///tmp/two',
    'ipc://@one',
]


@pytest.mark.usefixtures('lock_folder')
def test_addresses_that_overlap():
    """Two applications can have the addresses that can be bound at the same time."""
    count = 0
    for one, two in product(ADDRESSES, repeat=2):
        overlap = Endpoint.parse(one, bind=True).overlaps(Endpoint.parse(two, bind=True))
        [first], [second] = locks_of(one, 'α'), locks_of(two, 'β')
        assert first.acquire()
        assert second.acquire() is not overlap, (one, two)
        owner = f'application α, process {os.getpid()}' if overlap else None
        assert second.find_other_owner() == owner, (one, two)
        first.release()
        assert second.acquire()
        second.release()
        count += overlap
    assert len(ADDRESSES) < count < len(ADDRESSES) ** 2 / 2


@pytest.mark.usefixtures('lock_folder')
def test_two_addresses_of_a_process():
    endpoints = [Endpoint.parse(text, bind=True) for text in ('127.0.0.1:1', '127.0.0.1:2')]
    pool = AddressLock(endpoints, 'α', 'application α')
    [other] = locks_of('*:2', 'β')
    assert other.acquire()
    assert not pool.acquire()
    [free] = locks_of('127.0.0.1:1', 'β')
    assert free.acquire()  # the pool takes all or nothing
    free.release()
    other.release()
    assert pool.acquire()
    assert not other.acquire()
    pool.release()


@pytest.mark.usefixtures('lock_folder')
@pytest.mark.parametrize('server', ['127.0.0.1:1', '*:1', '[::]:1'])
def test_address_that_another_program_uses(server):
    """Clients of the application do not call that program, until a process could bind it."""
    [lock] = locks_of(server, 'α')
    [client] = locks_of('[::1]:1' if server == '[::]:1' else '127.0.0.1:1', 'α')
    assert lock.acquire()
    assert client.find_other_owner() is None
    lock.note_use(True)
    assert client.find_other_owner() == 'an unknown program'
    assert lock.acquire()
    assert client.find_other_owner() == 'an unknown program'
    lock.note_use(False)
    assert client.find_other_owner() is None
    lock.note_use(True)
    lock.release()
    assert client.find_other_owner() is None
    lock.note_use(True)  # no effect without the lock
    assert lock.acquire()
    assert client.find_other_owner() is None
    lock.release()
    uri = Endpoint.parse(server, bind=True).uri
    assert lock.is_in_use(ZMQBindError(errno.EADDRINUSE, 'in use', uri))
    for error in (
        ZMQBindError(errno.EADDRINUSE, 'in use', 'tcp://127.0.0.1:3'),
        ZMQBindError(errno.EACCES, 'not allowed', uri),
        RuntimeError('fails'),
        None,
    ):
        assert not lock.is_in_use(error)


def test_folder_of_addresses_is_lost(address, lock_folder, caplog):
    """The service runs without that protection, which is logged once."""
    [own] = locks_of(address, 'α')
    [client] = locks_of(address, 'β')
    assert own.acquire()
    own.note_use(True)
    shutil.rmtree(lock_folder)
    lock_folder.write_text('')
    assert own.acquire()
    assert own.acquire()
    [record] = caplog.records
    assert 'addresses of application α cannot be locked: another' in record.getMessage()
    assert client.find_other_owner() is None
    lock_folder.unlink()
    assert own.acquire()
    assert client.find_other_owner() == f'application α, process {os.getpid()}'  # with its note
    own.release()
