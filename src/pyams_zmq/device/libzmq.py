# SPDX-License-Identifier: ZPL-2.1
"""A direction that calls libzmq without pyzmq.

pyzmq makes a Python object of each frame, and releases the GIL around each call. Here a message of
one frame stays in libzmq, and the further frames of a message are received or sent by one call. No
call waits, since all have the flag `NOBLOCK`, so they can keep the GIL.
"""

import ctypes
import signal
import struct
import sys
from ctypes import c_int, c_size_t, c_void_p
from typing import Any

import zmq

from pyams_zmq.device.direction import BURST, NO_MESSAGE, UNDELIVERED, Direction, Prefix
from pyams_zmq.wire.frames import MORE, NOBLOCK

FEW = 16
"""Frames of a message for which memory is kept"""

# By the number of frames: they read the addresses and sizes.
_PAIRS = [struct.Struct(f'{2 * count}N').unpack_from for count in range(FEW + 1)]

_libc: Any = ctypes.PyDLL(None)
_libc.free.argtypes = [c_void_p]


def load(path: str | None, kind: Any = ctypes.PyDLL) -> Any:
    """Return libzmq as it is seen from a library that is linked with it.

    :param kind: `PyDLL`, whose functions keep the GIL, or `CDLL`
    :return: None if the functions cannot be called: pyzmq can be built so
    """
    library: Any = kind(path)
    try:
        # Types of arguments cost time: they are set where the type of a number is not int.
        library.zmq_sendiov.argtypes = [c_void_p, c_void_p, c_size_t, c_int]
        library.zmq_msg_data.restype = c_void_p
        library.zmq_msg_size.restype = c_size_t
    except AttributeError:
        return None
    return library


_PATH = sys.modules[zmq.backend.Socket.__module__].__file__
_zmq = load(_PATH)

IS_AVAILABLE = _zmq is not None
"""True when a :class:`DirectDirection` can be used"""


_BLOCK, _SET = int(signal.SIG_BLOCK), int(signal.SIG_SETMASK)


class _SignalMask(ctypes.c_ulong * 16):  # type: ignore[misc]
    """A `sigset_t`."""


# A signal would interrupt a call in the middle of a message. Errors of the program are not blocked.
_SIGNALS = _SignalMask(*[2 ** (8 * ctypes.sizeof(ctypes.c_ulong)) - 1] * 16)
for _number in (signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV):
    _SIGNALS[0] &= ~(1 << (_number - 1))


class _Message(ctypes.c_uint64 * 8):  # type: ignore[misc]
    """A `zmq_msg_t`: one frame; 64 bytes, aligned as a pointer."""

    def __init__(self) -> None:
        super().__init__()
        _zmq.zmq_msg_init(self)

    def __del__(self, library: Any = _zmq) -> None:
        library.zmq_msg_close(self)


