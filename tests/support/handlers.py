# SPDX-License-Identifier: ZPL-2.1
"""Handlers and processes of the tests; importable, so that any start method can use them."""

import asyncio
import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import zmq
from pyramid.threadlocal import get_current_registry

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.process import ZMQProcess


class Unprintable(Exception):
    """An exception without a printable text."""

    def __str__(self):
        raise RuntimeError('not printable')

    __repr__ = __str__


class Text(str):
    """A subclass of str, as a translation string is."""

    __slots__ = ()


class Journal:
    """Data manager that records how its transaction ended."""

    def __init__(self, manager, path, fails=False):
        self.transaction_manager = manager
        self.path, self.fails = path, fails

    def record(self, text):
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(f'{text}\n')

    def abort(self, transaction):
        self.record('abort')

    def tpc_begin(self, transaction):
        """Do nothing."""

    commit = tpc_begin

    def tpc_vote(self, transaction):
        if self.fails:
            raise ValueError('the vote failed')

    def tpc_finish(self, transaction):
        self.record('commit')

    def tpc_abort(self, transaction):
        self.record('tpc_abort')

    def sortKey(self):  # noqa: N802 - the name of IDataManager
        return 'journal'


class Handler:
    """Methods that work, and one for each way to fail."""

    value = 42
    Nested = type('Nested', (), {})

    def __init__(self):
        self.hook = print

    @property
    def secret(self):
        os._exit(66)  # a peer must not be able to read it

    def _private(self, args):
        return [200, args]

    def echo(self, args):
        return [200, args]

    def close_raw(self, args):
        """Close the socket of a stream behind its back."""
        self.process.fail_stream.socket.close()
        return [200, None]

    def big(self, size):
        """Return a large reply to a small request."""
        return [200, 'x' * size]

    def who(self, args, *, peer):
        return [200, [peer.user, peer.address, args]]

    async def async_who(self, args, *, peer):
        return [200, [peer.user, peer.address, args]]

    def first(self, frame, args):
        return [200, [frame.decode(), args]]

    def many(self, *frames):
        return [200, len(frames)]

    def nothing(self, args):
        return None

    def no_args(self):
        return [200, None]

    @staticmethod
    def static(args):
        return [200, args]

    @classmethod
    def klass(cls, args):
        return [200, cls.__name__]

    def pid(self, args):
        return [200, os.getpid()]

    def sleep(self, seconds):
        time.sleep(seconds)
        return [200, seconds]

    async def async_echo(self, args):
        await asyncio.sleep(0)
        return [200, args]

    async def async_sleep(self, seconds):
        await asyncio.sleep(seconds)
        return [200, seconds]

    def raises(self, name):
        raise self._error(name)

    async def async_raises(self, name):
        await asyncio.sleep(0)
        raise self._error(name)

    @staticmethod
    def _error(name):
        return {
            'ValueError': ValueError('the secret of the handler'),
            'TypeError': TypeError('the secret of the handler'),
            'KeyError': KeyError('the secret of the handler'),
            'SystemExit': SystemExit(3),
            'KeyboardInterrupt': KeyboardInterrupt(),
            'GeneratorExit': GeneratorExit(),
            'MemoryError': MemoryError(),
            'CancelledError': asyncio.CancelledError(),
            'Unprintable': Unprintable(),
            'ZMQMessageError': ZMQMessageError(418, 'I am a teapot'),
            'bad ZMQMessageError': ZMQMessageError(418, '\ud800'),
        }[name]

    def recurse(self, args):
        return self.recurse(args)

    def deep_result(self, args):
        result = []
        for _ in range(100_000):
            result = [result]
        return result

    def returns(self, name):
        cycle = []
        cycle.append(cycle)
        return {
            'object': object(),
            'set': {1},
            'bytes': b'bytes',
            'nan': float('nan'),
            'infinity': [1, {'x': float('inf')}],
            'surrogate': '\ud800',
            'generator': (i for i in range(3)),
            'tuple key': {(1, 2): 3},
            'cycle': cycle,
            'str subclass': Text('text'),
            'big': 2**70,
            'tuple': (200, 'OK'),
        }[name]

    def registry(self, args):
        """Return True if this thread has the registry of the process."""
        return [200, get_current_registry() is self.process.registry]

    def start_method(self, args):
        return [200, multiprocessing.get_start_method()]

    def signal_elsewhere(self, seconds):
        """Make another thread handle a SIGTERM while the loop sleeps."""

        def take():
            time.sleep(seconds)  # until the loop sleeps, which no event announces
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

        threading.Thread(target=take).start()
        return [200, seconds]

    def stop(self, args):
        self.process.stop()
        return [200, 'stopping']

    def spawn(self, seconds):
        """Start a child of the child, which keeps running."""
        child = multiprocessing.Process(target=time.sleep, args=(seconds,))
        child.start()
        return [200, child.pid]

    def run_program(self, args):
        """Start a program that keeps running."""
        return [200, subprocess.Popen(['sleep', '60']).pid]

    def listeners_of_a_fork(self, args):
        """Return how many descriptors of a fork listen."""
        pid = os.fork()
        if pid:
            _pid, status = os.waitpid(pid, 0)
            return [200, os.waitstatus_to_exitcode(status)]
        count = 0
        for fd in range(200):
            with suppress(OSError), closing(socket.socket(fileno=os.dup(fd))) as sock:
                count += sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        os._exit(count)

    def rss(self, args):
        """Return the resident memory in KiB."""
        with open('/proc/self/status', encoding='ascii') as status:
            line = next(line for line in status if line.startswith('VmRSS'))
        return [200, int(line.split()[1])]

    def trimmed_rss(self, args):
        """Return the resident memory without the free memory of the allocator."""
        gc.collect()
        with suppress(AttributeError):  # glibc only
            ctypes.CDLL(None).malloc_trim(0)
        return self.rss(args)

    def fds(self, args):
        return [200, len(os.listdir('/proc/self/fd'))]

    def touch(self, path):
        Path(path).touch()
        return [200, path]

    def wait_for(self, path):
        """Create a file, and block until it is removed."""
        Path(path).touch()
        while Path(path).exists():
            time.sleep(0.001)
        return [200, path]

    async def async_wait_for(self, path):
        return await asyncio.to_thread(self.wait_for, path)

    async def task_raises(self, name):
        await asyncio.create_task(self.async_raises(name))

    async def gather_raises(self, name):
        await asyncio.gather(*[self.async_raises(name) for _ in range(3)])

    async def async_returns(self, name):
        await asyncio.sleep(0)
        return self.returns(name)

    async def async_nothing(self, args):
        return None

    async def async_recurse(self, args):
        return await self.async_recurse(args)

    async def async_deep_result(self, args):
        return self.deep_result(args)

    async def generates(self, args):
        yield [200, args]

    def raw_ports(self, args):
        return [200, self.process.raw_ports]


