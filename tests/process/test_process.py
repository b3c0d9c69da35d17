# SPDX-License-Identifier: ZPL-2.1
"""Life of a process: start, ready, stop, and the failures of each."""

import asyncio
import gc
import json
import os
import pickle
import signal
import socket as tcp
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.context import ForkProcess
from types import SimpleNamespace

import pytest
import zmq
from pyramid.registry import Registry
from pyramid.threadlocal import get_current_registry

from checks import open_fds, wait_until
from handlers import ExitingSetup, FailingSetup, Handler, MessageHandler, Process
from pyams_zmq.exceptions import ZMQBindError, ZMQStartError, ZMQTimeoutError
from pyams_zmq.process import ZMQProcess, process_exit_func
from pyams_zmq.process.server_socket import _inspect
from pyams_zmq.stream import ZMQStream


def test_echo(start, ask):
    process = start()
    assert ask(process, ['echo', {'a': 1}]) == [200, {'a': 1}]
    process.stop()
    assert process.exitcode == 0


class Subscriber(Process):
    """Does not bind an address."""

    def init_stream(self):
        self.stream(zmq.SUB, ('127.0.0.1', 1), bind=False)


def test_process_that_binds_nothing(start):
    assert start(factory=Subscriber).bound_address is None


def test_address_in_use(start):
    process = start()
    second = Process(process.bound_address)
    second.start()
    with pytest.raises(ZMQBindError, match='Address already in use'):
        second.wait_ready()
    second.join(5)
    assert second.exitcode == 1


def test_failing_setup():
    process = FailingSetup()
    process.start()
    with pytest.raises(LookupError, match='no such tool: ffmpeg'):
        process.wait_ready()
    process.join(5)
    assert process.exitcode == 1


def test_exit_before_ready():
    process = ExitingSetup()
    process.start()
    with pytest.raises(ZMQStartError, match='exit code 7'):
        process.wait_ready()
    process.join(5)


@pytest.mark.parametrize(
    ('factory', 'expected'), [(Process, True), (FailingSetup, False), (ExitingSetup, False)]
)
def test_was_ready(factory, expected):
    """A supervisor asks for it after the end."""
    process = factory()
    process.start()
    with suppress(LookupError, ZMQStartError):
        process.wait_ready()
    process.stop()
    assert process._was_ready() == expected


class Watched(Process):
    """Notes the current registry of its threads."""

    notes = None

    def enter_thread(self):
        super().enter_thread()
        with open(self.notes, 'a', encoding='utf-8') as notes:
            same = get_current_registry() is self.registry
            notes.write(f'{threading.current_thread().name}: {same}\n')


def test_registry_of_threads(start, tmp_path):
    notes = tmp_path / 'notes'
    process = start(
        factory=type('Noted', (Watched,), {'notes': notes}), registry=Registry('theirs')
    )
    process.stop()
    assert sorted(notes.read_text().splitlines()) == [
        'MainThread: True',
        'pyams_zmq attendant: True',
        'pyams_zmq authenticator: True',
        'pyams_zmq watchdog: True',
    ]


def test_reload_after_the_end(start):
    """It sends no signal: another process may have the pid."""
    process = start()
    process.stop()
    process.reload()
    assert process.exitcode == 0


def test_local_registry(start, tmp_path, monkeypatch):
    """The registry that pyams_utils keeps for a thread is reset."""
    notes = tmp_path / 'notes'

    def note(registry):
        with notes.open('a') as file:
            file.write(f'{registry}\n')

    module = SimpleNamespace(set_local_registry=note)
    monkeypatch.setitem(sys.modules, 'pyams_utils.registry', module)
    start().stop()
    assert notes.read_text() == 'None\n' * 4


# Addresses


@pytest.mark.parametrize(
    'bind_addr', ['127.0.0.1', 'localhost', 'lo', '*', ('127.0.0.1', 0), 'tcp://127.0.0.1:*']
)
def test_any_free_port(start, ask, bind_addr):
    process = start(bind_addr)
    port = int(process.bound_address.rpartition(':')[2])
    assert port > 0
    assert ask(f'127.0.0.1:{port}', ['echo', 1]) == [200, 1]


@pytest.mark.parametrize('form', ['127.0.0.1:{}', '[::1]:{}', '*:{}', 'tcp://127.0.0.1:{}'])
def test_given_port(start, ask, form):
    with tcp.socket(tcp.AF_INET6) as reserved:
        reserved.bind(('::', 0))
        port = reserved.getsockname()[1]
    process = start(form.format(port))
    assert process.bound_address.endswith(f':{port}')
    assert ask(form.format(port).replace('*', 'localhost'), ['echo', 1]) == [200, 1]


