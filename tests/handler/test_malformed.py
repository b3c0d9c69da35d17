# SPDX-License-Identifier: ZPL-2.1
"""Each message gets exactly one reply, malformed or not, and the next message is handled.

`MESSAGES` is the specification: every class of malformed message with its reply.
"""

import random
from itertools import pairwise

import pytest
import zmq

from checks import wait_until
from handlers import BrokenLogProcess, LoggedProcess
from messages import ECHO, ERROR, LIMIT, MESSAGES, SECRET, Dealer, call, check


@pytest.fixture
def process(start, tmp_path):
    """Process whose handler can fail in many ways."""
    return start(factory=LoggedProcess, log_path=tmp_path / 'log')


@pytest.mark.parametrize('group', dict.fromkeys(case.group for case in MESSAGES))
def test_one_reply_each(process, connect, group):
    dealer = connect(process)
    for case in MESSAGES:
        if case.group == group:
            check(case, dealer.ask(case.frames))


def test_any_order(process, connect):
    """The same messages in random order, from several clients that do not wait for replies."""
    rng = random.Random(20)
    clients = [(connect(process), rng.sample(MESSAGES, len(MESSAGES))) for _ in range(4)]
    for cases in zip(*(cases for _dealer, cases in clients), strict=True):
        for (dealer, _cases), case in zip(clients, cases, strict=True):
            dealer.send(case.frames)
    for dealer, cases in clients:
        for case in cases:
            check(case, [dealer.receive()])
        assert dealer.ask(call('echo')) == [([b''], [200, None])]


@pytest.mark.slow
def test_nothing_grows(process, connect):
    """20 000 malformed messages of all classes cost neither memory nor descriptors."""
    dealer = connect(process)
    cheap = [
        case
        for case in MESSAGES
        if len(case.frames) < 10
        and sum(map(len, case.frames)) < 10_000
        and not case.name.startswith(('recurses', 'returns 100 000'))
    ]
    failing = [case for case in cheap if case.expected == 500]
    refused = [case for case in cheap if case.expected != 500]

    rng = random.Random(20)

    def flood(number):
        while number > 0:
            # Expensive messages now and then, and few tracebacks.
            batch = rng.sample(refused, 45) + rng.sample(failing, 5)
            if number % 4_000 == 0:
                batch += MESSAGES
            for case in batch:
                dealer.send(case.frames)
            for case in batch:
                check(case, [dealer.receive()])
            number -= 50

    def measure(kind):
        ((_envelope, (_status, value)),) = dealer.ask(call(kind))
        return value

    flood(4_000)
    fds, sizes = measure('fds'), [measure('trimmed_rss')]
    for _ in range(5):
        flood(4_000)
        sizes.append(measure('trimmed_rss'))
    assert measure('fds') == fds
    # The memory of a forked process varies, but a leak of 0.1 KiB per message shows each time.
    assert min(after - before for before, after in pairwise(sizes)) < 400, sizes


@pytest.mark.parametrize('method', ['raises', 'async_raises'])
def test_log(process, connect, tmp_path, method):
    ((_envelope, (status, text)),) = connect(process).ask(call(method, 'ValueError'))
    assert status == 500
    log = (tmp_path / 'log').read_text()
    assert f'Message handler failed, error id {ERROR.fullmatch(text)[1]}\nTraceback' in log
    assert f'ValueError: {SECRET}' in log
    assert f'in {method}' in log


@pytest.mark.parametrize('method', ['raises', 'async_raises'])
def test_log_that_fails(start, connect, method):
    dealer = connect(start(factory=BrokenLogProcess))
    for _ in range(3):
        ((_envelope, (status, text)),) = dealer.ask(call(method, 'ValueError'))
        assert (status, bool(ERROR.fullmatch(text))) == (500, True)


def test_default_limit(start, connect):
    process = start()
    dealer = connect(process)
    limit = 16 * 1024 * 1024
    text = 'x' * (limit - len(b'["echo",""]'))
    assert dealer.ask([*call('echo', text)[:1], b'["echo","%s"]' % text.encode()]) == [
        ([b''], [200, text])
    ]
    ((_envelope, (status, text)),) = dealer.ask([b'', b'x' * (limit + 1)])
    assert (status, text) == (413, f'Message is {limit + 1} bytes; the limit is {limit}')


def test_far_larger_than_the_limit(process, connect):
    """libzmq closes the connection of the sender; other clients are not affected."""
    other = connect(process)
    dealer = connect(process)
    with dealer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
        dealer.send([b'', b'x' * (LIMIT + 17 * 1024 * 1024)])
        assert monitor.poll(10_000)
        dealer.socket.disable_monitor()
    assert other.ask(call('echo')) == [([b''], [200, None])]
    assert dealer.ask(call('echo')) == [([b''], [200, None])]  # the client has reconnected


@pytest.mark.parametrize('method', ['wait_for', 'async_wait_for'])
def test_client_gone_before_the_reply(process, connect, tmp_path, method):
    other = connect(process)
    path = tmp_path / 'in hand'
    for _ in range(20):
        dealer = connect(process)
        dealer.send(call(method, str(path)))
        wait_until(path.exists)
        dealer.close()
        path.unlink()
        assert other.ask(call('echo')) == [([b''], [200, None])]


GONE = {
    'good': call('echo'),
    'async': call('async_echo'),
    'failing': call('raises', 'ValueError'),
    'no JSON': [b'', b'x'],
    'too many frames': [b'', b'x', b'x'],
    'an envelope': [b'hop', b'', ECHO],
    'no delimiter': [b'x'],
    'nothing behind the delimiter': [b''],
    'an envelope and nothing behind': [b'hop', b''],
}


@pytest.mark.parametrize('frames', GONE.values(), ids=GONE)
def test_clients_gone_before_their_turn(process, connect, tmp_path, frames):
    first = connect(process)
    other = connect(process)
    path = tmp_path / 'in hand'
    first.send(call('wait_for', str(path)))
    wait_until(path.exists)
    with zmq.Context() as context:
        for _ in range(50):
            dealer = Dealer(context, process.bound_address)
            dealer.send(frames)
            dealer.close()
    other.send(call('echo', 'in the middle of them'))
    path.unlink()
    assert first.receive() == ([b''], [200, str(path)])
    assert other.receive() == ([b''], [200, 'in the middle of them'])
    for _ in range(3):
        assert first.ask(call('echo')) == [([b''], [200, None])]
        assert connect(process).ask(call('echo')) == [([b''], [200, None])]


def test_client_that_does_not_read(process, connect):
    """It loses its own replies only."""
    idle = connect(process)
    idle.socket.sndtimeo = 10_000
    reply = 'x' * 10_000
    for _ in range(5_000):
        idle.send(call('echo', reply))
    assert connect(process).ask(call('echo')) == [([b''], [200, None])]
    while idle.socket.poll(0):
        assert idle.receive() == ([b''], [200, reply])


def test_10_000_requests_of_20_clients(process, connect):
    dealers = [connect(process) for _ in range(20)]
    for number in range(500):
        for dealer in dealers:
            dealer.send(call('async_echo' if number % 2 else 'echo', number))
    for number in range(500):
        for dealer in dealers:
            assert dealer.receive() == ([b''], [200, number])
    for dealer in dealers:
        assert dealer.ask(call('echo')) == [([b''], [200, None])]
