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

"""Round trips per second: PyAMS_zmq beside a bare pyzmq REQ/REP pair, interleaved in one run.

The bare server is a forked process with a blocking loop and the JSON of the standard library.
Each round runs every contender once; the table shows the median over the rounds.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
from contextlib import ExitStack
from statistics import median
from time import perf_counter

import zmq

from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.process import ZMQProcess
from pyams_zmq.socket import zmq_response, zmq_socket

MESSAGE = ['echo', {'path': '/this/is/my/path', 'format': 'JPEG'}]
REPLY = [200, MESSAGE[1]]


class EchoHandler:
    """Handler of the server."""

    def echo(self, args):
        """Return the arguments."""
        return [200, args]


class EchoMessageHandler(ZMQMessageHandler):
    """Message handler of the server."""

    handler = EchoHandler


def serve_bare(writer):
    """Answer messages with nothing but pyzmq."""
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.bind('tcp://127.0.0.1:*')
        writer.send(socket.last_endpoint.decode())
        while True:
            _kind, args = json.loads(socket.recv())
            socket.send(json.dumps([200, args]).encode())


def bare_kept(socket, count):
    """Send messages on one socket."""
    for _ in range(count):
        socket.send(json.dumps(MESSAGE).encode())
        reply = json.loads(socket.recv())
    return reply


def bare_per_message(context, address, count):
    """Open a socket for each message."""
    for _ in range(count):
        with context.socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.connect(address)
            reply = bare_kept(socket, 1)
    return reply


def pyams_kept(socket, count):
    """Send messages on one socket."""
    for _ in range(count):
        socket.send_json(MESSAGE)
        reply = zmq_response(socket)
    return reply


def pyams_per_message(address, count):
    """Open a socket for each message."""
    for _ in range(count):
        socket = zmq_socket(address)
        socket.send_json(MESSAGE)
        reply = zmq_response(socket)
    return reply


def measure(contenders, rounds, count):
    """Run all contenders in turn, return the rates of each."""
    rates = {name: [] for name in contenders}
    gc.disable()
    for number in range(rounds + 1):
        names = list(contenders)
        turn = number % len(names)  # nobody always comes after the same one
        for name in names[turn:] + names[:turn]:
            start = perf_counter()
            reply = contenders[name](count)
            seconds = perf_counter() - start
            if reply != REPLY:
                raise RuntimeError(f'{name} got {reply!r}')
            if number:  # the first round warms up
                rates[name].append(count / seconds)
        gc.collect()
    gc.enable()
    return rates


def report(rates):
    """Write the table."""
    medians = {name: median(values) for name, values in rates.items()}
    write = sys.stdout.write
    write(f'{"":32}{"median/s":>10}{"min/s":>10}{"max/s":>10}{"us":>8}{"ratio":>8}\n')
    for kind in ('kept socket', 'socket per message'):
        for name in (f'bare pyzmq, {kind}', f'PyAMS_zmq, {kind}'):
            rate = medians[name]
            ratio = rate / medians[f'bare pyzmq, {kind}']
            values = rates[name]
            write(
                f'{name:32}{rate:10.0f}{min(values):10.0f}{max(values):10.0f}'
                f'{1e6 / rate:8.0f}{ratio:8.2f}\n'
            )


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=15, help='rounds (15)')
    parser.add_argument('--count', type=int, default=200, help='messages of a turn (200)')
    arguments = parser.parse_args()

    fork = multiprocessing.get_context('fork')
    reader, writer = fork.Pipe(duplex=False)
    bare = fork.Process(target=serve_bare, args=(writer,), daemon=True)
    bare.start()
    bare_address = reader.recv()
    process = ZMQProcess('127.0.0.1', EchoMessageHandler)
    process.start()
    address = process.wait_ready()
    try:
        with ExitStack() as stack:
            context = stack.enter_context(zmq.Context())
            bare_socket = stack.enter_context(context.socket(zmq.REQ))
            bare_socket.connect(bare_address)
            socket = stack.enter_context(zmq_socket(address))
            contenders = {
                'bare pyzmq, kept socket': lambda count: bare_kept(bare_socket, count),
                'PyAMS_zmq, kept socket': lambda count: pyams_kept(socket, count),
                'bare pyzmq, socket per message': lambda count: bare_per_message(
                    context, bare_address, count
                ),
                'PyAMS_zmq, socket per message': lambda count: pyams_per_message(address, count),
            }
            rates = measure(contenders, arguments.rounds, arguments.count)
    finally:
        process.stop()
        bare.kill()
        bare.join()
    version = '.'.join(map(str, sys.version_info[:3]))
    sys.stdout.write(
        f'Python {version}, pyzmq {zmq.__version__}, libzmq {zmq.zmq_version()}, '
        f'{os.cpu_count()} processors, {arguments.rounds} rounds of {arguments.count} messages\n'
    )
    report(rates)


if __name__ == '__main__':
    main()
