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

    A socket belongs to the thread of the loop. This one uses it only while it has the turn, which
    the loop releases for the time of a method. If the loop has received nothing since the last
    tick, and the turn is free, a method runs: short ones are not disturbed.

    :param enter: called first in the thread
    """

    def __init__(self, enter: Callable[[], None]):
        super().__init__(name='pyams_zmq attendant', daemon=True)
        self._enter = enter
        self._turn = Turn()
        self._turn.wake = self._wake
        self._streams: list[ReplyStream] = []
        self._received = 0
        self._wake_fd, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._is_stopped = False

    def attend(self, stream: ReplyStream) -> None:
        """Read the messages of a stream, too; only the thread of its loop may call this."""
        stream.turn = self._turn
        others = [each for each in self._streams if each.socket is not None]
        self._streams = [*others, stream]  # a new list: the thread may use the old one
        self._wake()

    def run(self) -> None:
        """Read messages until `stop`."""
        self._enter()
        while not self._is_stopped:
            self._sleep()
            until = monotonic() + ACTIVE
            while monotonic() < until and not self._is_stopped:
                self._wait([], TICK)
                if self.step():
                    until = monotonic() + ACTIVE

    def _sleep(self) -> None:
        """Wait for a message.

        The loop may read it, which takes the wake-up, before this thread runs. So it also wakes
        this thread when a method begins.
        """
        self._turn.is_asleep = True
        if not self._has_received():  # else one may have begun just before
            # Without `closed`, which closes a stream whose socket other code has closed.
            self._wait([each._fd for each in self._streams if each.socket is not None], None)
        self._turn.is_asleep = False

    def _wait(self, fds: list[int], timeout: float | None) -> None:
        if self._wake_fd in wait_readable([self._wake_fd, *fds], timeout):
            os.read(self._wake_fd, 64)

    def _wake(self) -> None:
        self._turn.is_asleep = False  # once is enough
        os.write(self._waker, b'1')

    def _has_received(self) -> bool:
        """Return True if the loop has received messages since this was asked last."""
        received, self._received = self._received, sum(each.received for each in self._streams)
        return received != self._received

    def step(self) -> bool:
        """Read what waits for a method that was running at the last step; do not wait.

        :return: True if messages come in
        """
        if self._has_received():
            return True
        if not self._turn.take():
            return False
        try:
            results = [self._read(stream) for stream in self._streams]
            return any(results)
        finally:
            self._turn.give_back()

    def _read(self, stream: ReplyStream) -> bool:
        try:
            return stream.read_ahead(monotonic() + TIME_SLICE)
        except zmq.ZMQError as error:  # its context was terminated
            LOGGER.debug('%s cannot read: %s', self.name, error)
            return False

    def forget(self) -> None:
        """Forget the thread, which does not exist in a fork of its process."""
        self._turn.forget()

    def stop(self) -> None:
        """End the thread, and wait for that."""
        self._is_stopped = True
        self._wake()
        self.join()
        for fd in self._wake_fd, self._waker:
            os.close(fd)
