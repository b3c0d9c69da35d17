# SPDX-License-Identifier: ZPL-2.1
"""Each command that asks a service that is down, refuses, hangs, or is of another version."""

import re

import pytest
import zmq

from checks import freeze, wait_until
from handlers import Process
from old_service import METHOD, OldService
from pyams_zmq.testing import running

COMMANDS = [['ping'], ['call', 'echo'], ['methods'], ['stats'], ['reload'], ['restart']]
ALL = pytest.mark.parametrize('command', COMMANDS, ids=lambda command: command[0])
ASKED = ['methods', 'stats', 'reload', 'restart']
ASKING = pytest.mark.parametrize('command', ASKED)

NOWHERE = 'tcp://127.0.0.1:1'


def put_in(command, *target):
    """Return the words of a command about a service."""
    name, *words = command
    return [name, *target, *words]


@ALL
def test_down(run, declare, command):
    ini, name = declare(NOWHERE, start='external', handler='handlers.Handler')
    code, out, err = run(*put_in(command, ini, name))
    assert (code, out) == (4, '')
    assert re.fullmatch(
        rf'pyams_zmq: error: No service has answered at {NOWHERE} for [\d.]+ s\. Service '
        rf"'converter' at {NOWHERE} is started by \"pyams_zmq serve {ini} converter\" "
        r'\(start = external\): run that, or see its log\n',
        err,
    )


@ALL
def test_down_at_an_address(run, command):
    code, out, err = run(*put_in(command, '--address', NOWHERE))
    assert (code, out) == (4, '')
    assert re.fullmatch(
        rf'pyams_zmq: error: No service .* at {NOWHERE} for [\d.]+ s\. See the log of the '
        r'service; start it if it is down, or correct --address\n',
        err,
    )


@ALL
@pytest.mark.parametrize('way', ['ini', 'address'])
def test_wrong_password(run, declare, tmp_path, command, way):
    with running(Process('127.0.0.1:0', auth='alice:secret')) as process:
        users = tmp_path / 'users'
        users.write_text('alice:wrong\n')
        if way == 'ini':
            target = declare(process.bound_address, client_auth='alice:wrong')
        else:
            target = ('--address', process.bound_address, '--auth-file', str(users))
        code, out, err = run(*put_in(command, *target))
    assert (code, out) == (3, '')
    assert re.fullmatch(r'pyams_zmq: error: tcp://\S+: Connection refused: check user.*\n', err)


@ASKING
def test_user_who_may_not_ask(run, answer, command):
    refusal = [403, "User 'alice' at 10.0.0.1 may not read the statistics"]
    target = answer(**dict.fromkeys(('methods', 'stats', 'reload', 'restart'), refusal))
    assert run(command, *target) == (
        3,
        '',
        "pyams_zmq: error: 403 User 'alice' at 10.0.0.1 may not read the statistics\n",
    )


@ALL
def test_hung_before_the_connection(run, command):
    """The process is stopped with its thread of libzmq: there is no handshake."""
    with running(Process('127.0.0.1:0')) as process:
        freeze(process.pid)
        try:
            code, out, err = run(*put_in(command, '--address', process.bound_address))
        finally:
            process.kill()
    assert (code, out) == (5, '')
    assert re.fullmatch(
        r'pyams_zmq: error: No service .* connections are accepted, but .*: the service hangs.*\n',
        err,
    )


@ALL
def test_no_answer(run, command):
    """The connection is up, and the service does not answer within the time."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as silent:
        port = silent.bind_to_random_port('tcp://127.0.0.1')
        target = ('--address', f'127.0.0.1:{port}', '--timeout', '0.3')
        assert run(*put_in(command, *target)) == (
            5,
            '',
            f'pyams_zmq: error: tcp://127.0.0.1:{port} has not replied within 0.3 s\n',
        )


def test_method_that_takes_too_long(run, tmp_path):
    path = tmp_path / 'wait'
    with running(Process('127.0.0.1:0')) as process:
        target = ('--address', process.bound_address, '--timeout', '0.5')
        try:
            code, out, err = run('call', *target, 'wait_for', f'"{path}"')
        finally:
            wait_until(path.exists)
            path.unlink()
    assert (code, out) == (5, '')
    assert err == f'pyams_zmq: error: {process.bound_address} has not replied within 0.5 s\n'


@ASKING
def test_server_of_an_older_version(run, answer, command):
    target = answer()
    code, out, err = run(command, *target)
    name = 'stats' if command == 'restart' else command
    assert (code, out) == (1, '')
    assert err == (
        f"pyams_zmq: error: 404 Unknown message type 'pyams_zmq.{name}'. {target[1]} runs a "
        'version of pyams_zmq before 3.0\n'
    )


@pytest.mark.parametrize('command', [*ASKED, 'jobs', 'top'])
@pytest.mark.parametrize('way', ['ini', 'address'])
def test_server_of_version_2(run, declare, command, way):
    """It is not asked, since a message of an unknown type would block it."""
    with OldService() as service:
        by_name = declare(service.address)
        target = by_name if way == 'ini' else ('--address', service.address)
        code, out, err = run(command, *target)
        assert service.received == []
        assert run('call', *target, METHOD, '1') == (0, '1\n', '')
    name = by_name[1] if way == 'ini' else service.address
    problem = (
        f'{name} runs a version of pyams_zmq before 3.0 (its socket is a REP), which a question '
        'would block: it was not asked'
    )
    assert code == 1
    if command == 'top':
        assert 'no statistics' in out
        assert problem in out + err
    else:
        assert (out, err) == ('', f'pyams_zmq: error: {problem}\n')


def test_declared_service_that_this_version_starts(run, declare):
    """It is asked at once, by one connection."""
    with running(Process('127.0.0.1:0')) as process:
        for start in ('auto', 'external'):
            target = declare(process.bound_address, start=start, handler='handlers.Handler')
            assert run('stats', *target).code == 0


@ASKING
def test_answer_that_is_not_an_object(run, answer, command):
    target = answer(methods=[200, []], stats=[200, 5], reload=[200, None])
    code, out, err = run(command, *target)
    if command == 'reload':
        assert (code, err) == (0, '')
    else:
        assert (code, out) == (1, '')
        assert re.fullmatch(
            r'pyams_zmq: error: The answer of \S+ to pyams\S+ is not an object\n', err
        )
