# SPDX-License-Identifier: ZPL-2.1
"""Signals that a process inherits from a web server, and those that its handlers take."""

import asyncio
import faulthandler
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkProcess
from threading import Thread
from time import monotonic
from types import SimpleNamespace

import pytest
import zmq

import handlers
from app.program import is_running
from checks import AT_ONCE, TIMEOUT, started, wait_until
from pyams_zmq.client import ZMQClient
from pyams_zmq.device import ProcessDevice
from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.pool import PoolWorker, ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process import signals as signals_module
from pyams_zmq.process.base import describe_exit_code
from pyams_zmq.process.channel import RELOAD, Command
from pyams_zmq.process.signals import SERVER_SIGNALS, drop_inherited_handlers
from pyams_zmq.supervisor import Supervisor, SupervisorProcess
from pyams_zmq.testing import running
from pyams_zmq.wire.poll import wait_readable

SERVER_HANDLES = (
    *SERVER_SIGNALS,
    *(
        signal.SIGWINCH,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGALRM,
        signal.SIGPROF,
        signal.SIGIO,
    ),
)
"""Signals that web servers and profilers handle; by default most of them end or stop a process"""


SUPERVISED = """
import faulthandler, json, signal
from pyams_zmq.supervisor import Supervisor
signal.signal(signal.SIGUSR2, lambda num, frame: print(json.dumps(words), flush=True))
faulthandler.register(signal.SIGUSR1, open('/dev/null', 'w'))
class Ending(Supervisor):
    def _can_leave(self):
        return True
words = []
Ending({}).run()
for num in (signal.SIGUSR1, signal.SIGUSR2):
    status = open('/proc/self/status').read().split('SigCgt:')[1].split()[0]
    words += ['handled', bool(int(status, 16) >> num - 1 & 1)]
signal.raise_signal(signal.SIGUSR1)
signal.raise_signal(signal.SIGUSR2)
"""


class Handler(handlers.Handler):
    """Answers questions about the signals of its process."""

    def ignored(self, args):
        numbers = [num for num in SERVER_HANDLES if signal.getsignal(num) != signal.SIG_DFL]
        return [200, numbers]

    def run_program(self, code):
        return [200, subprocess.run(['sh', '-c', code], check=False).returncode]

    def caught(self, num):
        """Return True if C code handles a signal."""
        with open('/proc/self/status', encoding='ascii') as file:
            mask = next(line for line in file if line.startswith('SigCgt')).split()[1]
        return [200, bool(int(mask, 16) >> num - 1 & 1)]

    def exit_code(self, args):
        return [200, subprocess.run(['sh', '-c', 'exit 7'], check=False).returncode]

    def raise_on(self, number):
        """Raise an error, or a SystemExit, in a handler of a signal."""

        def handle(num, frame):
            raise ValueError('from a signal handler') if num == signal.SIGUSR1 else SystemExit(3)

        signal.signal(number, handle)
        return [200, None]

    def end_twice(self, args):
        """Stop the loop; a signal handler raises an error at the same time."""

        def end():
            self.process._stop_loop()
            raise SystemExit(3)

        self.process.loop.asyncio_loop.call_later(0.05, end)  # after the reply
        return [200, None]

    def break_loop(self, args):
        """Close the descriptor of the loop, as a library that closes all of them does."""
        loop = self.process.loop.asyncio_loop
        loop.call_later(0.05, os.close, loop._selector.fileno())  # after the reply
        return [200, None]


class MessageHandler(handlers.MessageHandler):
    """Serves Handler."""

    handler = Handler


class Taking(Handler):
    """Uses a library that handles the signals of a process itself."""

    def __init__(self):
        super().__init__()
        for num in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(num, lambda num, frame: None)


class TakingMessageHandler(MessageHandler):
    """Serves Taking."""

    handler = Taking


