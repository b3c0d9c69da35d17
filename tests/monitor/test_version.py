# SPDX-License-Identifier: ZPL-2.1
"""Services of pyams_zmq 2 are recognised, and not asked, since a question would block them."""

import os
import time
from threading import Timer

import pytest
from pyramid.request import Request

from access_cases import client_options, make_keys, server_options
from answering_service import AnsweringService
from checks import AT_ONCE
from old_service import METHOD, OldService
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import (
    ZMQRefusedError,
    ZMQUnreachableError,
    ZMQVersionError,
)
from pyams_zmq.monitor.inquiry import ask_all
from pyams_zmq.monitor.status import ServicesStatus
from pyams_zmq.monitor.version import check_version
from watched_services import PING

OLD = (
    'converter runs a version of pyams_zmq before 3.0 (its socket is a REP), which a question '
    'would block: it was not asked'
)


@pytest.fixture
def old(services):
    """A service that runs elsewhere; check at the end that it is not blocked."""
    address = services.declare('converter', handler=None, start='never')
    with OldService(address) as service:
        yield service
        with ZMQClient(address) as client:
            assert client.call(METHOD, 1) == 1
        assert service.received == [METHOD]


def check(address, timeout=AT_ONCE, **options):
    with ZMQClient(address, **options) as client:
        check_version(client, 'converter', timeout)


@pytest.mark.parametrize('type_', ['pyams_zmq.ping', 'pyams_zmq.stats'])
def test_old_service_is_not_asked(services, old, type_):
    services.config.commit()
    answer = ask_all(services.config.registry, type_)['converter']
    assert (type(answer.exception), answer.error) == (ZMQVersionError, OLD)
    assert answer.seconds < AT_ONCE


def test_old_service_is_healthy(services, old):
    services.config.include('pyams_zmq.health')
    app = services.config.make_wsgi_app()
    for path in ('/zmq/health', '/zmq/ready'):
        response = Request.blank(path).get_response(app)
        assert response.json == {'status': 'up', 'services': {'converter': {'status': 'up'}}}


def test_old_service_has_no_metrics_but_one(services, old):
    services.config.include('pyams_zmq.metrics')
    text = Request.blank('/zmq/metrics').get_response(services.config.make_wsgi_app()).text
    values = [line for line in text.splitlines() if 'converter' in line]
    assert values == ['zmq_up{service="converter"} 1.0', 'zmq_draining{service="converter"} 0.0']


def test_old_service_in_the_monitor_of_pyams_utils(services, old):
    services.config.commit()
    request = Request.blank('/')
    request.registry = services.config.registry
    [status] = ServicesStatus().get_status(request)
    assert 'UP' in vars(status).values()


def test_services_elsewhere_of_this_version(services, start, tmp_path):
    keys = make_keys(tmp_path)
    for mechanism, credentials in (
        ('NULL', 'none'),
        ('PLAIN', 'good password'),
        ('CURVE', 'good key'),
    ):
        process = start(**server_options(mechanism, keys))
        options = {
            f'client_{name}': each for name, each in client_options(credentials, keys).items()
        }
        services.config.add_zmq_process(
            mechanism, address=process.bound_address, start='never', **options
        )
    services.config.commit()
    answers = ask_all(services.config.registry, 'pyams_zmq.ping', 20)
    assert [answer.error for answer in answers.values()] == [None] * 3
    assert {answer.result['state'] for answer in answers.values()} == {'up'}


def test_other_services_are_of_this_version(services):
    """What the package has started itself is not examined: the test has a REP socket there."""
    services.answer('converter', ping=[200, PING])
    services.config.commit()
    assert ask_all(services.config.registry, 'pyams_zmq.ping', 20)['converter'].result == PING


def test_service_of_another_kind(services):
    """A REP socket that replies to everything is not asked, either: that is not known before."""
    address = services.declare('converter', handler=None, start='never')
    services.config.commit()
    with AnsweringService(address, {}) as service:
        answer = ask_all(services.config.registry, 'pyams_zmq.ping', 20)['converter']
        assert (answer.error, service.questions) == (OLD, [])


def test_recorded_service(services):
    services.declare('converter', handler=None, start='never')
    services.config.include('pyams_zmq.testing')
    services.config.commit()
    assert ask_all(services.config.registry, 'pyams_zmq.ping')['converter'].error is None


def test_client_of_another_class():
    check_version(object(), 'converter', 1)


# Services that are not there


def test_down(services):
    services.declare('converter', handler=None, start='never')
    services.config.commit()
    answer = ask_all(services.config.registry, 'pyams_zmq.ping', 0.3)['converter']
    assert type(answer.exception) is ZMQUnreachableError
    assert "Service 'converter' at ipc://" in answer.error  # the advice of a client


def test_old_service_that_starts_meanwhile(tmp_path):
    """A question that waits until somebody listens would block it."""
    address = f'ipc://{tmp_path}/service'
    service = OldService(f'ipc://{tmp_path}/other')
    timer = Timer(0.1, os.rename, (tmp_path / 'other', tmp_path / 'service'))
    with service:
        timer.start()
        with pytest.raises(ZMQVersionError):
            check(address, 20)
        timer.join()
    assert service.received == []


def test_refused(start):
    process = start(auth='alice:secret')
    begin = time.monotonic()
    with pytest.raises(ZMQRefusedError):
        check(process.bound_address, 60, auth='alice:wrong')
    assert time.monotonic() - begin < AT_ONCE


class Nameless(ZMQClient):
    """A client of a service whose handshake succeeds, and does not say the type of its socket."""

    def find_socket_type(self, *, timeout):
        assert timeout <= 1


def test_unknown_type(start):
    """One that is not recognised is not asked, either."""
    with (
        Nameless(start().bound_address) as client,
        pytest.raises(ZMQUnreachableError, match='converter does not say which type of socket it'),
    ):
        check_version(client, 'converter', 1)
