# SPDX-License-Identifier: ZPL-2.1
"""Echo over asyncio: the transport of pyams_zmq.aio beside zmq.asyncio, interleaved in one run.

A DEALER sends messages, and a ROUTER in the same loop sends them back, over tcp: one at a time, and
with many in flight. Each round runs every contender once, each in a process of its own, so that the
I/O threads and the garbage of one do not slow down another. The table shows the median of the
rates, of the ratios within a round, and of the median and the 99th percentile of the times from one
reply to the next.
"""

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
from itertools import pairwise
from statistics import median
from time import perf_counter

import uvloop
import zmq
import zmq.asyncio

# The same program measures both libraries; a process imports only the one that it measures.
if sys.argv[1:3] == ['--run', 'aiozmq']:
    from aiozmq import ZmqProtocol, create_zmq_connection
else:
    from pyams_zmq.aio import ZmqProtocol, create_zmq_connection

MESSAGE = b'x' * 64
ADDRESS = 'tcp://127.0.0.1:*'
LOOPS = {'asyncio': asyncio.SelectorEventLoop, 'uvloop': uvloop.new_event_loop}
WARM_UP = 200
"""Messages before the measurement"""

FACTOR = 5
"""Factor of the number of messages where many are in flight"""


def check(data):
    """Check a reply."""
    if tuple(data) != (MESSAGE,):
        raise RuntimeError(f'{data!r} came back')


class Echo(ZmqProtocol):
    """Sends each message back."""

    def connection_made(self, transport):
        """Keep the transport."""
        self.transport = transport

    def msg_received(self, data):
        """Send the message back."""
        self.transport.write(data)


class Asker(Echo):
    """Sends the next message when a reply arrives."""

    def ask(self, count, flight, times):
        """Send the first messages; return a future that is done after *count* replies."""
        self.left = count
        self.unsent = count - flight
        self.note = times.append
        self.done = asyncio.get_running_loop().create_future()
        for _ in range(flight):
            self.transport.write((MESSAGE,))
        return self.done

    def msg_received(self, data):
        """Count the reply."""
        check(data)
        self.note(perf_counter())
        self.left -= 1
        if self.unsent:
            self.unsent -= 1
            self.transport.write((MESSAGE,))
        elif not self.left:
            self.done.set_result(None)


class Waiter(ZmqProtocol):
    """Passes each reply to the coroutine that waits for it."""

    def msg_received(self, data):
        """Set the result of the future."""
        self.reply.set_result(data)


async def with_protocols(count, flight):
    """Echo through transports whose protocol sends the next message; return the times."""
    server, _protocol = await create_zmq_connection(Echo, zmq.ROUTER, bind=ADDRESS)
    [address] = server.bindings()
    client, asker = await create_zmq_connection(Asker, zmq.DEALER, connect=address)
    await asker.ask(WARM_UP, min(flight, WARM_UP), [])
    times = [perf_counter()]
    await asker.ask(count, flight, times)
    client.abort()
    server.abort()
    await asyncio.sleep(0)
    return times


async def with_futures(count, flight):
    """Echo through transports, with a coroutine that waits for each reply; return the times."""
    if flight != 1:
        raise ValueError(f'{flight} messages in flight; this style sends one at a time')
    server, _protocol = await create_zmq_connection(Echo, zmq.ROUTER, bind=ADDRESS)
    [address] = server.bindings()
    client, waiter = await create_zmq_connection(Waiter, zmq.DEALER, connect=address)
    loop = asyncio.get_running_loop()

    async def ask(count, times):
        for _ in range(count):
            waiter.reply = loop.create_future()
            client.write((MESSAGE,))
            check(await waiter.reply)
            times.append(perf_counter())

    await ask(WARM_UP, [])
    times = [perf_counter()]
    await ask(count, times)
    client.abort()
    server.abort()
    await asyncio.sleep(0)
    return times


async def with_pyzmq(count, flight):
    """Echo through sockets of zmq.asyncio; return the times."""
    context = zmq.asyncio.Context.instance()
    with context.socket(zmq.ROUTER) as server, context.socket(zmq.DEALER) as client:
        server.linger = client.linger = 0
        server.bind(ADDRESS)
        client.connect(server.last_endpoint)

        async def echo():
            while True:
                await server.send_multipart(await server.recv_multipart())

        async def ask(count, flight, times):
            for _ in range(flight):
                await client.send_multipart([MESSAGE])
            for number in range(count):
                check(await client.recv_multipart())
                times.append(perf_counter())
                if number < count - flight:
                    await client.send_multipart([MESSAGE])

        task = asyncio.create_task(echo())
        await ask(WARM_UP, min(flight, WARM_UP), [])
        times = [perf_counter()]
        await ask(count, flight, times)
        task.cancel()
        await asyncio.wait([task])
    return times


