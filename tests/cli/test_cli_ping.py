# SPDX-License-Identifier: ZPL-2.1
"""`pyams_zmq ping`."""

import re

import pytest

from answering import PING
from handlers import Process
from pyams_zmq.testing import running


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


def test_connect(run, answer):
    """It sends nothing, since that would block a service of pyams_zmq 2.0.0."""
    code, out, err = run('ping', *answer(), '--connect')
    assert (code, err) == (0, '')
    assert re.fullmatch(r'\d+\.\d ms, connected\n', out)


def test_connect_to_a_service_that_refuses(run):
    with running(Process('127.0.0.1:0', auth='alice:secret')) as process:
        code, out, err = run('ping', '--address', process.bound_address, '--connect')
    assert (code, out) == (3, '')
    assert 'Connection refused' in err


def test_service_of_an_application(run, answer, declare):
    _option, address = answer(ping=[200, {'state': 'up', **PING}])
    code, out, err = run('ping', *declare(address))
    assert (code, err) == (0, '')
    assert out.endswith(' ms, up 3 d, 4 workers\n')
