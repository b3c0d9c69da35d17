# SPDX-License-Identifier: ZPL-2.1
"""Which worker gets which call, decided without a socket."""

import pytest

from pyams_zmq.pool import scheduler as dispatch
from pyams_zmq.pool.histogram import Histogram
from pyams_zmq.pool.scheduler import Scheduler, peek_type
from pyams_zmq.wire.message import DRAINING_REPLY, decode_reply


class Bench:
    """A dispatcher, and what it has said."""

    def __init__(self, **options):
        options = {'queue_limit': 10, 'queue_size': 1000, **options}
        self.dispatcher = Scheduler(self.deliver, self.reply, **options)
        self.sent = []
        self.replies = []
        self.gone = set()
        self.now = 1000.0

    def deliver(self, worker, call):
        if worker.route in self.gone:
            return False
        self.sent.append((worker.route, call.body[0]))
        self.last = call
        return True

    def reply(self, envelope, reply):
        self.replies.append((envelope[0], reply[-1]))

    def ready(self, route, *, slots=1, in_hand=(), **options):
        info = {
            'pid': 1,
            'host': 'here',
            'slots': slots,
            'interval': 1,
            'methods': ['echo', 'again'],
            'repeatable': ['again'],
            'calls': [key.hex() for key in in_hand],
            **options,
        }
        return self.dispatcher.ready(route, info, self.now)

    def request(self, text, name=b'echo'):
        body = [text]
        self.dispatcher.request([text], b'', body, len(text), name, self.now)

    def answer(self, route, reply=b'[200,1]'):
        """Let a worker answer its oldest call."""
        [key, *_] = self.dispatcher.workers[route].calls
        self.dispatcher.answer(route, key, [reply], self.now)

    def lose(self, route):
        self.dispatcher.lose(route, self.now)


@pytest.fixture
def bench():
    return Bench()


def statuses(bench):
    return [(peer, decode_reply(reply)[0]) for peer, reply in bench.replies]


def test_free_worker_gets_the_call(bench):
    bench.ready(b'A')
    bench.ready(b'B')
    bench.request(b'1')
    bench.request(b'2')
    assert bench.sent == [(b'A', b'1'), (b'B', b'2')]
    bench.answer(b'B')
    bench.request(b'3')  # to the one that is free, though it is not the turn of it
    bench.answer(b'B')
    bench.request(b'4')
    assert bench.sent[2:] == [(b'B', b'3'), (b'B', b'4')]


def test_longest_free_first(bench):
    for route in (b'A', b'B', b'C'):
        bench.ready(route)
    bench.request(b'1')
    bench.answer(b'A')
    for text in (b'2', b'3', b'4'):
        bench.request(text)
    assert [route for route, _text in bench.sent] == [b'A', b'B', b'C', b'A']


def test_queue_in_order(bench):
    for text in (b'1', b'2', b'3'):
        bench.request(text)
    assert bench.dispatcher.queue_length == 3
    bench.ready(b'A')
    for _ in range(2):
        bench.answer(b'A')
    assert bench.sent == [(b'A', b'1'), (b'A', b'2'), (b'A', b'3')]
    assert bench.dispatcher.in_flight == 1


def test_slots(bench):
    bench.ready(b'A', slots=2)
    for text in (b'1', b'2', b'3'):
        bench.request(text)
    assert bench.sent == [(b'A', b'1'), (b'A', b'2')]
    bench.answer(b'A')
    assert bench.sent[2:] == [(b'A', b'3')]


def test_queue_limit():
    bench = Bench(queue_limit=2)
    for text in (b'1', b'2', b'3'):
        bench.request(text)
    [(peer, reply)] = bench.replies
    assert peer == b'3'
    assert decode_reply(reply) == [503, 'The service is overloaded: 2 calls wait, try again later']
    assert bench.dispatcher.stats(bench.now)['refused'] == 1


def test_queue_size():
    bench = Bench(queue_size=10)
    bench.request(b'12345678')
    bench.request(b'123')
    bench.request(b'12')
    assert statuses(bench) == [(b'123', 503)]
    bench.ready(b'A')
    bench.answer(b'A')
    assert bench.dispatcher.stats(bench.now)['queue_bytes'] == 0


