# SPDX-License-Identifier: ZPL-2.1
"""Keeps the loop of libzmq from using a processor for nothing.

libzmq waits for messages only: when one has come in and the other socket cannot send, its loop goes
round until it can. Only the processor time of its thread shows that, beside what it forwards. Then
the loop in Python takes over, which waits for that socket, until no message has to wait.
"""

import signal
from contextlib import suppress
from threading import Event, Thread
from time import clock_gettime
from typing import Any

from pyams_zmq.wire.clock import monotonic

INTERVAL = 0.1
"""Seconds between two looks at the processor time"""

CALM = 2.0
"""Seconds without a waiting message, after which the loop of libzmq goes on"""

SOME, MOST = 0.1, 0.9
"""Shares of a processor: a loop that uses less is not looked at, one that uses more never sleeps"""

FAST = 50_000
"""Frames per second that make it worth to use a whole processor"""

SLOW = 2000
"""Frames per second of processor time that a loop forwards at least that sleeps between them"""


def is_spinning(share: float, rate: float) -> bool:
    """Return True if the loop of libzmq goes round for nothing.

    :param share: share of a processor that it uses, which is low if other programs use them all
    :param rate: frames that it forwards per second of processor time
    """
    return share > SOME and rate < (FAST if share > MOST else SLOW)


class SpinWatch(Thread):
    """Thread that decides which loop a device uses, until the device ends.

    :param device: :class:`pyams_zmq.device.thread.DeviceThread`
    """

    def __init__(self, device: Any):
        super().__init__(name=f'{device.name} watch', daemon=True)
        self._device = device
        self._has_ended = Event()
        self._time = self._cpu = self._busy_until = 0.0
        self._frames = self._stalls = 0

    def run(self) -> None:
        """Look at the device in intervals."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self._has_ended.wait(INTERVAL):
            self._look()

    def end(self) -> None:
        """Let the thread end; do not wait, since it may wait for the thread of the device."""
        self._has_ended.set()

    def _look(self) -> None:
        with suppress(OSError):  # from the clock: the thread of the device has ended
            now, cpu = monotonic(), clock_gettime(self._device.cpu_clock)
            self._step(now, now - self._time, cpu - self._cpu)
            self._time, self._cpu = now, cpu

    def _step(self, now: float, elapsed: float, cpu: float) -> None:
        device, loop = self._device, self._device.python_loop
        if device.uses_python:
            former, self._frames = self._frames, loop.frames
            if loop.has_message or loop.stalls != self._stalls:
                self._stalls = loop.stalls
                self._busy_until = now + CALM
            if now > self._busy_until or self._frames - former > 2 * FAST * elapsed:
                device.use_loop(python=False)
        elif cpu > SOME * elapsed:
            former, self._frames = self._frames, device.count_frames()
            if is_spinning(cpu / elapsed, (self._frames - former) / cpu):
                self._busy_until = now + CALM
                device.use_loop(python=True)
