# SPDX-License-Identifier: ZPL-2.1
"""Clients of a queue: ``python -m queues.clients MODULE``.

It reads a line of JSON for each turn, forks clients that submit one job after the other, and writes
how many were accepted in how many seconds.
"""

import importlib
import json
import os
import sys
from time import monotonic


def submit(open_client, numbers, seconds, go, result):
    """Submit jobs for some seconds; one is submitted again after an error.

    :return: number of jobs that were accepted in this time, one more before, and of errors
    """
    client = open_client()
    numbers = iter(numbers)
    client(next(numbers))  # connects, and imports what it needs
    result.write(b'r')
    go.read(1)
    deadline = monotonic() + seconds
    accepted = errors = 0
    for number in numbers:
        if monotonic() > deadline:
            break
        while True:
            try:
                client(number)
                break
            except Exception:
                errors += 1
                if monotonic() > deadline + 30:
                    raise
        accepted += 1
    return accepted, errors


def run_turn(open_client, clients, first, count, seconds):
    """Let some clients submit the jobs from a number on; return what they did."""
    ready, ready_end = os.pipe()
    go_end, go = os.pipe()
    pipes, pids = [], []
    for index in range(clients):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                os.close(go)
                with (
                    open(go_end, 'rb', buffering=0) as start,
                    open(ready_end, 'wb', buffering=0) as out,
                ):
                    numbers = range(first + index, first + count, clients)
                    done = submit(open_client, numbers, seconds, start, out)
                os.write(writer, json.dumps(done).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        pipes.append(reader)
        pids.append(pid)
    os.close(ready_end)
    os.close(go_end)
    got = b''
    while len(got) < clients:
        part = os.read(ready, clients)
        if not part:
            raise RuntimeError('A client does not start')
        got += part
    start = monotonic()
    os.close(go)
    results = []
    for reader, pid in zip(pipes, pids, strict=True):
        with open(reader, 'rb') as file:
            results.append(json.loads(file.read() or '[0, 1000000]'))
        os.waitpid(pid, 0)
    os.close(ready)
    took = monotonic() - start
    return {
        'start': start,
        'took': took,
        'accepted': sum(each[0] for each in results),
        'submitted': sum(each[0] for each in results) + clients,
        'errors': sum(each[1] for each in results),
    }


def main():
    """Run turns until the standard input ends."""
    module = importlib.import_module(f'queues.{sys.argv[1]}')
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run_turn(module.open_client, **json.loads(line))), flush=True)


if __name__ == '__main__':
    main()
