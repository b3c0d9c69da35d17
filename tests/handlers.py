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

"""Handlers that the tests serve; importable, so that any start method could use them."""

import asyncio
import multiprocessing
import os
import sys
import threading
import time

from pyramid.threadlocal import get_current_registry

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.process import ZMQProcess


class Unprintable(Exception):
    """An exception that cannot be shown."""

    def __str__(self):
        raise RuntimeError('no text')

    __repr__ = __str__


class Text(str):
    """A text that is no plain str, as a translation string is."""

    __slots__ = ()


class Handler:
    """Methods for the good cases, and one for each way to misbehave."""

    value = 42
    Nested = type('Nested', (), {})

    def __init__(self):
        self.hook = print

    @property
    def secret(self):
        os._exit(66)  # a peer that reads it is noticed

    def _private(self, args):
        return [200, args]

    def echo(self, args):
        return [200, args]

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
            'set': {1, 2},
            'bytes': b'bytes',
            'nan': float('nan'),
            'infinity': [1, {'x': float('inf')}],
            'surrogate': '\ud800',
            'generator': (i for i in range(3)),
            'tuple key': {(1, 2): 3},
            'cycle': cycle,
            'text subclass': Text('text'),
            'big': 2 ** 70,
            'tuple': (200, 'OK'),
        }[name]

    def registry(self, args):
        """Say whose registry this thread and a thread of its own see."""
        seen = []
        thread = threading.Thread(target=lambda: seen.append(get_current_registry()))
        thread.start()
        thread.join()
        registry = self.process.registry
        return [200, [get_current_registry() is registry, seen[0] is registry]]

    def start_method(self, args):
        return [200, multiprocessing.get_start_method()]

    def stop(self, args):
        self.process.stop()
        return [200, 'stopping']

    def spawn(self, seconds):
        """Start a child of the child, which lives on."""
        child = multiprocessing.Process(target=time.sleep, args=(seconds,))
        child.start()
        return [200, child.pid]

    def rss(self, args):
        """Resident memory in KiB."""
        with open('/proc/self/status', encoding='ascii') as status:
            line = next(line for line in status if line.startswith('VmRSS'))
        return [200, int(line.split()[1])]

    def fds(self, args):
        return [200, len(os.listdir('/proc/self/fd'))]


class MessageHandler(ZMQMessageHandler):
    """Serves Handler."""

    handler = Handler


class Process(ZMQProcess):
    """Serves Handler, and does not wait long."""

    drain_timeout = 3.0

    def __init__(self, bind_addr='127.0.0.1', handler=MessageHandler, *args, **kwargs):
        super().__init__(bind_addr, handler, *args, **kwargs)


class FailingSetup(Process):
    """Cannot start."""

    def setup(self):
        super().setup()
        raise LookupError('no such tool: ffmpeg')


class ExitingSetup(Process):
    """Ends before it is ready, without a word."""

    def setup(self):
        sys.exit(7)
