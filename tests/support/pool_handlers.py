# SPDX-License-Identifier: ZPL-2.1
"""Handlers and programs of the tests of pools; importable, as those of `handlers`."""

import hashlib
import os
import time
from pathlib import Path

from pyramid.config import Configurator

from handlers import Handler, MessageHandler
from pyams_zmq.handler import ZMQMessageHandler, zmq_method
from pyams_zmq.pool import ZMQPool


class PoolHandler(Handler):
    """Methods that may be repeated, and others."""

    @zmq_method(repeatable=True)
    def again(self, args):
        return [200, [os.getpid(), args]]

    @zmq_method(repeatable=True)
    def wait_again(self, path):
        """Wait until a file is removed, as `wait_for` does; its name says who waits."""
        own = Path(f'{path}.{os.getpid()}')
        own.touch()
        while Path(path).exists():
            time.sleep(0.001)  # until the test removes it, which no event announces
        return [200, os.getpid()]

    @zmq_method(repeatable=True)
    def die(self, args):
        os.kill(os.getpid(), 9)

    @zmq_method(timeout=0.2)
    def late(self, path):
        return self.wait_for(path)

    @zmq_method(timeout=0.2)
    async def async_late(self, path):
        return await self.async_sleep(60)

    def compute(self, rounds):
        """Keep a processor busy, and the interpreter."""
        digest = b''
        for _ in range(rounds):
            digest = hashlib.sha256(digest).digest()
        return [200, os.getpid()]

    def hold(self, size):
        """Keep all threads of the worker from running, in one native call."""
        start = time.monotonic()
        sum(range(size))
        return [200, time.monotonic() - start]

    def leak(self, size):
        self.leaked = b'x' * size
        return [200, os.getpid()]

    def size(self, text):
        return [200, len(text)]

    def big(self, size):
        return [200, 'x' * size]


class PoolMessageHandler(MessageHandler):
    """Serves PoolHandler."""

    handler = PoolHandler


class FailingHandler:
    """Cannot be made."""

    def __init__(self):
        raise LookupError('no such tool: ffmpeg')


class FailingMessageHandler(ZMQMessageHandler):
    """Serves FailingHandler."""

    handler = FailingHandler


class Pool(ZMQPool):
    """Serves PoolHandler, and does not wait long."""

    drain_timeout = 3.0

    def __init__(self, bind_addr='127.0.0.1', handler=PoolMessageHandler, *args, **kwargs):
        kwargs.setdefault('workers', 2)
        super().__init__(bind_addr, handler, *args, **kwargs)


def make_app(global_config, **settings):
    """Make an application that has nothing but its registry."""
    return Configurator(settings=settings).make_wsgi_app()
