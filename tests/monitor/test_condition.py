# SPDX-License-Identifier: ZPL-2.1
"""Conditions of services whose answers are not those of the tests with services."""

import pytest

from pyams_zmq.exceptions import ZMQReplyError, ZMQTimeoutError
from pyams_zmq.monitor.condition import DOWN, UP, condition_of
from pyams_zmq.monitor.question import Answer

ADDRESS = 'tcp://10.1.2.3:5000'


@pytest.mark.parametrize(
    ('error', 'reason'),
    [
        (ZMQTimeoutError(ADDRESS), 'it does not answer: it is down, or hangs'),
        (ZMQReplyError(ADDRESS), 'what answers is not a service of pyams_zmq'),
        (OSError(24, ADDRESS), 'it cannot be asked'),
    ],
)
def test_down(error, reason):
    assert condition_of(Answer(None, str(error), 0.1, error)) == (DOWN, reason)


@pytest.mark.parametrize('result', [None, 'pong', {}, {'state': 'up'}])
def test_up(result):
    assert condition_of(Answer(result)) == (UP, None)
