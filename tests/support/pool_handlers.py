# SPDX-License-Identifier: ZPL-2.1
"""Importable handlers and pools for the tests of pools."""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyramid.config import Configurator

from handlers import Handler, MessageHandler
from pyams_zmq.handler import ZMQMessageHandler, zmq_method
from pyams_zmq.pool import ZMQPool


class PoolHandler(Handler):
    """Has repeatable methods, and methods that exceed limits."""

    @zmq_method(repeatable=True)
    def again(self, args):
        return [200, [os.getpid(), args]]

    @zmq_method(repeatable=True)
    def wait_again(self, path):
        """Wait until the file *path* is removed, after making one with the pid in its name."""
        own = Path(f'{path}.{os.getpid()}')
        own.touch()
        while Path(path).exists():
            time.sleep(0.001)  # no event announces the removal
        return [200, os.getpid()]

    @zmq_method(repeatable=True)
    def die(self, args):
        os.kill(os.getpid(), 9)

    @zmq_method(timeout=3)
    def limited(self, path):
        return self.wait_for(path)

    @zmq_method(timeout=0.2)
    def overdue(self, path):
        return self.wait_for(path)

    @zmq_method(timeout=0.2)
    def overdue_executor(self, path):
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(self.wait_for, path).result()

    @zmq_method(timeout=0.2)
    async def async_overdue(self, path):
        return await self.async_sleep(60)

    @zmq_method(timeout=0.2)
    async def overdue_thread(self, path):
        return await self.async_wait_for(path)

    @zmq_method(timeout=0.2)
    async def async_blocks(self, args):
        threading.Event().wait()  # the loop cannot reply

    def compute(self, rounds):
        """Compute in Python."""
        digest = b''
        for _ in range(rounds):
            digest = hashlib.sha256(digest).digest()
        return [200, os.getpid()]

    def hold(self, size):
        """Compute in one native call that holds the GIL."""
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
    """Raises an error in its constructor."""

    def __init__(self):
        raise LookupError('no such tool: ffmpeg')


class FailingMessageHandler(ZMQMessageHandler):
    """Serves FailingHandler."""

    handler = FailingHandler


class Pool(ZMQPool):
    """Serves PoolHandler; has a short drain timeout."""

    drain_timeout = 3.0

    def __init__(self, bind_addr='127.0.0.1', handler=PoolMessageHandler, *args, **kwargs):
        kwargs.setdefault('workers', 2)
        super().__init__(bind_addr, handler, *args, **kwargs)


def make_app(global_config, **settings):
    """Return an application without routes and services."""
    return Configurator(settings=settings).make_wsgi_app()
