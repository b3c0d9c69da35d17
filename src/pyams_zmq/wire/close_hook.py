# SPDX-License-Identifier: ZPL-2.1
"""Notices that a socket is closed: no event announces that reliably.

The thread of libzmq that closes the socket may take the wake-up of its descriptor.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakMethod


def hook_close(socket: Any, method: Callable[[], object]) -> None:
    """Call a method after other code has closed a socket, in the thread that closes it.

    :param socket: `zmq.Socket`
    :param method: bound method, whose object is not kept alive
    """
    close, reference = socket.close, WeakMethod(method)

    def close_and_tell(linger: int | None = None) -> None:
        close(linger)
        method = reference()
        if method is not None:
            method()

    socket.close = close_and_tell  # on this instance


def unhook_close(socket: Any) -> None:
    """End what `hook_close` has begun, if anything."""
    vars(socket).pop('close', None)
