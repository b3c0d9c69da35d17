# SPDX-License-Identifier: ZPL-2.1
"""The thread that reads the messages of a process while a method keeps its loop busy."""

import logging
import os
from collections.abc import Callable
from threading import Thread

import zmq

from pyams_zmq.handler.turn import Turn
from pyams_zmq.process.reply_stream import ReplyStream
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.poll import wait_readable

LOGGER = logging.getLogger('PyAMS (zmq)')

TICK = 0.005
"""Seconds between two looks at the loop, while messages come in"""

ACTIVE = 0.5
"""Seconds after the last message in which the thread looks at the loop; then it waits for the next
message, and costs nothing"""

TIME_SLICE = 0.001
"""Seconds for which it may read at a time; the end of a method waits for that"""


class Attendant(Thread):
    """Reads messages while a method runs in the loop, and answers questions about the service.

    A socket belongs to the thread of the loop. This one uses it only while it has the `turn` of the
    stream, which the loop releases for the time of a method. If the loop has received nothing since
    the last tick, and the turn is free, a method runs: short ones are not disturbed.

    The thread that creates an attendant is that of the loop.

    :param enter: called first in the thread
    """

    def __init__(self, enter: Callable[[], None]):
        super().__init__(name='pyams_zmq attendant', daemon=True)
        self._enter = enter
        self._received: dict[ReplyStream, int] = {}
        self._wake_fd, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._is_stopped = False

    def attend(self, stream: ReplyStream) -> None:
        """Read the messages of a stream, too; only the thread of its loop may call this."""
        stream.turn = Turn()
        self._received = {**self._received, stream: -1}  # a new one: the thread may use the old one
        os.write(self._waker, b'1')

    def run(self) -> None:
        """Read messages until `stop`."""
        self._enter()
        while not self._is_stopped:
            fds = [stream._fd for stream in self._received if not stream.closed()]
            if self._wake_fd in wait_readable([self._wake_fd, *fds], None):
                self._read_wake()
            until = monotonic() + ACTIVE
            while monotonic() < until and not self._is_stopped:
                if wait_readable([self._wake_fd], TICK):
                    self._read_wake()
                if self.step():
                    until = monotonic() + ACTIVE

    def _read_wake(self) -> None:
        os.read(self._wake_fd, 64)

    def step(self) -> bool:
        """Read what waits for a method that was running at the last step; do not wait.

        :return: True if messages come in
        """
        is_active = False
        for stream, former in self._received.items():
            received = self._received[stream] = stream.received
            if received != former:
                is_active = True
            elif stream.turn.take():
                try:
                    count = stream.waiting.count
                    stream.read_ahead(monotonic() + TIME_SLICE)
                    is_active = is_active or stream.waiting.count != count
                except zmq.ZMQError as error:  # its context was terminated
                    LOGGER.debug('%s cannot read: %s', self.name, error)
                finally:
                    stream.turn.give_back()
        return is_active

    def stop(self) -> None:
        """End the thread, and wait for that."""
        self._is_stopped = True
        os.write(self._waker, b'1')
        self.join()
        for fd in self._wake_fd, self._waker:
            os.close(fd)
