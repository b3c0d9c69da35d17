# SPDX-License-Identifier: ZPL-2.1
"""A message that is stored elsewhere gets one reply, or is given back once, in any course."""

import time

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import wait_until
from pyams_zmq.client import send_queue as send_queue_module
from pyams_zmq.client import unanswered as unanswered_module
from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.client.problem import QueuedMessage
from pyams_zmq.client.send_queue import SendQueue
from pyams_zmq.wire.message import DRAINING_REPLY
from scripted_service import GOOD, OVERLOADED, ScriptedService, StoredMessages

REPLIES = [
    GOOD,
    OVERLOADED,
    DRAINING_REPLY,
    b'[500, null]',
    b'[507, null]',
    b'{',
    b'[200, {"id": "a"}]',
]


class Course:
    """A queue and its service, whose steps a test does one after the other.

    :ivar now: the time of the queue, which a test moves
    """

    def __init__(self, context):
        self.service = ScriptedService(context)
        self.queue = SendQueue(ServiceAddress.parse(self.service.address, None, None))
        self.stored = StoredMessages(self.queue.add)
        self.now = time.monotonic()
        self._number = 0
        self._unanswered = []

    def offer(self, is_job, size):
        """Add a message that is stored elsewhere."""
        self._number += 1
        self.stored.offer(self._number, is_job=is_job, text='x' * size)

    def send(self):
        """Add another message."""
        self.queue.add(QueuedMessage('note', b'["note", 0]'))

    def step(self, seconds):
        """Let the queue do what is due now, and after some seconds."""
        for _turn in range(2):
            self.queue.step(self.now)
            wait_until(self._is_settled)
            self.now += seconds / 2

    def _is_settled(self):
        """Return True if the queue is connected; let it connect and read what has arrived."""
        if not self.queue.is_connected:
            self.now += 0.1
        self.queue.step(self.now)
        while self.service.socket.poll(0):
            self._unanswered.append(self.service.receive())
        return self.queue.is_connected

    def reply(self, index, reply):
        """Answer one of the messages that the service has received."""
        if self._unanswered:
            message = self._unanswered.pop(index % len(self._unanswered))
            self.service.reply(message, reply)
            self.queue._socket.poll(100)  # it is not there any more if the connection was lost
            self.queue.step(self.now)

    def restart(self):
        """Let the service end, and another one begin."""
        wait_until(self._is_settled)
        self._unanswered.clear()
        socket = self.queue._socket
        self.service.restart()
        wait_until(lambda: self._has_left(socket))

    def _has_left(self, socket):
        self.queue.step(self.now)
        return self.queue._socket is not socket

    def withdraw(self):
        """End the outbox."""
        self.queue.withdraw()
        assert all(message.on_reply is None for message in self.queue._unsent)

    def fail(self):
        """Terminate the context."""
        self.queue.fail(LookupError())
        self._unanswered.clear()


ACTIONS = st.one_of(
    st.tuples(st.just('offer'), st.booleans(), st.sampled_from([0, 300])),
    st.tuples(st.just('offer'), st.booleans(), st.sampled_from([0, 300])),
    st.tuples(st.just('send')),
    st.tuples(st.just('step'), st.sampled_from([0.0, 1.0, 40.0])),
    st.tuples(st.just('reply'), st.integers(0, 10), st.sampled_from(REPLIES)),
    st.tuples(st.just('reply'), st.integers(0, 10), st.sampled_from(REPLIES)),
    st.sampled_from([('restart',), ('withdraw',), ('fail',)]),
)


@settings(max_examples=100)
@given(st.lists(ACTIONS, max_size=25), st.sampled_from(['restart', 'fail']))
def test_each_reply_once(actions, end):
    """The limits are low here."""
    with pytest.MonkeyPatch.context() as patch, zmq.Context() as context:
        patch.setattr(unanswered_module, 'MAX_LATE', 2)
        patch.setattr(unanswered_module, 'MAX_LATE_SIZE', 500)
        patch.setattr(unanswered_module, 'WINDOW_SIZE', 1000)
        patch.setattr(send_queue_module, 'MAX_LOSSES', 2)
        course = Course(context)
        for name, *arguments in actions:
            getattr(course, name)(*arguments)
        course.step(0.0)
        course.withdraw()
        getattr(course, end)()
        course.queue.close()
        course.service.socket.close()
    assert set(course.stored.count_replies()) <= {1}
    assert course.queue.size == sum(message.size for message in course.queue)
    assert not any(message.on_reply for message in course.queue)
