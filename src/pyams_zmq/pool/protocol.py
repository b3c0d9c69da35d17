# SPDX-License-Identifier: ZPL-2.1
"""The protocol between the broker of a pool and its workers.

It has the commands of the Majordomo protocol (RFC 7/MDP, RFC 18/MDP2). Unlike there, a worker may
have several requests at a time, so each request has a key, and heartbeats have a socket of their
own.

Sockets. The broker binds ROUTER sockets. A worker connects two DEALER sockets. It chooses their
routing ids: `ROUTE_SIZE` random bytes for the first socket; the same bytes and one more for the
second socket, which a thread uses, so that heartbeats continue while a method computes. It sends
the first READY when both sockets have had a connection: behind a large request, that of the
heartbeats would come late.

Frames. `empty` is a frame without bytes; the routing id that a ROUTER socket adds is left out.

=============  ===================  ============================  ==================================
Message        Direction            Frames                        Meaning
=============  ===================  ============================  ==================================
REQUEST        broker to worker     header, body...               process this message of a client
REPLY          worker to broker     key, body...                  the reply to the request *key*
READY          worker to broker     empty, READY, JSON            register this worker, or register
                                                                  it again after a lost connection
READY_OK       broker to worker     empty, READY_OK, JSON         the worker is registered
HEARTBEAT      worker to broker,    empty, HEARTBEAT, MiB         the worker is alive, and has so
               second socket                                      much resident memory
UNKNOWN        broker to worker,    empty, UNKNOWN                in reply to HEARTBEAT: the worker
               first socket                                       is not registered, send READY
DISCONNECT     worker to broker     empty, DISCONNECT             send no more requests
DISCONNECT_OK  broker to worker     empty, DISCONNECT_OK          no more requests are on their way
REJECT         worker to broker     empty, REJECT, key            this request was not started, send
                                                                  it to another worker
STATS          owner of the pool    empty, STATS                  return the statistics
               to broker
(statistics)   broker to owner      JSON                          the reply to STATS
=============  ===================  ============================  ==================================

The header of a request is its key (`KEY_SIZE` bytes), the user, `SEPARATOR`, and the address of the
client. User, separator and address are missing if no handler needs them.

The JSON object of READY has these members:

==============  ====================================================================================
``pid``         process id of the worker
``host``        name of its machine
``slots``       number of requests that it processes at a time; 0 if it is leaving
``interval``    seconds between two heartbeats
``methods``     names of the message types
``repeatable``  those that the broker may send to another worker after the death of this one
``peers``       true if the handler needs user and address of each client
``calls``       keys of the requests that it has not replied to, in hexadecimal digits
==============  ====================================================================================

The JSON object of READY_OK, which the broker sends before any request, has the member
``max_reply_size``: the bytes of the largest reply that the worker may send.
"""

KEY_SIZE = 8
"""Bytes of the key of a request"""

ROUTE_SIZE = 16
"""Bytes of the routing id of a worker; the routing id of its second socket has one more"""

SEPARATOR = b'\0'
"""Separates user and address in the header of a request; an address does not contain it"""

MISSED_HEARTBEATS = 3
"""Heartbeats that a peer may miss before its connection, or the peer itself, is considered lost"""

MIN_INTERVAL = 0.01
MAX_INTERVAL = 60.0
"""Limits of the seconds between two heartbeats of a worker"""


# Commands: the second frame, after an empty one.
READY = b'READY'
READY_OK = b'READY_OK'
HEARTBEAT = b'HEARTBEAT'
UNKNOWN = b'UNKNOWN'
DISCONNECT = b'DISCONNECT'
DISCONNECT_OK = b'DISCONNECT_OK'
REJECT = b'REJECT'
STATS = b'STATS'


def check_interval(interval: float) -> float:
    """Return *interval*, the seconds between two heartbeats, if it is valid.

    :raises ValueError: it is not between `MIN_INTERVAL` and `MAX_INTERVAL`; shorter intervals would
        keep broker and workers busy
    """
    if not MIN_INTERVAL <= interval <= MAX_INTERVAL:
        raise ValueError(
            f'Bad beat_interval {interval!r}: write {MIN_INTERVAL} to {MAX_INTERVAL} seconds'
        )
    return interval
