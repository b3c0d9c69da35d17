# SPDX-License-Identifier: ZPL-2.1
"""A name that a socket reserves."""

import pytest

from checks import TIMEOUT
from pyams_zmq.process import socket_lock
from pyams_zmq.process.socket_lock import SocketLock
from users import NOBODY, needs_root, run_as

SQUATTER = """
import os, socket, sys, time
os.setuid(65534)
name = bytes.fromhex(sys.argv[1])
holders = [socket.socket(socket.AF_UNIX)]
holders[0].bind(name)
if sys.argv[2] == 'listens':
    holders[0].listen()
print('1', flush=True)
time.sleep(60)  # until the test kills this program
"""


@needs_root
@pytest.mark.parametrize('mode', ['listens', 'does not listen'])
def test_name_that_another_user_has(lock, run_program, mode):
    """It cannot keep a service from starting."""
    own = SocketLock(lock)
    program = run_program('-c', SQUATTER, own._address.hex(), mode)
    assert program.read(TIMEOUT) == 1
    assert own.acquire()
    program.end()
    other = SocketLock(lock)
    assert own.acquire()
    assert not other.acquire()
    own.release()
    other.release()


def test_name_is_asked_for_again_and_again(lock, monkeypatch):
    """The questions of standbys do not pile up between two looks of the holder."""
    monkeypatch.setattr(socket_lock, '_BACKLOG', 2)
    own, other = SocketLock(lock), SocketLock(lock)
    for _number in range(3):
        assert own.acquire()
        for _question in range(10):
            assert not other.acquire()
    assert not other._has_warned
    own.release()
    assert other.acquire()
    own.release()
    other.release()


def test_too_many_standbys(lock, monkeypatch, caplog):
    """The name is not taken while it cannot be known whose it is, which is logged once."""
    monkeypatch.setattr(socket_lock, '_BACKLOG', 1)
    own, *others = (SocketLock(lock) for _number in range(6))
    assert own.acquire()
    for _question in range(2):
        assert not any(other.acquire() for other in others)
    assert 0 < len(caplog.records) == sum(other._has_warned for other in others) < len(others)
    assert 'A lock counts as held' in caplog.text
    assert own.acquire()
    own.release()
    assert sum([other.acquire() for other in others]) == 1
    for other in others:
        other.release()


def test_holder_dies(lock):
    """The connection of a standby that it has not accepted ends, too."""
    own, other = SocketLock(lock), SocketLock(lock)
    assert own.acquire()
    assert not other.acquire()
    own.close()
    assert other.acquire()
    other.release()


def test_holder_with_a_fork_stops(lock):
    """Its socket, which the fork has inherited without hooks, does not keep the standbys."""
    own, other = SocketLock(lock), SocketLock(lock)
    assert own.acquire()
    assert not other.acquire()
    with own._socket.dup():
        own.release()
        assert other.acquire()
    other.release()


@needs_root
def test_user_with_a_high_number(lock):
    """The number of a user has 32 bits without a sign."""

    def use_it():
        own, other = SocketLock(lock), SocketLock(lock)
        assert own.acquire()
        assert not other.acquire()
        own.release()
        other.release()

    run_as(3_000_000_000, NOBODY, use_it)


def test_name_in_a_fork_without_hooks(lock):
    """The process id is compared."""
    own = SocketLock(lock)
    assert own.acquire()
    own._pid += 1
    own.release()
    assert own.acquire()
    own.release()
