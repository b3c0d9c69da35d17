# SPDX-License-Identifier: ZPL-2.1
"""The errors: their base classes, and that a child can send them to its parent."""

import copy
import errno
import inspect
import pickle

import pytest

from pyams_zmq import exceptions
from pyams_zmq.exceptions import (
    ZMQBacklogError,
    ZMQBaseError,
    ZMQBindError,
    ZMQClosedError,
    ZMQHandlerError,
    ZMQJobError,
    ZMQJournalError,
    ZMQMessageError,
    ZMQOutboxError,
    ZMQRefusedError,
    ZMQRemoteError,
    ZMQReplyError,
    ZMQStartError,
    ZMQTimeoutError,
    ZMQUnreachableError,
    ZMQVersionError,
)

BIND_ERROR = ZMQBindError(errno.EADDRINUSE, 'Address already in use', 'tcp://127.0.0.1:5555')
ERRORS = [
    ZMQBaseError('text'),
    ZMQMessageError(418, 'I am a teapot'),
    ZMQStartError('it ended with exit code 7'),
    BIND_ERROR,
    ZMQHandlerError('a constructor that needs arguments'),
    ZMQTimeoutError('not ready after 10 s'),
    ZMQReplyError('not JSON'),
    ZMQClosedError('closed'),
    ZMQUnreachableError('no service'),
    ZMQBacklogError('10000 messages wait'),
    ZMQRefusedError('wrong password'),
    ZMQVersionError('it was not asked'),
    ZMQRemoteError(409, {'reason': 'conflict'}),
    ZMQJobError(404, 'Unknown job id'),
    ZMQJournalError('var/converter.jobs', 'another broker has it'),
    ZMQOutboxError('the transaction is doomed'),
]


def test_list_is_complete():
    classes = {
        item
        for item in vars(exceptions).values()
        if inspect.isclass(item) and item.__module__ == exceptions.__name__
    }
    assert classes == {type(error) for error in ERRORS}


@pytest.mark.parametrize(
    ('error', 'builtin'),
    [
        (ZMQMessageError, ValueError),
        (ZMQStartError, RuntimeError),
        (ZMQBindError, ZMQStartError),
        (ZMQBindError, OSError),
        (ZMQHandlerError, ZMQStartError),
        (ZMQHandlerError, TypeError),
        (ZMQHandlerError, ValueError),
        (ZMQTimeoutError, TimeoutError),
        (ZMQReplyError, ValueError),
        (ZMQClosedError, ConnectionError),
        (ZMQUnreachableError, ConnectionError),
        (ZMQBacklogError, ZMQUnreachableError),
        (ZMQRefusedError, ConnectionRefusedError),
        (ZMQRemoteError, RuntimeError),
        (ZMQJobError, ZMQRemoteError),
        (ZMQJournalError, ZMQStartError),
        (ZMQOutboxError, RuntimeError),
    ],
)
def test_base_classes(error, builtin):
    assert issubclass(error, ZMQBaseError)
    assert issubclass(error, builtin)


@pytest.mark.parametrize('error', ERRORS, ids=lambda error: type(error).__name__)
def test_pickle(error):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        other = pickle.loads(pickle.dumps(error, protocol))
        assert type(other) is type(error)
        assert other.args == error.args
        assert vars(other) == vars(error)
        assert str(other) == str(error)
        assert repr(other) == repr(error)


@pytest.mark.parametrize('error', ERRORS, ids=lambda error: type(error).__name__)
def test_copy(error):
    assert str(copy.deepcopy(error)) == str(error)


def test_message_error():
    error = ZMQMessageError('404', 12)
    assert (error.status, error.text) == (404, '12')
    assert str(error) == '404 12'


def test_message_error_without_a_status():
    with pytest.raises(ValueError, match='invalid literal'):
        ZMQMessageError('none', 'text')


@pytest.mark.parametrize('error', [BIND_ERROR, pickle.loads(pickle.dumps(BIND_ERROR))])
def test_bind_error(error):
    assert error.errno == errno.EADDRINUSE
    assert error.strerror == 'Address already in use'
    assert error.filename == 'tcp://127.0.0.1:5555'
    assert str(error) == f"[Errno {errno.EADDRINUSE}] Address already in use: '{error.filename}'"