@pytest.mark.parametrize('form', ['ipc://{}/zmq.sock', 'ipc://@{}'])
def test_ipc(start, ask, tmp_path, form):
    process = start(form.format(tmp_path))
    assert process.bound_address == form.format(tmp_path)
    assert ask(process, ['echo', 1]) == [200, 1]


@pytest.mark.parametrize('bind_addr', [None, '', 'a b', 'http://localhost', 'host:99999', 5555])
def test_bad_address(bind_addr):
    with pytest.raises(ValueError, match='Bad ØMQ address') as error:
        Process(bind_addr)
    assert repr(bind_addr) in str(error.value)


@pytest.mark.parametrize(
    ('bind_addr', 'text'),
    [
        ('192.0.2.1:5555', 'no interface of this machine has it'),
        ('nosuchif0:5555', 'neither an address nor an interface'),
        ('ipc:///nowhere/zmq.sock', 'its folder does not exist'),
    ],
)
def test_address_that_cannot_be_bound(bind_addr, text):
    process = Process(bind_addr)
    process.start()
    with pytest.raises(ZMQBindError, match=text) as error:
        process.wait_ready()
    assert bind_addr in str(error.value)
    process.join(5)
    assert process.exitcode == 1


# Wait until it is ready


class SlowSetup(Process):
    """Needs half a second to set up."""

    def setup(self):
        time.sleep(0.5)
        super().setup()


def test_not_ready_in_time():
    process = SlowSetup()
    process.start()
    try:
        with pytest.raises(ZMQTimeoutError, match=r'is not ready after 0\.1 s'):
            process.wait_ready(0.1)
        with pytest.raises(TimeoutError):
            process.wait_ready(0)
        assert process.wait_ready(None) == process.bound_address
        assert process.wait_ready(0) == process.bound_address
    finally:
        process.stop()
    with pytest.raises(ZMQStartError, match='ended with exit code 0'):
        process.wait_ready()


def test_never_started():
    process = Process()
    with pytest.raises(ZMQStartError, match='was not started by this process'):
        process.wait_ready()
    process.exit(signal.SIGTERM)  # there is nothing to stop
    process_exit_func(process)


class Unpicklable(Exception):
    """Can be pickled, but not unpickled."""

    def __init__(self, one, two):
        super().__init__(f'{one} {two}')


class LongError(Process):
    """Cannot start; its error does not fit into a pipe."""

    def setup(self):
        raise ValueError('x' * 1_000_000)


def test_error_that_is_too_long():
    process = LongError()
    process.start()
    process.join(5)
    assert process.exitcode == 1  # although the report is not read yet
    with pytest.raises(ZMQStartError, match='ValueError: xxx') as error:
        process.wait_ready()
    assert len(str(error.value)) < 2000


class UnpicklableError(Process):
    """Cannot start; its error cannot be unpickled."""

    def setup(self):
        raise Unpicklable('no', 'ffmpeg')


def test_error_that_cannot_be_pickled():
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(Unpicklable('no', 'ffmpeg')))
    process = UnpicklableError()
    process.start()
    with pytest.raises(ZMQStartError, match='Unpicklable: no ffmpeg'):
        process.wait_ready()
    process.join(5)


class LeavingAChild(Process):
    """Exits before it is ready, while a child of its own has inherited its descriptors."""

    def setup(self):
        ForkProcess(target=time.sleep, args=(1,)).start()
        os._exit(7)


def test_exit_before_ready_with_a_child():
    process = LeavingAChild()
    process.start()
    with pytest.raises(ZMQStartError, match='exit code 7'):
        process.wait_ready()


def test_run_in_the_foreground(ask, tmp_path):
    """Under another supervisor, without `start`."""
    address = f'ipc://{tmp_path}/zmq.sock'
    child = ForkProcess(target=Process(address, StoppingMessageHandler).run)
    child.start()
    assert ask(address, ['echo', 1]) == [200, 1]
    assert ask(address, ['exit', None]) == [200, 'leaving']
    child.join(5)
    assert child.exitcode == 0
    assert not list(tmp_path.iterdir())


# Stop from within


