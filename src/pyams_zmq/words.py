#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

"""PyAMS_zmq.words module: what the broker of a pool and its workers say to each other.

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

__docformat__ = 'restructuredtext'

KEY_SIZE = 8
"""Bytes of the key of a call"""

ROUTE_SIZE = 16
"""Bytes of the name that a worker gives itself; that of its second socket has one more"""

SEPARATOR = b'\0'
"""Between user and address; no address has it"""


class Word:
    """Commands."""

    READY = b'ready'
    BEAT = b'beat'
    BYE = b'bye'
    RETURN = b'return'
    STATS = b'stats'
    WELCOME = b'welcome'
    GOODBYE = b'goodbye'
    UNKNOWN = b'unknown'
