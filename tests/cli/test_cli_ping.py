# SPDX-License-Identifier: ZPL-2.1
"""`pyams_zmq ping`."""

import re

import pytest

from answering import PING
from old_service import OldService


@pytest.mark.parametrize(
    ('changes', 'text'),
    [
        ({}, 'up 3 d, 4 workers'),
        ({'workers': 1, 'uptime': 59.9}, 'up 59 s, 1 worker'),
        ({'uptime': 60}, 'up 1 min, 4 workers'),
        ({'uptime': 7200}, 'up 2 h, 4 workers'),
        ({'state': 'draining'}, 'up 3 d, 4 workers, draining'),
        ({'state': '\x1b[2J'}, 'up 3 d, 4 workers, ?[2J'),
        ({'workers': 'x'}, 'answers as a server older than 3.0'),
        ({'uptime': None}, 'answers as a server older than 3.0'),
    ],
)
def test_answer(run, answer, changes, text):
    code, out, err = run('ping', *answer(ping=[200, {'state': 'up', **PING, **changes}]))
    assert (code, err) == (0, '')
    assert re.fullmatch(rf'\d+\.\d ms, {re.escape(text)}\n', out)


@pytest.mark.parametrize(
    'reply', [[404, "Unknown message type 'pyams_zmq.ping'"], [400, '?'], [500, '?'], [200, None]]
)
def test_older_server(run, answer, reply):
    code, out, err = run('ping', *answer(ping=reply))
    assert (code, err) == (0, '')
    assert re.fullmatch(r'\d+\.\d ms, answers as a server older than 3\.0\n', out)


def test_server_that_is_overloaded(run, answer):
    assert run('ping', *answer(ping=[503, 'The service is overloaded'])) == (
        1,
        '',
        'pyams_zmq: error: 503 The service is overloaded\n',
    )


def test_server_of_version_2(run):
    """It is not asked, since a message of an unknown type would block it."""
    with OldService() as service:
        code, out, err = run('ping', '--address', service.address)
    assert (code, err, service.received) == (0, '', [])
    assert re.fullmatch(r'\d+\.\d ms, answers as a server older than 3\.0\n', out)


def test_service_of_an_application(run, answer, declare):
    _option, address = answer(ping=[200, {'state': 'up', **PING}])
    code, out, err = run('ping', *declare(address))
    assert (code, err) == (0, '')
    assert out.endswith(' ms, up 3 d, 4 workers\n')
