# SPDX-License-Identifier: ZPL-2.1
"""Time without a declared service after its process, its owner or the server was killed.

Run it in an environment with the extra ``test``, on an idle machine. It prints the median, the
minimum and the maximum of each figure.
"""

import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests/support'))

from app.program import WebServer
from checks import wait_until
from life import folder_for_run, owner_of, report

SERVERS = {
    'pserve': ('pserve',),
    'gunicorn, 3 workers': ('gunicorn', '--workers', '3'),
    'gunicorn --preload, 2 workers': ('gunicorn', '--preload', '--workers', '2'),
}


@contextmanager
def running_server(label):
    """Run a web server with a service; yield it when the service answers."""
    name, *args = SERVERS[label]
    with folder_for_run() as (folder, stack):
        server = getattr(WebServer, name)(
            folder, *args, address=f'ipc://{folder}/zmq.sock', application='declared'
        )
        stack.callback(server.end)
        server.wait_for_service()
        if args:
            wait_until(lambda: len(server.workers()) == int(args[-1]), 10)
        yield server


def time_until_answer(server, former, pid):
    """Kill a process; return the seconds until a new child answers a request."""
    start = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    server.wait_for_service(but=[former])
    return time.perf_counter() - start


def measure(label):
    """Kill the processes of a server, one after the other; yield names and seconds."""
    with running_server(label) as server:
        [child] = server.children()
        yield f'{label}: kill -9 of the process', time_until_answer(server, child, child)
        [child] = server.children()
        if label == 'gunicorn, 3 workers':
            seconds = time_until_answer(server, child, owner_of(child))
            yield f'{label}: kill -9 of its supervisor', seconds
            [child] = server.children()
            seconds = time_until_answer(server, child, owner_of(owner_of(child)))
            yield f'{label}: kill -9 of the owner worker', seconds
        if label == 'pserve':  # workers of gunicorn notice it only after many seconds
            start = time.perf_counter()
            server.send_signal(signal.SIGKILL)
            wait_until(lambda: not server.running(), 10)
            yield f'{label}: kill -9, until all have ended', time.perf_counter() - start


if __name__ == '__main__':
    report([lambda label=label: measure(label) for label in SERVERS], __doc__)