STYLES = {'pyzmq': with_pyzmq, 'protocols': with_protocols, 'futures': with_futures}


def run_here(loop, style, count, flight):
    """Echo in this process; write the rate and the latencies (microseconds) to stdout."""
    event_loop = LOOPS[loop]()
    gc.collect()
    gc.disable()
    times = event_loop.run_until_complete(STYLES[style](count, flight))
    latencies = sorted(1e6 * (after - before) for before, after in pairwise(times))
    figures = count / (times[-1] - times[0]), median(latencies), latencies[99 * count // 100]
    sys.stdout.write(json.dumps(figures))


def run_there(python, library, loop, style, count, flight):
    """Echo in a new process; return the rate and the latencies."""
    command = [python, '-W', 'ignore', __file__, '--run', library, loop, style]
    command += [str(count), str(flight)]
    done = subprocess.run(  # noqa: S603 - our Python, or the one of the command line
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=120
    )
    return json.loads(done.stdout)


def list_contenders(aiozmq):
    """Return name, Python, library and style of each contender; the first one has ratio 1."""
    contenders = [
        ('zmq.asyncio', sys.executable, 'pyams_zmq.aio', 'pyzmq'),
        ('transport', sys.executable, 'pyams_zmq.aio', 'protocols'),
        ('transport, a future each', sys.executable, 'pyams_zmq.aio', 'futures'),
    ]
    if aiozmq:
        contenders.append(('aiozmq', aiozmq, 'aiozmq', 'protocols'))
        contenders.append(('aiozmq, a future each', aiozmq, 'aiozmq', 'futures'))
    return contenders


def list_cases(loops, flights, contenders):
    """Return the loop, the messages in flight, and the contender of each case."""
    return [
        (loop, flight, contender)
        for loop in loops
        for flight in flights
        for contender in contenders
        if flight == 1 or contender[-1] != 'futures'
    ]


def measure(cases, rounds, count):
    """Run all cases in each round; return the figures of each case."""
    figures = {case: [] for case in cases}
    for number in range(rounds):
        first = number % len(cases)  # each round begins with another case
        for case in cases[first:] + cases[:first]:
            loop, flight, (_name, python, library, style) = case
            messages = count if flight == 1 else FACTOR * count
            figures[case].append(run_there(python, library, loop, style, messages, flight))
    return figures


def report(figures):
    """Write the table."""
    columns = ('median/s', 'min/s', 'max/s', 'ratio', 'median us', 'p99 us')
    sys.stdout.write(f'{"":46}' + ''.join(f'{column:>10}' for column in columns) + '\n')
    beside = {}
    for (loop, flight, (name, *_rest)), rounds in figures.items():
        rates, medians, p99s = zip(*rounds, strict=True)
        beside.setdefault((loop, flight), rates)
        ratios = [mine / other for mine, other in zip(rates, beside[loop, flight], strict=True)]
        title = f'{loop}, {flight} in flight, {name}'
        line = f'{title:46}{median(rates):10.0f}{min(rates):10.0f}{max(rates):10.0f}'
        line += f'{median(ratios):10.2f}'
        if flight == 1:
            line += f'{median(medians):10.0f}{median(p99s):10.0f}'
        sys.stdout.write(f'{line}\n')


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--aiozmq', metavar='PYTHON', help='compare with its aiozmq')
    parser.add_argument('--rounds', type=int, default=11, help='rounds (11)')
    parser.add_argument('--count', type=int, default=2000, help='messages of a case (2000)')
    parser.add_argument('--flight', type=int, default=256, help='most messages in flight (256)')
    parser.add_argument('--loop', choices=LOOPS, help='this loop only')
    parser.add_argument('--run', nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        _library, loop, style, count, flight = arguments.run
        run_here(loop, style, int(count), int(flight))
        return
    loops = [arguments.loop] if arguments.loop else list(LOOPS)
    cases = list_cases(loops, (1, arguments.flight), list_contenders(arguments.aiozmq))
    version = '.'.join(map(str, sys.version_info[:3]))
    sys.stdout.write(
        f'Python {version}, pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}, '
        f'{os.cpu_count()} processors, {arguments.rounds} rounds of {arguments.count} messages, '
        f'{FACTOR * arguments.count} where {arguments.flight} are in flight\n'
    )
    report(measure(cases, arguments.rounds, arguments.count))


if __name__ == '__main__':
    main()
