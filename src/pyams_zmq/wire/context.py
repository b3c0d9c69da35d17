# SPDX-License-Identifier: ZPL-2.1
"""The limits that libzmq does not have itself: of open files, and of a subscription."""

import errno
import os
import resource
from contextlib import ExitStack, suppress

import zmq

_PIPES = 6
"""Each has two descriptors; a context with one I/O thread and its first socket need six"""


MAX_DESCRIPTORS = 65_536
"""Limit on open files that is set, if the system allows it"""

MAX_SUBSCRIPTION_SIZE = 4096
"""Bytes of a message that a subscriber may send

libzmq 4.3.5 keeps a tree with one node for each byte of a topic, of more than 100 bytes, and
walks it recursively: a topic of 100 KB overflows the stack.
"""

PUBLISHERS = (zmq.PUB, zmq.XPUB)
"""Types of the sockets that receive subscriptions"""


def raise_descriptor_limit() -> None:
    """Raise the soft limit on open files to the hard one, or to `MAX_DESCRIPTORS`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with suppress(OSError, ValueError):  # a system call filter may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def check_descriptors() -> None:
    """Raise an error if too few descriptors are left for the first socket of a context, or a bind.

    Without them libzmq aborts the process: when the socket starts the threads of the context
    (src/epoll.cpp), and when it resolves the address to bind (src/ip_resolver.cpp).

    :raises zmq.ZMQError: EMFILE, when the process has no descriptor left
    """
    with ExitStack() as stack:
        try:
            for _number in range(_PIPES):
                for descriptor in os.pipe():
                    stack.callback(os.close, descriptor)
        except OSError as error:
            raise zmq.ZMQError(error.errno or errno.EMFILE) from None
