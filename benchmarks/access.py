# SPDX-License-Identifier: ZPL-2.1
"""Access control, measured with real sockets.

It measures the verdict on each combination of mechanism, address and credentials (the ones of
`tests/support/access_cases.py`) and the time until a refused client gets it; the latency of an
authorized client during a flood of bad handshakes; the time until half-open peers are disconnected;
and what the monitor of a socket, which detects refusals, costs an authorized client.
"""

import argparse
import gc
import itertools
import multiprocessing
import socket as tcp
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from math import inf
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter, process_time, sleep

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests/support'))

from access_cases import (
    ADDRESSES,
    CREDENTIALS,
    HALF_OPEN,
    MECHANISMS,
    QuickLimits,
    client_options,
    flood,
    make_keys,
    server_options,
)
from handlers import Process
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import socket as client_socket
from pyams_zmq.socket import zmq_response, zmq_socket

ROW = '{:<34} {:<9} {:>5} {:>9} {:>8} {:>6}\n'
write = sys.stdout.write


@contextmanager
def serving(*args, factory=Process, **kwargs):
    """Run a process."""
    process = factory(*args, **kwargs)
    process.start()
    try:
        process.wait_ready()
        yield process
    finally:
        process.stop()


def ask(address, message=('echo', 1), **credentials):
    """Ask on a new socket; return the reply and the seconds."""
    start = perf_counter()
    with zmq_socket(address, **credentials) as socket:
        socket.send_json(message)
        reply = zmq_response(socket)
    return reply, perf_counter() - start


def run_matrix(keys, rounds):
    """Try all combinations; print counts and times."""
    write(ROW.format('address', 'mechanism', 'sent', 'let in', 'refused', 'wrong'))
    seconds = {}
    wrong = 0
    for (name, (bind_addr, clients, is_good)), mechanism in itertools.product(
        ADDRESSES.items(), MECHANISMS
    ):
        counts = Counter()
        address = f'ipc://{keys}/zmq' if bind_addr == 'ipc' else bind_addr
        with serving(address, clients=clients, **server_options(mechanism, keys)) as process:
            target = process.bound_address.replace('[::]', '127.0.0.1')
            for (credentials, good_for), _ in itertools.product(CREDENTIALS.items(), range(rounds)):
                reply, took = ask(target, **client_options(credentials, keys))
                expected = 200 if is_good and good_for == mechanism else 401
                counts[reply[0]] += 1
                counts['wrong'] += reply[0] != expected
                if reply[0] != 200:  # noqa: PLR2004 - a status
                    seconds.setdefault((mechanism, credentials), []).append(took * 1000)
        sent = rounds * len(CREDENTIALS)
        write(ROW.format(name, mechanism, sent, counts[200], counts[401], counts['wrong']))
        wrong += counts['wrong']
    write('\nmilliseconds from connect to 401\n')
    for (mechanism, credentials), values in seconds.items():
        write(
            f'{mechanism:<6} {credentials:<18} median {median(values):6.1f}, '
            f'longest {max(values):6.1f}, of {len(values)}\n'
        )
    longest = max(itertools.chain.from_iterable(seconds.values()))
    write(f'wrong verdicts: {wrong}; longest time to 401: {longest:.1f} ms\n\n')


def latencies(socket, condition):
    """Ask on a kept socket while a condition is true; return the milliseconds of each call."""
    values = []
    while condition():
        start = perf_counter()
        socket.send_json(['echo', 1])
        if zmq_response(socket) != [200, 1]:
            raise RuntimeError('an authorized client was not served')
        values.append((perf_counter() - start) * 1000)
        sleep(0.0005)
    return values


