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

"""Echo over asyncio: the transport of pyams_zmq.aio beside zmq.asyncio, interleaved in one run.

A DEALER sends messages, a ROUTER in the same loop sends them back, over tcp: one at a time, and
with many in flight. Each round runs every contender once; the table shows the median of the rates,
and of the ratios within a round.
"""

import argparse
import asyncio
import gc
import os
import subprocess
import sys
from statistics import median
from time import perf_counter

import uvloop
import zmq
import zmq.asyncio

try:
    from pyams_zmq.aio import ZmqProtocol, create_zmq_connection
except ImportError:  # in the environment of `--aiozmq`
    from aiozmq import ZmqProtocol, create_zmq_connection

MESSAGE = b'x' * 64
ADDRESS = 'tcp://127.0.0.1:*'
LOOPS = {'asyncio': asyncio.SelectorEventLoop, 'uvloop': uvloop.new_event_loop}


class Echo(ZmqProtocol):
    """Sends back what it gets."""

    def connection_made(self, transport):
        """Keep the transport."""
        self.transport = transport

    def msg_received(self, data):
        """Send it back."""
        self.transport.write(data)


class Asker(Echo):
    """Sends the next message when one comes back."""

    def ask(self, count, flight):
        """Send the first ones; the future is done when *count* messages are back."""
        self.left = count
        self.unsent = count - flight
        self.done = asyncio.get_running_loop().create_future()
        for _ in range(flight):
            self.transport.write((MESSAGE,))
        return self.done

    def msg_received(self, data):
        """Count the reply."""
        if tuple(data) != (MESSAGE,):
            raise RuntimeError(f'{data!r} came back')
        self.left -= 1
        if self.unsent:
            self.unsent -= 1
            self.transport.write((MESSAGE,))
        elif not self.left:
            self.done.set_result(None)


class Waiter(ZmqProtocol):
    """Gives each message to the coroutine which waits for it."""

    def msg_received(self, data):
        """Give it."""
        self.reply.set_result(data)


async def transports(count, flight):
    """Echo through transports, the protocol sends the next message; return the seconds."""
    server, _protocol = await create_zmq_connection(Echo, zmq.ROUTER, bind=ADDRESS)
    [address] = server.bindings()
    client, asker = await create_zmq_connection(Asker, zmq.DEALER, connect=address)
    await asker.ask(flight, flight)  # connects
    start = perf_counter()
    await asker.ask(count, flight)
    seconds = perf_counter() - start
    client.abort()
    server.abort()
    await asyncio.sleep(0)
    return seconds


async def coroutine(count, _flight):
    """Echo through transports, one at a time, a coroutine waits for each; return the seconds."""
    server, _protocol = await create_zmq_connection(Echo, zmq.ROUTER, bind=ADDRESS)
    [address] = server.bindings()
    client, waiter = await create_zmq_connection(Waiter, zmq.DEALER, connect=address)
    loop = asyncio.get_running_loop()

    async def ask(count):
        for _ in range(count):
            waiter.reply = loop.create_future()
            client.write((MESSAGE,))
            await waiter.reply

    await ask(1)
    start = perf_counter()
    await ask(count)
    seconds = perf_counter() - start
    client.abort()
    server.abort()
    await asyncio.sleep(0)
    return seconds


async def pyzmq(count, flight):
    """Echo through sockets of zmq.asyncio; return the seconds."""
    context = zmq.asyncio.Context.instance()
    with context.socket(zmq.ROUTER) as server, context.socket(zmq.DEALER) as client:
        server.linger = client.linger = 0
        server.bind(ADDRESS)
        client.connect(server.last_endpoint)

        async def echo():
            while True:
                await server.send_multipart(await server.recv_multipart())

        async def ask(count):
            for _ in range(flight):
                await client.send_multipart([MESSAGE])
            for number in range(count):
                [reply] = await client.recv_multipart()
                if reply != MESSAGE:
                    raise RuntimeError(f'{reply!r} came back')
                if number < count - flight:
                    await client.send_multipart([MESSAGE])

        task = asyncio.create_task(echo())
        await ask(flight)
        start = perf_counter()
        await ask(count)
        seconds = perf_counter() - start
        task.cancel()
        await asyncio.wait([task])
    return seconds