def test_reply(bench):
    bench.ready(b'A')
    bench.request(b'1')
    bench.answer(b'A', b'[200,"result"]')
    assert bench.replies == [(b'1', b'[200,"result"]')]


def test_reply_to_nothing(bench):
    bench.ready(b'A')
    bench.ready(b'B')
    bench.request(b'1')
    key = bench.last.key
    for route, other in ((b'A', b'nonsense'), (b'B', key), (b'stranger', key)):
        bench.dispatcher.answer(route, other, [b'[200,1]'], bench.now)
    assert bench.replies == []
    bench.answer(b'A')
    bench.dispatcher.answer(b'A', key, [b'[200,1]'], bench.now)
    assert len(bench.replies) == 1


def test_dead_worker(bench):
    bench.ready(b'A')
    bench.request(b'1')
    bench.lose(b'A')
    bench.lose(b'A')
    assert statuses(bench) == [(b'1', 502)]
    assert b'died while it had this call in hand' in bench.replies[0][1]
    bench.request(b'2')
    assert bench.dispatcher.queue_length == 1
    assert bench.dispatcher.workers == {}


def test_repeat_before_the_others(bench):
    bench.ready(b'A', slots=2)
    bench.request(b'1', b'again')
    bench.request(b'2', b'again')
    bench.request(b'3')
    bench.lose(b'A')
    assert bench.replies == []
    bench.ready(b'B', slots=3)
    assert [text for _route, text in bench.sent[2:]] == [b'1', b'2', b'3']
    assert bench.dispatcher.stats(bench.now)['repeated'] == 2


def test_repeat_goes_to_a_free_worker_at_once(bench):
    bench.ready(b'A')
    bench.ready(b'B')
    bench.request(b'1', b'again')
    bench.lose(b'A')
    assert bench.sent == [(b'A', b'1'), (b'B', b'1')]


def test_three_attempts(bench):
    bench.request(b'1', b'again')
    for route in (b'A', b'B', b'C', b'D'):
        bench.ready(route)
        bench.lose(route)
    assert [route for route, _text in bench.sent] == [b'A', b'B', b'C']
    assert statuses(bench) == [(b'1', 502)]


def test_worker_that_cannot_be_reached(bench):
    bench.ready(b'A')
    bench.ready(b'B')
    bench.gone = {b'A'}
    bench.request(b'1')
    assert bench.sent == [(b'B', b'1')]
    bench.gone = {b'A', b'B'}
    bench.answer(b'B')
    bench.request(b'2')
    assert bench.dispatcher.queue_length == 1
    bench.gone = set()
    bench.ready(b'A')
    assert bench.sent[1:] == [(b'A', b'2')]


def test_queue_stays_when_the_only_worker_cannot_be_reached(bench):
    bench.request(b'1')
    bench.gone = {b'A'}
    bench.ready(b'A')
    assert bench.dispatcher.queue_length == 1
    assert bench.dispatcher.stats(bench.now)['queue_bytes'] == 1


def test_announced_again(bench):
    bench.ready(b'A', slots=3)
    bench.request(b'1', b'again')
    first = bench.last.key
    bench.request(b'2')
    bench.ready(b'A', slots=3, in_hand=[first])  # its connection broke before the second came in
    assert statuses(bench) == [(b'2', 502)]
    assert b'was cut off' in bench.replies[0][1]
    for text in (b'3', b'4', b'5'):
        bench.request(text)
    assert bench.dispatcher.queue_length == 1  # not more than its slots
    assert bench.dispatcher.in_flight == 3


def test_announced_with_calls_of_a_former_broker(bench):
    """They take its slots until it has answered them."""
    bench.ready(b'A', slots=2, in_hand=[b'former 1'])
    bench.request(b'1')
    bench.request(b'2')
    assert bench.sent == [(b'A', b'1')]
    [worker] = bench.dispatcher.stats(bench.now)['workers']
    assert (worker['state'], worker['in_flight']) == ('busy', 2)
    bench.dispatcher.answer(b'A', b'former 1', [b'[200,1]'], bench.now)
    bench.dispatcher.answer(b'A', b'former 1', [b'[200,1]'], bench.now)
    assert bench.sent == [(b'A', b'1'), (b'A', b'2')]
    assert bench.replies == []
    bench.request(b'3')
    assert len(bench.sent) == 2


