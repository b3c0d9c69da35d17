# SPDX-License-Identifier: ZPL-2.1
"""Messages that are handled at the same time, and methods that pass their deadline."""

import asyncio
import multiprocessing
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partialmethod
from math import inf
from pathlib import Path

import pytest
import transaction
import zmq
from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.threadlocal import manager
from tornado.ioloop import IOLoop

from checks import wait_until
from handlers import BrokenLogProcess, Handler, Journal, LoggedProcess, Process
from messages import MESSAGES, call, check
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.handler.executor import call_when_done
from pyams_zmq.handler.methods import methods_of, zmq_method
from pyams_zmq.interfaces import IZMQProcessStoppedEvent
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import RecordingClient
from pyams_zmq.wire.message import overloaded


class SlowHandler(Handler):
    """Methods that run until a file is removed."""

    timeout = 30

    @zmq_method(timeout=0.2)
    def late(self, path):
        return self.wait_for(path)

    @zmq_method(timeout=0.2)
    async def async_late(self, path):
        self.touch(path)
        await asyncio.sleep(60)  # it is cancelled

    @zmq_method(timeout=0.2)
    async def late_thread(self, path):
        return await self.async_wait_for(path)

    @zmq_method(timeout=3600)
    async def leaves_thread(self, path):
        asyncio.get_running_loop().run_in_executor(None, self.wait_for, path)
        return [200, path]

    @zmq_method(timeout=inf)
    async def name_of_thread(self, args):
        return [200, await asyncio.to_thread(lambda: threading.current_thread().name)]

    @zmq_method(timeout=0.2)
    async def stubborn(self, path):
        waits = asyncio.ensure_future(self.async_wait_for(path))
        while not waits.done():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(waits)
        return waits.result()

    @zmq_method(timeout=0.2)
    def promise(self, path):
        """A plain method whose result is awaited."""
        return self.stubborn(path)

    @zmq_method(timeout=0.2)
    def late_promise(self, path):
        self.wait_for(path)
        return self.async_touch(f'{path} too late')

    @zmq_method(timeout=inf)
    def patient(self, path):
        return self.wait_for(path)

    async def async_touch(self, path):
        return self.touch(path)

    def run_loop(self, args):
        return asyncio.run(self.async_echo(args))

    def touch_later(self, path):
        return self.async_touch(path)

    def asks(self, args, *, request):
        return [200, isinstance(request, Request)]

    def asks_later(self, args, *, request):
        return self.async_echo(args)

    def asks_with_future(self, args, *, request):
        return asyncio.Future(loop=asyncio.new_event_loop())

    @zmq_method(timeout=0.3)
    def late_by_far(self, path):
        return self.wait_for(path)

    @zmq_method(timeout=0.2)
    def records(self, path, *, request):
        request.tm.get().join(Journal(request.tm, path))
        while not Path(f'{path} go').exists():
            time.sleep(0.001)  # until the test makes it
        return [200, None]

    part = zmq_method(timeout=0.2)(partialmethod(async_late))

    def spawn_and_join(self, seconds):
        child = multiprocessing.Process(target=time.sleep, args=(seconds,))
        child.start()
        child.join(5)
        return [200, child.exitcode]

    async def cancel_all(self, args):
        for task in asyncio.all_tasks():
            task.cancel()
        await asyncio.sleep(0)  # takes no time: here this one is cancelled

    def depth(self, args):
        """Return the number of requests and registries on the stack of this thread."""
        return [200, len(manager.stack)]

    def fails_with_request(self, args, *, request):
        raise SystemExit(3)

    def sent(self, args):
        return [200, self.process.sent]


class BlockingHandler(Handler):
    """Blocks the loop at a deadline."""

    @zmq_method(timeout=0.5)
    def late(self, path):
        return self.wait_for(path)

    async def block_at_deadline(self, path):
        loop = asyncio.get_running_loop()
        [deadline] = [timer.when() for timer in loop._scheduled if '_pass_deadline' in repr(timer)]

        def block():
            Path(path).touch()
            time.sleep(0.3)  # the test sends its message meanwhile

        # Both `block` and the deadline are due when this ends: the loop runs them in one iteration.
        loop.call_at(deadline - 0.1, time.sleep, 0.2)
        loop.call_at(deadline - 0.001, block)
        return [200, None]


