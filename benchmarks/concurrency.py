# SPDX-License-Identifier: ZPL-2.1
"""Latency of a fast method while slow methods run in the same process.

Each row is a kind of slow method that occupies the other slots of a process with `concurrency`; in
the first row no slow method runs. Latencies are in milliseconds, on a kept connection.
"""

import argparse
import asyncio
import sys
import time
from statistics import median, quantiles

from pyams_zmq.client import ZMQClient
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.process import ZMQProcess

PERCENT = 100


class Slow:
    """Methods that are slow in different ways."""

    def ping(self, args):
        """Answer at once."""
        return [200, args]

    def wait(self, seconds):
        """Block a thread, like a call of another program."""
        time.sleep(seconds)
        return [200, None]

    def compute(self, seconds):
        """Hold the interpreter lock."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))
        return [200, None]

    async def wait_async(self, seconds):
        """Wait in the event loop."""
        await asyncio.sleep(seconds)
        return [200, None]


class SlowMessageHandler(ZMQMessageHandler):
    """Serves Slow."""

    handler = Slow


class Process(ZMQProcess):
    """Does not wait for slow methods when it stops."""

    concurrency = 8
    drain_timeout = 0.0


def measure(method, slow, seconds, count):
    """Return the milliseconds of each ping."""
    process = Process('127.0.0.1', SlowMessageHandler)
    process.start()
    try:
        with ZMQClient(process.wait_ready()) as client:
            client.call('ping', 1)
            for _ in range(slow if method else 0):
                client.send(method, seconds)
            time.sleep(0.2)  # until the slow methods have started
            latencies = []
            for number in range(count):
                start = time.perf_counter()
                if client.call('ping', number) != number:
                    raise RuntimeError('Reply to another message')
                latencies.append((time.perf_counter() - start) * 1000)
    finally:
        process.kill()
        process.join()
    return latencies


def main():
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--count', type=int, default=2000, help='pings of a row (2000)')
    parser.add_argument('--seconds', type=float, default=60, help='duration of a slow method (60)')
    arguments = parser.parse_args()
    sys.stdout.write(f'{"":28}{"median":>10}{"p99":>10}{"max":>10}\n')
    rows = [('', 0), ('wait', 1), ('wait', 7), ('wait_async', 7), ('compute', 1), ('compute', 7)]
    for method, slow in rows:
        values = measure(method, slow, arguments.seconds, arguments.count)
        title = f'{slow} times {method}' if method else 'nothing else'
        p99 = quantiles(values, n=PERCENT)[-1]
        sys.stdout.write(f'{title:28}{median(values):10.2f}{p99:10.2f}{max(values):10.2f}\n')


if __name__ == '__main__':
    main()
