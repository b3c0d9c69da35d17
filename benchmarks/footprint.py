# SPDX-License-Identifier: ZPL-2.1
"""Cost of a process besides its calls: start, memory, idle connections, growth over many calls.

Each figure is compared with a bare pyzmq child that was forked from the same parent.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

import zmq

from contenders.bare import ReqRep, call, open_socket
from contenders.base import KIND, TIMEOUT, check, make_args
from contenders.ours import LOCAL, EchoMessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.process import ZMQProcess
from results import print_table

FORK = multiprocessing.get_context('fork')
ARGS = make_args(60)
WARM_UP = 1000
"""Calls after which a process has allocated what it needs"""

MB = 1024 * 1024
GOALS = {
    'start to ready, ms': 60,
    'memory (PSS) above the bare child, MB': 10,
    'median of an active client, idle connections to none': 1.1,
    'processor time of a call, last quarter to first': 1.1,
    'growth of the server, MB': 1,
    'growth of the client, MB': 1,
}
"""Upper limit of each figure"""


def serve_bare(writer):
    """Serve with pyzmq only."""
    ReqRep().serve(writer.send)


@contextmanager
def bare():
    """Run a bare child; yield it and its address."""
    reader, writer = FORK.Pipe(duplex=False)
    process = FORK.Process(target=serve_bare, args=(writer,), daemon=True)
    process.start()
    try:
        if not reader.poll(TIMEOUT):
            raise TimeoutError('The bare child does not start')
        yield process, reader.recv()
    finally:
        process.kill()
        process.join()


@contextmanager
def ours():
    """Run a ZMQProcess; yield it and its address."""
    process = ZMQProcess(LOCAL, EchoMessageHandler)
    process.start()
    try:
        yield process, process.wait_ready()
    finally:
        process.stop()
        process.join()


def run_calls(exchange, count):
    """Make calls; return the seconds of each."""
    times = []
    for _ in range(count):
        start = perf_counter()
        check(exchange(ARGS), ARGS)
        times.append(perf_counter() - start)
    return times


@contextmanager
def calling(address):
    """Yield a function that calls over a bare REQ socket."""
    with open_socket(address, zmq.REQ) as socket:
        yield lambda args: call(socket, args)


def read_memory(pid, field):
    """Return a memory figure of a process in bytes: `Pss` or `Rss`."""
    for line in Path(f'/proc/{pid}/smaps_rollup').read_text(encoding='ascii').splitlines():
        name, number, *_unit = line.split()
        if name == f'{field}:':
            return int(number) * 1024
    raise LookupError(field)


def measure_start(runs):
    """Compare the start of a process with that of a bare child."""
    times = {bare: [], ours: []}
    for _ in range(runs + 1):
        for make, values in times.items():
            start = perf_counter()
            with make():
                values.append(perf_counter() - start)
    yield 'start to ready, ms', median(times[ours][1:]) * 1000  # the first one warms up
    yield 'start to ready of the bare child, ms', median(times[bare][1:]) * 1000


def measure_memory(runs, calls=WARM_UP):
    """Compare the memory of both after some calls; they share the pages of this process."""
    figures = []
    for _ in range(runs):
        with bare() as (plain, plain_address), ours() as (process, address):
            for target in (plain_address, address):
                with calling(target) as exchange:
                    run_calls(exchange, calls)
            figures.append((read_memory(process.pid, 'Pss'), read_memory(plain.pid, 'Pss')))
    yield 'memory (PSS) above the bare child, MB', median(one - two for one, two in figures) / MB
    yield 'memory (PSS) of the bare child, MB', median(two for _one, two in figures) / MB


def stay_idle(address, number, channel):
    """Open connections, call once on each, keep them idle until a message arrives."""
    with zmq.Context() as context:
        context.max_sockets = number + 1
        sockets = []
        for _ in range(number):
            socket = context.socket(zmq.REQ)
            socket.linger = 0
            socket.rcvtimeo = TIMEOUT * 1000
            socket.connect(address)
            sockets.append(socket)
            check(call(socket, ARGS), ARGS)
        channel.send('ready')
        channel.recv()
        context.destroy(0)


@contextmanager
def idle_connections(address, number):
    """Hold idle connections in another process."""
    channel, other = FORK.Pipe()
    process = FORK.Process(target=stay_idle, args=(address, number, other), daemon=True)
    process.start()
    try:
        if not channel.poll(TIMEOUT + number / 50):
            raise TimeoutError(f'{number} connections could not be made')
        channel.recv()
        yield
    finally:
        process.kill()
        process.join()


def measure_idle(number, rounds, calls):
    """Compare a process that has idle connections with one that has none."""
    ratios = []
    with (
        ours() as (_quiet, quiet),
        ours() as (_crowded, crowded),
        idle_connections(crowded, number),
        calling(quiet) as one,
        calling(crowded) as other,
    ):
        for _ in range(rounds + 1):
            alone = median(run_calls(one, calls))
            ratios.append(median(run_calls(other, calls)) / alone)
    yield 'median of an active client, idle connections to none', median(ratios[1:])


def read_processor_time(pid):
    """Return the seconds of processor time that a process has used."""
    text = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8')
    fields = text.rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def measure_flat(calls, slices=20, turns=10):
    """Make many calls; compare the cost of the last ones with that of the first ones.

    Turns of a bare pair alternate with ours, because the speed of the processor varies.
    """
    size = max(1, calls // slices // turns)
    with (
        bare() as (plain, plain_address),
        ours() as (process, address),
        ZMQClient(address, timeout=TIMEOUT) as client,
        calling(plain_address) as exchange,
    ):

        def use(ask, server, count):
            start = sum(map(read_processor_time, (server.pid, 'self')))
            for _ in range(count):
                check(ask(ARGS), ARGS)
            return sum(map(read_processor_time, (server.pid, 'self'))) - start

        def ask(args):
            return client.request([KIND, args])

        use(ask, process, min(WARM_UP, calls))
        use(exchange, plain, min(WARM_UP, calls))
        before = [read_memory(pid, 'Rss') for pid in (process.pid, 'self')]
        used = []
        for _ in range(slices):
            ticks = [
                (use(ask, process, size), use(exchange, plain, size // 2)) for _ in range(turns)
            ]
            one, other = map(sum, zip(*ticks, strict=True))
            used.append(one / other if other else 1)  # a few calls may take no tick
        after = [read_memory(pid, 'Rss') for pid in (process.pid, 'self')]
    quarter = max(1, slices // 4)
    first, last = median(used[:quarter]), median(used[-quarter:])
    yield 'processor time of a call, last quarter to first', last / first if first else 1
    for name, old, new in zip(('server', 'client'), before, after, strict=True):
        yield f'growth of the {name}, MB', (new - old) / MB


def judge(name, value):
    """Return the text for the goal of a figure, empty if it has none."""
    most = GOALS.get(name)
    if most is None:
        return ''
    return f'at most {most:g}: {"reached" if value <= most else "missed"}'


def measure(arguments):
    """Yield the names and values of all figures."""
    runs = arguments.runs
    yield from measure_start(runs)
    yield from measure_memory(max(1, runs // 3))
    yield from measure_idle(arguments.idle, runs, max(10, arguments.calls // 1000))
    yield from measure_flat(arguments.calls)


def parse_arguments(args=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--runs', type=int, default=15, help='starts, and rounds of the other measures (15)')
    add('--idle', type=int, default=1000, help='idle connections (1000)')
    add('--calls', type=int, default=200_000, help='calls whose cost is compared (200000)')
    add('--save', metavar='FILE', help='save the figures as JSON')
    return parser.parse_args(args)


def main():
    """Run the benchmark."""
    arguments = parse_arguments()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    figures = dict(measure(arguments))
    if arguments.save:
        Path(arguments.save).write_text(json.dumps(figures, indent=1), encoding='utf-8')
    rows = [[name, f'{value:.2f}', judge(name, value)] for name, value in figures.items()]
    title = f'{arguments.idle} idle connections, {arguments.calls} calls'
    print_table([[title, 'median', 'goal'], *rows], sys.stdout.write)


if __name__ == '__main__':
    main()