class BlockingMessageHandler(ZMQMessageHandler):
    """Serves BlockingHandler."""

    handler = BlockingHandler


class SlowMessageHandler(ZMQMessageHandler):
    """Serves SlowHandler."""

    handler = SlowHandler


class Concurrent(LoggedProcess):
    """Handles four messages at a time, and creates a file when it is asked to stop."""

    concurrency = 4

    def exit(self, *args):
        super().exit(*args)
        self.log_path.with_name('draining').touch()


class One(Process):
    """Handles one message at a time."""


def make_loop_with_executor():
    """Return a loop that has a default executor."""
    loop = asyncio.new_event_loop()
    loop.set_default_executor(ThreadPoolExecutor(thread_name_prefix='own'))
    return loop


class OwnExecutor(Process):
    """Has a default executor of its own."""

    loop_factory = staticmethod(make_loop_with_executor)


class Two(Process):
    """Handles two messages at a time, in requests with transactions."""

    concurrency = 2
    sent = 0

    def setup(self):
        super().setup()
        configurator = Configurator(registry=self.registry)
        configurator.add_request_method(
            lambda request: transaction.TransactionManager(explicit=True), 'tm', reify=True
        )
        configurator.commit()

    def init_stream(self):
        super().init_stream()
        self.rep_stream.on_send(self.count_sent)

    def count_sent(self, msg, status):
        self.sent += 1


