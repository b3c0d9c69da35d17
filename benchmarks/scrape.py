# SPDX-License-Identifier: ZPL-2.1
"""Time of a scrape of ``/zmq/metrics``, with services that answer, hang and are down.

Run it in an environment with the extra ``test``, on an idle machine. It prints the median, the
minimum and the maximum of each figure.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from contextlib import ExitStack

from pyramid.config import Configurator
from pyramid.request import Request

from pyams_zmq.config import services_of
from pyams_zmq.monitor import shared
from pyams_zmq.testing import running

NAMES = ('one', 'two', 'three', 'four', 'five')


class Echo:
    """The handler of the services."""

    def echo(self, args):
        """Return the arguments."""
        return [200, args]


def measure(app, repeats):
    """Return the seconds of several scrapes."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        text = Request.blank('/zmq/metrics').get_response(app).text
        times.append(time.perf_counter() - start)
        if f'zmq_up{{service="{NAMES[-1]}"}} 1.0' not in text:
            raise SystemExit(text)
    return times


def show(label, times):
    """Print a figure."""
    parts = [statistics.median(times), min(times), max(times)]
    print(f'{label:32}', *(f'{1000 * part:9.1f} ms' for part in parts))


def main():
    """Measure with all services, with one that hangs, and with one that is down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repeats', type=int, default=10)
    repeats = parser.parse_args().repeats
    shared.MAX_AGE = 0  # each scrape asks
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        config = Configurator()
        config.include('pyams_zmq.metrics')
        for name in NAMES:
            config.add_zmq_process(
                name, handler=Echo, address=f'ipc://{folder}/{name}', start='external'
            )
        app = config.make_wsgi_app()
        processes = [
            stack.enter_context(running(service.make_process(app.registry)))
            for service in services_of(app.registry).values()
        ]
        show('five services answer', measure(app, repeats))
        os.kill(processes[0].pid, signal.SIGSTOP)
        stack.callback(os.kill, processes[0].pid, signal.SIGCONT)
        show('one of them hangs', measure(app, repeats))
        processes[1].stop()
        show('and one of them is down', measure(app, repeats))
        app.registry.zmq_clients.close()


if __name__ == '__main__':
    main()
