# SPDX-License-Identifier: ZPL-2.1
"""Access control, measured with real sockets.

It measures the verdict on each combination of mechanism, address and credentials (the ones of
`tests/access/test_access.py`) and the time until a refused client gets it; the latency of an
authorized client during a flood of bad handshakes; the time until half-open peers are disconnected;
and what the detection of refusals costs an authorized client.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import socket as tcp
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter, sleep

sys.path.extend(
    str(Path(__file__).resolve().parents[1] / 'tests' / folder) for folder in ('support', 'access')
)

from test_access import (
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


def per_message(address, count, wait):
    """Open a socket for each message; return the messages per second."""
    start = perf_counter()
    for _ in range(count):
        socket = zmq_socket(address, auth='alice:wonder')
        socket.send_json(['echo', 1])
        if wait(socket) != [200, 1]:
            raise RuntimeError('an authorized client was not served')
    return count / (perf_counter() - start)


def plain_wait(socket):
    """Wait for a reply, without detection of a refusal."""
    if not socket.poll(10_000):
        return [503, 'Connection timeout']
    return json.loads(socket.recv())


def run_price(rounds):
    """Compare `zmq_response` with a wait that does not detect refusals."""
    rates = {'zmq_response': [], 'plain poll': []}
    with serving('127.0.0.1', auth='alice:wonder') as process:
        gc.disable()
        for number in range(rounds + 1):
            for name, wait in (('zmq_response', zmq_response), ('plain poll', plain_wait)):
                rate = per_message(process.bound_address, 200, wait)
                if number:
                    rates[name].append(rate)
            gc.collect()
        gc.enable()
    ours, plain = (median(rates[name]) for name in ('zmq_response', 'plain poll'))
    write(
        f'socket per message with PLAIN: zmq_response {ours:.0f}/s, plain poll {plain:.0f}/s, '
        f'ratio {ours / plain:.3f}\n'
    )


def main():
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=5, help='tries of each combination (5)')
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        run_matrix(make_keys(Path(folder)), rounds)
    run_flood()
    run_half_open()
    run_price(3 * rounds)


if __name__ == '__main__':
    main()