class StoppingHandler(Handler):
    """Stops its process from within, in several ways."""

    def stop_and_exit(self, args):
        self.process.stop()
        asyncio.get_running_loop().call_soon(sys.exit, 3)
        self.process.loop.call_later(0.1, self.stop_loop_and_exit)
        return [200, 'stopping']

    def stop_loop_and_exit(self, args=None):
        self.process._stop_loop()
        sys.exit(3)

    async def stop_first(self, args):
        self.process.stop()
        await asyncio.sleep(0.1)
        return [200, 'stopping']

    def exit(self, args):
        self.process.exit()
        self.process.exit()
        return [200, 'leaving']

    def leave_a_task(self, path):
        async def last():
            try:
                await asyncio.sleep(3600)
            finally:
                os.mkdir(path)

        self.task = asyncio.ensure_future(last())
        return [200, None]

    def close_stream(self, args):
        self.process.loop.call_later(0.01, self.process.rep_stream.close)
        return [200, None]


class StoppingMessageHandler(MessageHandler):
    """Serves StoppingHandler."""

    handler = StoppingHandler


@pytest.mark.parametrize(
    ('kind', 'reply'),
    [
        ('stop', 'stopping'),
        ('stop_and_exit', 'stopping'),
        ('stop_first', 'stopping'),
        ('exit', 'leaving'),
    ],
)
def test_stopped_by_its_handler(start, ask, kind, reply):
    process = start(handler=StoppingMessageHandler)
    assert ask(process, [kind, None]) == [200, reply]
    process.join(5)
    assert process.exitcode == 0


def test_stopped_by_its_handler_while_messages_wait(start, ask):
    process = start(handler=StoppingMessageHandler)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(process.bound_address)
        for message in (b'["sleep",0.1]', b'["stop_first",null]', b'["echo",1]', b'["echo",2]'):
            socket.send_multipart([b'', message])
        replies = [json.loads(socket.recv_multipart()[-1])[0] for _ in range(4)]
    assert replies == [200, 200, 503, 503]
    process.join(5)
    assert process.exitcode == 0


def test_tasks_are_cancelled_at_the_end(start, ask, tmp_path):
    process = start(handler=StoppingMessageHandler)
    path = tmp_path / 'cancelled'
    assert ask(process, ['leave_a_task', str(path)]) == [200, None]
    process.stop()
    assert process.exitcode == 0
    assert path.exists()


def test_stop_without_a_stream(start, ask):
    process = start(handler=StoppingMessageHandler)
    assert ask(process, ['close_stream', None]) == [200, None]
    process.stop()
    assert process.exitcode == 0


class ProcessWithoutCallback(Process):
    """Has a stream without a callback, whose messages wait."""

    drain_timeout = 60.0

    def setup(self):
        super().setup()
        self.inbox, port = self.stream(zmq.PULL, '127.0.0.1', bind=True)
        outbox, _port = self.stream(zmq.PUSH, ('127.0.0.1', port), bind=False)
        outbox.send(b'x')


def test_stop_while_a_message_waits(start, ask):
    process = start(factory=ProcessWithoutCallback)
    assert ask(process, ['echo', 1]) == [200, 1]
    start = time.monotonic()
    process.stop()
    assert process.exitcode == 0
    assert time.monotonic() - start < 20


# Subclasses, as sibling packages have them


class Scheduler:
    """Replaces the scheduler of a sibling package, which has threads of its own."""

    def __init__(self):
        self.ticks = 0
        self.registries = set()

    def start(self):
        threading.Thread(target=self.tick, daemon=True).start()

    def tick(self):
        while True:
            self.ticks += 1
            self.registries.add(id(get_current_registry()))
            time.sleep(0.01)


class SchedulerHandler(Handler):
    """Asks the scheduler of its process."""

    def ticks(self, args):
        scheduler = self.process.scheduler
        return [200, [scheduler.ticks, scheduler.registries == {id(self.process.registry)}]]


class SchedulerMessageHandler(MessageHandler):
    """Serves SchedulerHandler."""

    handler = SchedulerHandler


class SchedulerProcess(ZMQProcess):
    """Starts its scheduler in `run`, and binds its stream itself."""

    def __init__(self, zmq_address, handler, auth, clients, registry):
        super().__init__(zmq_address, handler, auth, clients, registry)
        self.scheduler = Scheduler()

    def run(self):
        self.scheduler.start()
        ZMQProcess.run(self)

    def init_stream(self):
        self.rep_stream, self.port = self.stream(zmq.REP, self.bind_addr, bind=True)
        super().init_stream()
        self.rep_stream.on_recv(self.handler(self, self.rep_stream, self.stop))


def test_scheduler(ask):
    process = SchedulerProcess('127.0.0.1', SchedulerMessageHandler, None, None, Registry('theirs'))
    process.start()
    try:
        process.wait_ready()
        wait_until(lambda: ask(process, ['ticks', None])[1][0] > 5)
        assert ask(process, ['ticks', None])[1][1] is True
    finally:
        process.stop()
    assert process.exitcode == 0