class TakingInC(Handler):
    """Uses a library whose C code handles SIGTERM."""

    def __init__(self):
        super().__init__()
        faulthandler.register(signal.SIGTERM)


class TakingInCMessageHandler(MessageHandler):
    """Serves TakingInC."""

    handler = TakingInC


class EarlyTaking(handlers.Process):
    """Takes SIGTERM before there is a loop, and is asked to stop then."""

    def setup(self):
        signal.signal(signal.SIGTERM, lambda num, frame: None)
        self._on_stop_request()
        super().setup()


@contextmanager
def handled(*numbers):
    """Handle signals, as a web server does."""
    former = {num: signal.signal(num, lambda num, frame: None) for num in numbers}
    try:
        yield
    finally:
        for num, handler in former.items():
            signal.signal(num, handler)


def pids_of(process, address):
    """Return the pids of a process that has answered, and of its parents below this one."""
    with ZMQClient(address, timeout=TIMEOUT) as client:
        pid = client.call('pid')
    return {pid, process.pid}


@pytest.mark.parametrize('is_inherited', [True, False])
@pytest.mark.parametrize('kind', ['process', 'supervisor', 'pool'])
def test_signal_to_all(address, kind, is_inherited):
    """As a rotation of logs sends it to a group of processes, or by name."""
    processes = {
        'process': partial(ZMQProcess, address, MessageHandler),
        'supervisor': lambda: SupervisorProcess(
            {'echo': partial(ZMQProcess, address, MessageHandler)}
        ),
        'pool': partial(ZMQPool, address, MessageHandler, workers=1),
    }
    numbers = SERVER_HANDLES if is_inherited else SERVER_SIGNALS
    with handled(*numbers if is_inherited else ()), started(processes[kind]()) as process:
        pids = pids_of(process, address)
        for pid in pids:
            for num in numbers:
                os.kill(pid, num)
        with ZMQClient(address, timeout=TIMEOUT) as client:
            assert client.call('pid') in pids
            assert set(client.call('ignored')) >= set(numbers)
        assert process.is_alive()


def test_signal_to_device():
    device = ProcessDevice()
    device.bind_in('127.0.0.1')
    with device:
        pid = device.launcher.pid
        for num in SERVER_SIGNALS:
            os.kill(pid, num)
        device.statistics()
        assert is_running(pid)


def test_dump_of_tracebacks(start, ask):
    """An operator asks for it with a signal, of services as well."""
    faulthandler.register(signal.SIGUSR1)
    try:
        process = start(handler=MessageHandler)
        assert ask(process, ['caught', signal.SIGUSR1]) == [200, True]
        assert signal.SIGUSR1 not in ask(process, ['ignored', None])[1]
    finally:
        faulthandler.unregister(signal.SIGUSR1)
    assert ask(start(handler=MessageHandler), ['caught', signal.SIGUSR1]) == [200, False]


def test_handlers_of_uwsgi(monkeypatch):
    """They are C code that acts on the worker from which this process was forked."""
    monkeypatch.setitem(sys.modules, 'uwsgi', object())
    faulthandler.register(signal.SIGUSR1)
    former = {num: signal.getsignal(num) for num in signal.valid_signals()}
    try:
        drop_inherited_handlers()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        for num, handler in former.items():
            if handler != signal.getsignal(num):
                signal.signal(num, handler)
        faulthandler.unregister(signal.SIGUSR1)


@pytest.mark.parametrize(
    'text', [None, 'Name: x\n', 'SigCgt: ?\n'], ids=['no file', 'no line', 'no number']
)
def test_system_without_the_signals_that_are_caught(tmp_path, monkeypatch, text):
    """gVisor has no line for them."""
    path = tmp_path / 'status'
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(signals_module, 'open', lambda _path, mode: path.open(mode), raising=False)
    assert signals_module._find_caught() == set()


