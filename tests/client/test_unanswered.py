# SPDX-License-Identifier: ZPL-2.1
"""The late messages of a connection, and the limits of what is kept of them."""

import pytest

from pyams_zmq.client import unanswered as unanswered_module
from pyams_zmq.client.problem import QueuedMessage
from pyams_zmq.client.unanswered import PATIENCE, UnansweredMessages


@pytest.fixture
def unanswered():
    """Messages of a connection, of which none was sent yet."""
    return UnansweredMessages()


def add_late(unanswered, *messages):
    """Add messages, which become late because a further one has a reply."""
    for message in (*messages, QueuedMessage('later', b'')):
        number = b'%d' % id(message)
        unanswered.add(number, message, 0.0, is_probe=False)
    assert unanswered.answer(number, 1.0)[1] is False
    assert unanswered.find_late(PATIENCE) == list(messages)


def stored(size=100):
    """Return a message that is stored elsewhere."""
    return QueuedMessage('stored', b'x' * size, on_reply=list)


def sent(size=100):
    """Return another message."""
    return QueuedMessage('sent', b'x' * size)


def test_what_is_awaited(unanswered):
    assert not unanswered.has_late_to_await
    add_late(unanswered, sent())
    assert not unanswered.has_late_to_await
    message = stored()
    add_late(unanswered, message)
    assert unanswered.has_late_to_await
    message.is_repeatable = False
    assert message.is_withdrawn
    assert not unanswered.has_late_to_await


def test_late_messages_are_taken_once(unanswered):
    """Those that are stored elsewhere; the reply to another one is still awaited."""
    kept, first, second = sent(), stored(), stored()
    add_late(unanswered, first, kept, second)
    assert unanswered.take_late() == [first, second]
    assert unanswered.take_late() == []
    assert unanswered.answer(b'%d' % id(first), 50.0) == (None, True)
    assert unanswered.answer(b'%d' % id(kept), 50.0) == (kept, True)


@pytest.mark.parametrize('leave', ['taken', 'dropped', 'answered'])
def test_data_of_messages_that_are_gone_does_not_count(unanswered, monkeypatch, leave):
    monkeypatch.setattr(unanswered_module, 'MAX_LATE', 2)
    monkeypatch.setattr(unanswered_module, 'MAX_LATE_SIZE', 250)
    first, second, third = messages = [stored() for _number in range(3)]
    add_late(unanswered, *messages[:2])
    if leave == 'taken':
        assert unanswered.take_late() == [first, second]
    elif leave == 'answered':
        assert unanswered.answer(b'%d' % id(first), 50.0) == (first, True)
    add_late(unanswered, third)
    assert unanswered.limit_late() == ([first] if leave == 'dropped' else [])
    assert not third.is_dropped
    assert not second.is_dropped
    fourth = stored(200)
    add_late(unanswered, fourth)
    unanswered.limit_late()
    assert third.is_dropped
    assert not fourth.is_dropped