class MessageHandler(ZMQMessageHandler):
    """Serves Handler."""

    handler = Handler


class RecordingHandler(Handler):
    """Counts its calls, and records the arguments of its notes."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.notes = []

    def note(self, args):
        self.notes.append(args)
        return [200, None]

    def slow_note(self, args):
        time.sleep(0.3)
        return self.note(args)

    def all_notes(self, args):
        return [200, self.notes]

    def count(self, seconds):
        self.calls += 1
        time.sleep(seconds)
        return [200, self.calls]

    def slow_at_first(self, seconds):
        self.calls += 1
        if self.calls == 1:
            time.sleep(seconds)
        return [200, self.calls]

    def status(self, status):
        return [status, 'payload']

    def raw(self, value):
        return value


class RecordingMessageHandler(MessageHandler):
    """Serves RecordingHandler."""

    handler = RecordingHandler


class Process(ZMQProcess):
    """Serves Handler with a short drain time."""

    drain_timeout = 3.0

    def __init__(self, bind_addr='127.0.0.1', handler=MessageHandler, *args, **kwargs):
        super().__init__(bind_addr, handler, *args, **kwargs)


class PatientProcess(Process):
    """Serves Handler with a long drain time."""

    drain_timeout = 60.0


class FailingSetup(Process):
    """Fails at the start."""

    def setup(self):
        super().setup()
        raise LookupError('no such tool: ffmpeg')


class ExitingSetup(Process):
    """Ends before it is ready, without an error."""

    def setup(self):
        sys.exit(7)


class LoggedProcess(Process):
    """Logs only to a file."""

    max_message_size = 2_000_000

    def __init__(self, log_path, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_path = log_path

    def setup(self):
        super().setup()
        logging.getLogger().handlers[:] = [
            logging.FileHandler(self.log_path, errors='backslashreplace')
        ]


class BrokenLog(logging.Handler):
    """A log handler that fails."""

    def emit(self, record):
        raise OSError('no space left on device')


class BrokenLogProcess(Process):
    """Its log handler fails."""

    def setup(self):
        super().setup()
        logging.getLogger().handlers[:] = [BrokenLog()]


class RawProcess(LoggedProcess):
    """Serves callbacks on raw streams beside its message handler."""

    def init_stream(self):
        super().init_stream()
        self.raw_ports = {}
        for callback in (
            self.fail,
            self.async_fail,
            self.reply_then_fail,
            self.reply_then_async_fail,
            self.half_reply_then_fail,
        ):
            stream, port = self.stream(zmq.REP, '127.0.0.1', True, callback)
            self.raw_ports[callback.__name__] = port
            setattr(self, f'{callback.__name__}_stream', stream)

    def fail(self, frames):
        raise Handler._error(frames[0].decode())

    async def async_fail(self, frames):
        await asyncio.sleep(0)
        self.fail(frames)

    def reply_then_fail(self, frames):
        self.reply_then_fail_stream.send(b'"replied"')
        self.fail(frames)

    async def reply_then_async_fail(self, frames):
        self.reply_then_async_fail_stream.send(b'"replied"')
        await asyncio.sleep(0.001)  # the next message arrives during this time
        self.fail(frames)

    def half_reply_then_fail(self, frames):
        self.half_reply_then_fail_stream.send(b'half', zmq.SNDMORE)
        self.fail(frames)


class FuzzHandler:
    """Methods that a fuzzer may call: none has a side effect."""

    def echo(self, args):
        return [200, args]

    async def async_echo(self, args):
        return [200, args]

    def many(self, *frames):
        return [200, len(frames)]

    def fail(self, args):
        raise RuntimeError(args)


class FuzzMessageHandler(ZMQMessageHandler):
    """Serves FuzzHandler."""

    handler = FuzzHandler
