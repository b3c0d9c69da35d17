# SPDX-License-Identifier: ZPL-2.1
"""A web server with few threads, and a service that is down."""

import http.client
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import waitress
from pyramid.config import Configurator
from pyramid.response import Response
from waitress import wasyncore

from checks import wait_until
from handlers import Process
from pyams_zmq.client import call as call_module
from pyams_zmq.exceptions import ZMQUnreachableError
from pyams_zmq.testing import running

THREADS, VISITORS = 4, 8


@pytest.fixture
def attempts(monkeypatch):
    """The connections that were opened for calls."""
    opened = []
    open_connection = call_module.open_connection
    monkeypatch.setattr(
        call_module,
        'open_connection',
        lambda *args, **options: opened.append(args) or open_connection(*args, **options),
    )
    return opened


def convert(request):
    """Call the service."""
    return Response(request.zmq('converter').call('echo', 'converted'))


def report(error, request):
    """Show what an operator reads in the log."""
    return Response(str(error), status=503)


@contextmanager
def serve(address):
    """Serve an application whose service runs elsewhere; yield its port and its registry."""
    settings = {
        'pyams_zmq.converter.address': address,
        'pyams_zmq.converter.start': 'never',
        'pyams_zmq.converter.connect_timeout': '60',
        'pyams_zmq.converter.timeout': '60',
    }
    with Configurator(settings=settings) as config:
        config.include('pyams_zmq')
        config.add_route('convert', '/convert')
        config.add_view(convert, route_name='convert')
        config.add_exception_view(report, context=ZMQUnreachableError)
        config.add_route('other', '/other')
        config.add_view(lambda request: Response('other'), route_name='other')
        app = config.make_wsgi_app()
    server = waitress.create_server(
        app, host='127.0.0.1', port=0, threads=THREADS, clear_untrusted_proxy_headers=True
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server.effective_port, app.registry
    finally:
        server.trigger.pull_trigger(lambda: wasyncore.close_all(server._map))  # in its thread
        thread.join()
        server.task_dispatcher.shutdown()
        app.registry.zmq_clients.close()


def fetch(port, path):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
    try:
        connection.request('GET', path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_other_pages_of_a_server_whose_service_was_never_there(tmp_path, attempts):
    """One visitor waits until the service is there; the others, and other pages, do not."""
    address = f'ipc://{tmp_path}/converter'
    with serve(address) as (port, registry), ThreadPoolExecutor(VISITORS) as pool:
        pages = [pool.submit(fetch, port, '/convert') for _ in range(VISITORS)]
        wait_until(lambda: sum(page.done() for page in pages) == VISITORS - 1)
        for page in pages:
            if page.done():
                status, text = page.result()
                assert status == 503
                assert text.startswith(f'No service has answered at {address}')
                assert "Service 'converter' at" in text
                assert text.endswith('start it there, or correct pyams_zmq.converter.address')
        assert fetch(port, '/other') == (200, 'other')
        assert len(attempts) <= THREADS
        assert not registry.zmq_clients.get('converter')._breaker.get().is_open
        with running(Process(address)):
            wait_until(lambda: all(page.done() for page in pages))
            assert sorted(page.result()[0] for page in pages) == [200] + [503] * (VISITORS - 1)
            assert fetch(port, '/convert') == (200, 'converted')


def test_visitors_of_a_server_whose_service_is_known_to_be_down(tmp_path, attempts):
    """No call opens a connection, or waits, after the first one has failed."""
    address = f'ipc://{tmp_path}/converter'
    with serve(address) as (port, registry), ThreadPoolExecutor(VISITORS) as pool:
        client = registry.zmq_clients.get('converter')
        client.connect_timeout = 0.05
        assert fetch(port, '/convert')[0] == 503
        client.connect_timeout = 60
        client._breaker.get()._opened_at += 60  # the pause lasts for the whole test
        pages = [pool.submit(fetch, port, '/convert') for _ in range(5 * VISITORS)]
        for page in pages:
            status, text = page.result()
            assert status == 503
            assert 'known to be down' in text
        assert fetch(port, '/other') == (200, 'other')
        assert len(attempts) == 1


def test_service_that_the_application_starts_is_expected():
    for start, is_expected in ('auto', True), ('external', False):
        with Configurator(settings={'pyams_zmq.echo.start': start}) as config:
            config.include('pyams_zmq')
            config.add_zmq_process('echo', address='127.0.0.1:5555', handler=Process)
        client = config.registry.zmq_clients.get('echo')
        assert client.is_service_expected is is_expected
        client.close()
