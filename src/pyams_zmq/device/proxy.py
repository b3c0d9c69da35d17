# SPDX-License-Identifier: ZPL-2.1
"""Loops that forward messages between two sockets: one of libzmq, one in Python.

The loop of libzmq is fast. It blocks when a monitor does not read. It ends at a peer that cannot be
reached, and at a REQ or REP socket that is in the wrong state. It uses a whole processor when a
message comes in and the other socket cannot send. It counts frames only, copies both directions
alike, and does not read commands while the peers do not read. The loop in Python has none of these
limits, and forwards fewer small messages per second (`benchmarks/device.py`).

Both read commands from a PAIR socket, as `zmq_proxy_steerable(3)` does: they answer `STATISTICS`
with a message of numbers, and return after `TERMINATE`.
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import zmq

from pyams_zmq.device import libzmq
from pyams_zmq.device.direction import Direction, Prefix

STATISTICS = b'STATISTICS'
TERMINATE = b'TERMINATE'

# libzmq 4.3.5 has PAUSE and RESUME swapped. It also uses a whole processor while it is paused, so
# this only makes the last statistics exact: TERMINATE follows.
PAUSE = b'RESUME' if zmq.zmq_version_info()[:3] == (4, 3, 5) else b'PAUSE'

LOCKSTEP = (zmq.REQ, zmq.REP)

RETRY = 10
"""Milliseconds before a message is sent again to a socket that says it can send, and cannot"""

Counts = Sequence[int]
"""Numbers in the answer of a loop to `STATISTICS`, in the order of that loop"""

NO_COUNTS: Counts = (0,) * 8


class Traffic(NamedTuple):
    """What was forwarded in one direction.

    :ivar frames: frames; a message of a REQ socket has three on its way through a ROUTER
    :ivar bytes: bytes of all frames
    :ivar messages: messages; None with the loop of libzmq, which counts frames only
    """

    frames: int
    bytes: int
    messages: int | None


class Statistics(NamedTuple):
    """What a device has forwarded.

    :ivar in_to_out: what the `in` socket received
    :ivar out_to_in: what the `out` socket received
    :ivar unroutable: messages that were dropped because their peer cannot be reached or does not
        read, or because the other socket cannot send; what a ROUTER socket drops is counted only
        with `ROUTER_MANDATORY`
    :ivar unmonitored: messages that the monitor could not send at once; what a PUB socket drops is
        not counted
    """

    in_to_out: Traffic
    out_to_in: Traffic
    unroutable: int = 0
    unmonitored: int = 0


def decode_counts(frames: list[bytes]) -> Counts:
    """Decode the answer of a loop to `STATISTICS`."""
    return struct.unpack(f'{len(NO_COUNTS)}Q', b''.join(frames))


def summarize(counts: Counts, *, is_native: bool) -> Statistics:
    """Return the counts of a loop as the owner of a device gets them."""
    if is_native:
        # Received and sent, of `in`, then of `out`: what was sent was forwarded.
        _, _, out_frames, out_bytes, _, _, in_frames, in_bytes = counts
        return Statistics(Traffic(in_frames, in_bytes, None), Traffic(out_frames, out_bytes, None))
    return Statistics(Traffic(*counts[:3]), Traffic(*counts[3:6]), *counts[6:])


class PythonLoop:
    """Forwards between two sockets in Python; swaps the first two frames between two ROUTERs.

    :param in_socket: one socket
    :param out_socket: the other socket, or the same
    :param monitor: socket that gets a copy of each message that it can send at once, or None
    :param prefixes: first frame of the copies of what `in_socket` and `out_socket` receive; None
        for copies without such a frame
    :param counts_as_native: answer `STATISTICS` with the numbers of the loop of libzmq
    :param keeps_gil: keep the GIL during a burst; the sockets have no inproc addresses
    """

    def __init__(
        self,
        in_socket: Any,
        out_socket: Any,
        monitor: Any = None,
        *,
        prefixes: tuple[Prefix, Prefix] = (None, None),
        counts_as_native: bool = False,
        keeps_gil: bool = False,
    ):
        self._counts_as_native = counts_as_native
        direct = libzmq.KeepingDirection if keeps_gil else libzmq.DirectDirection
        direction = direct if libzmq.IS_AVAILABLE else Direction
        self._in = direction(in_socket, out_socket, monitor, prefixes[0])
        self._out = direction(out_socket, in_socket, monitor, prefixes[1])
        self._directions = [self._in] if in_socket is out_socket else [self._in, self._out]

    def run(self, control: Any = None) -> None:
        """Forward until the context is terminated or `TERMINATE` is received; count from zero.

        :param control: socket of the commands, or None
        :raises zmq.ZMQError: ETERM when the context is terminated, or the error of a socket
        """
        for direction in self._directions:
            direction.reset()
        commands: dict[Any, int] = {} if control is None else {control: zmq.POLLIN}
        directions = self._directions
        while True:
            items = [direction.poll_item for direction in directions]
            # Each socket once: libzmq reads the events of each item, and the second look at a
            # socket could take the wake-up for what the first one has not found.
            polled = commands.copy()
            for socket, events in items:
                polled[socket] = polled.get(socket, 0) | events
            timeout = RETRY if any(each.is_stuck for each in directions) else -1
            ready = dict(zmq.zmq_poll([*polled.items()], timeout))
            for direction, (socket, events) in zip(directions, items, strict=True):
                if direction.is_stuck or ready.get(socket, 0) & events:
                    messages, waits = direction.messages, direction.waiting
                    direction.forward()
                    direction.is_stuck = (
                        waits and direction.waiting and direction.messages == messages
                    )
            if control in ready:
                command = control.recv()
                if command == STATISTICS:
                    control.send_multipart([struct.pack('Q', count) for count in self._count()])
                elif command == PAUSE:  # else the last statistics would not be exact
                    directions = []
                elif command == TERMINATE:
                    return

    @property
    def has_message(self) -> bool:
        """True while a message waits until it can be sent."""
        return self._in.waiting or self._out.waiting

    @property
    def stalls(self) -> int:
        """How often a message had to wait."""
        return self._in.stalls + self._out.stalls

    @property
    def frames(self) -> int:
        """Frames that were forwarded since the last call of `run`."""
        return self._in.frames + self._out.frames

    def _count(self) -> Counts:
        one, other = self._in, self._out
        if self._counts_as_native:
            return [0, 0, other.frames, other.bytes, 0, 0, one.frames, one.bytes]
        return [
            *(one.frames, one.bytes, one.messages, other.frames, other.bytes, other.messages),
            one.unroutable + other.unroutable,
            one.unmonitored + other.unmonitored,
        ]
