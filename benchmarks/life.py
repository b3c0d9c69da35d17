# SPDX-License-Identifier: ZPL-2.1
"""Time that a process takes to start, to stop, and to end after its owner was killed.

Run it in an environment with the extra ``test``, on an idle machine. It prints the median, the
minimum and the maximum of each figure.
"""

import argparse
import os
import select
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests/support'))

from app.handler import Process, in_hand
from app.program import Program, WebServer, is_running
from checks import wait_until

OWNER = """
import json, signal, sys
from app.handler import Process

process = Process(sys.argv[1])
process.start()
print(json.dumps(process.wait_ready()), flush=True)
print(process.pid, flush=True)
signal.pause()
"""

NO_PIDFD = 'import os\ndel os.pidfd_open\n'

SERVERS = {
    'pserve': ('pserve',),
    'pserve --reload': ('pserve', '--reload'),
    'gunicorn': ('gunicorn',),
    'gunicorn --preload': ('gunicorn', '--preload', '--workers', '2'),
}


def measure_process():
    """Start and stop a process."""
    process = Process()
    start = time.perf_counter()
    process.start()
    yield 'start() returns', time.perf_counter() - start
    process.wait_ready()
    yield 'start() until ready', time.perf_counter() - start
    start = time.perf_counter()
    process.stop()
    yield 'stop() of an idle process', time.perf_counter() - start


def measure_owner(label, code, work=None):
    """Kill an interpreter that owns a process."""
    with folder_for_run() as (folder, stack):
        address = f'ipc://{folder}/zmq.sock'
        owner = Program(folder, '-c', code, address)
        stack.callback(owner.end)
        owner.read()
        child = owner.read()
        if work is not None:
            stack.enter_context(in_hand(address, work))
        yield f'kill -9 of {label}', time_of_end(child, lambda: owner.send_signal(signal.SIGKILL))


def measure_server(label):
    """Kill a server, and end it with SIGTERM and SIGINT."""
    for num in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        with running_server(label) as server:
            [child] = server.children()
            if num == signal.SIGKILL:
                owner = owner_of(child)
                seconds = time_of_end(child, lambda pid=owner: os.kill(pid, signal.SIGKILL))
                yield f'kill -9 of {label}', seconds
            else:
                seconds = time_of_end(server.pid, lambda num=num: server.send_signal(num))
                yield f'{num.name} to {label} until it has ended', seconds


def measure_reload():
    """Make `pserve --reload` restart its worker."""
    with running_server('pserve --reload') as server:
        [child] = server.children()
        worker = owner_of(child)
        start = 0.0
        while is_running(worker):
            if time.perf_counter() > start + 1.5:  # its first check comes late and finds no change
                start = time.perf_counter()
                (server.folder / 'watched').touch()
            time.sleep(0.005)
        ended = time.perf_counter()
        server.wait_for_service(but=[child])
        yield 'reload, from the change to an answer', time.perf_counter() - start
        yield 'reload, from the end of the worker to an answer', time.perf_counter() - ended


@contextmanager
def folder_for_run():
    """Yield a temporary folder and an exit stack."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        yield Path(name), stack


@contextmanager
def running_server(label):
    """Run a web server; yield it when it answers."""
    name, *args = SERVERS[label]
    with folder_for_run() as (folder, stack):
        server = getattr(WebServer, name)(folder, *args, address=f'ipc://{folder}/zmq.sock')
        stack.callback(server.end)
        server.wait_for_service()
        if '--workers' in args:
            wait_until(lambda: len(server.workers()) == int(args[-1]), 10)
        yield server


def owner_of(pid):
    """Return the pid of the parent of a process."""
    for line in Path(f'/proc/{pid}/status').read_text(encoding='ascii').splitlines():
        if line.startswith('PPid'):
            return int(line.split()[1])
    raise LookupError(pid)


def time_of_end(pid, action):
    """Run an action; return the seconds until a process has ended."""
    fd = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        start = time.perf_counter()
        action()
        if not poller.poll(30_000):
            raise TimeoutError(f'process {pid} still runs after 30 s')
        return time.perf_counter() - start
    finally:
        os.close(fd)


def report(measures, description):
    """Run the measures as often as the command line says; print the figures."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument('runs', nargs='?', type=int, default=10, help='runs of each measure (10)')
    runs = parser.parse_args().runs
    print(f'{"milliseconds, of " + str(runs) + " runs":60} {"median":>8} {"min":>8} {"max":>8}')
    for measure in measures:
        figures = {}
        for _ in range(runs):
            for name, seconds in measure():
                figures.setdefault(name, []).append(seconds * 1000)
        for name, values in figures.items():
            columns = (statistics.median(values), min(values), max(values))
            print(f'{name:60}', *(f'{value:8.1f}' for value in columns), flush=True)


if __name__ == '__main__':
    measures = [
        measure_process,
        lambda: measure_owner('a plain interpreter', OWNER),
        lambda: measure_owner('a plain interpreter without pidfd', NO_PIDFD + OWNER),
        lambda: measure_owner('its owner, while a handler blocks', OWNER, 'work'),
        lambda: measure_owner('its owner, while an async handler waits', OWNER, 'async_work'),
        *(lambda label=label: measure_server(label) for label in SERVERS),
        measure_reload,
    ]
    report(measures, __doc__)
