# SPDX-License-Identifier: ZPL-2.1
"""A direction that calls libzmq without pyzmq.

pyzmq makes a Python object of each frame, and releases the GIL around each call. Here a message of
one frame stays in libzmq, and the further frames of a message are received or sent by one call. No
call waits, since all have the flag `NOBLOCK`, so they can keep the GIL, unless they copy much.
"""

import ctypes
import errno
import signal
import struct
import sys
from ctypes import c_int, c_size_t, c_void_p
from typing import Any, NoReturn

import zmq

from pyams_zmq.device.direction import BURST, NO_MESSAGE, UNDELIVERED, Direction, Prefix
from pyams_zmq.wire.frames import MORE, NOBLOCK

FEW = 16
"""Frames of a message for which memory is kept"""

LARGE = 64 * 1024
"""Bytes of a message of several frames that is copied without the GIL"""

# By the number of frames: they read the addresses and sizes.
_PAIRS = [struct.Struct(f'{2 * count}N').unpack_from for count in range(FEW + 1)]

_libc: Any = ctypes.PyDLL(None)
_libc.free.argtypes = [c_void_p]
_releasing_libc: Any = ctypes.CDLL(None)  # the GIL
_releasing_libc.free.argtypes = [c_void_p]


def load(path: str | None, kind: Any = ctypes.PyDLL) -> Any:
    """Return libzmq as it is seen from a library that is linked with it.

    :param kind: `PyDLL`, whose functions keep the GIL, or `CDLL`
    :return: None if the functions cannot be called: pyzmq can be built so
    """
    try:
        # ctypes saves errno in the call: a signal handler or a finalizer would change it after.
        library: Any = kind(path, use_errno=True)
        # Types of arguments cost time: they are set where the type of a number is not int.
        library.zmq_sendiov.argtypes = [c_void_p, c_void_p, c_size_t, c_int]
        library.zmq_msg_data.restype = c_void_p
        library.zmq_msg_size.restype = c_size_t
    except (OSError, AttributeError):
        return None
    return library


# None if pyzmq is linked into the program, which then has the functions of libzmq itself.
_PATH = getattr(sys.modules[zmq.backend.Socket.__module__], '__file__', None)
_zmq = load(_PATH)
_releasing = load(_PATH, ctypes.CDLL)  # the GIL

IS_AVAILABLE = _zmq is not None
"""True when a :class:`DirectDirection` can be used"""


_BLOCK, _SET = int(signal.SIG_BLOCK), int(signal.SIG_SETMASK)


class _SignalMask(ctypes.c_uint64 * 16):  # type: ignore[misc] # mypy does not know this base
    """A `sigset_t`, which has 128 bytes on all systems."""


# A signal would interrupt a call in the middle of a message. Errors of the program are not blocked.
_SIGNALS = _SignalMask()
_libc.sigfillset(_SIGNALS)
for _number in (signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV):
    _libc.sigdelset(_SIGNALS, int(_number))


