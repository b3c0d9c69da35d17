# SPDX-License-Identifier: ZPL-2.1
"""A plain class as handler, and handlers that cannot be made."""

from functools import partial

import pytest
from pyramid.registry import Registry

import plain_handlers
from plain_handlers import (
    POLITE,
    Abstract,
    AsyncRequest,
    BadRepeatable,
    BadTimeout,
    Callable,
    Closing,
    Counted,
    Declared,
    Empty,
    Injected,
    NoHandler,
    NoProcess,
    OwnConstructor,
    Plain,
    PlainMessageHandler,
    Polite,
    PoliteMessageHandler,
    Table,
    decorated_factory,
    wrong_factory,
)
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQHandlerError, ZMQStartError
from pyams_zmq.handler.plain import check_handler, is_plain
from pyams_zmq.pool import PoolWorker, ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import RecordingClient, running


@pytest.mark.parametrize('handler', [Plain, Polite, POLITE, Empty, Table, 42, plain_handlers])
def test_plain(handler):
    assert is_plain(handler)


@pytest.mark.parametrize(
    'handler',
    [
        PlainMessageHandler,
        Callable,
        Declared,
        partial(PlainMessageHandler, handler=POLITE),
        wrong_factory,
        type('Sub', (Callable,), {}),
    ],
)
def test_factory(handler):
    assert not is_plain(handler)


@pytest.mark.parametrize(
    ('handler', 'greeting'),
    [
        (Plain, 'hello'),
        (POLITE, 'good day'),
        (Closing, 'hello'),
        (PlainMessageHandler, 'hello'),
        (Callable, 'hello'),
        (OwnConstructor, 'hey'),
        (partial(PlainMessageHandler, handler=POLITE), 'good day'),
        (Injected, 'Ann says hello,'),
        (decorated_factory, 'hello'),
    ],
)
@pytest.mark.parametrize('factory', [ZMQProcess, partial(ZMQPool, workers=1)])
def test_process_takes_it(handler, greeting, factory):
    process = factory('127.0.0.1', handler, registry=Registry('front row'))
    assert process.handler is handler
    with running(process), ZMQClient(process.bound_address) as client:
        assert client.call('greet', 'Ann') == f'{greeting} Ann'
        assert client.call('seat') == 'front row'
        assert client.request(['greeting', None])[0] == 404
    assert process.handler is handler


def test_running_and_recording_client():
    with running(ZMQProcess, handler=Plain) as process, ZMQClient(process.bound_address) as client:
        assert client.call('pid') == process.pid
    for handler in (Plain, ZMQProcess('127.0.0.1', Plain), ZMQPool('127.0.0.1', Plain, workers=2)):
        assert RecordingClient(handler=handler).call('greet', 'Ann') == 'hello Ann'


BAD = [
    (42, '42 is not a class'),
    (None, 'None is not a class'),
    (plain_handlers, 'is not a class'),
    (dict, "<class 'dict'> is not a class of the application"),
    (Empty, 'Empty has no public method: write one for each type of message'),
    (
        Polite,
        r'the constructor of Polite needs arguments \(missing a required .*: pass an instance',
    ),
    (PoliteMessageHandler, 'the constructor of Polite needs arguments'),
    (NoHandler, 'NoHandler has no handler: set its class attribute `handler`'),
    (Abstract, 'Abstract is abstract: it has no greet'),
    (BadTimeout, 'Bad timeout -1: write a number of seconds above 0'),
    (BadTimeout(), 'Bad timeout -1'),
    (BadRepeatable, r"BadRepeatable\.repeatable contains \['grete'\]"),
    (NoProcess, "'NoProcess' object has no attribute 'process'"),
    (wrong_factory, r'called with the process, the stream .*: take these, or write a class'),
    (partial(Callable, None), r'called with the process, the stream .*: take these, or write'),
]


@pytest.mark.parametrize(('handler', 'text'), BAD)
def test_check(handler, text):
    with pytest.raises(ZMQHandlerError, match=rf'^The handler [\w.]+ cannot be made: .*{text}'):
        check_handler(handler)


@pytest.mark.parametrize(('handler', 'text'), BAD)
def test_start(handler, text):
    """The owner gets the reason, also if nothing has checked the handler before."""
    process = ZMQProcess('127.0.0.1', handler)
    with pytest.raises(ZMQHandlerError, match=text) as error, running(process):
        pass
    assert isinstance(error.value, ZMQStartError)
    assert process.exitcode == 1


def test_concurrency():
    check_handler(AsyncRequest)
    with pytest.raises(ZMQHandlerError, match='leave concurrency at 1'):
        check_handler(AsyncRequest, 2)


@pytest.mark.parametrize(
    'handler', [Plain, POLITE, Closing, Table, Callable, OwnConstructor, decorated_factory, Counted]
)
def test_check_makes_nothing(handler):
    check_handler(handler)
    assert not hasattr(handler, 'process')
    assert Counted.made == 0


def test_error_of_its_own_code():
    """It may depend on anything, so it is not an error of the declaration."""

    class Unlucky:
        def __init__(self):
            raise ValueError('the database is down')

        def greet(self, name):
            return [200, name]

    check_handler(Unlucky)
    with pytest.raises(ValueError, match='^the database is down$') as error:
        RecordingClient(handler=Unlucky)
    assert not isinstance(error.value, ZMQHandlerError)


def test_worker():
    """A worker takes what its pool takes."""
    assert PoolWorker('127.0.0.1:1', Plain).handler is Plain