class Noting(Two):
    """Creates a file when it has ended; may take its time on a busy machine."""

    drain_timeout = 8.0

    def __init__(self, path, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.path = path

    def setup(self):
        super().setup()
        self.registry.registerHandler(lambda event: self.path.touch(), (IZMQProcessStoppedEvent,))


class NoThreads(Two):
    """The first start of a thread fails."""

    def setup(self):
        super().setup()
        [name] = [
            name
            for name in ('_start_joinable_thread', '_start_new_thread')
            if hasattr(threading, name)
        ][:1]
        start = getattr(threading, name)

        def fail(*args, **kwargs):
            setattr(threading, name, start)
            raise RuntimeError("can't start new thread")

        setattr(threading, name, fail)


class RunSyncHandler(Handler):
    """Uses an IOLoop as a program without a running loop does."""

    def run_sync(self, args):
        return IOLoop.current().run_sync(lambda: self.async_echo(args))

    async def is_set_up(self, args):
        # Measures time: no event shows that the loop is not stopped.
        await asyncio.sleep(0.01)
        return [200, self.process.is_set_up]


class RunSyncMessageHandler(ZMQMessageHandler):
    """Serves RunSyncHandler."""

    handler = RunSyncHandler


class RunSync(LoggedProcess):
    """Runs a coroutine before its loop."""

    def setup(self):
        super().setup()
        # A coroutine that returns True after one iteration of the loop.
        self.is_set_up = self.loop.run_sync(lambda: asyncio.sleep(0, True))


class Puller(Process):
    """Receives messages that need no reply."""

    socket_type = zmq.PULL


@pytest.fixture
def process(start, tmp_path):
    return start(handler=SlowMessageHandler, factory=Concurrent, log_path=tmp_path / 'log')


def ask_once(dealer, frames):
    """Send a message, and return its only reply."""
    dealer.send(frames)
    reply = dealer.receive()
    check_no_more(dealer)
    return reply


def check_no_more(dealer):
    """Check that no further reply arrives."""
    dealer.send(call('async_echo', 'no more'))
    assert dealer.receive() == ([b''], [200, 'no more'])


@pytest.fixture
def occupy(connect, tmp_path):
    """Occupy a process with calls that run until their file is removed."""
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
def test_one_reply_each(process, connect, group):
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
def test_other_messages_are_handled(process, occupy, ask, method):
    for _ in range(3):
        occupy(process, method)
    for ping in ('echo', 'async_echo'):
        assert ask(process, [ping, 'ping']) == [200, 'ping']


def test_run_sync_in_the_loop(start, ask, tmp_path):
    """It fails, and does not stop the loop of the process, which it may use before the start."""
    log = tmp_path / 'log'
    process = start(handler=RunSyncMessageHandler, factory=RunSync, log_path=log)
    assert ask(process, ['run_sync', 1])[0] == 500
    assert 'another one cannot start beside it' in log.read_text()
    assert ask(process, ['is_set_up', 1]) == [200, True]


def test_method_in_a_thread_runs_a_loop(process, ask):
    assert ask(process, ['run_loop', 1]) == [200, 1]


@pytest.mark.parametrize('method', ['wait_for', 'async_wait_for'])
def test_each_peer_gets_its_reply(process, occupy, method):
    calls = [occupy(process, method) for _ in range(4)]
    for dealer, path in reversed(calls):
        path.unlink()
        assert dealer.receive() == ([b''], [200, str(path)])


@pytest.mark.parametrize('method', ['wait_for', 'async_wait_for'])
def test_other_messages_wait(process, occupy, connect, tmp_path, method):
    calls = [occupy(process, method) for _ in range(4)]
    fifth = connect(process)
    path = tmp_path / 'fifth'
    fifth.send(call('touch', str(path)))
    assert not fifth.socket.poll(100)
    assert not path.exists()
    calls[2][1].unlink()
    assert fifth.receive() == ([b''], [200, str(path)])


def test_reply_to_a_peer_that_has_left(process, occupy, ask):
    for method in ('wait_for', 'async_wait_for') * 4:
        dealer, path = occupy(process, method)
        dealer.close()
        path.unlink()
    assert ask(process, ['echo', 1]) == [200, 1]


@pytest.mark.parametrize('factory', [One, Concurrent])
@pytest.mark.parametrize(
    'method', ['late', 'async_late', 'late_thread', 'stubborn', 'promise', 'late_promise']
)
def test_deadline(start, occupy, tmp_path, factory, method):
    options = {'log_path': tmp_path / 'log'} if factory is Concurrent else {}
    process = start(handler=SlowMessageHandler, factory=factory, **options)
    dealer, path = occupy(process, method)
    assert dealer.receive() == ([b''], [504, f'{method!r} has not ended after 0.2 s'])
    path.unlink()  # now it ends, without a second reply
    check_no_more(dealer)
    assert not Path(f'{path} too late').exists()


@pytest.mark.parametrize('method', ['late', 'late_thread', 'stubborn'])
def test_overdue_method_counts_for_concurrency(start, occupy, ask, method):
    process = start(handler=SlowMessageHandler, factory=One)
    dealer, path = occupy(process, method)
    assert dealer.receive()[1][0] == 504
    assert ask(process, ['echo', 1]) == list(overloaded(1))
    path.unlink()
    wait_until(lambda: ask(process, ['echo', 1]) == [200, 1])


@pytest.mark.parametrize('method', ['late', 'late_thread', 'stubborn'])
def test_all_slots_are_overdue(start, occupy, connect, ask, tmp_path, method):
    """Callers get 503, also those that wait already; one slot that is free or works is enough."""
    process = start(tmp_path / 'log', handler=SlowMessageHandler, factory=Concurrent)
    calls = [occupy(process, method) for _ in range(3)]
    held, held_path = occupy(process, 'wait_for')
    for dealer, _path in calls:
        assert dealer.receive()[1][0] == 504
    waiting = connect(process)
    waiting.send(call('echo', 1))
    assert not waiting.socket.poll(200)
    held_path.unlink()
    assert waiting.receive() == ([b''], [200, 1])
    assert held.receive()[1][0] == 200
    calls.append(occupy(process, method))
    waiting.send(call('echo', 2))
    assert calls[-1][0].receive()[1][0] == 504
    assert waiting.receive() == ([b''], list(overloaded(4)))
    calls[0][1].unlink()
    wait_until(lambda: ask(process, ['echo', 3]) == [200, 3])


def test_cancelled_method_does_not_count(start, occupy, ask):
    process = start(handler=SlowMessageHandler, factory=One)
    dealer, _path = occupy(process, 'async_late')
    assert dealer.receive()[1][0] == 504
    assert ask(process, ['echo', 1]) == [200, 1]


def test_in_time(process, ask, tmp_path):
    """A method with a timeout can fail, or end before it."""
    assert ask(process, ['touch_later', str(tmp_path / 'x')]) == [200, str(tmp_path / 'x')]
    assert ask(process, ['wait_for', str(tmp_path / 'no' / 'folder')])[0] == 500
    assert ask(process, ['async_wait_for', str(tmp_path / 'no' / 'folder')])[0] == 500


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
        assert 'takes a request and returns an awaitable' in text


class AsyncRequests:
    """Takes a request in an `async def` method."""

    async def find(self, args, *, request):
        return [200, args]


class AsyncRequestsHandler(ZMQMessageHandler):
    """Serves AsyncRequests."""

    handler = AsyncRequests


def test_request_in_a_task(start, ask, tmp_path):
    assert ask(start(handler=AsyncRequestsHandler), ['find', 1]) == [200, 1]
    process = Concurrent(tmp_path / 'log', '127.0.0.1', AsyncRequestsHandler)
    process.start()
    text = r'AsyncRequests\.find is `async def` and takes a request, .* leave concurrency at 1$'
    with pytest.raises(ValueError, match=text):
        process.wait_ready()
    process.join()


def test_drain(process, occupy, connect, tmp_path):
    """Running calls end, waiting calls are refused."""
    calls = [occupy(process, method) for method in ('wait_for', 'async_wait_for') * 2]
    waiting = connect(process)
    waiting.send(call('echo'))
    assert not waiting.socket.poll(100)
    process._ask_to_stop()
    wait_until((tmp_path / 'draining').exists)
    for dealer, path in calls:
        path.unlink()
        assert dealer.receive() == ([b''], [200, str(path)])
    assert waiting.receive()[1][0] == 503
    process.join()
    assert process.exitcode == 0


def test_drain_of_a_late_method(process, occupy, tmp_path):
    """Its caller has got 504; the process ends when the thread does, or at `drain_timeout`."""
    dealer, path = occupy(process, 'late')
    assert dealer.receive()[1][0] == 504
    process._ask_to_stop()
    path.unlink()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize('concurrency', [0, -1, True, None, '8', float('nan')])
def test_bad_concurrency(concurrency):
    process = Process()
    process.concurrency = concurrency
    with pytest.raises(
        ValueError, match=f'^Bad concurrency {concurrency!r}: write an integer, 1 or more$'
    ):
        process.start()


def test_concurrency_of_another_socket():
    process = Process()
    process.concurrency, process.socket_type = 2, zmq.PULL
    with pytest.raises(ValueError, match='^A concurrency of 2 is for the socket type REP'):
        process.start()


def test_default():
    assert ZMQProcess.concurrency == 1


def test_wake_up_at_a_deadline(start, connect, tmp_path):
    """Sending the 504 of a thread clears the wake-up of a message that has just arrived."""
    process = start(handler=BlockingMessageHandler, factory=Two)
    other, blocker, dealer = (connect(process) for _ in range(3))
    for client in (other, blocker, dealer):
        check_no_more(client)
    late, blocked = tmp_path / 'late', tmp_path / 'blocked'
    dealer.send(call('late', str(late)))
    wait_until(late.exists)
    blocker.send(call('block_at_deadline', str(blocked)))
    assert blocker.receive() == ([b''], [200, None])
    wait_until(blocked.exists)
    other.send(call('echo', 'are you there'))
    assert dealer.receive()[1][0] == 504
    assert other.receive(timeout=3) == ([b''], [200, 'are you there'])
    late.unlink()


@pytest.mark.parametrize('method', ['late', 'async_late'])
def test_deadline_with_a_log_that_fails(start, occupy, method):
    process = start(handler=SlowMessageHandler, factory=BrokenLogProcess)
    dealer, _path = occupy(process, method)
    assert dealer.receive(timeout=3)[1][0] == 504


def test_thread_that_cannot_start(start, ask, tmp_path):
    """The peer gets 500 if a thread cannot start, and its method is not called later."""
    process = start(handler=SlowMessageHandler, factory=NoThreads)
    path = tmp_path / 'x'
    assert ask(process, ['touch', str(path)])[0] == 500
    for _ in range(3):
        assert ask(process, ['echo', 1]) == [200, 1]
    assert not path.exists()


@pytest.mark.parametrize('when', ['before', 'after'])
def test_drain_behind_late_methods(start, occupy, connect, when):
    """Callers that wait for a slot get 503, also after the deadline of the running methods."""
    process = start(handler=SlowMessageHandler, factory=Two)
    calls = [occupy(process, 'late_by_far') for _ in range(2)]
    waiting = connect(process)
    waiting.send(call('echo'))
    if when == 'after':
        process._ask_to_stop()
    for dealer, _path in calls:
        assert dealer.receive()[1][0] == 504
    if when == 'before':
        process._ask_to_stop()
    assert waiting.receive(timeout=6)[1][0] == 503
    for _dealer, path in calls:
        path.unlink()
    process.join()
    assert process.exitcode == 0


def test_method_that_never_ends(start, occupy, tmp_path):
    """Its caller has a reply, so the process ends with exit code 0."""
    path = tmp_path / 'ended'
    process = start(path, handler=SlowMessageHandler, factory=Noting)
    dealer, _path = occupy(process, 'late')
    assert dealer.receive()[1][0] == 504
    process.stop()
    assert process.exitcode == 0
    assert path.exists()


@pytest.mark.parametrize('factory', [One, Two])
def test_child_of_a_method(start, ask, factory):
    process = start(handler=SlowMessageHandler, factory=factory)
    for _ in range(3):
        assert ask(process, ['spawn_and_join', 0.01], timeout=10) == [200, 0]


def test_thread_of_a_call_that_has_ended(start, occupy, ask):
    """What a method has started in a thread may go on behind its reply."""
    process = start(handler=SlowMessageHandler, factory=One)
    dealer, path = occupy(process, 'leaves_thread')
    assert dealer.receive() == ([b''], [200, str(path)])
    assert ask(process, ['echo', 1]) == [200, 1]
    assert path.exists()


def test_call_when_done():
    ends = []
    futures = [Future() for _ in range(4)]
    futures[3].set_result(None)
    call_when_done(list(futures), lambda: ends.append('end'))
    for future in futures[:3]:
        assert not ends
        future.set_result(None)
    assert ends == ['end']


@pytest.mark.parametrize(('factory', 'name'), [(One, 'asyncio_0'), (OwnExecutor, 'own_0')])
def test_default_executor(start, ask, factory, name):
    process = start(handler=SlowMessageHandler, factory=factory)
    assert ask(process, ['name_of_thread', None]) == [200, name]


def test_name_of_a_late_method(start, ask):
    process = start(handler=SlowMessageHandler, factory=One)
    assert ask(process, ['part', '/dev/null']) == [504, "'part' has not ended after 0.2 s"]


def test_transaction_behind_its_504(start, ask, tmp_path):
    """A thread cannot be ended: its transaction is committed after the 504."""
    path = tmp_path / 'journal'
    process = start(handler=SlowMessageHandler, factory=Two)
    assert ask(process, ['records', str(path)])[0] == 504
    Path(f'{path} go').touch()
    wait_until(lambda: path.exists() and path.read_text())
    assert path.read_text() == 'commit\n'


def test_nothing_is_left_in_threads(start, ask):
    process = start(handler=SlowMessageHandler, factory=Two)
    depth = ask(process, ['depth', None])
    for _ in range(5):
        assert ask(process, ['fails_with_request', None])[0] == 500
    assert ask(process, ['depth', None]) == depth


def test_all_tasks_are_cancelled(process, occupy, ask):
    calls = [occupy(process, 'async_wait_for') for _ in range(2)]
    assert ask(process, ['cancel_all', None])[0] == 500
    for dealer, path in calls:
        assert dealer.receive()[1][0] == 500
        path.unlink()
    for _ in range(5):
        assert ask(process, ['async_echo', 1]) == [200, 1]


def test_stop_in_a_thread(start, ask):
    process = start(handler=SlowMessageHandler, factory=Two)
    assert ask(process, ['stop', None]) == [200, 'stopping']
    process.join(5)
    assert process.exitcode == 0


@pytest.mark.parametrize('method', ['echo', 'async_echo'])
def test_on_send(start, ask, method):
    process = start(handler=SlowMessageHandler, factory=Two)
    assert ask(process, [method, 1]) == [200, 1]
    assert ask(process, ['sent', None]) == [200, 1]


def test_messages_without_reply_wait_in_the_socket(start, occupy, tmp_path):
    """A socket without replies has no deadlines, and handles one message at a time."""
    process = start(handler=SlowMessageHandler, factory=Puller)
    path = tmp_path / 'second'
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.connect(process.bound_address)
        push.send(call('late', str(tmp_path / 'first'))[1])
        push.send(call('touch', str(path))[1])
        wait_until((tmp_path / 'first').exists)
        assert not path.exists()
        (tmp_path / 'first').unlink()
        wait_until(path.exists)


def test_eager_client(tmp_path):
    """In a test of an application, methods with a timeout reply as they do in a process."""
    client = RecordingClient(handler=SlowMessageHandler)
    assert client.request(['echo', 1]) == [200, 1]
    assert client.request(['async_echo', 1]) == [200, 1]
    assert client.request(['async_late', '/dev/null']) == [
        504,
        "'async_late' has not ended after 0.2 s",
    ]
    path = tmp_path / 'late'
    assert client.request(['late', str(path)])[0] == 504
    wait_until(path.exists)
    path.unlink()  # it has not ended before


def test_eager_client_of_a_concurrent_process(config):
    """It refuses the handlers that the process refuses."""
    process = Two('127.0.0.1', AsyncRequestsHandler, registry=config.registry)
    with pytest.raises(ValueError, match=r'leave concurrency at 1$'):
        RecordingClient(handler=process)


def options(cls):
    """Return the declared properties of each method."""
    return {name: (method.timeout, method.repeatable) for name, method in methods_of(cls()).items()}


class Declared:
    """Some of its methods have properties of their own."""

    timeout = 5
    repeatable = ('plain', 'static')

    def plain(self, args):
        """It has the properties of the class."""

    @zmq_method(timeout=1, repeatable=False)
    def own(self, args):
        """It has both properties."""

    @zmq_method(timeout=inf)
    @staticmethod
    def static(args):
        """It has no limit."""

    @staticmethod
    @zmq_method(repeatable=True)
    def inner(args):
        """It is declared inside the static method."""


class All(Declared):
    """All methods but one are repeatable, and none has a limit."""

    timeout = None
    repeatable = True


class Old:
    """Uses the name of a property for another attribute, as an older class may do."""

    timeout = property(int)

    def echo(self, args):
        """A message."""


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
    assert options(Old) == {'echo': (None, False)}
    assert options(Messages) == {'timeout': (None, False), 'repeatable': (None, False)}


@pytest.mark.parametrize('timeout', [0, -1, True, 'x', float('nan'), 10**400])
def test_bad_timeout(timeout):
    with pytest.raises(ValueError, match='^Bad timeout .*: write a number of seconds above 0$'):
        zmq_method(timeout=timeout)


@pytest.mark.parametrize('timeout', [-1, True, float('nan'), 10**400])
def test_bad_timeout_of_a_class(timeout):
    with pytest.raises(ValueError, match='^Bad timeout .*: write a number of seconds above 0$'):
        methods_of(type('Bad', (), {'timeout': timeout})())


@pytest.mark.parametrize(('names', 'culprit'), [(['plain', 'typo'], 'typo'), ('plain', 'plain')])
def test_bad_repeatable(names, culprit):
    with pytest.raises(ValueError, match=rf"^Bad\.repeatable contains \['{culprit}'\]"):
        methods_of(type('Bad', (Declared,), {'repeatable': names})())
