# SPDX-License-Identifier: ZPL-2.1
"""Jobs of a pool: how fast they are accepted and run, alone and beside other queues.

Each figure with a goal is measured beside its base in the same run, and both alternate.
"""

import argparse
import math
import multiprocessing
import os
import signal
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter, sleep

import zmq

from journal import fill, measure_disk
from pyams_zmq.client import ZMQClient
from pyams_zmq.message import encode
from pyams_zmq.wire.uuid7 import make_uuid7
from queues.compare import ENVIRONMENTS, compare
from queues.ours import make_pool

FORK = multiprocessing.get_context('fork')
SUBMITTERS = 4
FLIGHT = 64
"""Messages in flight of the client that submits many jobs"""

STALL = 0.02
"""Seconds that no call may take longer"""

LATER = 3600.0
"""Seconds until jobs begin that are only to be accepted"""

write = sys.stdout.write


def report(name, figure, goal=None, unit='ms', *, is_least=False):
    """Print a figure, its goal and whether it is reached."""
    text = f'{name:<58} {figure:>10.2f} {unit}'
    if goal is not None:
        is_reached = figure >= goal if is_least else figure <= goal
        word = 'reached' if is_reached else 'MISSED'
        text += f'   goal {">=" if is_least else "<="} {goal:.2f}: {word}'
    write(f'{text}\n')
    sys.stdout.flush()


def percentile(values, number):
    """Return a percentile of seconds, in milliseconds."""
    return quantiles(values, n=100)[number - 1] * 1000 if len(values) > 1 else math.nan


@contextmanager
def pool_in(folder, **options):
    """Run a pool; yield it and a client of it."""
    pool = make_pool(folder, **options)
    pool.start()
    try:
        pool.wait_ready()
        with ZMQClient(pool.bound_address) as client:
            yield pool, client
    finally:
        pool.stop()
        pool.join()


def in_child(function, *args):
    """Call a function in a child; return a function that waits for its result."""
    reader, writer = FORK.Pipe(duplex=False)
    child = FORK.Process(target=lambda: writer.send(function(*args)), daemon=True)
    child.start()
    writer.close()

    def wait():
        result = reader.recv()
        child.join()
        return result

    return wait


def repeat(address, method, seconds, pause=0.0):
    """Call, or submit, for some seconds; return the seconds of each.

    :param pause: seconds between the beginnings of two; 0 for one after the other
    """
    times = []
    with ZMQClient(address) as client:
        act = {
            'call': lambda: client.call('echo', 1),
            'submit': lambda: client.submit('work', 1, delay=LATER),
        }[method]
        act()
        start = due = perf_counter()
        end = start + seconds
        while start < end:
            act()
            times.append(perf_counter() - start)
            due += pause
            sleep(max(0.0, due - perf_counter()))
            start = perf_counter()
    return times


