# SPDX-License-Identifier: ZPL-2.1
"""How long a page waits that needs no service, while visitors call one that is down.

Waitress with four threads; eight visitors fetch a page that calls the service, and half a second
later another one fetches a page that does not. The service is up, was never there, ended before, is
restarted, or is silent behind an open port.
"""

import argparse
import http.client
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from statistics import median
from time import monotonic, sleep

import waitress
from pyramid.config import Configurator
from pyramid.response import Response
from waitress import wasyncore

from pyams_zmq.exceptions import ZMQBaseError
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.process import ZMQProcess

VISITORS = 8
THREADS = 4
HEAD_START = 0.5
"""Seconds until the page without a service is fetched"""

ROW = '{:<30} {:>12} {:>12} {:>9}'


class Methods:
    """The methods of the service."""

    def echo(self, args):
        """Return the arguments."""
        return [200, args]


class Handler(ZMQMessageHandler):
    """The service."""

    handler = Methods


def show_other(_request):
    """Call nothing."""
    return Response('other')


def convert(request):
    """Call the service."""
    try:
        return Response(request.zmq('converter').call('echo', 'converted'))
    except ZMQBaseError as error:
        return Response(str(error), status=503)


@contextmanager
def serve(address):
    """Serve the application; yield its port."""
    settings = {'pyams_zmq.converter.address': address, 'pyams_zmq.converter.start': 'never'}
    with Configurator(settings=settings) as config:
        config.include('pyams_zmq')
        config.add_route('convert', '/convert')
        config.add_view(convert, route_name='convert')
        config.add_route('other', '/other')
        config.add_view(show_other, route_name='other')
        app = config.make_wsgi_app()
    server = waitress.create_server(
        app, host='127.0.0.1', port=0, threads=THREADS, clear_untrusted_proxy_headers=True
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.effective_port
    finally:
        server.trigger.pull_trigger(lambda: wasyncore.close_all(server._map))
        thread.join()
        server.task_dispatcher.shutdown()
        app.registry.zmq_clients.close()


def fetch(port, path):
    """Fetch a page; return the status and the seconds."""
    start = monotonic()
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=120)
    try:
        connection.request('GET', path)
        status = connection.getresponse().status
    finally:
        connection.close()
    return status, monotonic() - start


def start_service(address):
    """Start the service, and wait until it is ready."""
    process = ZMQProcess(address, Handler)
    process.start()
    process.wait_ready()
    return process


def visit(port):
    """Return the seconds of the page without a service, and the status and seconds of others."""
    with ThreadPoolExecutor(VISITORS) as pool:
        pages = [pool.submit(fetch, port, '/convert') for _ in range(VISITORS)]
        sleep(HEAD_START)  # until these pages have the threads
        _status, seconds = fetch(port, '/other')
        return seconds, [page.result() for page in pages]


def measure(case):
    """Return the results of one case."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(('127.0.0.1', 0)))
        address = f'127.0.0.1:{listener.getsockname()[1]}'
        if case != 'silent behind an open port':
            listener.close()
        process = None
        if case in ('up', 'ended before', 'ended just now', 'restarted'):
            process = start_service(address)
            stack.callback(process.stop)
        port = stack.enter_context(serve(address))
        if process is not None:
            fetch(port, '/convert')
        if case in ('ended before', 'ended just now', 'restarted'):
            process.stop()
            process.join()
        if case == 'ended before':
            sleep(4)  # longer than clients remember that it was up
        if case == 'restarted':
            timer = threading.Timer(0.3, lambda: stack.callback(start_service(address).stop))
            timer.start()
            stack.callback(timer.join)
        if case == 'known to be down':
            fetch(port, '/convert')
        return visit(port)


def main():
    """Print a row for each case."""
    logging.getLogger('waitress.queue').setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=3)
    rounds = parser.parse_args().rounds
    print(ROW.format('service', 'other page', 'its slowest', 'errors'))
    for case in (
        'up',
        'never there',
        'known to be down',
        'ended before',
        'ended just now',
        'restarted',
        'silent behind an open port',
    ):
        results = [measure(case) for _ in range(rounds)]
        other = median(seconds for seconds, _pages in results)
        slowest = max(seconds for _, pages in results for _status, seconds in pages)
        errors = sum(status != HTTPStatus.OK for _, pages in results for status, _seconds in pages)
        print(
            ROW.format(case, f'{other:.3f} s', f'{slowest:.2f} s', f'{errors}/{rounds * VISITORS}')
        )


if __name__ == '__main__':
    main()