def test_programs_of_handlers(start, ask):
    """They get the default action of a signal that the server handles, but for its logs."""
    with handled(signal.SIGALRM, signal.SIGUSR1):
        process = start(handler=MessageHandler)
    assert ask(process, ['run_program', 'kill -ALRM $$']) == [200, -signal.SIGALRM]
    assert ask(process, ['run_program', 'kill -USR1 $$']) == [200, 0]


def test_handlers_of_a_program_with_a_supervisor(run_program):
    program = run_program('-c', SUPERVISED)
    assert program.read() == ['handled', True, 'handled', True]


def test_exit_codes_of_children(start, ask):
    former = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = start(handler=MessageHandler)
    finally:
        signal.signal(signal.SIGCHLD, former)
    assert ask(process, ['exit_code', None]) == [200, 7]


# Signals of others


@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT], ids=lambda num: num.name)
def test_nobody_has_asked(address, num):
    """A supervised service that was terminated comes back, as after any other end."""
    process = SupervisorProcess({'echo': partial(ZMQProcess, address, MessageHandler)})
    process.drain_timeout = 5
    with started(process), ZMQClient(address, timeout=TIMEOUT) as client:
        for _ in range(Supervisor.max_starts + 1):  # which does not count as a failure of its start
            pid = client.call('pid')
            os.kill(pid, num)
            wait_until(lambda pid=pid: not is_running(pid))
            assert client.call('pid') != pid
    assert process.exitcode == 0


class TerminatedEarly(ZMQProcess):
    """Gets a SIGTERM before it is ready, as from a guard of the memory of a machine."""

    def setup(self):
        os.kill(os.getpid(), signal.SIGTERM)
        super().setup()


def test_signal_to_each_start():
    """It counts as a failure of the start: after a few of them there are pauses."""
    given_up = []
    registry = SimpleNamespace(notify=given_up.append)
    supervisor = Supervisor(
        {'early': partial(TerminatedEarly, '127.0.0.1', MessageHandler)}, registry=registry
    )
    supervisor.min_delay, supervisor.max_starts = 0.0, 2
    deadline = monotonic() + TIMEOUT
    while not given_up:
        wait_readable(supervisor._descriptors(), supervisor.step(monotonic()))
        assert monotonic() < deadline
    assert given_up[0].exit_code == 143


def test_exit_code_names_the_signal():
    assert describe_exit_code(143) == 'exit code 143 (after SIGTERM)'
    assert describe_exit_code(250) == 'exit code 250'
    assert describe_exit_code(-15) == 'exit code -15 (SIGTERM)'


# Signals that a handler class takes


@pytest.mark.parametrize('handler', [TakingMessageHandler, TakingInCMessageHandler])
@pytest.mark.parametrize('factory', [ZMQProcess, ZMQPool])
def test_stop_without_a_signal(factory, handler):
    process = factory('127.0.0.1', handler)
    with running(process), ZMQClient(process.bound_address, timeout=TIMEOUT) as client:
        assert client.call('echo', 1) == 1
        process.stop()
        assert process.exitcode == 0


def test_stop_before_the_loop():
    process = EarlyTaking()
    with started(process):
        process.join(AT_ONCE)
        assert process.exitcode == 0


def test_reload_without_a_signal():
    """The workers of a pool are replaced."""
    process = ZMQPool('127.0.0.1', TakingMessageHandler, workers=1)
    with running(process), ZMQClient(process.bound_address, timeout=TIMEOUT) as client:
        pid = client.call('pid')
        process.reload()
        wait_until(lambda: client.call('pid') != pid)


@pytest.mark.parametrize('num', [signal.SIGUSR1, signal.SIGUSR2], ids=['error', 'exit'])
def test_exception_between_two_messages(start, ask, num):
    process = start(handler=MessageHandler)
    assert ask(process, ['raise_on', num]) == [200, None]
    with ZMQClient(process.bound_address, timeout=TIMEOUT, retries=3) as client:
        for _ in range(20):
            os.kill(process.pid, num)
            assert client.call('pid', timeout=1) == process.pid
    process.stop()
    assert process.exitcode == 0


