#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#


"""Messages that are answered at the same time, and methods that take too long."""

import asyncio
import random
from contextlib import suppress
from math import inf
from pathlib import Path

import pytest
import zmq
from pyramid.request import Request

from conftest import wait_until
from handlers import Handler, LoggedProcess, Process
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.method import methods_of, zmq_method
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import RecordingClient
from test_malformed import MESSAGES, call, check, connect

__all__ = ['connect']  # a fixture


class SlowHandler(Handler):
    """Methods that take as long as a file is there."""

    timeout = 30

    @zmq_method(timeout=0.05)
    def late(self, path):
        return self.wait_for(path)

    @zmq_method(timeout=0.05)
    async def async_late(self, path):
        self.touch(path)
        await asyncio.sleep(60)  # it is cancelled

    @zmq_method(timeout=0.05)
    async def stubborn(self, path):
        waits = asyncio.ensure_future(self.async_wait_for(path))
        while not waits.done():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(waits)
        return waits.result()

    @zmq_method(timeout=0.05)
    def promise(self, path):
        """A plain method whose result is awaited."""
        return self.stubborn(path)

    @zmq_method(timeout=0.05)
    def late_promise(self, path):
        self.wait_for(path)
        return self.async_touch(f'{path} too late')

    @zmq_method(timeout=inf)
    def patient(self, path):
        return self.wait_for(path)

    async def async_touch(self, path):
        return self.touch(path)

    def touch_later(self, path):
        return self.async_touch(path)

    def asks(self, args, *, request):
        return [200, isinstance(request, Request)]

    def asks_later(self, args, *, request):
        return self.async_echo(args)

    def asks_with_future(self, args, *, request):
        return asyncio.Future(loop=asyncio.new_event_loop())


class SlowMessageHandler(ZMQMessageHandler):
    """Serves SlowHandler."""

    handler = SlowHandler


class Concurrent(LoggedProcess):
    """Answers four messages at a time."""

    concurrency = 4


class One(Process):
    """Answers one message at a time."""


@pytest.fixture
def process(start, tmp_path):
    return start(handler=SlowMessageHandler, factory=Concurrent, log_path=tmp_path / 'log')


def ask_once(dealer, frames):
    """Send a message, return its reply, which must be the only one."""
    dealer.send(frames)
    reply = dealer.receive()
    hears_no_more(dealer)
    return reply


def hears_no_more(dealer):
    """Check that no reply is under way."""
    dealer.send(call('async_echo', 'no more'))
    assert dealer.receive() == ([b''], [200, 'no more'])


@pytest.fixture
def occupy(connect, tmp_path):
    """Take places of a process by calls that last until they are released."""
    paths = []

    def start(process, method='wait_for'):
        path = tmp_path / f'call {len(paths)}'
        paths.append(path)
        dealer = connect(process)
        dealer.send(call(method, str(path)))
        wait_until(path.exists)
        return dealer, path

    yield start
    for path in paths:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize('group', dict.fromkeys(case.group for case in MESSAGES))
def test_one_answer_each(process, connect, group):
    dealer = connect(process)
    for case in MESSAGES:
        if case.group == group:
            check(case, [ask_once(dealer, case.frames)])


def test_any_order(process, connect):
    rng = random.Random(20)
    clients = [(connect(process), rng.sample(MESSAGES, len(MESSAGES))) for _ in range(12)]
    for cases in zip(*(cases for _dealer, cases in clients), strict=True):
        for (dealer, _cases), case in zip(clients, cases, strict=True):
            dealer.send(case.frames)
        for (dealer, _cases), case in zip(clients, cases, strict=True):
            check(case, [dealer.receive()])


@pytest.mark.parametrize('method', ['wait_for', 'async_wait_for', 'stubborn'])
def test_others_are_answered(process, occupy, ask, method):
    for _ in range(3):
        occupy(process, method)
    for ping in ('echo', 'async_echo'):
        assert ask(process, [ping, 'ping']) == [200, 'ping']


