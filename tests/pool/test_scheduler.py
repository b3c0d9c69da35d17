# SPDX-License-Identifier: ZPL-2.1
"""The scheduler, without a socket."""

import pytest

from pyams_zmq.pool import scheduler as scheduler_module
from pyams_zmq.pool.queue import FairQueue
from pyams_zmq.pool.scheduler import Scheduler
from pyams_zmq.wire.message import DRAINING_REPLY, decode_reply


class Bench:
    """A scheduler, and what it has sent."""

    def __init__(self, **options):
        limits = {'limit': 10, 'size_limit': 1000, 'client_size_limit': 1000}
        queue = FairQueue(**{name: options.pop(name, limits[name]) for name in limits})
        self.scheduler = Scheduler(self.deliver, self.reply, self.reply, queue=queue, **options)
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
        self.replies.append((envelope[1], reply[-1]))

    def ready(self, route, *, slots=1, calls=(), **options):
        info = {
            'pid': 1,
            'host': 'here',
            'slots': slots,
            'interval': 1,
            'methods': ['echo', 'again'],
            'repeatable': ['again'],
            'calls': [key.hex() for key in calls],
            **options,
        }
        worker = self.scheduler.handle_ready(route, info, self.now)
        self.scheduler.assign_queued()
        return worker

    def request(self, text, name=b'echo', client=b'client'):
        envelope = [client, text]  # the second frame shows which request a reply belongs to
        self.scheduler.handle_request(envelope, b'', [text], len(text), name, self.now)

    def reply_to_oldest(self, route, reply=b'[200,1]'):
        """Send the reply of a worker to its oldest call."""
        [key, *_] = self.scheduler.workers[route].calls
        self.scheduler.handle_reply(route, key, [reply], self.now)

    def remove(self, route):
        self.scheduler.remove(route, self.now)

    @property
    def queue_length(self):
        return self.scheduler.stats(self.now)['queue']


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
    bench.reply_to_oldest(b'B')
    bench.request(b'3')  # to the free worker, although the other one is next
    bench.reply_to_oldest(b'B')
    bench.request(b'4')
    assert bench.sent[2:] == [(b'B', b'3'), (b'B', b'4')]


def test_longest_free_first(bench):
    for route in (b'A', b'B', b'C'):
        bench.ready(route)
    bench.request(b'1')
    bench.reply_to_oldest(b'A')
    for text in (b'2', b'3', b'4'):
        bench.request(text)
    assert [route for route, _text in bench.sent] == [b'A', b'B', b'C', b'A']


def test_queue_in_order(bench):
    for text in (b'1', b'2', b'3'):
        bench.request(text)
    assert bench.queue_length == 3
    bench.ready(b'A')
    for _ in range(2):
        bench.reply_to_oldest(b'A')
    assert bench.sent == [(b'A', b'1'), (b'A', b'2'), (b'A', b'3')]
    assert bench.scheduler.in_flight == 1


def test_slots(bench):
    bench.ready(b'A', slots=2)
    for text in (b'1', b'2', b'3'):
        bench.request(text)
    assert bench.sent == [(b'A', b'1'), (b'A', b'2')]
    bench.reply_to_oldest(b'A')
    assert bench.sent[2:] == [(b'A', b'3')]


def test_queue_limit():
    bench = Bench(limit=2)
    for text in (b'1', b'2', b'3'):
        bench.request(text)
    [(peer, reply)] = bench.replies
    assert peer == b'3'
    assert decode_reply(reply) == [503, 'The service is overloaded: 2 calls wait, try again later']
    assert bench.scheduler.stats(bench.now)['refused'] == 1


def test_queue_size():
    bench = Bench(size_limit=10)
    bench.request(b'12345678')
    bench.request(b'123')
    bench.request(b'12')
    assert statuses(bench) == [(b'123', 503)]
    bench.ready(b'A')
    bench.reply_to_oldest(b'A')
    assert bench.scheduler.stats(bench.now)['queue_bytes'] == 0


def test_reply(bench):
    bench.ready(b'A')
    bench.request(b'1')
    bench.reply_to_oldest(b'A', b'[200,"result"]')
    assert bench.replies == [(b'1', b'[200,"result"]')]