def measure_accept(args, folder):
    """Compare the time of one client until its job is accepted with that of the disk."""
    with pool_in(folder) as (_pool, client):
        bare, values = [], []
        for _ in range(args.jobs // 10):
            bare += measure_disk(folder / 'bare', 1, 10)
            for _ in range(10):
                start = perf_counter()
                client.submit('work', 1, delay=LATER)
                values.append(perf_counter() - start)
    report('fdatasync of a page, p50', percentile(bare, 50))
    report('fdatasync of a page, p99', percentile(bare, 99))
    goal = 2 * percentile(bare, 50) + 1
    report('one client, accepted, p50', percentile(values, 50), goal)
    report('one client, accepted, p99', percentile(values, 99))
    with pool_in(folder) as (pool, _client):
        waits = [
            in_child(repeat, pool.bound_address, 'submit', args.seconds)
            for _ in range(args.clients)
        ]
        values = [each for wait in waits for each in wait()]
    rate = len(values) / args.seconds
    report(f'{args.clients} clients, accepted', rate, 1000, '/s', is_least=True)
    report(f'{args.clients} clients, each, p50', percentile(values, 50))
    report(f'{args.clients} clients, each, p99', percentile(values, 99))


def measure_calls(args, folder):
    """Compare calls beside clients that submit with calls alone, and beside others that call."""
    beside = {'alone': None}
    for pace in (*args.paces, math.inf):
        for method in ('call', 'submit'):
            how = 'all the time' if pace == math.inf else f'{pace:g}/s'
            name = f'beside {SUBMITTERS} that {method}, {how}'
            beside[name] = method, SUBMITTERS / pace
    found = {name: [] for name in beside}
    with pool_in(folder, jobs=3) as (pool, _client):
        for _ in range(args.rounds):
            for name, other in beside.items():
                waits = [
                    in_child(repeat, pool.bound_address, other[0], args.seconds, other[1])
                    for _ in range(SUBMITTERS if other else 0)
                ]
                values = repeat(pool.bound_address, 'call', args.seconds)
                found[name].append((percentile(values, 50), percentile(values, 99)))
                for wait in waits:
                    wait()
    for name, values in found.items():
        report(f'calls {name}, p50', median(each[0] for each in values))
        report(f'calls {name}, p99', median(each[1] for each in values))
        if 'submit' not in name:
            continue
        # Clients that never pause take the processors, whatever they ask for.
        bases = [name.replace('submit', 'call'), *(['alone'] if beside[name][1] else [])]
        for base in bases:
            ratio = median(a[1] / b[1] for a, b in zip(values, found[base], strict=True))
            report(f'    p99 to those {base}', ratio, 1.1, 'times')


def measure_ended(args, folder):
    """Read lists of many ended jobs; call while they are removed, and for as long after that."""
    fill(folder / 'journal', args.ended)
    size = (folder / 'journal').stat().st_size
    report(f'{args.ended} ended jobs', size / 2**20, unit='MiB')
    with pool_in(folder, keep=1e6) as (pool, client):
        times = []
        for options in ({}, {'state': 'done'}, {'state': 'failed'}, {'type': 'convert'}):
            before = None
            for _ in range(args.pages):
                start = perf_counter()
                page = client.jobs(before=before, **options)
                times.append(perf_counter() - start)
                before = page[-1].id if page else None
        report('page of 100 jobs, p50', percentile(times, 50), 10)
        report('page of 100 jobs, p99', percentile(times, 99), 10)
    with pool_in(folder) as (pool, client):
        count, values = args.ended, []
        start = monotonic()
        while count and monotonic() < start + args.limit:
            values += repeat(pool.bound_address, 'call', 1.0)
            count = sum(client.call('pyams_zmq.stats')['jobs']['states'].values())
        took = monotonic() - start
        alone = repeat(pool.bound_address, 'call', took)
    report('jobs removed', (args.ended - count) / took, unit='/s')
    report('calls while jobs are removed, longest', max(values) * 1000, 20)
    report('calls after that, in as many seconds, longest', max(alone) * 1000)
    for name, times in {'while jobs are removed': values, 'after that': alone}.items():
        count = sum(each > STALL for each in times)
        report(f'calls {name}, of more than {STALL * 1000:.0f} ms', count, unit=f'of {len(times)}')
    report('calls while jobs are removed, p99', percentile(values, 99))
    report('calls after that, p99', percentile(alone, 99))


def submit_many(address, count):
    """Submit jobs that wait, many at a time; return how many were accepted per second."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(address)
        start = perf_counter()
        for number in range(count + FLIGHT):
            if number < count:
                body = encode(['work', number, {'id': make_uuid7()}])
                socket.send_multipart([b'', body])
            if number >= FLIGHT:
                socket.recv_multipart()
        return count / (perf_counter() - start)


def resident(pid):
    """Return the memory of a process, in MiB."""
    for line in Path(f'/proc/{pid}/status').read_text(encoding='ascii').splitlines():
        if line.startswith('RssAnon:'):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def measure_memory(args, folder):
    """Let many jobs wait, while others hold all places."""
    with pool_in(folder, jobs=1) as (pool, client):
        client.submit('hold', 3600)
        pid = client.call('pyams_zmq.stats')['pid']
        few = args.waiting // 10
        submit_many(pool.bound_address, few)
        base = resident(pid)
        rate = submit_many(pool.bound_address, args.waiting - few)
        report(f'memory of the broker, {few} jobs wait', base, unit='MiB')
        report(f'    {args.waiting} jobs wait', resident(pid), base + 5, 'MiB')
        report(f'one client, {FLIGHT} in flight, accepted', rate, unit='/s')


def measure_queues(args, _folder):
    """Compare with other queues."""
    compare(args, write)


PARTS = {
    'accept': measure_accept,
    'calls': measure_calls,
    'ended': measure_ended,
    'memory': measure_memory,
    'queues': measure_queues,
}


def parse_arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('parts', nargs='*', default=list(PARTS), help=', '.join(PARTS))
    add('--folder', help='a folder on the disk to measure')
    add('--jobs', type=int, default=1000, help='jobs of the client alone (1000)')
    add('--clients', type=int, default=16, help='clients that submit at the same time (16)')
    add('--seconds', type=float, default=3.0, help='duration of a turn (3)')
    add('--rounds', type=int, default=3, help='turns of each (3)')
    add('--paces', type=float, nargs='*', default=[20, 100], help='jobs per second beside calls')
    add('--ended', type=int, default=100_000, help='jobs that have ended (100000)')
    add('--pages', type=int, default=50, help='pages of each list (50)')
    add('--waiting', type=int, default=100_000, help='jobs that wait (100000)')
    add('--limit', type=float, default=180.0, help='seconds to remove jobs, at most (180)')
    add('--only', default='', help='parts of names of queues, separated by ;')
    add('--kills', type=int, default=20, help='processes to kill in each queue; 0 for none (20)')
    add('--patience', type=float, default=90.0, help='seconds until a job is lost (90)')
    add('--environments', type=Path, default=ENVIRONMENTS, help='folder of those of the queues')
    return parser.parse_args()


def main():
    """Run the parts that the command line names."""
    args = parse_arguments()
    # SystemExit unwinds the stack, which ends the programs.
    signal.signal(signal.SIGTERM, lambda _num, _frame: sys.exit(1))
    write(f'Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]}\n')
    for part in args.parts:
        write(f'\n{part}\n')
        with ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder))
            PARTS[part](args, Path(name))


if __name__ == '__main__':
    main()