def test_exception_at_the_end(start, ask):
    process = start(handler=MessageHandler)
    assert ask(process, ['end_twice', None]) == [200, None]
    process.join(AT_ONCE)
    assert process.exitcode == 0


def test_loop_that_fails_at_once_each_time(start, ask):
    """Its process ends, so that a supervisor replaces it."""
    process = start(handler=MessageHandler)
    assert ask(process, ['break_loop', None]) == [200, None]
    process.join(TIMEOUT)
    assert process.exitcode == 1


def test_exception_when_a_socket_has_ended():
    """Its stream is closed; the others continue."""

    class Stream:
        is_closed = False

        def recover(self):
            raise zmq.ZMQError(zmq.ETERM)

        def close(self):
            self.is_closed = True

    process, streams = handlers.Process(), [Stream(), Stream()]
    process._streams.update(streams)
    process._recover(ValueError('from a signal handler'))
    assert all(stream.is_closed for stream in streams)


def test_reload_before_the_loop(monkeypatch):
    kills = []
    monkeypatch.setattr(os, 'kill', lambda *args: kills.append(args))
    handlers.Process()._on_command(Command(RELOAD))
    assert kills == [(os.getpid(), signal.SIGHUP)]


def test_unknown_command(start):
    process = start(handler=MessageHandler)
    with pytest.raises(ZMQStartError, match="Unknown command 'dance'"):
        process._call('dance', timeout=TIMEOUT)


def test_handler_in_a_fork_in_c(monkeypatch):
    """It resets the handlers, and sends the signal once more."""

    def run():
        process = handlers.Process()
        process._pid = -1  # of its parent
        kills = []
        monkeypatch.setattr(os, 'kill', lambda *args: kills.append(args))
        process.exit(signal.SIGINT)
        assert kills == [(os.getpid(), signal.SIGINT)]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL

    child = ForkProcess(target=run)
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == 0


class Interrupted:
    """A signal handler raises an error between the receipt of the first message and its handler."""

    def init_stream(self):
        super().init_stream()
        stream = self.rep_stream
        receive = stream._receive

        def interrupted():
            message = receive()
            if message is not None:
                del stream._receive
                raise ValueError('from a signal handler')
            return message

        stream._receive = interrupted


class InterruptedProcess(Interrupted, handlers.Process):
    """Is interrupted."""


class InterruptedWorker(Interrupted, PoolWorker):
    """Is interrupted at its first call."""


def test_exception_before_the_handler(start, ask):
    process = start(factory=InterruptedProcess)
    assert ask(process, ['echo', 1]) == [500, 'Internal error']
    assert ask(process, ['echo', 1]) == [200, 1]


def test_exception_before_the_handler_of_a_worker(start, ask):
    """Nobody knows what it has lost: another worker replaces it."""

    class Pool(ZMQPool):
        worker_factory = InterruptedWorker

    pool = start('127.0.0.1', handlers.MessageHandler, factory=Pool, workers=1)
    [status, text] = ask(pool, ['pid', None])
    assert status == 502
    assert 'worker' in text
    assert pool.is_alive()


class SignalledLoop(asyncio.SelectorEventLoop):
    """Another thread handles a signal when this loop has closed its socket, and not more yet."""

    def _close_self_pipe(self):
        super()._close_self_pipe()
        thread = Thread(target=self._raise_signal)
        thread.start()
        thread.join()

    def _raise_signal(self):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
        signal.raise_signal(signal.SIGHUP)


def test_signal_while_the_loop_is_closed(start, capfd):
    process = start(factory=type('Own', (handlers.Process,), {'loop_factory': SignalledLoop}))
    process.stop()
    process.join(TIMEOUT)
    assert process.exitcode == 0
    assert 'wakeup' not in capfd.readouterr().err
