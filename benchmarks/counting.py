# SPDX-License-Identifier: ZPL-2.1
"""What the statistics of a process cost: calls with them and without them, in one run.

Without them, the handler does not take the time, and another thread does not read messages while
a method runs. Each server has its turns, one after the other; the ratio is that of the processor
time of the servers, and that of their rates. ``--rounds`` and ``--calls`` are the numbers of turns,
and of the calls in each.

After that, the time of the answer to ``pyams_zmq.stats`` while a method sleeps, and while one
computes.
"""

import argparse
import json
import os
import time
from collections.abc import Awaitable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from threading import Thread
from time import perf_counter

import zmq

from pyams_zmq.client import ZMQClient
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.handler.errors import error_reply
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import running
from pyams_zmq.wire.body import encode_reply
from pyams_zmq.wire.message import encode

IN_FLIGHT = 64
PAUSE = 0.02  # seconds between two questions
TICKS = os.sysconf('SC_CLK_TCK')


class Methods:
    """What is called."""

    def echo(self, args):
        """Return the arguments."""
        return args

    def sleep(self, seconds):
        """Wait."""
        time.sleep(seconds)

    def compute(self, seconds):
        """Use the processor."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass


class Uncounted(ZMQMessageHandler):
    """Handles messages without counting them."""

    handler = Methods

    def __call__(self, frames):
        """Handle a message."""
        try:
            method, call = self._prepare(frames)
            if call is not None and method.in_thread:
                self._defer(method, 0.0).run(self._threads, call)
                return
            result = method.call(*frames) if call is None else call()
            if type(result) in (list, tuple, dict, str, int, type(None)):
                reply = encode(result)
            elif isinstance(result, Awaitable):
                self._defer(method, 0.0).wait_for_result(result)
                return
            else:
                reply = encode_reply(result)
        except BaseException as error:  # noqa: BLE001 - the peer waits for a reply
            reply = error_reply(error)
        self._send(reply)


class UnattendedProcess(ZMQProcess):
    """A process without statistics."""

    def _attend(self, stream):
        pass


def processor_time(pid):
    """Return the processor time of a process and its threads, in seconds."""
    fields = Path(f'/proc/{pid}/schedstat').read_text().split()
    tasks = Path(f'/proc/{pid}/task').glob('*/schedstat')
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9 if fields else 0.0


def turn(socket, pid, calls, in_flight):
    """Make calls, and return the processor time of the server and the seconds."""
    message = json.dumps(['echo', {'path': '/this/is/my/path', 'format': 'JPEG'}]).encode()
    before, began = processor_time(pid), perf_counter()
    sent = 0
    for received in range(calls):
        while sent < min(calls, received + in_flight):
            socket.send_multipart([b'', message])
            sent += 1
        reply = socket.recv_multipart()[-1]
        if not reply.startswith(b'{'):
            raise RuntimeError(f'not the reply: {reply!r}')
    return processor_time(pid) - before, perf_counter() - began


def ask(address, method, seconds):
    """Ask for the statistics while a method runs; return the milliseconds of each answer."""
    found = []
    with ZMQClient(address) as caller, ZMQClient(address) as asker:
        thread = Thread(target=caller.call, args=(method, seconds))
        thread.start()
        while asker.call('pyams_zmq.stats')['in_flight'] == 0 and thread.is_alive():
            pass
        while thread.is_alive():
            began = perf_counter()
            asker.call('pyams_zmq.stats')
            found.append((perf_counter() - began) * 1000)
            thread.join(PAUSE)
    return found


def main():
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=25)
    parser.add_argument('--calls', type=int, default=4000)
    parser.add_argument('--seconds', type=float, default=3.0, help='of a method that is busy')
    args = parser.parse_args()
    servers = {
        'with statistics': ZMQProcess('127.0.0.1:0', Methods),
        'without': UnattendedProcess('127.0.0.1:0', Uncounted),
    }
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        peers = {}
        for name, server in servers.items():
            stack.enter_context(running(server))
            socket = peers[name] = stack.enter_context(context.socket(zmq.DEALER))
            socket.connect(server.bound_address)
        for in_flight in (1, IN_FLIGHT):
            ratios = []
            for number in range(args.rounds + 1):
                order = list(servers) if number % 2 else list(reversed(servers))
                found = {
                    name: turn(peers[name], servers[name].pid, args.calls, in_flight)
                    for name in order
                }
                (with_cpu, with_time), (cpu, seconds) = (found[name] for name in servers)
                if number:  # the first round is for warming up
                    ratios.append((with_cpu / cpu, seconds / with_time, cpu / args.calls))
            cpu, rate, cost = (median(values) for values in zip(*ratios, strict=True))
            print(
                f'{in_flight} in flight: {cpu:.3f} times the processor time of the server '
                f'({cost * 1e6:.1f} µs a call without statistics), {rate:.3f} times the rate'
            )
        for method in 'sleep', 'compute':
            times = ask(servers['with statistics'].bound_address, method, args.seconds)
            print(
                f'stats while a method is busy ({method}): median {median(times):.1f} ms, longest '
                f'{max(times):.1f} ms'
            )


if __name__ == '__main__':
    main()
