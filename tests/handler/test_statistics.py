# SPDX-License-Identifier: ZPL-2.1
"""What is counted about the calls of methods, and how methods are described."""

from functools import partial

import pytest
import zmq

from handlers import Unprintable
from pyams_zmq.handler.description import describe, trim
from pyams_zmq.handler.methods import Method, methods_of
from pyams_zmq.handler.statistics import MAX_METHODS, CallStatistics, MethodStats


@pytest.mark.parametrize(
    ('reply', 'errors'),
    [
        (b'[500,"text"]', 1),
        (b'[404,"text"]', 1),
        ([b'frame', b'[400,"text"]'], 1),
        ([zmq.Frame(b'[400,"text"]')], 1),
        ([zmq.Frame(b'[200,"text"]')], 0),
        (b'[200,4]', 0),
        (b'[4,5]', 0),
        (b'[45]', 0),
        (b'"4"', 0),
        (b'1', 0),
        (b'', 0),
        ([b'[500,"text"]', b'1'], 0),
    ],
)
def test_errors(reply, errors):
    stats = MethodStats()
    stats.count(0.5, reply)
    assert stats.errors == errors
    assert stats.stats()['calls'] == 1
    assert stats.stats()['mean'] == stats.stats()['max'] == 0.5


def test_no_calls():
    assert MethodStats().stats()['mean'] == 0.0
    assert CallStatistics().stats() == {'calls': 0, 'errors': 0, 'refused': 0, 'methods': {}}


def test_many_methods():
    statistics = CallStatistics()
    for number in range(MAX_METHODS + 5):
        statistics.of_method(f'm{number}').count(0.1, b'1')
    methods = statistics.stats()['methods']
    assert len(methods) == MAX_METHODS + 1
    assert methods['(others)']['calls'] == 5
    assert statistics.stats()['calls'] == MAX_METHODS + 5


class Described:
    """Methods of several kinds."""

    built_in = staticmethod(max)
    part = staticmethod(partial(int, base=2))

    def broken(self, args=Unprintable()):  # noqa: B008 - its `repr` raises
        """Have a default that cannot be shown."""

    def long(self, args='x' * 500):
        pass

    def short(self, args, *, peer):
        """Say it in one line.

        And more.
        """


def test_describe():
    described = describe(methods_of(Described()))
    assert list(described) == ['broken', 'built_in', 'long', 'part', 'short']
    assert described['broken']['signature'] == described['built_in']['signature'] == ''
    assert described['broken']['doc'] == 'Have a default that cannot be shown.'
    assert len(described['long']['signature']) == 200
    assert described['long']['doc'] == ''
    assert described['short']['doc'] == 'Say it in one line.'
    assert described['short']['signature'] == '(args, *, peer)'
    assert describe({'x': Method(len, 'x')})['x']['kind'] == 'call'


def test_trim():
    [described] = describe({'f': Method(sorted, 'f', timeout=2)}).values()
    assert trim(described) == described
    long = {**described, 'doc': 'x' * 1000, 'signature': ['x'] * 1000, 'kind': 'job', 'more': 1}
    trimmed = trim(long)
    assert len(trimmed['doc']) == len(trimmed['signature']) == 200
    assert trimmed['kind'] == 'job'
    assert trimmed.keys() == described.keys()
    with pytest.raises(KeyError):
        trim({})