@pytest.mark.parametrize('method', ['wait_for', 'async_wait_for'])
def test_replies_find_their_peers(process, occupy, method):
    calls = [occupy(process, method) for _ in range(4)]
    for dealer, path in reversed(calls):
        path.unlink()
        assert dealer.receive() == ([b''], [200, str(path)])


@pytest.mark.parametrize('method', ['wait_for', 'async_wait_for'])
def test_the_rest_waits(process, occupy, connect, tmp_path, method):
    calls = [occupy(process, method) for _ in range(4)]
    fifth = connect(process)
    path = tmp_path / 'fifth'
    fifth.send(call('touch', str(path)))
    assert not fifth.socket.poll(100)
    assert not path.exists()
    calls[2][1].unlink()
    assert fifth.receive() == ([b''], [200, str(path)])


def test_reply_to_whom_has_left(process, occupy, ask):
    for method in ('wait_for', 'async_wait_for') * 4:
        dealer, path = occupy(process, method)
        dealer.close()
        path.unlink()
    assert ask(process, ['echo', 1]) == [200, 1]


@pytest.mark.parametrize('factory', [One, Concurrent])
@pytest.mark.parametrize('method', ['late', 'async_late', 'stubborn', 'promise', 'late_promise'])
def test_deadline(start, occupy, tmp_path, factory, method):
    options = {'log_path': tmp_path / 'log'} if factory is Concurrent else {}
    process = start(handler=SlowMessageHandler, factory=factory, **options)
    dealer, path = occupy(process, method)
    assert dealer.receive() == ([b''], [504, f'{method!r} has not ended after 0.05 s'])
    path.unlink()  # now it ends, and is heard no more
    hears_no_more(dealer)
    assert not Path(f'{path} too late').exists()


def test_late_thread_keeps_its_place(start, occupy, connect):
    process = start(handler=SlowMessageHandler, factory=One)
    dealer, path = occupy(process, 'late')
    assert dealer.receive()[1][0] == 504
    other = connect(process)
    other.send(call('echo'))
    assert not other.socket.poll(100)
    path.unlink()
    assert other.receive() == ([b''], [200, None])


def test_cancelled_method_gives_its_place_back(start, occupy, ask):
    process = start(handler=SlowMessageHandler, factory=One)
    dealer, _path = occupy(process, 'async_late')
    assert dealer.receive()[1][0] == 504
    assert ask(process, ['echo', 1]) == [200, 1]


def test_in_time(process, ask, tmp_path):
    """A method with a timeout may also fail, or end before."""
    assert ask(process, ['touch_later', str(tmp_path / 'x')]) == [200, str(tmp_path / 'x')]
    assert ask(process, ['late', str(tmp_path / 'no' / 'folder')])[0] == 500
    assert ask(process, ['async_late', str(tmp_path / 'no' / 'folder')])[0] == 500


def test_threads_see_the_registry(process, ask):
    assert ask(process, ['registry', None]) == [200, True]


@pytest.mark.parametrize('name', ['asks', 'asks_later', 'asks_with_future'])
def test_request_in_a_thread(process, ask, tmp_path, name):
    status, _text = reply = ask(process, [name, None])
    if name == 'asks':
        assert reply == [200, True]
    else:
        assert status == 500
        text = (tmp_path / 'log').read_text()
        assert 'takes a request, and cannot be awaited: make it an `async def`' in text


class AsyncRequests:
    """Asks for a request where it cannot get one."""

    async def find(self, args, *, request):
        return [200, args]


class AsyncRequestsHandler(ZMQMessageHandler):
    """Serves AsyncRequests."""

    handler = AsyncRequests


def test_request_in_a_task(start, ask, tmp_path):
    assert ask(start(handler=AsyncRequestsHandler), ['find', 1]) == [200, 1]
    process = Concurrent(tmp_path / 'log', '127.0.0.1', AsyncRequestsHandler)
    process.start()
    text = r'^AsyncRequests\.find is `async def` and takes a request, .* leave concurrency at 1$'
    with pytest.raises(ValueError, match=text):
        process.wait_ready()
    process.join()


