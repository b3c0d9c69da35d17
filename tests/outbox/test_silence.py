# SPDX-License-Identifier: ZPL-2.1
"""Owners on other machines: which of them count as ended."""

import pytest

from pyams_zmq.outbox.silence import ORPHAN_TIME, SilenceWatch
from pyams_zmq.outbox.storage import Waiting


@pytest.fixture
def watch():
    """Watch that has seen no owner."""
    return SilenceWatch()


def waiting(owner='a:1:1', service='converter', count=1, since=5.0, renewals=0):
    """Entries that wait."""
    return Waiting(owner, service, count, since, renewals)


def test_owner_that_is_silent(watch):
    """The time begins when it is seen first, at any time of the clock of the machine."""
    entries = [waiting(), waiting(service='mail')]
    assert not watch.is_over('a:1:1', entries, 1000.0)
    assert not watch.is_over('a:1:1', entries, 1000.0 + ORPHAN_TIME - 1)
    assert watch.is_over('a:1:1', entries[::-1], 1000.0 + ORPHAN_TIME)
    assert watch.is_over('a:1:1', entries, 1000.0 + ORPHAN_TIME + 1)


@pytest.mark.parametrize(
    'change',
    [
        {'count': 2},
        {'count': 0},
        {'since': 6.0},
        {'renewals': 1},
        {'service': 'mail'},
    ],
)
def test_changes(watch, change):
    """Each change of its entries begins the time again."""
    assert not watch.is_over('a:1:1', [waiting()], 0.0)
    assert not watch.is_over('a:1:1', [waiting(**change)], ORPHAN_TIME)
    assert not watch.is_over('a:1:1', [waiting(**change)], 2 * ORPHAN_TIME - 1)
    assert watch.is_over('a:1:1', [waiting(**change)], 2 * ORPHAN_TIME)


def test_another_service(watch):
    """A further message is a change, too."""
    assert not watch.is_over('a:1:1', [waiting()], 0.0)
    assert not watch.is_over('a:1:1', [waiting(), waiting(service='mail')], ORPHAN_TIME)


def test_owners_do_not_count_for_each_other(watch):
    assert not watch.is_over('a:1:1', [waiting()], 0.0)
    assert not watch.is_over('b:1:1', [waiting('b:1:1')], 30.0)
    assert watch.is_over('a:1:1', [waiting()], ORPHAN_TIME)
    assert not watch.is_over('b:1:1', [waiting('b:1:1')], ORPHAN_TIME)
    assert watch.is_over('b:1:1', [waiting('b:1:1')], 30.0 + ORPHAN_TIME)


def test_owners_without_entries_are_forgotten(watch):
    """If they have entries again, the time begins again."""
    for owner in ('a:1:1', 'b:1:1'):
        assert not watch.is_over(owner, [waiting(owner)], 0.0)
    watch.forget_others({'b:1:1': []})
    assert not watch.is_over('a:1:1', [waiting()], ORPHAN_TIME)
    assert watch.is_over('b:1:1', [waiting('b:1:1')], ORPHAN_TIME)
    watch.forget_others([])
    assert not watch.is_over('b:1:1', [waiting('b:1:1')], 2 * ORPHAN_TIME)