class DirectDirection(Direction):
    """Direction that calls libzmq without pyzmq; see :class:`Direction`."""

    # A message that a program sends over inproc without a copy is released by a thread of pyzmq,
    # which needs the GIL and for which libzmq waits. Over other transports there are none.
    _zmq = load(_PATH, ctypes.CDLL)

    def __init__(self, source: Any, target: Any, monitor: Any, prefix: Prefix):
        super().__init__(source, target, monitor, prefix)
        self._from = c_void_p(source.underlying)
        self._to = c_void_p(target.underlying)
        self._copies_to = None if monitor is None else c_void_p(monitor.underlying)
        self._has_prefix = bool(self._prefix)
        self._head = ctypes.create_string_buffer(b''.join(self._prefix))
        self._head_size = c_size_t(len(self._head) - 1)  # without a NUL
        self._first, self._copy, self._empty = _Message(), _Message(), _Message()
        self._length = 0  # frames of the message in hand
        self._own = 0  # address of its first frame, if that is in `_first`
        self._count = c_size_t()
        self._count_at = c_void_p(ctypes.addressof(self._count))
        self._mask = _SignalMask()
        self._iov: Any = ()
        self._reserve(FEW)

    def _reserve(self, capacity: int) -> None:
        """Make room for the addresses and sizes of frames, and of the prefix before them.

        It is an array of `struct iovec`, of which each has an address and a size.
        """
        former = self._iov[: 2 + 2 * self._length]
        self._capacity = capacity
        self._iov = (c_size_t * (2 + 2 * capacity))(*former)
        self._iov[:2] = ctypes.addressof(self._head), self._head_size.value
        self._address = ctypes.addressof(self._iov)
        self._frames_at = c_void_p(self._address + 16)
        self._copies_at = c_void_p(self._address) if self._has_prefix else self._frames_at

    def forward(self) -> None:
        """Forward a burst of messages."""
        _libc.pthread_sigmask(_BLOCK, _SIGNALS, self._mask)
        try:
            if self.waiting or self._is_dead_end or self._forward_frames():
                self._forward_messages()
        finally:
            _libc.pthread_sigmask(_SET, self._mask, None)

    def _forward_frames(self) -> bool:
        """Forward messages of one frame; return True when one is in hand that has more, or waits.

        This is the short way of :meth:`_forward_messages`: libzmq does not copy the messages.
        """
        first, source, target, monitor = self._first, self._from, self._to, self._copies_to
        has_prefix, head, head_size = self._has_prefix, self._head, self._head_size
        receive, has_more, copy = (
            self._zmq.zmq_msg_recv,
            self._zmq.zmq_msg_more,
            self._zmq.zmq_msg_copy,
        )
        send, send_bytes = self._zmq.zmq_msg_send, self._zmq.zmq_send
        message = first if monitor is None else self._copy
        messages = size = 0
        try:
            for _ in range(BURST):
                length = receive(first, source, NOBLOCK)
                if length < 0:
                    _check(-1, *NO_MESSAGE)
                    return False
                if has_more(first):
                    self._take()
                    return True
                if monitor is not None:
                    copy(message, first)
                if send(message, target, NOBLOCK) < 0:
                    self._take()
                    return True
                messages += 1
                size += length
                if monitor is not None and (
                    (has_prefix and send_bytes(monitor, head, head_size, MORE) < 0)
                    or send(first, monitor, NOBLOCK) < 0
                ):
                    _check(-1, *UNDELIVERED)
                    self.unmonitored += 1
                    for each in (first, message):
                        self._zmq.zmq_msg_move(each, self._empty)
        finally:
            self.messages += messages
            self.frames += messages
            self.bytes += size
        return False

    def _forward_messages(self) -> None:
        """Forward messages of any number of frames, first that in hand."""
        receive, send, free = self._zmq.zmq_recviov, self._zmq.zmq_sendiov, _libc.free
        source, target, monitor = self._from, self._to, self._copies_to
        count, count_at, has_prefix = self._count, self._count_at, self._has_prefix
        for _ in range(BURST):
            length = self._length
            if not length:
                count.value = FEW
                length = receive(source, self._frames_at, count_at, NOBLOCK)
                if length < 0:
                    _check(-1, *NO_MESSAGE)
                    return
                self._length = length
                if length == FEW or self._swaps:
                    length = self._complete()
            if self._is_dead_end or send(target, self._frames_at, length, MORE) < 0:
                if not self._is_dropped():
                    return
            else:
                values = _PAIRS[length](self._iov, 16) if length <= FEW else self._iov[2:]
                self.messages += 1
                self.frames += length
                self.bytes += sum(values[1::2])
                if (
                    monitor is not None
                    and send(monitor, self._copies_at, length + has_prefix, MORE) < 0
                ):
                    _check(-1, *UNDELIVERED)
                    self.unmonitored += 1
                if not (self._own or length > FEW):  # the most frequent case of `_release`
                    for address in values[::2]:
                        free(address)
                    self._length = 0
                    self.waiting = False
                    continue
            self._release()

    def _is_dropped(self) -> bool:
        """Decide what becomes of a message that was not sent."""
        if not self._is_dead_end:
            _check(-1, *UNDELIVERED)
        self.waiting = not self._drops
        self.stalls += self.waiting
        self.unroutable += self._drops
        return self._drops

    def _complete(self) -> int:
        """Receive the frames for which there was no room, and swap the first two."""
        if self._length == FEW and self.source.getsockopt(zmq.RCVMORE):
            self._receive_frames()
        if self._swaps and self._length > 1:
            self._swap()
        return self._length

    def _take(self) -> None:
        """Take the message in hand whose first frame was received alone."""
        first = self._first
        self._iov[2:4] = self._own, _ = self._zmq.zmq_msg_data(first), self._zmq.zmq_msg_size(first)
        self._length = 1
        if self._zmq.zmq_msg_more(first):
            self._receive_frames()
            if self._swaps:
                self._swap()
        self.waiting = True

    def _receive_frames(self) -> None:
        """Receive the frames that follow those in hand."""
        has_more = True
        while has_more:
            if self._length == self._capacity:
                self._reserve(2 * self._capacity)
            self._count.value = self._capacity - self._length
            end = c_void_p(self._address + 16 * (1 + self._length))
            result = self._zmq.zmq_recviov(self._from, end, self._count_at, NOBLOCK)
            self._length += self._count.value
            _check(result)
            has_more = self._length == self._capacity and self.source.getsockopt(zmq.RCVMORE)

    def _swap(self) -> None:
        # The sender comes first, then the addressee; libzmq routes by the first frame.
        self._iov[2:6] = self._iov[4:6] + self._iov[2:4]

    def _release(self) -> None:
        """Release the frames of the message in hand."""
        self.waiting = False
        free, own = _libc.free, self._own
        for address in self._iov[2 : 2 + 2 * self._length : 2]:
            if address != own:
                free(address)
        self._length = 0
        if own:
            self._own = 0
            self._zmq.zmq_msg_move(self._first, self._empty)
        if self._capacity > FEW:
            self._reserve(FEW)

    def __del__(self) -> None:
        self._release()


class KeepingDirection(DirectDirection):
    """Direction that keeps the GIL, for the sockets of a context without inproc addresses."""

    _zmq = _zmq


def _check(result: int, *expected: int) -> None:
    """Raise the error that a call has returned, unless it is expected."""
    number = _zmq.zmq_errno() if result < 0 else None
    if number == zmq.ETERM:
        raise zmq.ContextTerminated
    if number not in (None, *expected):
        raise zmq.ZMQError(number)