def test_announced_with_too_many_calls(bench):
    bench.ready(b'A', slots=1, in_hand=[b'former 1', b'former 2'])
    bench.dispatcher.answer(b'A', b'former 1', [b'[200,1]'], bench.now)
    bench.request(b'1')
    assert bench.sent == []
    bench.dispatcher.answer(b'A', b'former 2', [b'[200,1]'], bench.now)
    assert bench.sent == [(b'A', b'1')]


def test_heartbeat_of_one_that_was_cut_off(bench):
    bench.ready(b'A')
    bench.gone.add(b'A')
    bench.request(b'1')
    assert not bench.dispatcher.heard(b'A', 1, bench.now)
    bench.gone.clear()
    bench.ready(b'A')
    assert bench.dispatcher.heard(b'A', 1, bench.now)
    assert bench.sent == [(b'A', b'1')]


def test_leave(bench):
    bench.ready(b'A')
    bench.ready(b'B')
    bench.request(b'1')
    bench.dispatcher.leave(b'A')
    bench.dispatcher.leave(b'B')
    bench.dispatcher.leave(b'stranger')
    bench.request(b'2')
    bench.answer(b'A')
    assert bench.sent == [(b'A', b'1')]
    assert statuses(bench) == [(b'1', 200)]
    states = [worker['state'] for worker in bench.dispatcher.stats(bench.now)['workers']]
    assert states == ['leaving', 'leaving']


def test_announced_while_leaving(bench):
    bench.ready(b'A', slots=0)
    bench.request(b'1')
    assert bench.sent == []


def test_give_back(bench):
    bench.ready(b'A')
    bench.request(b'1')
    bench.request(b'2')
    key = bench.last.key
    bench.dispatcher.leave(b'A')
    bench.dispatcher.give_back(b'A', key)
    bench.dispatcher.give_back(b'A', key)
    bench.dispatcher.give_back(b'stranger', key)
    bench.ready(b'B', slots=2)
    assert bench.sent == [(b'A', b'1'), (b'B', b'1'), (b'B', b'2')]
    assert bench.replies == []


def test_given_back_by_a_worker_that_stays(bench):
    """It cannot take the call yet, and will be able to: its place is not lost."""
    bench.ready(b'A')
    bench.request(b'1')
    for _ in range(3):
        bench.dispatcher.give_back(b'A', bench.last.key)
    assert bench.sent == [(b'A', b'1')] * 4
    bench.dispatcher.answer(b'A', bench.last.key, [b'[200,1]'], bench.now)
    bench.request(b'2')
    assert bench.sent[-1] == (b'A', b'2')


def test_expire(bench):
    bench.ready(b'A')
    watched = bench.ready(b'B')
    watched.is_watched = True
    bench.request(b'1')
    bench.dispatcher.expire(bench.now)
    for _ in range(4):
        bench.now += 0.7
        assert bench.dispatcher.expire(bench.now) == []
    bench.now += 0.3
    [lost] = bench.dispatcher.expire(bench.now)
    assert lost.route == b'A'
    assert statuses(bench) == [(b'1', 502)]
    assert list(bench.dispatcher.workers) == [b'B']


def test_heartbeats(bench):
    bench.ready(b'A')
    for _ in range(10):
        bench.now += 0.9
        assert bench.dispatcher.heard(b'A', 17, bench.now)
        assert bench.dispatcher.expire(bench.now) == []
    assert not bench.dispatcher.heard(b'stranger', 17, bench.now)
    [worker] = bench.dispatcher.stats(bench.now)['workers']
    assert worker['memory'] == 17
    assert worker['age'] == 9


def test_who_was_away_blames_nobody(bench):
    bench.ready(b'A')
    bench.dispatcher.expire(bench.now)
    bench.now += 3600
    assert bench.dispatcher.expire(bench.now) == []


def test_drain(bench):
    bench.ready(b'A', slots=2)
    for text in (b'1', b'2', b'3'):
        bench.request(text, b'again')
    bench.dispatcher.drain()
    bench.request(b'4')
    assert bench.replies == [(b'3', DRAINING_REPLY), (b'4', DRAINING_REPLY)]
    bench.dispatcher.give_back(b'A', bench.last.key)
    bench.lose(b'A')
    assert statuses(bench)[2:] == [(b'2', 503), (b'1', 502)]