def test_reply_to_nothing(bench):
    bench.ready(b'A')
    bench.ready(b'B')
    bench.request(b'1')
    key = bench.last.key
    for route, other in ((b'A', b'nonsense'), (b'B', key), (b'stranger', key)):
        bench.scheduler.handle_reply(route, other, [b'[200,1]'], bench.now)
    assert bench.replies == []
    bench.reply_to_oldest(b'A')
    bench.scheduler.handle_reply(b'A', key, [b'[200,1]'], bench.now)
    assert len(bench.replies) == 1


def test_removed_worker(bench):
    bench.ready(b'A')
    bench.request(b'1')
    bench.remove(b'A')
    bench.remove(b'A')
    assert statuses(bench) == [(b'1', 502)]
    assert b'died during this call' in bench.replies[0][1]
    bench.request(b'2')
    assert bench.queue_length == 1
    assert bench.scheduler.workers == {}


def test_repeat_before_the_others(bench):
    bench.ready(b'A', slots=2)
    bench.request(b'1', b'again')
    bench.request(b'2', b'again')
    bench.request(b'3')
    bench.remove(b'A')
    assert bench.replies == []
    bench.ready(b'B', slots=3)
    assert [text for _route, text in bench.sent[2:]] == [b'1', b'2', b'3']
    assert bench.scheduler.stats(bench.now)['repeated'] == 2


def test_repeat_goes_to_a_free_worker_at_once(bench):
    bench.ready(b'A')
    bench.ready(b'B')
    bench.request(b'1', b'again')
    bench.remove(b'A')
    assert bench.sent == [(b'A', b'1'), (b'B', b'1')]


def test_three_attempts(bench):
    bench.request(b'1', b'again')
    for route in (b'A', b'B', b'C', b'D'):
        bench.ready(route)
        bench.remove(route)
    assert [route for route, _text in bench.sent] == [b'A', b'B', b'C']
    assert statuses(bench) == [(b'1', 502)]


def test_worker_that_cannot_be_reached(bench):
    bench.ready(b'A')
    bench.ready(b'B')
    bench.gone = {b'A'}
    bench.request(b'1')
    assert bench.sent == [(b'B', b'1')]
    bench.gone = {b'A', b'B'}
    bench.reply_to_oldest(b'B')
    bench.request(b'2')
    assert bench.queue_length == 1
    bench.gone = set()
    bench.ready(b'A')
    assert bench.sent[1:] == [(b'A', b'2')]


def test_queue_stays_when_the_only_worker_cannot_be_reached(bench):
    bench.request(b'1')
    bench.gone = {b'A'}
    bench.ready(b'A')
    assert bench.queue_length == 1
    assert bench.scheduler.stats(bench.now)['queue_bytes'] == 1


def test_ready_again(bench):
    bench.ready(b'A', slots=3)
    bench.request(b'1', b'again')
    first = bench.last.key
    bench.request(b'2')
    bench.ready(b'A', slots=3, calls=[first])  # the second call was lost with the connection
    assert statuses(bench) == [(b'2', 502)]
    assert b'lost its connection' in bench.replies[0][1]
    for text in (b'3', b'4', b'5'):
        bench.request(text)
    assert bench.queue_length == 1  # not more than its slots
    assert bench.scheduler.in_flight == 3


def test_ready_with_calls_of_an_earlier_broker(bench):
    """They use its slots until it has replied to them."""
    bench.ready(b'A', slots=2, calls=[b'former 1'])
    bench.request(b'1')
    bench.request(b'2')
    assert bench.sent == [(b'A', b'1')]
    [worker] = bench.scheduler.stats(bench.now)['workers']
    assert (worker['state'], worker['in_flight']) == ('busy', 2)
    bench.scheduler.handle_reply(b'A', b'former 1', [b'[200,1]'], bench.now)
    bench.scheduler.handle_reply(b'A', b'former 1', [b'[200,1]'], bench.now)
    assert bench.sent == [(b'A', b'1'), (b'A', b'2')]
    assert bench.replies == []
    bench.request(b'3')
    assert len(bench.sent) == 2


def test_ready_with_too_many_calls(bench):
    bench.ready(b'A', slots=1, calls=[b'former 1', b'former 2'])
    bench.scheduler.handle_reply(b'A', b'former 1', [b'[200,1]'], bench.now)
    bench.request(b'1')
    assert bench.sent == []
    bench.scheduler.handle_reply(b'A', b'former 2', [b'[200,1]'], bench.now)
    assert bench.sent == [(b'A', b'1')]


