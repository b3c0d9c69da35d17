# SPDX-License-Identifier: ZPL-2.1
"""Loops that forward messages between two sockets.

The one of libzmq is fast. It blocks on a monitor that takes nothing, ends at a peer that cannot be
reached and at a REQ or REP socket whose turn it is not, takes a whole processor when a message
comes in where the other socket cannot send, counts frames only, does not tell the directions apart
and does not hear commands while the peers take nothing. The one of Python has none of this, and
forwards a third as many small messages per second, a fifth with a monitor
(`benchmarks/device.py`).

Both are steered over a PAIR socket: they answer `STATISTICS` with a message of numbers, and return
after `TERMINATE`.
"""

import errno
import struct
from typing import Any, NamedTuple

import zmq

STATISTICS = b'STATISTICS'
TERMINATE = b'TERMINATE'

# libzmq 4.3.5 has PAUSE and RESUME swapped. It also takes a whole processor while it is paused, so
# this only makes the last statistics exact: TERMINATE follows.
HOLD = b'RESUME' if zmq.zmq_version_info()[:3] == (4, 3, 5) else b'PAUSE'

TAKES_TURNS = (zmq.REQ, zmq.REP)
CANNOT_SEND = (zmq.PULL, zmq.SUB)
CANNOT_RECEIVE = (zmq.PUSH, zmq.PUB)

BURST = 100
"""Messages of one direction that are forwarded before the other one, and commands, get a turn"""

# As plain numbers, which are faster than the flags of pyzmq.
_NOW = int(zmq.DONTWAIT)
_NOW_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)

# EFSM is the answer of a REQ or REP socket whose turn it is not.
_NOT_NOW = (errno.EAGAIN, zmq.EFSM)
_UNDELIVERED = (*_NOT_NOW, errno.EHOSTUNREACH)
_ONE_OF_MANY = (zmq.ROUTER, zmq.STREAM)
_NATIVE_ANSWER = 8  # numbers


class Traffic(NamedTuple):
    """What went into one direction.

    :ivar frames: frames; a message of a REQ socket has three on its way through a ROUTER
    :ivar bytes: bytes of all frames
    :ivar messages: messages; None with the loop of libzmq, which counts frames only
    """

    frames: int
    bytes: int
    messages: int | None


class Statistics(NamedTuple):
    """What a device has forwarded.

    :ivar in_to_out: what came in on the `in` socket
    :ivar out_to_in: what came in on the `out` socket
    :ivar unroutable: messages that were dropped: their peer cannot be reached or takes nothing, or
        the other socket is one that cannot send; what a ROUTER socket drops is counted with
        `ROUTER_MANDATORY` only
    :ivar unmonitored: messages that the monitor did not take; what a PUB socket drops is not
        counted
    """

    in_to_out: Traffic
    out_to_in: Traffic
    unroutable: int = 0
    unmonitored: int = 0


class Counts(NamedTuple):
    """Numbers of :class:`Statistics` which can be added up; libzmq counts no messages."""

    in_frames: int = 0
    in_bytes: int = 0
    out_frames: int = 0
    out_bytes: int = 0
    in_messages: int = 0
    out_messages: int = 0
    unroutable: int = 0
    unmonitored: int = 0

    @classmethod
    def decode(cls, frames: list[bytes]) -> 'Counts':
        """Read the answer of a loop to `STATISTICS`."""
        numbers = [struct.unpack('Q', frame)[0] for frame in frames]
        if len(numbers) == _NATIVE_ANSWER:
            # Received and sent, of `in`, then of `out`: what was sent has gone through.
            _, _, out_frames, out_bytes, _, _, in_frames, in_bytes = numbers
            return cls(in_frames, in_bytes, out_frames, out_bytes)
        return cls(*numbers[1:])

    def encode(self) -> list[bytes]:
        """Give the answer of the loop of Python; its first number makes it differ in length."""
        return [struct.pack('Q', number) for number in (0, *self)]

    def plus(self, other: 'Counts') -> 'Counts':
        """Add up."""
        return Counts(*map(sum, zip(self, other, strict=True)))

    def summarize(self, *, is_native: bool) -> Statistics:
        """Give what the owner of a device reads."""
        return Statistics(
            Traffic(self.in_frames, self.in_bytes, None if is_native else self.in_messages),
            Traffic(self.out_frames, self.out_bytes, None if is_native else self.out_messages),
            self.unroutable,
            self.unmonitored,
        )


