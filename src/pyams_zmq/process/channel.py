# SPDX-License-Identifier: ZPL-2.1
"""The channel between a process and its owner.

The owner sends commands; the child reports that it is ready, or why not, answers commands, and
reports its result at its end. A message is a pickled tuple in one packet of a socket pair, so that
it is read as a whole or not at all: neither end ever blocks in a call to the system.
"""

import logging
import os
import pickle
import socket
from collections.abc import Callable
from contextlib import suppress
from math import inf
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.process.descendants import poll

LOGGER = logging.getLogger('PyAMS (zmq)')

STOP = 'stop'
"""Command which every child obeys, and does not answer"""

_MAX_PACKET = 256 * 1024  # bytes; the system takes no packet above its send buffer, 208 KiB
_MAX_TEXT = 1000  # characters of an error that cannot be sent as it is

_T = TypeVar('_T')

Outcome = tuple[Any, Exception | None]
"""A value, or the error that is there instead"""


class Command(NamedTuple):
    """A command of the owner; one without a number gets no answer."""

    name: str
    args: tuple[Any, ...] = ()
    number: int | None = None


class _End:
    """One end of a channel.

    :param fd: descriptor
    """

    def __init__(self, fd: int):
        self._fd = fd

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def close(self) -> None:
        """Close this end in this process; closing it twice does no harm."""
        fd, self._fd = self._fd, -1
        with suppress(OSError):
            os.close(fd)

    __del__ = close

    def _send(self, *message: Any) -> None:
        # The other end is closed, or its process is stopped and does not read.
        with suppress(ConnectionError, BlockingIOError):
            os.write(self._fd, pickle.dumps(message))

    def _receive(self) -> Any:
        """Return the next message, or None if it has not come yet.

        :raises EOFError: the other end is closed
        """
        data = None
        while data is None:
            try:
                data = os.read(self._fd, _MAX_PACKET)
            except BlockingIOError:
                return None
            except ConnectionResetError:  # reported before the messages that were sent earlier
                continue
            except OSError:
                data = b''
        if not data:
            raise EOFError
        return pickle.loads(data)  # noqa: S301 - sent by the process at the other end


class OwnerChannel(_End):
    """The end of the owner.

    :ivar report: the addresses of the child when it is ready, or the error of its start; None
        before it is known
    :ivar result: the last value of the child, and the error by which it ended; None before its end
    """

    def __init__(self, fd: int):
        super().__init__(fd)
        self.report: Outcome | None = None
        self.result: Outcome | None = None
        self._answers: dict[int, Outcome | None] = {}
        self._number = 0

    def ask_to_stop(self) -> None:
        """Send the command to stop."""
        self._send(STOP)

    def call(
        self, name: str, args: tuple[Any, ...], end: int | None, timeout: float
    ) -> Outcome | None:
        """Send a command, and return its answer; None if the child has ended.

        :param name: name of the command
        :param args: its arguments, which can be pickled
        :param end: see :meth:`wait`
        :param timeout: seconds
        :raises TimeoutError: the child does not answer in time; a late answer is dropped
        """
        self._number = number = self._number + 1
        self._answers[number] = None
        try:
            self._send(name, args, number)
            return self.wait(lambda: self._answers[number], end, timeout)
        finally:
            del self._answers[number]

    def wait(
        self, find: Callable[[], _T | None], end: int | None, timeout: float | None
    ) -> _T | None:
        """Read messages until what is looked for is there; return None if the child has ended.

        A signal handler may read messages in the middle of this.

        :param find: returns None until it is there
        :param end: descriptor that is readable when the child has ended, None if it has: other
            processes may hold its end of the channel open
        :param timeout: seconds; None waits without end
        :raises TimeoutError: it is not there in time
        """
        deadline = inf if timeout is None else monotonic() + timeout
        has_ended = end is None
        while (found := find()) is None:
            try:
                if self._read():
                    continue
            except EOFError:
                return find()
            if has_ended:
                return find()
            left = max(0.0, deadline - monotonic())
            readable = poll([fd for fd in (self.fileno(), end) if fd is not None], left)
            if not (readable or left):
                raise TimeoutError
            has_ended = end in readable
        return found

    def _read(self) -> bool:
        """Read one message; return False if none is there."""
        match self._receive():
            case None:
                return False
            case 'report', outcome:
                self.report = outcome
            case 'result', outcome:
                self.result = outcome
            case 'answer', number, outcome if number in self._answers:
                self._answers[number] = outcome
        return True


class ChildChannel(_End):
    """The end of the child."""

    def receive(self) -> Command | None:
        """Return the next command, or None if it has not come yet.

        :raises EOFError: the owner has died, or has become another program
        """
        message = self._receive()
        return None if message is None else Command(*message)

    def report(self, addresses: Any, error: Exception | None = None) -> None:
        """Report that this process is ready, or that it cannot be; once.

        :param addresses: bound addresses, in a list or a dict of lists
        :param error: why it is not ready
        """
        self._send('report', _make_outcome(addresses, error))

    def answer(self, command: Command, value: Any, error: Exception | None = None) -> None:
        """Answer a command.

        :param value: anything that can be pickled, in 64 KiB
        :param error: why there is no value
        """
        self._send('answer', command.number, _make_outcome(value, error))

    def run(self, command: Command, function: Callable[..., Any]) -> None:
        """Call a function with the arguments of a command; answer with its result, or its error."""
        try:
            self.answer(command, function(*command.args))
        except Exception as error:  # noqa: BLE001 - the owner gets it
            self.answer(command, None, error)

    def refuse(self, command: Command) -> None:
        """Answer a command that this process does not know."""
        self.answer(command, None, ZMQStartError(f'Unknown command {command.name!r}'))

    def report_result(self, value: Any, error: Exception | None = None) -> None:
        """Report the last value of this process, and the error by which it ends."""
        self._send('result', _make_outcome(value, error))


def open_channel() -> tuple[OwnerChannel, ChildChannel]:
    """Open a channel; both ends are closed when a process becomes another program."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner, child = (end.detach() for end in pair)
    for fd in (owner, child):
        os.set_blocking(fd, False)
    return OwnerChannel(owner), ChildChannel(child)


def make_portable(error: Exception, max_size: int = 32 * 1024) -> Exception:
    """Return an error that can be sent as it is, or a ZMQStartError with its type and text.

    :param max_size: bytes of the pickled error
    """
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # noqa: S301 - our own: some exceptions pickle, but do not unpickle
        if len(data) <= max_size:
            return error
    except Exception:  # noqa: BLE001 - pickling an exception of others may raise anything
        LOGGER.debug('%s cannot be pickled', type(error).__name__)
    return ZMQStartError(f'{type(error).__name__}: {error}'[:_MAX_TEXT])


def _make_outcome(value: Any, error: Exception | None) -> Outcome:
    return value, None if error is None else make_portable(error)