def test_heartbeat_after_a_lost_connection(bench):
    bench.ready(b'A')
    bench.gone.add(b'A')
    bench.request(b'1')
    assert not bench.scheduler.handle_heartbeat(b'A', 1, bench.now)
    bench.gone.clear()
    bench.ready(b'A')
    assert bench.scheduler.handle_heartbeat(b'A', 1, bench.now)
    assert bench.sent == [(b'A', b'1')]


def test_disconnect(bench):
    bench.ready(b'A')
    bench.ready(b'B')
    bench.request(b'1')
    bench.scheduler.handle_disconnect(b'A')
    bench.scheduler.handle_disconnect(b'B')
    bench.scheduler.handle_disconnect(b'stranger')
    bench.request(b'2')
    bench.reply_to_oldest(b'A')
    assert bench.sent == [(b'A', b'1')]
    assert statuses(bench) == [(b'1', 200)]
    states = [worker['state'] for worker in bench.scheduler.stats(bench.now)['workers']]
    assert states == ['leaving', 'leaving']


def test_ready_while_leaving(bench):
    bench.ready(b'A', slots=0)
    bench.request(b'1')
    assert bench.sent == []


def test_reject(bench):
    bench.ready(b'A')
    bench.request(b'1')
    bench.request(b'2')
    key = bench.last.key
    bench.scheduler.handle_disconnect(b'A')
    bench.scheduler.handle_reject(b'A', key)
    bench.scheduler.handle_reject(b'A', key)
    bench.scheduler.handle_reject(b'stranger', key)
    bench.ready(b'B', slots=2)
    assert bench.sent == [(b'A', b'1'), (b'B', b'1'), (b'B', b'2')]
    assert bench.replies == []


def test_reject_by_a_worker_that_stays(bench):
    """The slot remains usable."""
    bench.ready(b'A')
    bench.request(b'1')
    for _ in range(3):
        bench.scheduler.handle_reject(b'A', bench.last.key)
    assert bench.sent == [(b'A', b'1')] * 4
    bench.scheduler.handle_reply(b'A', bench.last.key, [b'[200,1]'], bench.now)
    bench.request(b'2')
    assert bench.sent[-1] == (b'A', b'2')


def test_missed_heartbeats(bench):
    bench.ready(b'A')
    watched = bench.ready(b'B')
    watched.is_watched = True
    bench.request(b'1')
    bench.scheduler.check(bench.now)
    for _ in range(4):
        bench.now += 0.7
        assert bench.scheduler.check(bench.now) == []
    bench.now += 0.3
    [lost] = bench.scheduler.check(bench.now)
    assert lost.route == b'A'
    assert statuses(bench) == [(b'1', 502)]
    assert list(bench.scheduler.workers) == [b'B']


def test_worker_that_has_left(bench):
    """It is removed, but not lost: a worker of another machine ends this way in good order."""
    bench.ready(b'A')
    bench.ready(b'B')
    bench.request(b'1')
    for route in (b'A', b'B'):
        bench.scheduler.handle_disconnect(route)
    for _ in range(4):
        bench.scheduler.check(bench.now)
        bench.now += 0.9
    [lost] = bench.scheduler.check(bench.now)
    assert lost.route == b'A'  # with a call
    assert bench.scheduler.workers == {}


def test_heartbeats(bench):
    bench.ready(b'A')
    for _ in range(10):
        bench.now += 0.9
        assert bench.scheduler.handle_heartbeat(b'A', 17, bench.now)
        assert bench.scheduler.check(bench.now) == []
    assert not bench.scheduler.handle_heartbeat(b'stranger', 17, bench.now)
    [worker] = bench.scheduler.stats(bench.now)['workers']
    assert worker['memory'] == 17
    assert worker['age'] == 9


def test_suspended_broker_removes_no_worker(bench):
    bench.ready(b'A')
    bench.scheduler.check(bench.now)
    bench.now += 3600
    assert bench.scheduler.check(bench.now) == []


def test_drain(bench):
    bench.ready(b'A', slots=2)
    for text in (b'1', b'2', b'3'):
        bench.request(text, b'again')
    bench.scheduler.drain()
    bench.request(b'4')
    assert bench.replies == [(b'3', DRAINING_REPLY), (b'4', DRAINING_REPLY)]
    bench.scheduler.handle_reject(b'A', bench.last.key)
    bench.remove(b'A')
    assert statuses(bench)[2:] == [(b'2', 503), (b'1', 502)]