class Direction:
    """One direction of a relay."""

    def __init__(self, source: Any, target: Any, monitor: Any, prefix: bytes | None):
        self.source = source
        self.target = target
        self._monitor = monitor
        self._prefix = [] if prefix is None else [prefix]
        self._swaps = source.type == target.type == zmq.ROUTER and source is not target
        self._is_dead_end = target.type in CANNOT_SEND
        # One peer of many that takes nothing must not stop the others.
        self._drops = self._is_dead_end or target.type in _ONE_OF_MANY
        self.waiting: list[bytes] | None = None
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.messages = self.frames = self.bytes = self.unroutable = self.unmonitored = 0

    @property
    def poll_item(self) -> tuple[Any, int]:
        """What to wait for."""
        return (self.source, zmq.POLLIN) if self.waiting is None else (self.target, zmq.POLLOUT)

    def forward(self) -> None:
        """Forward a burst of messages."""
        for _ in range(BURST):
            frames, self.waiting = self.waiting or self._receive(), None
            if frames is None:
                return
            self._send(frames)
            if self.waiting is not None:
                return

    def _receive(self) -> list[bytes] | None:
        source = self.source
        try:
            frames = [source.recv(_NOW)]
        except zmq.ZMQError as error:
            if error.errno not in _NOT_NOW:
                raise
            return None
        while source.get(zmq.RCVMORE):
            frames.append(source.recv(_NOW))
        if self._swaps:
            # The sender comes first, then the peer that it addresses; libzmq routes by the first.
            frames[:2] = frames[1::-1]
        return frames

    def _send(self, frames: list[bytes]) -> None:
        if self._is_dead_end or not _send(self.target, frames):
            if self._drops:
                self.unroutable += 1
            else:
                self.waiting = frames
            return
        self.messages += 1
        self.frames += len(frames)
        self.bytes += sum(map(len, frames))
        if self._monitor is not None and not _send(self._monitor, self._prefix + frames):
            self.unmonitored += 1


class Relay:
    """Forwards between two sockets in Python; swaps the first two frames between two ROUTERs.

    What the monitor does not take at once, it does not get.

    :param in_socket: socket of one side
    :param out_socket: socket of the other side, or the same once more
    :param monitor: socket that gets a copy of each message; None for no monitor
    :param prefixes: first frame of the copies of what comes in on `in_socket`, and on
        `out_socket`; None for no such frame
    """

    def __init__(
        self,
        in_socket: Any,
        out_socket: Any,
        monitor: Any = None,
        prefixes: tuple[bytes, bytes] | tuple[None, None] = (None, None),
    ):
        self._in = Direction(in_socket, out_socket, monitor, prefixes[0])
        self._out = Direction(out_socket, in_socket, monitor, prefixes[1])
        self._ways = [self._in] if in_socket is out_socket else [self._in, self._out]

    def run(self, control: Any = None) -> None:
        """Forward until the end of the context, or until `TERMINATE`; counts from zero.

        :param control: socket of the commands, or None
        :raises zmq.ZMQError: ETERM when the context is terminated, or what is wrong with a socket
        """
        for way in self._ways:
            way.reset()
        commands = [] if control is None else [(control, zmq.POLLIN)]
        while True:
            items = commands + [way.poll_item for way in self._ways]
            ready = zmq.zmq_poll(items, -1)
            for way, item in zip(self._ways, items[len(commands) :], strict=True):
                if item in ready:
                    way.forward()
            if control is not None and commands[0] in ready:
                command = control.recv()
                if command == STATISTICS:
                    control.send_multipart(self._count().encode())
                elif command == TERMINATE:
                    return

    def _count(self) -> Counts:
        one, other = self._in, self._out
        return Counts(
            one.frames,
            one.bytes,
            other.frames,
            other.bytes,
            one.messages,
            other.messages,
            one.unroutable + other.unroutable,
            one.unmonitored + other.unmonitored,
        )


class NativeRelay:
    """Forwards between two sockets in libzmq; has the `run` of :class:`Relay`."""

    def __init__(self, in_socket: Any, out_socket: Any, monitor: Any = None):
        self._sockets = in_socket, out_socket, monitor

    def run(self, control: Any) -> None:
        """Forward until the end of the context, or until `TERMINATE`; counts from zero."""
        zmq.proxy_steerable(*self._sockets, control)


def _send(socket: Any, frames: list[bytes]) -> bool:
    """Send a message, unless it would have to wait or its peer is not there; tell if it is sent."""
    try:
        for frame in frames[:-1]:
            socket.send(frame, _NOW_MORE)
        socket.send(frames[-1], _NOW)
    except zmq.ZMQError as error:
        # All or nothing: libzmq finds the peer, and room for a message, with the first frame. When
        # the peer leaves between two frames (EAGAIN), it forgets the message so far.
        if error.errno not in _UNDELIVERED:
            raise
        return False
    return True
