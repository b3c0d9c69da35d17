# SPDX-License-Identifier: ZPL-2.1
"""The channel between a process and its owner.

The owner sends commands; the child reports that it is ready, or why not, answers commands, and
reports its result at its end. A message is a pickled tuple in one packet of a socket pair, which is
sent and read as a whole: neither end ever blocks in a system call.
"""

import logging
import os
import pickle
import socket
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any, NamedTuple

from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.wire.clock import monotonic
from pyams_zmq.wire.poll import wait_readable

LOGGER = logging.getLogger('PyAMS (zmq)')

STOP = 'stop'
"""Command to stop, which the child does not answer"""

RELOAD = 'reload'
"""Command to read users and keys again; without a number the child does not answer it"""

_MAX_PACKET = 256 * 1024  # bytes; the system takes no packet above its send buffer, 208 KiB
_MAX_ERROR = 32 * 1024  # bytes of a pickled error
_INTERVAL = 0.1  # seconds; a signal handler may have read the awaited message during the poll
_MAX_TEXT = 1000  # characters of an error that cannot be sent as it is

Outcome = tuple[Any, Exception | None]
"""A value, or the error that replaces it"""


class Command(NamedTuple):
    """A command of the owner; one without a number gets no answer."""

    name: str
    args: tuple[Any, ...] = ()
    number: int | None = None


class _End:
    """One end of a channel; *fd* is its descriptor."""

    def __init__(self, fd: int):
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Close this end in this process. Calling it again has no effect."""
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

    It knows the outcomes that the child has sent, None before that: `report`, its addresses or the
    error of its start; `result`, its last value and the error by which it ended; and the answers,
    by the number of the command.
    """

    def __init__(self, fd: int):
        super().__init__(fd)
        self._outcomes: dict[str | int, Outcome | None] = {'report': None, 'result': None}
        self._number = 0

    def ask_to_stop(self) -> None:
        """Send the command to stop."""
        self._send(STOP)

    def ask_to_reload(self) -> None:
        """Send the command to read users and keys again."""
        self._send(RELOAD)

    def call(
        self, name: str, args: tuple[Any, ...], end: int | None, timeout: float
    ) -> Outcome | None:
        """Send a command, and return its answer; see :meth:`wait`. A late answer is dropped.

        :param name: name of the command
        :param args: its arguments, which can be pickled
        """
        self._number = number = self._number + 1
        self._outcomes[number] = None
        try:
            self._send(name, args, number)
            return self.wait(number, end, timeout)
        finally:
            del self._outcomes[number]

    def wait(self, key: str | int, end: int | None, timeout: float | None) -> Outcome | None:
        """Read messages until an outcome is there; return None if the child has ended without it.

        A signal handler may read messages in the middle of this.

        :param key: name of the outcome, or number of the command
        :param end: descriptor that is readable when the child has ended, None if it has: other
            processes may hold its end of the channel open
        :param timeout: seconds; None waits without end
        :raises TimeoutError: it is not there in time
        """
        deadline = inf if timeout is None else monotonic() + timeout
        has_ended = end is None
        while True:  # also if it is there: a later one replaces it
            try:
                message = self._receive()
            except EOFError:
                break
            if message is not None:
                sent_key, outcome = message
                if sent_key in self._outcomes:
                    self._outcomes[sent_key] = outcome
            elif has_ended or self._outcomes[key] is not None:
                break
            else:
                left = max(0.0, deadline - monotonic())
                fds = [fd for fd in (self.fileno(), end) if fd is not None]
                readable = wait_readable(fds, min(left, _INTERVAL))
                if not (readable or left):
                    raise TimeoutError
                has_ended = end in readable
        return self._outcomes[key]


class ChildChannel(_End):
    """The end of the child."""

    def receive(self) -> Command | None:
        """Return the next command, or None if it has not come yet.

        :raises EOFError: the owner has died, or has become another program
        """
        message = self._receive()
        return None if message is None else Command(*message)

    def send_outcome(
        self, key: str | int | None, value: Any, error: Exception | None = None
    ) -> None:
        """Send an outcome to the owner; see :class:`OwnerChannel`.

        :param key: `report`, `result`, or the number of a command
        :param value: anything that can be pickled, in 64 KiB
        :param error: why there is no value
        """
        self._send(key, (value, None if error is None else make_portable(error)))

    def run(self, command: Command, function: Callable[..., Any]) -> None:
        """Call a function with the arguments of a command; answer with its result, or its error."""
        try:
            self.send_outcome(command.number, function(*command.args))
        except Exception as error:  # noqa: BLE001 - the owner gets it
            self.send_outcome(command.number, None, error)

    def refuse(self, command: Command) -> None:
        """Answer a command that this process does not know."""
        error = ZMQStartError(f'Unknown command {command.name!r}')
        self.send_outcome(command.number, None, error)


def open_channel() -> tuple[OwnerChannel, ChildChannel]:
    """Open a channel; both ends are closed when a process becomes another program."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    owner, child = (end.detach() for end in pair)
    for fd in (owner, child):
        os.set_blocking(fd, False)
    return OwnerChannel(owner), ChildChannel(child)


def make_portable(error: Exception) -> Exception:
    """Return an error that can be sent as it is, or a ZMQStartError with its type and text."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # noqa: S301 - our own: some exceptions pickle, but do not unpickle
        if len(data) <= _MAX_ERROR:
            return error
    except Exception:  # noqa: BLE001 - pickling an exception of others may raise anything
        LOGGER.debug('%s cannot be pickled', type(error).__name__)
    return ZMQStartError(f'{type(error).__name__}: {error}'[:_MAX_TEXT])
