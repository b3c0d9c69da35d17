# SPDX-License-Identifier: ZPL-2.1
"""Reads the sockets of the broker, all in turn."""

from collections.abc import Callable
from typing import Any

import zmq

from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.frames import POLLIN

_POLL_TIMEOUT = 2  # milliseconds to wait for the next message before the loop may run
_TURN = 0.02  # seconds after which the loop may run in any case


class SocketPump:
    """Handles messages of all sockets until none has arrived for `_POLL_TIMEOUT`.

    The loop does not run between two messages: a turn of it takes longer than all the rest. Any
    access to a ØMQ socket clears its wake-up, so every method that accesses one calls `run`
    afterwards: it ends when all sockets are empty, and their next message wakes the loop.

    :param add_callback: lets the loop call a function in its next turn
    :param on_drained: called when all sockets are empty
    :ivar is_scheduled: true if the loop calls `run` in its next turn
    """

    def __init__(
        self,
        add_callback: Callable[[Callable[[], None]], object],
        on_drained: Callable[[], object],
    ):
        self._add_callback = add_callback
        self._on_drained = on_drained
        self._readers: dict[Any, Callable[[], None]] = {}
        self._polled: list[tuple[Any, int]] = []
        self.is_scheduled = False

    def add(self, socket: Any, read: Callable[[], None]) -> None:
        """Add a socket, or a descriptor.

        :param read: called when it can be read
        """
        self._readers[socket] = read
        self._polled.append((socket, POLLIN))

    def run(self) -> None:
        """Handle the messages that have arrived."""
        deadline = monotonic() + _TURN
        readers = self._readers
        while ready := zmq.zmq_poll(self._polled, _POLL_TIMEOUT):
            for socket, _events in ready:
                readers[socket]()
            if monotonic() > deadline:
                # Once for each turn of the loop, else each turn would take longer than the last.
                if not self.is_scheduled:
                    self.is_scheduled = True
                    self._add_callback(self._run_again)
                break
        else:
            self._on_drained()

    def _run_again(self) -> None:
        self.is_scheduled = False
        self.run()