class _Message(ctypes.c_uint64 * 8):  # type: ignore[misc] # mypy does not know this base
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
    _zmq = _releasing

    def __init__(self, source: Any, target: Any, monitor: Any, prefix: Prefix):
        super().__init__(source, target, monitor, prefix)
        self._from = c_void_p(source.underlying)
        self._to = c_void_p(target.underlying)
        self._copies_to = None if monitor is None else c_void_p(monitor.underlying)
        self._has_prefix = bool(self._prefix)
        self._head = ctypes.create_string_buffer(b''.join(self._prefix))
        self._head_size = c_size_t(len(self._head) - 1)  # without a NUL
        self._first, self._copy, self._empty = _Message(), _Message(), _Message()
        # Frames of the message in hand: those of former calls, and those of the last one. A signal
        # handler can raise an exception after each call, but not between two other statements:
        # so the frames are counted by libzmq itself, and are not in hand when they are released.
        self._length = 0
        self._own = 0  # address of its first frame, if that is in `_first`
        self._count = c_size_t()
        # It copies all frames, of which the peer decides how large they are.
        self._recviov = _releasing.zmq_recviov
        self._count_at = c_void_p(ctypes.addressof(self._count))
        self._mask = _SignalMask()
        self._iov: Any = ()
        self._reserve(FEW)

    def _reserve(self, capacity: int) -> None:
        """Make room for the addresses and sizes of frames, and of the prefix before them.

        It is an array of `struct iovec`, of which each has an address and a size.
        """
        iov: Any = (c_size_t * (2 + 2 * capacity))(
            *self._iov[: 2 + 2 * (self._length + self._count.value)]
        )
        iov[:2] = ctypes.addressof(self._head), self._head_size.value
        address = ctypes.addressof(iov)
        frames_at = c_void_p(address + 16)
        copies_at = c_void_p(address) if self._has_prefix else frames_at
        self._capacity, self._iov, self._address = capacity, iov, address
        self._frames_at, self._copies_at = frames_at, copies_at

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
                    length = _retry(NO_MESSAGE, receive, first, source, NOBLOCK)
                    if length < 0:
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
                if (
                    monitor is not None
                    and (
                        (has_prefix and send_bytes(monitor, head, head_size, MORE) < 0)
                        or send(first, monitor, NOBLOCK) < 0
                    )
                    and _retry(UNDELIVERED, self._copy_frame) < 0
                ):
                    self.unmonitored += 1
                    for each in (first, message):
                        self._zmq.zmq_msg_move(each, self._empty)
        finally:
            self.messages += messages
            self.frames += messages
            self.bytes += size
        return False

    def _copy_frame(self) -> int:
        """Send the frame in `_first` to the monitor."""
        if self._has_prefix:
            result = self._zmq.zmq_send(self._copies_to, self._head, self._head_size, MORE)
            if result < 0:
                return -1
        return int(self._zmq.zmq_msg_send(self._first, self._copies_to, NOBLOCK))

    def _forward_messages(self) -> None:
        """Forward messages of any number of frames, first that in hand."""
        receive, free = self._recviov, _libc.free
        send_few, send_many = self._zmq.zmq_sendiov, _releasing.zmq_sendiov
        source, target, monitor = self._from, self._to, self._copies_to
        count, count_at, has_prefix = self._count, self._count_at, self._has_prefix
        for _ in range(BURST):
            length = self._length + count.value
            if not length:
                count.value = FEW
                length = receive(source, self._frames_at, count_at, NOBLOCK)
                if length < 0:
                    length = self._receive_again()
                    if length < 0:
                        return
                if length == FEW or self._swaps:
                    length = self._complete()
            values = _PAIRS[length](self._iov, 16) if length <= FEW else self._iov[2:]
            size = sum(values[1::2])
            send = send_many if size > LARGE or length > FEW else send_few
            message = (target, self._frames_at, length, MORE)
            if self._is_dead_end or (
                send(*message) < 0 and _retry(UNDELIVERED, send, *message) < 0
            ):
                if not self._is_dropped():
                    return
            else:
                self.messages += 1
                self.frames += length
                self.bytes += size
                if monitor is not None:
                    message = (monitor, self._copies_at, length + has_prefix, MORE)
                    if send(*message) < 0 and _retry(UNDELIVERED, send, *message) < 0:
                        self.unmonitored += 1
                if not (self._own or send is send_many):  # the most frequent case of `_release`
                    self._length = count.value = 0
                    self.waiting = False
                    for address in values[::2]:
                        free(address)
                    continue
            self._release()

    def _is_dropped(self) -> bool:
        """Decide what becomes of a message that was not sent."""
        self.waiting = not self._drops
        self.stalls += self.waiting
        self.unroutable += self._drops
        return self._drops

    def _complete(self) -> int:
        """Receive the frames for which there was no room, and swap the first two."""
        if self._count.value == FEW and self.source.getsockopt(zmq.RCVMORE):
            self._receive_frames()
        length = self._length + self._count.value
        if self._swaps and length > 1:
            self._swap()
        return length

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
            if self._length + self._count.value == self._capacity:
                self._reserve(2 * self._capacity)
            if self._receive_iov() < 0:
                _retry((), self._receive_iov)
            is_full = self._length + self._count.value == self._capacity
            has_more = is_full and self.source.getsockopt(zmq.RCVMORE)

    def _receive_iov(self) -> int:
        """Receive as many frames as there is room for behind those in hand."""
        length = self._length + self._count.value
        room = self._capacity - length
        end = c_void_p(self._address + 16 * (1 + length))
        self._length, self._count.value = length, room
        result = int(self._recviov(self._from, end, self._count_at, NOBLOCK))
        if result < 0 and self._count.value == room:
            self._count.value = 0  # not a socket: libzmq has not counted
        return result

    def _receive_again(self) -> int:
        """Look again for a message after `zmq_recviov` has failed; return -1 if there is none."""
        if self._count.value == FEW:
            self._count.value = 0  # not a socket: libzmq has not counted
        if self._count.value:
            # The end of the context or of the memory, within a message.
            self._release()
            _raise(ctypes.get_errno())
        return _retry(NO_MESSAGE, self._receive_iov)

    def _swap(self) -> None:
        # The sender comes first, then the addressee; libzmq routes by the first frame.
        self._iov[2:6] = self._iov[4:6] + self._iov[2:4]

    def _release(self) -> None:
        """Release the frames of the message in hand."""
        self.waiting = False
        own = self._own
        addresses = self._iov[2 : 2 + 2 * (self._length + self._count.value) : 2]
        self._length = self._count.value = self._own = 0
        free = _releasing_libc.free  # large frames go back to the system
        for address in addresses:
            if address != own:
                free(address)
        if own:
            self._zmq.zmq_msg_move(self._first, self._empty)
        if self._capacity > FEW:
            self._reserve(FEW)

    def __del__(self) -> None:
        self._release()


class KeepingDirection(DirectDirection):
    """Direction that keeps the GIL, for the sockets of a context without inproc addresses."""

    _zmq = _zmq


def _retry(expected: tuple[int, ...], call: Any, *arguments: Any) -> int:
    """Call again after a call has failed, unless its error is expected.

    A signal handler or a finalizer that uses ctypes can have changed the number of the error.

    :return: the result of the call, -1 for an expected error
    """
    number = ctypes.get_errno()
    if number not in (*expected, errno.ENOMEM, zmq.ETERM):
        result = int(call(*arguments))
        if result >= 0:
            return result
        number = ctypes.get_errno()
    if number not in expected:
        _raise(number)
    return -1


def _raise(number: int) -> NoReturn:
    if number == zmq.ETERM:
        raise zmq.ContextTerminated
    raise zmq.ZMQError(number)
