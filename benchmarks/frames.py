# SPDX-License-Identifier: ZPL-2.1
"""Compare a picture in a binary frame with the same one in base64: time and memory of a call.

Each round makes some calls of each kind, in alternating order, with a new client and a new process:
`there` sends a picture, `there and back` also gets it in the reply. The memory is the sum by which
both processes grow at most (`VmHWM` in /proc).
"""

import argparse
import multiprocessing
import os
from base64 import b64decode, b64encode
from pathlib import Path
from statistics import median
from time import perf_counter

from pyams_zmq.client import ZMQClient
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.message import Multipart
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import running

MIB = 1024 * 1024
FORK = multiprocessing.get_context('fork')
ROW = '{:<16}{:>12}{:>12}{:>18}'
LIMIT = 256 * MIB  # of the client and of the process: base64 takes a third more


class Pictures:
    """Takes and returns pictures."""

    def take(self, picture, args):
        """Return the size."""
        return [200, len(picture)]

    def copy(self, picture, args):
        """Return the picture."""
        return Multipart([200, len(picture)], [picture])

    def take_text(self, text):
        """Return the size."""
        return [200, len(b64decode(text))]

    def copy_text(self, text):
        """Return the picture."""
        return [200, b64encode(b64decode(text)).decode()]


class PictureMessageHandler(ZMQMessageHandler):
    """Serves Pictures."""

    handler = Pictures


class Process(ZMQProcess):
    """Accepts large messages."""

    max_message_size = LIMIT


def send(client, picture):
    """Send a picture as it is."""
    return client.call('take', frames=[picture])


def copy(client, picture):
    """Send it, and get it back."""
    return len(client.call('copy', frames=[picture]).frames[0])


def send_text(client, picture):
    """Send it as a text."""
    return client.call('take_text', b64encode(picture).decode())


def copy_text(client, picture):
    """Send it as a text, and get it back."""
    return len(b64decode(client.call('copy_text', b64encode(picture).decode())))


KINDS = {'there': (send, send_text), 'there and back': (copy, copy_text)}


def read_memory(pid, name):
    """Return a number of bytes that the system knows of a process."""
    for line in Path(f'/proc/{pid}/status').read_text(encoding='ascii').splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def call_in_child(call, process, picture, count, pipe):
    """Call a process; send the seconds of each call, and by how many bytes both have grown."""
    pids = (os.getpid(), process.pid)
    before = sum(read_memory(pid, 'VmRSS') for pid in pids)
    seconds = []
    with ZMQClient(process.bound_address, timeout=60) as client:
        client.max_message_size = LIMIT
        for _ in range(count):
            start = perf_counter()
            if call(client, picture) != len(picture):
                raise ValueError(f'{call.__name__} has not returned the size of the picture')
            seconds.append(perf_counter() - start)
    pipe.send((median(seconds), sum(read_memory(pid, 'VmHWM') for pid in pids) - before))


def measure(call, picture, count):
    """Return the median seconds of some calls, and the bytes by which both processes grow."""
    with running(Process, handler=PictureMessageHandler) as process:
        here, there = FORK.Pipe()
        child = FORK.Process(target=call_in_child, args=(call, process, picture, count, there))
        child.start()
        result = here.recv()
        child.join()
    return result


def main():
    """Print the medians, and the medians of the ratios within a round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--calls', type=int, default=5, help='calls of each kind in a round')
    parser.add_argument('--size', type=float, default=12, help='MiB of the picture')
    options = parser.parse_args()
    picture = os.urandom(int(options.size * MIB))
    print(ROW.format('', 'frames', 'base64', 'base64 / frames'))
    for name, calls in KINDS.items():
        rounds = []
        for number in range(options.rounds):
            order = calls if number % 2 else calls[::-1]
            results = {call: measure(call, picture, options.calls) for call in order}
            rounds.append([results[call] for call in calls])
        for index, unit, scale in ((0, 'ms', 1000), (1, 'MiB', 1 / MIB)):
            values = [(frames[index] * scale, text[index] * scale) for frames, text in rounds]
            frames, text = (median(column) for column in zip(*values, strict=True))
            ratio = median(one / other for other, one in values)
            cells = (f'{frames:.1f} {unit}', f'{text:.1f} {unit}', f'{ratio:.2f}')
            print(ROW.format(name, *cells))


if __name__ == '__main__':
    main()
