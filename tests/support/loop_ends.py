# SPDX-License-Identifier: ZPL-2.1
"""Program: closes loops with ØMQ sockets again and again, whatever is under way.

``python loop_ends.py VARIANT ROUNDS``. It ends with an error when libzmq aborts it, or a round does
not end.
"""

import asyncio
import faulthandler
import random
import sys
from contextlib import suppress
from functools import partial

import zmq

from aio_loops import DEAD, address_of
from pyams_zmq.aio import ZmqEventLoop, ZmqProtocol, create_zmq_connection
from raw_peer import RawPeer, message

ROUND_TIME = 60
"""Seconds in which a round has to end"""

SMALL = [b'x' * 1000] * 26
LARGE = [b'id', b'', b'x' * 300_000, b'y' * 300_000]


class First(ZmqProtocol):
    """Waits for the first message."""

    def __init__(self):
        self.received = asyncio.Event()

    def msg_received(self, data):
        self.received.set()


async def make_pair(first=zmq.DEALER, second=zmq.ROUTER, address='tcp://127.0.0.1:*', hwm=1000):
    """Make two transports that are connected to each other; return them and their protocols."""
    pairs = [await create_zmq_connection(First, kind) for kind in (first, second)]
    transports, protocols = zip(*pairs, strict=True)
    for transport in transports:
        transport.setsockopt(zmq.RCVHWM, hwm)
    transports[1].connect(transports[0].bind(address))
    return transports, protocols


async def burst(end, data=SMALL, number=300, monitor=False, **options):
    """End both while many messages are on their way."""
    transports, protocols = await make_pair(**options)
    for transport in transports if monitor else ():
        transport.enable_monitor()
    for _ in range(number):
        transports[0].write(data)
    await protocols[1].received.wait()
    for transport in random.sample(transports, 2):
        if end is not None:
            getattr(transport, end)()


async def connecting():
    """End both while they connect."""
    transports, _protocols = await make_pair()
    for _ in range(300):
        transports[0].write(SMALL)
    for transport in random.sample(transports, 2):
        transport.abort()


async def lockstep():
    """End a REQ and a REP, which has received a request and has not replied."""
    transports, protocols = await make_pair(zmq.REP, zmq.REQ)
    for _ in range(50):
        transports[1].write(LARGE)
    await protocols[0].received.wait()
    transports[0].write(LARGE)
    for transport in random.sample(transports, 2):
        transport.abort()


async def published():
    """End a publisher and its subscriber."""
    transports, protocols = await make_pair(zmq.PUB, zmq.SUB)
    transports[1].subscribe(b'')
    while not protocols[1].received.is_set():
        transports[0].write(SMALL)
        await asyncio.sleep(0)  # one iteration of the loop, not a time
    for _ in range(500):
        transports[0].write(SMALL)
    for transport in random.sample(transports, 2):
        transport.abort()


async def unread():
    """End both when neither reads what the other one sends."""
    transports, protocols = await make_pair(second=zmq.DEALER, hwm=10)
    for transport, protocol in zip(transports, reversed(protocols), strict=True):
        transport.write(SMALL)
        await protocol.received.wait()
    for transport in transports:
        transport.pause_reading()
    for _ in range(3000):
        for transport in transports:
            transport.write(SMALL)
    for transport in random.sample(transports, 2):
        transport.abort()


async def without_peer(end):
    """End a transport that has never been connected."""
    transport, _protocol = await create_zmq_connection(First, zmq.DEALER, connect=DEAD)
    for _ in range(300):
        transport.write(SMALL)
    if end is not None:
        getattr(transport, end)()


async def foreign(finish, end='abort', number=2000):
    """End a transport and the connection of a peer that has read a part of the messages."""
    transport, _protocol = await create_zmq_connection(First, zmq.DEALER, bind='tcp://127.0.0.1:*')
    transport.enable_monitor()
    for _ in range(number):
        transport.write(SMALL)
    size = random.randrange(100, 100_000)
    connect = partial(RawPeer, address_of(transport), kind=b'ROUTER', receive_buffer=4096)
    peer = await asyncio.to_thread(connect)
    with suppress(OSError):
        await asyncio.to_thread(peer.file.read, size)
    peer.send(message(b'whole') + message(b'half', b'x' * 1000)[:-500])
    ends = [partial(finish, peer)]
    if end is not None:
        ends.append(getattr(transport, end))
    for each in random.sample(ends, len(ends)):
        each()
        if random.random() < 0.3:
            await asyncio.sleep(random.random() * 0.003)  # the time between the ends is random


kept = []

VARIANTS = {
    'close': partial(burst, 'close'),
    'abort': partial(burst, 'abort'),
    'open': partial(burst, None),
    'monitor': partial(burst, 'abort', monitor=True),
    'monitor-open': partial(burst, None, monitor=True),
    'large': partial(burst, 'abort', LARGE, 30),
    'large-open': partial(burst, None, LARGE, 30),
    'inproc': partial(burst, 'abort', address='inproc://loop'),
    'connecting': connecting,
    'lockstep': lockstep,
    'published': published,
    'unread': unread,
    'without-peer': partial(without_peer, 'abort'),
    'without-peer-open': partial(without_peer, None),
    'reset': partial(foreign, RawPeer.reset),
    'reset-open': partial(foreign, RawPeer.reset, None),
    'reset-few': partial(foreign, RawPeer.reset, number=40),
    'stalled': partial(foreign, kept.append),
    'stalled-open': partial(foreign, kept.append, None),
}


def run(variant, rounds):
    """Close loops; each second one is that of an `asyncio.Runner`, if there is one."""
    for number in range(rounds):
        faulthandler.dump_traceback_later(ROUND_TIME, exit=True)
        if number % 2 and sys.version_info >= (3, 11):
            with asyncio.Runner(loop_factory=ZmqEventLoop) as runner:
                runner.run(VARIANTS[variant]())
        else:
            loop = ZmqEventLoop()
            loop.run_until_complete(VARIANTS[variant]())
            loop.close()
        while kept:
            kept.pop().reset()
    faulthandler.cancel_dump_traceback_later()


if __name__ == '__main__':
    asyncio.set_event_loop(None)
    run(sys.argv[1], int(sys.argv[2]))
