# SPDX-License-Identifier: ZPL-2.1
"""A pool: speed-up of two workers, cost of the broker, and the effect of kills on callers.

The echo through the broker is compared with `zmq.proxy` and one REP worker that does the same work
(decode JSON, call, encode JSON), and with a ZMQProcess without a broker. Their rounds alternate.
"""

import argparse
import hashlib
import multiprocessing
import os
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests/support'))

from handlers import Process
from pool_checks import kill_workers
from pool_handlers import Pool
from pyams_zmq.message import decode_request, encode
from pyams_zmq.testing import running

write = sys.stdout.write


def proxy(channel, folder):
    """Run `zmq.proxy`."""
    context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    port = front.bind_to_random_port('tcp://127.0.0.1')
    back.bind(f'ipc://{folder}/back')
    channel.send(f'tcp://127.0.0.1:{port}')
    zmq.proxy(front, back)


def rep_worker(folder, through_handler):
    """Answer messages in a minimal loop."""
    context = zmq.Context()
    socket = context.socket(zmq.REP)
    socket.connect(f'ipc://{folder}/back')
    while True:
        if through_handler:
            _name, args = decode_request(socket.recv())
            socket.send(encode([200, args]))
        else:
            socket.send(socket.recv())


@contextmanager
def proxied(*, through_handler=True):
    """Run a proxy and its worker; yield the address."""
    parent, child = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            multiprocessing.Process(target=proxy, args=(child, folder)),
            multiprocessing.Process(target=rep_worker, args=(folder, through_handler)),
        ]
        for process in processes:
            process.start()
        try:
            yield parent.recv()
        finally:
            for process in processes:
                process.kill()
                process.join()


def call(address, message, in_flight, seconds):
    """Keep *in_flight* messages in flight for some seconds; return the replies per second."""
    data = encode(message)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(address)
        for _ in range(in_flight):
            socket.send_multipart([b'', data])
        count, start = 0, perf_counter()
        while perf_counter() < start + seconds:
            socket.recv_multipart()
            count += 1
            socket.send_multipart([b'', data])
        rate = count / (perf_counter() - start)
        for _ in range(in_flight):
            socket.recv_multipart()
    return rate


def compare(addresses, message, in_flight, rounds, seconds):
    """Measure several services in turn; return the rates of each."""
    rates = {name: [] for name in addresses}
    for _ in range(rounds):
        for name, address in addresses.items():
            rates[name].append(call(address, message, in_flight, seconds))
    return rates


def compute(rounds):
    """Do the work of the CPU-bound method."""
    digest = b''
    for _ in range(rounds):
        digest = hashlib.sha256(digest).digest()


def compare_bare(work, rounds):
    """Return the calls per second of one and of two processes without a pool."""
    rates = {1: [], 2: []}
    for _ in range(rounds):
        for count, values in rates.items():
            processes = [
                multiprocessing.Process(target=compute, args=(work * 20,)) for _ in range(count)
            ]
            start = perf_counter()
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            values.append(20 * count / (perf_counter() - start))
    return rates


def run_cpu(args):
    """Compare one worker with two, and with bare processes."""
    bare = compare_bare(args.work, args.rounds)
    ratios = [two / one for one, two in zip(*bare.values(), strict=True)]
    write(f'    2 bare processes / 1 {median(ratios):>26.2f} (best {max(ratios):.2f})\n')
    with ExitStack() as stack:
        addresses = {
            f'{count} workers': stack.enter_context(running(Pool, workers=count)).bound_address
            for count in (1, 2)
        }
        rates = compare(addresses, ['compute', args.work], 4, args.rounds, args.seconds)
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    for name, values in rates.items():
        write(f'CPU-bound, {name:<22} {median(values):>9.1f} calls/s\n')
    write(f'    2 workers / 1 worker   {median(ratios):>22.2f} (best {max(ratios):.2f})\n')


def run_echo(args):
    """Compare the broker with `zmq.proxy`."""
    with ExitStack() as stack:
        addresses = {
            'proxy': stack.enter_context(proxied()),
            'bare proxy': stack.enter_context(proxied(through_handler=False)),
            'ZMQProcess': stack.enter_context(running(Process)).bound_address,
            'pool': stack.enter_context(running(Pool, workers=1)).bound_address,
            'pool of 2': stack.enter_context(running(Pool, workers=2)).bound_address,
        }
        for in_flight in (1, 16):
            rates = compare(addresses, ['echo', 1], in_flight, args.rounds, args.seconds)
            for name, values in rates.items():
                ratio = median(a / b for a, b in zip(values, rates['proxy'], strict=True))
                write(
                    f'echo, {in_flight:>2} in flight, {name:<14} {median(values):>9.0f} calls/s'
                    f' {ratio:>6.2f}\n'
                )


def run_kills(args):
    """Kill workers repeatedly during calls."""
    with running(Pool) as process:
        replies, times = kill_workers(process, args.kills, args.kills * 100)
        lost = args.kills * 100 - len({number for number, _reply in replies})
        twice = len(replies) - len({number for number, _reply in replies})
        wrong = sum(number != reply for number, reply in replies)
        times.sort()
        write(
            f'{args.kills} kills during {args.kills * 100} calls: {lost} lost, {twice} twice, '
            f'{wrong} wrong; at full strength after {median(times):.3f} s (median), '
            f'{times[-1]:.3f} s (longest); {process.stats()["repeated"]} repeated\n'
        )


def main():
    """Run the parts that the command line names."""
    parts = {'cpu': run_cpu, 'echo': run_echo, 'kills': run_kills}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('parts', nargs='*', default=list(parts), help=', '.join(parts))
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--seconds', type=float, default=0.5, help='duration of a round')
    parser.add_argument('--work', type=int, default=20_000, help='hashes in a CPU-bound call')
    parser.add_argument('--kills', type=int, default=50)
    args = parser.parse_args()
    write(f'Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]}\n')
    for part in args.parts:
        parts[part](args)


if __name__ == '__main__':
    main()
