# SPDX-License-Identifier: ZPL-2.1
"""Compare devices of PyAMS_zmq with a bare `zmq.proxy` and the monitored queue of pyzmq.

Each device runs in a process, between a source in this process and a sink or server in a third one.
Each round runs all contenders, one after the other; the table shows the median of the rounds.
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
    """Run a loop of pyzmq until the process is killed."""
    with zmq.Context() as context, ExitStack() as stack:
        sockets = [stack.enter_context(context.socket(kind)) for kind in types]
        for socket in sockets:
            socket.bind(LOCAL)
        writer.send([socket.last_endpoint.decode() for socket in sockets[:2]])
        loop(*sockets)


def drain(address, pipe):
    """Receive as many messages as the pipe asks for, send the seconds back; repeat."""
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
    """Reply to each request with its own content."""
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.connect(address)
        pipe.send(True)
        while True:
            socket.send(socket.recv())


class Contender:
    """A device, its source, and its sink or server.

    :param stack: exit stack that ends them
    :param types: types of the sockets
    :param factory: class of the device, None for a loop of pyzmq
    :param loop: loop of pyzmq
    :param native: whether a device may use the loop of libzmq
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
        first = number % len(names)  # no contender always runs first
        for name in names[first:] + names[:first]:
            rate = contenders[name].run(count, message)
            if number:  # the first round warms up
                rates[name].append(rate)
        gc.collect()
    gc.enable()
    return rates


def report(title, rates):
    """Write a table with ratios to the first contender."""
    write = sys.stdout.write
    write(f'{title:44}{"median/s":>10}{"min/s":>10}{"max/s":>10}{"ratio":>8}\n')
    base = next(iter(rates.values()))
    for name, values in rates.items():
        # Ratios within a round: the speed of the machine changes between rounds.
        ratio = median(one / other for one, other in zip(values, base, strict=True))
        write(
            f'{name:44}{median(values):10.0f}{min(values):10.0f}{max(values):10.0f}{ratio:8.2f}\n'
        )


def compare(title, types, rounds, count, message):
    """Compare the contenders for sockets of these types."""
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