def test_abandon(bench):
    bench.ready(b'A')
    bench.request(b'1')
    bench.dispatcher.drain()
    bench.dispatcher.abandon(bench.now)
    assert statuses(bench) == [(b'1', 502)]
    assert bench.dispatcher.in_flight == 0


def test_stats(bench):
    bench.ready(b'A', slots=2)
    bench.request(b'1')
    bench.request(b'2', b'unknown')
    bench.now += 0.5
    bench.answer(b'A')
    bench.answer(b'A', b'[404, "?"]')
    stats = bench.dispatcher.stats(bench.now)
    assert (stats['calls'], stats['errors'], stats['in_flight']) == (2, 1, 0)
    assert stats['methods']['echo']['p50'] == 0.5
    assert stats['methods']['(others)']['errors'] == 1
    assert set(stats['methods']) == {'echo', '(others)'}
    assert stats['workers'][0]['state'] == 'idle'


@pytest.mark.parametrize('reply', [b'[45,"x"]', b'[4000,1]', b'"text"', b'', b'[200,[500]]'])
def test_what_is_no_error(bench, reply):
    bench.ready(b'A')
    bench.request(b'1')
    bench.answer(b'A', reply)
    assert bench.dispatcher.stats(bench.now)['errors'] == 0


@pytest.mark.parametrize('reply', [b'[500,"x"]', b' [ 404 , 1]', b'[503]'])
def test_what_is_an_error(bench, reply):
    bench.ready(b'A')
    bench.request(b'1')
    bench.answer(b'A', reply)
    assert bench.dispatcher.stats(bench.now)['errors'] == 1


def test_limits(bench, monkeypatch):
    monkeypatch.setattr(dispatch, 'MAX_METHODS', 3)
    monkeypatch.setattr(dispatch, 'MAX_WORKERS', 2)
    worker = bench.ready(b'A', slots=10**9, interval=10**9, host='x' * 1000)
    assert worker.slots == dispatch.MAX_SLOTS
    assert worker.interval == dispatch.MAX_INTERVAL
    assert len(worker.host) == 255
    bench.ready(b'B', methods=[f'm{number}' for number in range(10)])
    assert len(bench.dispatcher.methods) == 3
    with pytest.raises(ValueError, match='2 workers already'):
        bench.ready(b'C')


@pytest.mark.parametrize(
    'nonsense',
    [{'pid': None}, {'slots': 'x'}, {'interval': []}, {'methods': 1}, {'calls': 1}],
)
def test_nonsense_announced(bench, nonsense):
    with pytest.raises((TypeError, ValueError)):
        bench.ready(b'A', **nonsense)
    bench.request(b'1')
    assert bench.sent == []


def test_numbers_differ_between_brokers():
    keys = set()
    for _ in range(100):
        bench = Bench()
        bench.ready(b'A')
        bench.request(b'1')
        keys.add(bench.last.key)
    assert len(keys) == 100


@pytest.mark.parametrize(
    ('data', 'name'),
    [
        (b'["echo",1]', b'echo'),
        (b' [ "pyams_zmq.stats", null]', b'pyams_zmq.stats'),
        (b'["ech\\u006f",1]', b''),
        (b'{"echo":1}', b''),
        (b'', b''),
        (b'["' + b'x' * 101 + b'"]', b''),
        (b'x["echo",1]', b''),
        ('["é"]'.encode(), b''),
    ],
)
def test_peek_type(data, name):
    assert peek_type(data) == name
    assert peek_type(memoryview(data)) == name


def test_histogram():
    histogram = Histogram()
    assert histogram.percentile(99) == 0
    for milliseconds in range(1, 1001):
        histogram.add(milliseconds / 1000)
    for percent in (1, 50, 90, 99):
        assert histogram.percentile(percent) == pytest.approx(percent / 100, rel=0.13)
    assert histogram.percentile(100) == 1
    assert histogram.total == pytest.approx(500.5)


@pytest.mark.parametrize('seconds', [-1, 0, 1e-6, 1.5e-5, 1.6e-5, 3.1e-5, 1, 1e6, 1e30])
def test_histogram_of_one(seconds):
    histogram = Histogram()
    histogram.add(seconds)
    assert histogram.percentile(50) <= max(0, seconds)
    assert sum(histogram._buckets) == 1
