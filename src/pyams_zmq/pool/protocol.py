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
DISCONNECT     worker to broker     empty, DISCONNECT, asked      send no more requests; *asked* is
                                                                  ``1`` if somebody ends the worker,
                                                                  which does not leave by itself
DISCONNECT_OK  broker to worker     empty, DISCONNECT_OK          no more requests are on their way
REJECT         worker to broker     empty, REJECT, key            this request was not started, send
                                                                  it to another worker
PROGRESS       worker to broker,    empty, PROGRESS, key, JSON    how far a job is: what is done,
               second socket                                      the total or null, and a text
ACK            broker to worker     empty, ACK, key               the reply to a job is on disk, or
                                                                  not needed
CANCEL         broker to worker     empty, CANCEL, key, force     end a job; if *force* is ``1``, by
                                                                  the end of the worker
STATS          owner of the pool    empty, STATS                  return the statistics
               to broker
(statistics)   broker to owner      JSON                          the reply to STATS
=============  ===================  ============================  ==================================

The header of a request is its key (`KEY_SIZE` bytes), the user, `SEPARATOR`, and the address of the
client. User, separator and address are missing if no handler needs them.

A job is a request, too. Its key is `JOB_MARK`, the number of the job (5 bytes) and that of the
attempt (2 bytes), so that the reply to a former attempt is known as such, and a new broker knows
what its workers have in hand. In its header, two bytes with the length of a JSON object, and this
object, follow the key: ``id``, ``type``, ``attempt``, and ``timeout`` if the job has its own. A
worker keeps the reply until ACK, and sends it again after READY_OK.

The JSON object of READY has these members:

==============  ====================================================================================
``pid``         process id of the worker
``host``        name of its machine
``slots``       number of requests that it processes at a time; 0 if it is leaving
``interval``    seconds between two heartbeats
``methods``     names of the message types
``described``   of each: signature, first line of its docstring, time limit, and kind
``repeatable``  those that the broker may send to another worker after the death of this one
``peers``       true if the handler needs user and address of each client
``asked``       true if it leaves because it was asked to
``calls``       keys of the requests that it has not replied to, in hexadecimal digits
``replies``     keys of the jobs whose replies have no ACK
``jobs``        of each message type that is a job: retries, and seconds until the second attempt
==============  ====================================================================================

The JSON object of READY_OK, which the broker sends before any request, has the members
``max_reply_size``, the bytes of the largest reply that the worker may send, and ``service``, the
name of the service, for the log of the worker.
"""

import msgspec

KEY_SIZE = 8
"""Bytes of the key of a request"""

ROUTE_SIZE = 16
"""Bytes of the routing id of a worker; the routing id of its second socket has one more"""

SEPARATOR = b'\0'
"""Separates user and address in the header of a request; an address does not contain it"""

JOB_MARK = 0xFF
"""First byte of the key of a job; keys of calls begin with a lower one"""

PROGRESS_INTERVAL = 0.5
"""Seconds between two PROGRESS of a job, at most"""

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
PROGRESS = b'PROGRESS'
ACK = b'ACK'
CANCEL = b'CANCEL'
STATS = b'STATS'

_MAX_ATTEMPT = 0xFFFF
_LENGTH = 2  # bytes of the length of the JSON object in the header of a job


class JobHeader(msgspec.Struct, omit_defaults=True):
    """The JSON object in the header of a job."""

    id: str
    type: str
    attempt: int
    timeout: float | None = None


_decode_header = msgspec.json.Decoder(JobHeader).decode


def make_job_key(number: int, attempt: int) -> bytes:
    """Return the key of an attempt; after 65,536 attempts, it is the same again."""
    return (
        bytes([JOB_MARK])
        + number.to_bytes(5, 'big')
        + (attempt & _MAX_ATTEMPT).to_bytes(_LENGTH, 'big')
    )


def parse_job_key(key: bytes) -> tuple[int, int]:
    """Return the numbers of a job and of an attempt from the key of a job."""
    return int.from_bytes(key[1:6], 'big'), int.from_bytes(key[6:], 'big')


def make_job_header(key: bytes, header: JobHeader, sender: bytes) -> bytes:
    """Return the header of the request for a job.

    :param sender: user, separator and address
    """
    data = msgspec.json.encode(header)
    return key + len(data).to_bytes(_LENGTH, 'big') + data + sender


def parse_job_header(header: bytes) -> tuple[JobHeader, bytes]:
    """Return what `make_job_header` has got, without the key.

    :raises ValueError: if it has another form
    """
    start = KEY_SIZE + _LENGTH
    end = start + int.from_bytes(header[KEY_SIZE:start], 'big')
    return _decode_header(header[start:end]), header[end:]


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