def run_flood():
    """Serve an authorized client while others try wrong passwords."""
    with serving('127.0.0.1', auth='alice:wonder') as process:
        good = {'auth': 'alice:wonder'}
        address = process.bound_address
        with zmq_socket(address, **good) as socket:
            until = monotonic() + 1
            calm = latencies(socket, lambda: monotonic() < until)
            before = ask(address, ['fds', None], **good)[0][1]
            fork = multiprocessing.get_context('fork')
            attacker = fork.Process(target=flood, args=(address, 2000))
            start = monotonic()
            attacker.start()
            values = latencies(socket, attacker.is_alive)
            took = monotonic() - start
            sleep(0.5)
            after = ask(address, ['fds', None], **good)[0][1]
    for name, times in (('calm', calm), ('flood', values)):
        write(
            f'{name}: {len(times)} calls, median {median(times):.2f} ms, '
            f'p99 {quantiles(times, n=100)[98]:.2f} ms, longest {max(times):.2f} ms\n'
        )
    write(f'2000 bad handshakes in {took:.1f} s, descriptors {after - before:+d}\n\n')


def run_half_open():
    """Connect peers that never finish a handshake; wait until they are disconnected."""
    with serving('127.0.0.1', factory=QuickLimits) as process:
        address = process.bound_address
        ask(address)
        before = ask(address, ['fds', None])[0][1]
        host, port = address.removeprefix('tcp://').split(':')
        peers = []
        for data in itertools.islice(itertools.cycle(HALF_OPEN.values()), 400):
            peers.append(tcp.create_connection((host, int(port))))
            peers[-1].sendall(data)
        start = monotonic()
        longest = 0
        while ask(address, ['fds', None])[0][1] > before + 2:
            longest = max(longest, ask(address)[1] * 1000)
        limit = process.handshake_timeout + process.heartbeat_interval + process.heartbeat_timeout
        write(
            f'{len(peers)} half-open peers of {len(HALF_OPEN)} kinds are disconnected after '
            f'{monotonic() - start:.2f} s (handshake + heartbeat: {limit:.2f} s); '
            f'longest call during that time {longest:.1f} ms\n\n'
        )
        for peer in peers:
            peer.close()


def per_message(address, count, recent, **credentials):
    """Open a socket for each message; return the seconds and the processor seconds of a message.

    :param recent: seconds after a reply in which a socket has no monitor, see `client.socket`
    """
    usual, client_socket.RECENT = client_socket.RECENT, recent
    start, cpu = perf_counter(), process_time()
    for _ in range(count):
        with zmq_socket(address, **credentials) as socket:
            socket.send_json(['echo', 1])
            if zmq_response(socket) != [200, 1]:
                raise RuntimeError('an authorized client was not served')
    client_socket.RECENT = usual
    return (perf_counter() - start) / count, (process_time() - cpu) / count


def kept_connection(client, count):
    """Call on the kept connection of a client; return the same as `per_message`."""
    start, cpu = perf_counter(), process_time()
    for _ in range(count):
        client.call('echo', 1)
    return (perf_counter() - start) / count, (process_time() - cpu) / count


def run_price(rounds, **options):
    """Compare ways to send a message, as medians of the ratios to a socket without a monitor."""
    with (
        serving('127.0.0.1', **options) as process,
        ZMQClient(process.bound_address, **options) as client,
    ):
        address = process.bound_address
        ways = {
            'no monitor': lambda: per_message(address, 100, inf, **options),
            'monitor always': lambda: per_message(address, 100, -inf, **options),
            'zmq_socket as it is': lambda: per_message(
                address, 100, client_socket.RECENT, **options
            ),
            'kept by ZMQClient': lambda: kept_connection(client, 100),
        }
        times = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, measure in ways.items():
                gc.collect()
                measured = measure()
                if number:
                    times[name].append(measured)
    write(f'a socket per message, {"PLAIN" if options else "NULL"}, without a monitor = 1\n')
    for name, values in times.items():
        pairs = list(zip(values, times['no monitor'], strict=True))
        wall, cpu = (median(own[part] / base[part] for own, base in pairs) for part in (0, 1))
        micros = median(own[1] for own in values) * 1e6
        write(f'{name:<20} time {wall:5.2f}, processor {cpu:5.2f} ({micros:.0f} us)\n')


def main():
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5, help='tries of each combination (5)')
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        run_matrix(make_keys(Path(folder)), rounds)
    run_flood()
    run_half_open()
    for options in ({}, {'auth': 'alice:wonder'}):
        run_price(3 * rounds, **options)


if __name__ == '__main__':
    main()