def test_drain(process, occupy, connect):
    """Calls in hand end, those which wait are refused."""
    calls = [occupy(process, method) for method in ('wait_for', 'async_wait_for') * 2]
    waiting = connect(process)
    waiting.send(call('echo'))
    assert not waiting.socket.poll(100)
    process._ask_to_stop()
    for dealer, path in calls:
        path.unlink()
        assert dealer.receive() == ([b''], [200, str(path)])
    assert waiting.receive()[1][0] == 503
    process.join()
    assert process.exitcode == 0


def test_drain_of_a_late_method(process, occupy, tmp_path):
    """Its caller has its answer; the process ends when its thread does, in time or by force."""
    dealer, path = occupy(process, 'late')
    assert dealer.receive()[1][0] == 504
    process._ask_to_stop()
    path.unlink()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize('concurrency', [0, -1])
def test_bad_concurrency(concurrency):
    process = Process()
    process.concurrency = concurrency
    with pytest.raises(ValueError, match=f'^Bad concurrency {concurrency}: write 1 or more$'):
        process.start()


def test_concurrency_of_another_socket():
    process = Process()
    process.concurrency, process.socket_type = 2, zmq.PULL
    with pytest.raises(ValueError, match='^A concurrency of 2 is for the socket type REP'):
        process.start()


def test_default():
    assert ZMQProcess.concurrency == 1


def test_eager_client():
    """In a test of an application, methods with a timeout answer as they do in a process."""
    client = RecordingClient(handler=SlowMessageHandler)
    assert client.request(['echo', 1]) == [200, 1]
    assert client.request(['async_echo', 1]) == [200, 1]
    assert client.request(['async_late', '/dev/null']) == [
        504,
        "'async_late' has not ended after 0.05 s",
    ]


def options(cls):
    """What is declared of each method."""
    return {name: (method.timeout, method.repeatable) for name, method in methods_of(cls()).items()}


class Declared:
    """Its methods declare for themselves, or not."""

    timeout = 5
    repeatable = ('plain', 'static')

    def plain(self, args):
        """Nothing."""

    @zmq_method(timeout=1, repeatable=False)
    def own(self, args):
        """Both."""

    @zmq_method(timeout=inf)
    @staticmethod
    def static(args):
        """No limit."""

    @staticmethod
    @zmq_method(repeatable=True)
    def inner(args):
        """Declared inside."""


class All(Declared):
    """All but one may be repeated, and nothing has a limit."""

    timeout = None
    repeatable = True


class Messages:
    """Has messages of these names."""

    def timeout(self, args):
        """A message."""

    def repeatable(self, args):
        """A message."""


def test_declarations():
    assert options(Declared) == {
        'plain': (5, True),
        'own': (1, False),
        'static': (None, True),
        'inner': (5, True),
    }
    assert options(All) == {
        'plain': (None, True),
        'own': (1, False),
        'static': (None, True),
        'inner': (None, True),
    }
    assert options(Messages) == {'timeout': (None, False), 'repeatable': (None, False)}


@pytest.mark.parametrize('timeout', [0, -1, True, 'x', float('nan')])
def test_bad_timeout(timeout):
    with pytest.raises(ValueError, match='^Bad timeout .*: write a number of seconds above 0$'):
        zmq_method(timeout=timeout)
    with pytest.raises(ValueError, match='^Bad timeout .*: write a number of seconds above 0$'):
        methods_of(type('Bad', (), {'timeout': timeout})())


@pytest.mark.parametrize(('names', 'culprit'), [(['plain', 'typo'], 'typo'), ('plain', 'plain')])
def test_bad_repeatable(names, culprit):
    with pytest.raises(ValueError, match=rf"^Bad\.repeatable names what is no .*\['{culprit}'\]"):
        methods_of(type('Bad', (Declared,), {'repeatable': names})())