class RelayHandler(Handler):
    """Publishes messages, and returns those that were received."""

    def publish(self, text):
        self.process.publisher.send_multipart([b'news', text.encode()])
        return [200, None]

    def news(self, args):
        return [200, self.process.news]

    def streams(self, args):
        return [200, all(isinstance(stream, ZMQStream) for stream in self.process._streams)]


class RelayMessageHandler(MessageHandler):
    """Serves RelayHandler."""

    handler = RelayHandler


class RelayProcess(Process):
    """Has streams of its own."""

    def setup(self):
        super().setup()
        self.news = []
        self.publisher, port = self.stream(zmq.PUB, '127.0.0.1', bind=True)
        _stream, same = self.stream(
            zmq.SUB, ('127.0.0.1', port), bind=False, callback=self.read, subscribe=b'news'
        )
        assert same == port
        with pytest.raises(ZMQBindError):
            self.stream(zmq.PUB, '192.0.2.1:1', bind=True)
        with pytest.raises(ValueError, match='Bad ØMQ address'):
            self.stream(zmq.SUB, '127.0.0.1', bind=False)

    def read(self, frames):
        self.news.append([frame.decode() for frame in frames])


def test_streams_of_a_subclass(start, ask):
    process = start(handler=RelayMessageHandler, factory=RelayProcess)
    assert ask(process, ['streams', None]) == [200, True]

    def has_news():
        ask(process, ['publish', 'hello'])  # until the subscription has arrived
        return ['news', 'hello'] in ask(process, ['news', None])[1]

    wait_until(has_news)


class ReusingHandler(Handler):
    """Opens a file with the descriptor of a closed listener."""

    def reuse(self, args):
        stream, _port = self.process.stream(zmq.PULL, '127.0.0.1', bind=True)
        uri = stream.socket.last_endpoint.decode()
        [fd] = [fd for fd in map(int, os.listdir('/proc/self/fd')) if uri in _inspect(fd)[0]]
        stream.close()
        wait_until(lambda: not os.path.exists(f'/proc/self/fd/{fd}'))
        lowest = os.open(
            os.devnull, os.O_RDONLY
        )  # the number of the listener itself, or a lower one
        os.dup2(lowest, fd)
        child = ForkProcess(target=os.fstat, args=(fd,))
        child.start()
        child.join()
        for number in {lowest, fd}:
            os.close(number)
        return [200, child.exitcode]


class ReusingMessageHandler(MessageHandler):
    """Serves ReusingHandler."""

    handler = ReusingHandler


def test_children_of_the_child_keep_open_files(start, ask):
    assert ask(start(handler=ReusingMessageHandler), ['reuse', None]) == [200, 0]


class Reopening(Handler):
    """Opens and closes streams."""

    def reopen(self, path):
        for _ in range(50):
            for address in ('127.0.0.1', f'ipc://{path}'):
                stream, _port = self.process.stream(zmq.PULL, address, bind=True)
                stream.close()
        stream, _port = self.process.stream(zmq.PULL, f'ipc://{path}', bind=True)
        self.process.bind_timeout = 0
        with pytest.raises(ZMQBindError, match='in use'):
            self.process.stream(zmq.PULL, f'ipc://{path}', bind=True)
        self.process.bind_timeout = 2
        stream.close()
        gc.collect()
        return [200, [len(self.process._streams), len(self.process._sockets.uris) < 20]]


class ReopeningMessageHandler(MessageHandler):
    """Serves Reopening."""

    handler = Reopening


class ImpatientProcess(Process):
    """Does not wait for an address that is in use."""

    bind_timeout = 0.0


def test_opened_and_closed_streams(start, ask, tmp_path):
    process = start(handler=ReopeningMessageHandler)
    path = tmp_path / 'zmq.sock'
    for _ in range(2):
        status, [streams, is_bounded] = ask(process, ['reopen', str(path)])
        assert (status, is_bounded) == (200, True)
        assert streams <= 3
    process.stop()
    assert not list(tmp_path.iterdir())


def test_failed_starts_leave_no_descriptors(start):
    address = start().bound_address
    fds = None
    for _ in range(5):
        process = ImpatientProcess(address)
        process.start()
        with pytest.raises(ZMQBindError):
            process.wait_ready()
        process.join()
        del process
        gc.collect()
        fds = fds or open_fds()
    assert open_fds() <= fds
