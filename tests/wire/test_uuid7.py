# SPDX-License-Identifier: ZPL-2.1
"""Ids that sort by time."""

import os
import threading
import time
from uuid import RFC_4122, UUID

from pyams_zmq.wire import uuid7
from pyams_zmq.wire.uuid7 import make_uuid7


def milliseconds_of(text):
    return UUID(text).int >> 80


def test_fields():
    """As RFC 9562, section 5.7."""
    before = time.time_ns() // 1_000_000
    text = make_uuid7()
    assert len(text) == 36
    assert (UUID(text).version, UUID(text).variant) == (7, RFC_4122)
    assert before <= milliseconds_of(text) <= time.time_ns() // 1_000_000 + 1


def test_order():
    ids = [make_uuid7() for _number in range(20_000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert milliseconds_of(ids[-1]) - time.time_ns() // 1_000_000 < 100  # not far ahead


def test_threads():
    found = []

    def make():
        found.append([make_uuid7() for _number in range(2000)])

    threads = [threading.Thread(target=make) for _number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ids == sorted(ids) for ids in found)
    assert len(set().union(*found)) == 8000


def test_clock_that_is_set_back(monkeypatch):
    first = make_uuid7()
    monkeypatch.setattr(uuid7, 'time', lambda: time.time() - 3600)
    ids = [first, *(make_uuid7() for _number in range(100))]
    assert ids == sorted(ids)


def test_random_numbers_that_are_used_up(monkeypatch):
    """The largest id of a millisecond is followed by one of the next."""
    monkeypatch.setattr(uuid7, 'time', lambda: 1e9)
    monkeypatch.setattr(uuid7, '_random', lambda bits: (1 << bits) - 1)
    generator = uuid7._Generator()
    first, second = generator.make(), generator.make()
    assert str(first) == '00e8d4a5-1000-7fff-bfff-ffffffffffff'
    assert (second.version, second.variant) == (7, RFC_4122)
    assert milliseconds_of(str(second)) == milliseconds_of(str(first)) + 1


def test_fork():
    """A child does not repeat the ids of its parent, and does not wait for its lock."""
    make_uuid7()
    with uuid7._generator.get()._lock:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, make_uuid7().encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        child = pipe.read()
    os.waitpid(pid, 0)
    assert UUID(child).version == 7
    assert child != make_uuid7()