def test_abort(bench):
    bench.ready(b'A')
    bench.request(b'1')
    bench.scheduler.drain()
    bench.scheduler.abort(bench.now)
    assert statuses(bench) == [(b'1', 502)]
    assert bench.scheduler.in_flight == 0


def test_stats(bench):
    bench.ready(b'A', slots=2)
    bench.request(b'1')
    bench.request(b'2', b'unknown')
    bench.now += 0.5
    bench.reply_to_oldest(b'A')
    bench.reply_to_oldest(b'A', b'[404, "?"]')
    stats = bench.scheduler.stats(bench.now)
    assert (stats['calls'], stats['errors'], stats['in_flight']) == (2, 1, 0)
    assert stats['methods']['echo']['p50'] == 0.5
    assert stats['methods']['(others)']['errors'] == 1
    assert set(stats['methods']) == {'echo', '(others)'}
    assert stats['workers'][0]['state'] == 'idle'


def test_limits(bench, monkeypatch):
    monkeypatch.setattr(scheduler_module, 'MAX_METHODS', 3)
    monkeypatch.setattr(scheduler_module, 'MAX_WORKERS', 2)
    worker = bench.ready(b'A', slots=10**9, interval=10**9, host='x' * 1000)
    assert worker.slots == scheduler_module.MAX_SLOTS
    assert worker.interval == scheduler_module.MAX_INTERVAL
    assert len(worker.host) == 255
    bench.ready(b'B', methods=[f'm{number}' for number in range(10)])
    assert len(bench.scheduler.methods) == 3
    with pytest.raises(ValueError, match='limit of 2 workers'):
        bench.ready(b'C')


@pytest.mark.parametrize(
    'invalid',
    [{'pid': None}, {'slots': 'x'}, {'interval': []}, {'methods': 1}, {'calls': 1}],
)
def test_ready_with_invalid_data(bench, invalid):
    with pytest.raises((TypeError, ValueError)):
        bench.ready(b'A', **invalid)
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


def test_greedy_client(bench):
    """Its calls wait; the other client's call is the next one."""
    bench.ready(b'A')
    for number in range(12):
        bench.request(b'%d' % number, client=b'greedy')
    assert statuses(bench) == [(b'11', 503)]
    bench.request(b'other', client=b'polite')
    assert statuses(bench)[1:] == [(b'10', 503)]
    for _ in range(3):
        bench.reply_to_oldest(b'A')
    assert [text for _route, text in bench.sent] == [b'0', b'1', b'other', b'2']
    assert bench.scheduler.stats(bench.now)['refused'] == 2


def test_order_while_a_worker_is_replaced():
    """The new worker takes a call when the old one has finished, or returned, that before it."""
    bench = Bench(is_ordered=True)
    bench.ready(b'old')
    for text in (b'1', b'2', b'3', b'4'):
        bench.request(text)
    bench.ready(b'new')
    bench.scheduler.handle_disconnect(b'old')
    assert bench.sent == [(b'old', b'1')]
    bench.reply_to_oldest(b'old')
    assert bench.sent[1:] == [(b'new', b'2')]
    bench.ready(b'newer')
    bench.scheduler.handle_reject(b'new', bench.last.key)
    bench.reply_to_oldest(b'newer')
    bench.reply_to_oldest(b'new')
    assert [text for _route, text in bench.sent[2:]] == [b'2', b'3', b'4']


def test_order_after_the_death_of_a_worker():
    bench = Bench(is_ordered=True)
    bench.ready(b'A')
    bench.ready(b'B')
    bench.request(b'1', b'again')
    bench.request(b'2')
    bench.remove(b'A')
    assert bench.sent == [(b'A', b'1'), (b'B', b'1')]
    bench.reply_to_oldest(b'B')
    assert bench.sent[2:] == [(b'B', b'2')]


def test_descriptions(bench):
    """Of known methods, the last one that a worker has sent."""
    described = {'signature': '()', 'doc': '', 'timeout': None, 'kind': 'call', 'repeatable': False}
    for text in 'a', 'b':
        bench.ready(text.encode(), described={'echo': {**described, 'doc': text}, 'no': described})
    assert bench.scheduler.descriptions == {'echo': {**described, 'doc': 'b'}}
