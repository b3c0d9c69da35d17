# SPDX-License-Identifier: ZPL-2.1
"""Which entries are read from the storage, and when."""

from math import inf

import pytest

from pyams_zmq.outbox.catch_up import MAX_PAUSE, PAUSE, CatchUp


@pytest.fixture
def catch_up():
    """Entries of a service, of which all were posted so far."""
    return CatchUp()


def test_all_were_posted(catch_up):
    assert not catch_up.is_behind
    assert catch_up.after is None


def test_missed_entries(catch_up):
    """They are read at once, from the first one on, until there are no more."""
    catch_up.miss(1)
    catch_up.miss(2)
    assert catch_up.is_behind
    assert catch_up.reads_at == -inf
    misses = catch_up.misses
    catch_up.pass_by(1)
    assert catch_up.after == 1
    catch_up.pass_by(2)
    catch_up.finish(misses)
    assert not catch_up.is_behind
    assert catch_up.after is None


def test_entry_that_is_missed_while_others_are_read(catch_up):
    """It is read with the next page."""
    catch_up.miss(1)
    misses = catch_up.misses
    catch_up.pass_by(1)
    catch_up.miss(2)
    catch_up.finish(misses)
    assert catch_up.is_behind
    assert catch_up.after == 1
    catch_up.finish(catch_up.misses)
    assert not catch_up.is_behind


@pytest.mark.parametrize('key', [1, 3, None])
def test_entry_that_comes_before_the_last_one(catch_up, key):
    """Its transaction was committed later, or it was given back: all are read again."""
    catch_up.miss(2)
    catch_up.pass_by(3)
    catch_up.miss(key)
    assert catch_up.is_behind
    assert catch_up.after is None


def test_entry_that_was_given_back(catch_up):
    """It is read later, unless others are read before."""
    catch_up.miss(reads_at=7.0)
    assert (catch_up.is_behind, catch_up.reads_at) == (True, 7.0)
    catch_up.miss(reads_at=9.0)
    assert catch_up.reads_at == 7.0
    catch_up.finish(catch_up.misses)
    catch_up.miss(1)
    assert catch_up.reads_at == -inf


def test_pauses(catch_up):
    """They grow while the client takes no more entries, and begin again when it takes one."""
    catch_up.miss(1)
    pauses = []
    for now in range(0, 80, 10):
        catch_up.wait(now)
        pauses.append(catch_up.reads_at - now)
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])
    assert (pauses[0], pauses[-1]) == (PAUSE, MAX_PAUSE)
    catch_up.pass_by(1)
    catch_up.wait(100)
    assert catch_up.reads_at == pytest.approx(100 + PAUSE)


def test_storage_that_cannot_be_read(catch_up):
    catch_up.miss(1)
    catch_up.postpone(42.0)
    assert (catch_up.is_behind, catch_up.reads_at) == (True, 42.0)


def test_problems(catch_up):
    """One is new until entries can be posted."""
    assert catch_up.note_problem('closed')
    assert not catch_up.note_problem('closed')
    assert catch_up.note_problem('no descriptor')
    assert catch_up.note_problem('closed')
    assert not catch_up.note_problem(None)
    assert not catch_up.note_problem(None)
    assert catch_up.note_problem('closed')
