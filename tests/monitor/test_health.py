# SPDX-License-Identifier: ZPL-2.1
"""The pages ``/zmq/live``, ``/zmq/health`` and ``/zmq/ready``, for services in all conditions."""

import os
import signal

import pytest
from pyramid.request import Request

import pyams_zmq.health
from checks import wait_until
from pyams_zmq.monitor import shared
from watched_services import PASSWORD, PING

UP = {'status': 'up'}
DRAINING = {'status': 'draining'}


class Nobody:
    """A security policy by which nobody may do anything."""

    def permits(self, request, context, permission):
        return False


def fail(request):
    """Root factory of an application whose database is down."""
    raise OSError


@pytest.fixture
def get(services):
    """Send a request to the application; return the response."""
    services.config.include('pyams_zmq.health')

    apps = []

    def send(path, method='GET'):
        if not apps:
            apps.append(services.config.make_wsgi_app())
        [app] = apps
        return Request.blank(path, method=method).get_response(app)

    return send


def test_all_conditions(services, get, set_timeout):
    set_timeout(3)
    services.add_all()
    reason = 'it does not answer: it is down, or hangs'
    refused = 'it refuses this application: compare the users and keys of both'
    expected = {
        'draining': DRAINING,
        'down': {'status': 'down', 'error': reason},
        'hung': {'status': 'down', 'error': reason},
        'old': UP,
        'refusing': {'status': 'down', 'error': refused},
        'stopping': DRAINING,
        'up': UP,
        'withdrawn': {'status': 'down', 'error': refused},
    }
    for path in ('/zmq/health', '/zmq/ready'):
        response = get(path)
        assert response.status_int == 503
        assert response.json == {'status': 'down', 'services': expected}
        assert 'ipc://' not in response.text
        assert PASSWORD not in response.text
    assert (get('/zmq/live').status_int, get('/zmq/live').json) == (200, UP)


@pytest.mark.parametrize('path', ['/zmq/health', '/zmq/ready'])
def test_all_are_up(services, get, path):
    services.answer('converter', ping=[200, PING])
    services.answer('old')
    response = get(path)
    assert response.status_int == 200
    assert response.json == {'status': 'up', 'services': {'converter': UP, 'old': UP}}


def test_real_process(services, get):
    services.run('converter')
    assert get('/zmq/ready').json == {'status': 'up', 'services': {'converter': UP}}


def test_real_process_that_stops(services, get):
    process = services.run('converter')
    with services.waiting('converter'):
        assert get('/zmq/ready').json['services'] == {'converter': UP}  # it is busy
        os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: get('/zmq/health').json['services'] == {'converter': DRAINING})
        assert get('/zmq/ready').status_int == 503


@pytest.mark.parametrize('path', ['/zmq/health', '/zmq/ready'])
def test_draining(services, get, path):
    services.answer('converter', ping=[200, {**PING, 'state': 'draining'}])
    response = get(path)
    assert (response.status_int, response.json['status']) == (503, 'down')
    assert response.json['services'] == {'converter': DRAINING}


@pytest.mark.parametrize('path', ['/zmq/live', '/zmq/health', '/zmq/ready'])
def test_head(services, get, path):
    services.answer('converter', ping=[200, PING])
    response = get(path, 'HEAD')
    assert (response.status_int, response.body) == (200, b'')
    assert response.content_type == 'application/json'
    assert response.headers['Cache-Control'] == 'no-store'
    assert get(path, 'POST').status_int == 404


def test_application_without_services(get):
    assert get('/zmq/ready').json == {'status': 'up', 'services': {}}


def test_default_permission_and_root(services, get):
    services.config.set_default_permission('view')
    services.config.set_security_policy(Nobody())
    services.config.set_root_factory(fail)
    assert get('/zmq/ready').status_int == 200


def test_requests_share_the_answers(services, monkeypatch):
    monkeypatch.setattr(shared, 'MAX_AGE', 60)
    services.config.include('pyams_zmq.health')
    service = services.answer('converter', ping=[200, PING])
    app = services.config.make_wsgi_app()
    for path in ('/zmq/health', '/zmq/ready', '/zmq/ready'):
        Request.blank(path).get_response(app)
    assert service.questions == ['pyams_zmq.ping']


def test_prefix_and_second_include(services):
    services.config.include('pyams_zmq.health', route_prefix='internal')
    pyams_zmq.health.includeme(services.config)
    app = services.config.make_wsgi_app()
    assert Request.blank('/internal/zmq/live').get_response(app).status_int == 200
    assert Request.blank('/zmq/live').get_response(app).status_int == 404
