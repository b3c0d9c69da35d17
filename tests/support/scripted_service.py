# SPDX-License-Identifier: ZPL-2.1
"""A service whose replies a test sends itself, and messages that are stored elsewhere for it."""

import json
import time

import zmq

from checks import wait_until
from pyams_zmq.client import send_queue, unanswered
from pyams_zmq.client.problem import QueuedMessage
from pyams_zmq.client.sender import sender_thread

GOOD = b'[200, null]'
OVERLOADED = b'[503, "The service is overloaded, try again later"]'


class ScriptedService:
    """A ROUTER that answers as a test wants.

    :ivar run: arguments of the messages that were answered with 200
    """

    def __init__(self, context):
        self._context = context
        self._open()
        self.address = f'127.0.0.1:{self.socket.bind_to_random_port("tcp://127.0.0.1")}'
        self.run = []

    def _open(self):
        self.socket = self._context.socket(zmq.ROUTER)
        self.socket.linger = 1000

    def receive(self):
        """Return the next message: its envelope and its argument."""
        assert self.socket.poll(30_000)
        *envelope, data = self.socket.recv_multipart()
        return envelope, json.loads(data)[1]

    def reply(self, message, reply=GOOD):
        """Answer a message."""
        envelope, argument = message
        if reply == GOOD:
            self.run.append(argument)
        self.socket.send_multipart([*envelope, reply])

    def restart(self):
        """End all connections, and serve the same address again."""
        self.socket.close()
        self._open()
        wait_until(self._can_bind)

    def _can_bind(self):
        try:
            self.socket.bind(f'tcp://{self.address}')
        except zmq.ZMQError:
            return False
        return True


def until_late(client):
    """Wait until all messages on their way are late, so that one step finds them."""
    last = max(message.sent_at for message in list(client._queue.get()._sent))
    wait_until(lambda: time.monotonic() > last + unanswered.PATIENCE)


def let_idle(queue, monkeypatch):
    """Let a queue be unused for longer than it may be; return a list of its steps from then on.

    A thread that spins makes thousands of them.
    """
    monkeypatch.setattr(send_queue, 'IDLE', 0.1)
    wait_until(lambda: time.monotonic() > queue.used + 0.1)
    steps = []
    step = queue.step
    monkeypatch.setattr(queue, 'step', lambda now: steps.append(now) or step(now))
    thread = sender_thread.get()
    with thread._changed:
        thread._wake()
    wait_until(lambda: steps)
    return steps


def end_queue(queue):
    """Let the thread that sends drop all messages of a queue; only it may close their connection.

    The errors are logged.
    """

    def fail(now):
        raise LookupError

    queue.step = fail
    thread = sender_thread.get()
    with thread._changed:
        thread._wake()
    wait_until(lambda: queue not in thread._queues)


class StoredMessages:
    """Messages that are stored elsewhere, and what `on_reply` has got for each of them.

    :param add: gets each message: a method of a client, or of its queue
    :ivar replies: for each number of a message, the replies in their order
    """

    def __init__(self, add):
        self._add = add
        self.replies = {}

    def offer(self, *numbers, name='note', is_job=False, text=''):
        """Offer messages, whose argument is their number; return the results.

        :param text: makes them larger
        """
        return [self._offer(number, name, is_job, text) for number in numbers]

    def _offer(self, number, name, is_job, text):
        data = json.dumps([name, [number, text] if text else number]).encode()
        on_reply = self.replies.setdefault(number, []).append
        return self._add(QueuedMessage(name, data, None, is_job, on_reply))

    def statuses(self):
        """Return the status of each message that has a reply, None if it was given back."""
        return {
            number: None if reply is None else reply.status
            for number, replies in self.replies.items()
            for reply in replies
        }

    def count_replies(self):
        """Return how often `on_reply` was called for each message."""
        return [len(replies) for replies in self.replies.values()]

    def wait(self, number):
        """Wait until so many messages have a reply."""
        wait_until(lambda: sum(self.count_replies()) >= number)
