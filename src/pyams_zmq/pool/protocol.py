# SPDX-License-Identifier: ZPL-2.1
"""What the broker of a pool and its workers say to each other.

A worker has two DEALER sockets, the broker a ROUTER socket::

    call       broker   key user NUL address, body...
    reply      worker   key, reply
    command    worker   empty, READY, JSON      here I am, or: here I am again
                        empty, BEAT, MiB        by a thread of its own, on the second socket
                        empty, BYE              give me no more calls
                        empty, RETURN, key      I have not begun with this one
    command    owner    empty, STATS
    command    broker   empty, WELCOME          after READY
                        empty, GOODBYE          after BYE: no more calls are under way
                        empty, UNKNOWN          after BEAT: who are you? Say READY, unless you have
                                                and wait for WELCOME

The key of a call has 8 bytes.
"""

KEY_SIZE = 8
"""Bytes of the key of a call"""

ROUTE_SIZE = 16
"""Bytes of the name that a worker gives itself; that of its second socket has one more"""

SEPARATOR = b'\0'
"""Between user and address; no address has it"""


class Command:
    """First frame of a command, behind an empty one."""

    READY = b'READY'
    READY_OK = b'READY_OK'
    HEARTBEAT = b'HEARTBEAT'
    DISCONNECT = b'DISCONNECT'
    DISCONNECT_OK = b'DISCONNECT_OK'
    REJECT = b'REJECT'
    UNKNOWN = b'UNKNOWN'
    STATS = b'STATS'