class Other:
    """Echo through the transports of aiozmq, in a Python of its own.

    :param python: path of an interpreter that has aiozmq and uvloop
    """

    def __init__(self, python):
        self._process = subprocess.Popen(  # noqa: S603 - a Python that was given by hand
            [python, __file__, '--echo'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def __call__(self, count, flight):
        """Let it echo; return the seconds."""
        kind = 'uvloop' if isinstance(asyncio.get_running_loop(), uvloop.Loop) else 'asyncio'
        self._process.stdin.write(f'{kind} {count} {flight}\n')
        self._process.stdin.flush()
        return float(self._process.stdout.readline())


def echo():
    """Echo as standard input tells, write the seconds to standard output."""
    loops = {name: factory() for name, factory in LOOPS.items()}
    gc.disable()
    for line in sys.stdin:
        loop, count, flight = line.split()
        seconds = loops[loop].run_until_complete(transports(int(count), int(flight)))
        sys.stdout.write(f'{seconds}\n')
        sys.stdout.flush()
        gc.collect()


CONTENDERS = {
    'zmq.asyncio': pyzmq,
    'transport': transports,
    'transport, a future each': coroutine,
}


def cases(flight):
    """Give each case: the loop, the messages in flight, and the contender."""
    for loop in LOOPS:
        for number in (1, flight):
            for name in CONTENDERS:
                if number == 1 or name != 'transport, a future each':
                    yield loop, number, name


def measure(rounds, count, flight):
    """Run all cases in turn, return the rates of each."""
    rates = {case: [] for case in cases(flight)}
    loops = {name: factory() for name, factory in LOOPS.items()}
    gc.disable()
    for number in range(rounds + 1):
        order = list(rates)
        turn = number % len(order)  # nobody always comes after the same one
        for case in order[turn:] + order[:turn]:
            loop, in_flight, name = case
            messages = count if in_flight == 1 else 5 * count
            seconds = loops[loop].run_until_complete(CONTENDERS[name](messages, in_flight))
            if number:  # the first round warms up
                rates[case].append(messages / seconds)
        gc.collect()
    gc.enable()
    for loop in loops.values():
        loop.close()
    return rates


def report(rates):
    """Write the table."""
    write = sys.stdout.write
    write(f'{"":42}{"median/s":>10}{"min/s":>10}{"max/s":>10}{"ratio":>8}\n')
    for (loop, in_flight, name), values in rates.items():
        beside = rates[loop, in_flight, 'zmq.asyncio']
        ratio = median(value / other for value, other in zip(values, beside, strict=True))
        title = f'{loop}, {in_flight} in flight, {name}'
        write(
            f'{title:42}{median(values):10.0f}{min(values):10.0f}{max(values):10.0f}{ratio:8.2f}\n'
        )


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--aiozmq', metavar='PYTHON', help='compare with aiozmq, which this has')
    parser.add_argument('--echo', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--rounds', type=int, default=11, help='rounds (11)')
    parser.add_argument('--count', type=int, default=500, help='messages of a turn (500)')
    parser.add_argument('--flight', type=int, default=256, help='most messages in flight (256)')
    arguments = parser.parse_args()
    if arguments.echo:
        echo()
        return
    if arguments.aiozmq:
        CONTENDERS['aiozmq'] = Other(arguments.aiozmq)
    rates = measure(arguments.rounds, arguments.count, arguments.flight)
    version = '.'.join(map(str, sys.version_info[:3]))
    sys.stdout.write(
        f'Python {version}, pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}, '
        f'{os.cpu_count()} processors, {arguments.rounds} rounds of {arguments.count} messages, '
        f'{5 * arguments.count} where {arguments.flight} are in flight\n'
    )
    report(rates)


if __name__ == '__main__':
    main()
