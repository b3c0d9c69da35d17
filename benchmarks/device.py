# SPDX-License-Identifier: ZPL-2.1
"""Devices of PyAMS_zmq beside a bare `zmq.proxy` and those of pyzmq, interleaved in one run.

Each device runs in a process of its own, between a source here and a sink, or a server, in another
process. Each round runs every contender once; the table shows the median over the rounds.
"""

import argparse
import gc
import multiprocessing
import os
import sys
from contextlib import ExitStack
from statistics import median
from time import perf_counter

import zmq
from zmq.devices import monitored_queue

from pyams_zmq.device import ProcessDevice, ProcessMonitoredQueue, ProcessProxy

FORK = multiprocessing.get_context('fork')
LOCAL = 'tcp://127.0.0.1:*'


def run_bare(writer, loop, types):
    """Run a loop of pyzmq for ever."""
    with zmq.Context() as context, ExitStack() as stack:
        sockets = [stack.enter_context(context.socket(kind)) for kind in types]
        for socket in sockets:
            socket.bind(LOCAL)
        writer.send([socket.last_endpoint.decode() for socket in sockets[:2]])
        loop(*sockets)


def drain(address, pipe):
    """Tell the seconds in which so many messages came in, as often as asked."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.connect(address)
        while True:
            count = pipe.recv()
            socket.recv()
            start = perf_counter()
            for _ in range(count - 1):
                socket.recv()
            pipe.send(perf_counter() - start)


def echo(address, pipe):
    """Send back what comes in."""
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.connect(address)
        pipe.send(True)
        while True:
            socket.send(socket.recv())


class Contender:
    """A device, and what is behind it.

    :param stack: ends them
    :param types: types of the sockets
    :param factory: of a device of ours, or None
    :param loop: of pyzmq, or None
    :param native: choice of the loop of a device of ours
    """

    def __init__(self, stack, types, factory=None, loop=None, native=True):
        self.is_stream = types[0] == zmq.PULL
        has_monitor = types[-1] == zmq.PUB
        if factory is None:
            reader, writer = FORK.Pipe()
            self.fork(stack, run_bare, writer, loop, types)
            in_address, out_address = reader.recv()
        else:
            device = factory(*types) if has_monitor else factory(zmq.QUEUE, *types)
            device.native = native
            device.bind_in(LOCAL)
            device.bind_out(LOCAL)
            if has_monitor:
                device.bind_mon(LOCAL)
            stack.enter_context(device)
            in_address, out_address = device.in_address, device.out_address
        self.pipe, pipe = FORK.Pipe()
        self.fork(stack, drain if self.is_stream else echo, out_address, pipe)
        self.socket = stack.enter_context(
            zmq.Context.instance().socket(zmq.PUSH if self.is_stream else zmq.REQ)
        )
        self.socket.linger = 0
        self.socket.connect(in_address)

    @staticmethod
    def fork(stack, function, *arguments):
        """Run a function in a process that ends with the benchmark."""
        process = FORK.Process(target=function, args=arguments, daemon=True)
        process.start()
        stack.callback(process.join)
        stack.callback(process.kill)

    def run(self, count, message):
        """Send messages; return the rate per second."""
        if self.is_stream:
            self.pipe.send(count)
            for _ in range(count):
                self.socket.send(message)
            return (count - 1) / self.pipe.recv()
        start = perf_counter()
        for _ in range(count):
            self.socket.send(message)
            self.socket.recv()
        return count / (perf_counter() - start)


def measure(contenders, rounds, count, message):
    """Run all contenders in turn, return the rates of each."""
    rates = {name: [] for name in contenders}
    gc.disable()
    for number in range(rounds + 1):
        names = list(contenders)
        turn = number % len(names)  # nobody always comes after the same one
        for name in names[turn:] + names[:turn]:
            rate = contenders[name].run(count, message)
            if number:  # the first round warms up
                rates[name].append(rate)
        gc.collect()
    gc.enable()
    return rates


def report(title, rates):
    """Write a table; the first one is what the others are compared with."""
    write = sys.stdout.write
    write(f'{title:44}{"median/s":>10}{"min/s":>10}{"max/s":>10}{"ratio":>8}\n')
    base = next(iter(rates.values()))
    for name, values in rates.items():
        # Ratios within a round: the machine drifts from one to the next.
        ratio = median(one / other for one, other in zip(values, base, strict=True))
        write(
            f'{name:44}{median(values):10.0f}{min(values):10.0f}{max(values):10.0f}{ratio:8.2f}\n'
        )


def compare(title, types, rounds, count, message):
    """Compare what forwards between sockets of some types."""
    with ExitStack() as stack:
        pair, with_monitor = types, (*types, zmq.PUB)
        contenders = {
            'bare zmq.proxy': Contender(stack, pair, loop=zmq.proxy),
            'ProcessDevice': Contender(stack, pair, ProcessDevice),
            'ProcessDevice, native = False': Contender(stack, pair, ProcessDevice, native=False),
            'bare zmq.proxy, PUB monitor': Contender(stack, with_monitor, loop=zmq.proxy),
            'ProcessProxy': Contender(stack, with_monitor, ProcessProxy),
            'monitored_queue of pyzmq': Contender(stack, with_monitor, loop=monitored_queue),
            'ProcessMonitoredQueue': Contender(stack, with_monitor, ProcessMonitoredQueue),
        }
        report(title, measure(contenders, rounds, count, message))


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=11, help='rounds (11)')
    parser.add_argument('--count', type=int, default=20_000, help='messages of a stream (20000)')
    arguments = parser.parse_args()
    version = '.'.join(map(str, sys.version_info[:3]))
    sys.stdout.write(
        f'Python {version}, pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}, '
        f'{os.cpu_count()} processors, {arguments.rounds} rounds\n'
    )
    rounds, count = arguments.rounds, arguments.count
    stream, requests = (zmq.PULL, zmq.PUSH), (zmq.ROUTER, zmq.DEALER)
    compare('stream of 100 bytes', stream, rounds, count, b'x' * 100)
    compare('stream of 100 kB', stream, rounds, count // 20, b'x' * 100_000)
    compare('round trips of 100 bytes', requests, rounds, count // 20, b'x' * 100)


if __name__ == '__main__':
    main()
