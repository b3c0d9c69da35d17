# SPDX-License-Identifier: ZPL-2.1
"""The services of a soak: programs with a supervisor, and a device in front of one of them.

Each method writes its token to the journal of its service before it does anything else. All
processes of a service append to one file, so a kill loses no line.
"""

import asyncio
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from hashlib import sha256
from time import sleep, time

from pyramid.testing import setUp

from pyams_zmq.device import QUEUE, Device
from pyams_zmq.handler import ZMQMessageHandler, zmq_method
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.supervisor import Supervisor

JOURNAL = 'SOAK_JOURNAL'
"""Environment variable with the path of the journal"""

LOG_FORMAT = '%(created)f %(process)d %(levelname)s %(message)s'

LATE = 0.2
"""Seconds after which a call of `late` gets 504"""


GRACE = 1.0
"""Seconds until the process of a method that does not end is replaced"""


class Work:
    """Methods that take ``[token, seconds, size]``, and return the token and *size* characters."""

    def __init__(self):
        self._journal = os.open(
            os.environ[JOURNAL], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        )

    def _note(self, token):
        os.write(self._journal, f'{time():.6f} {os.getpid()} {token}\n'.encode())

    def once(self, args):
        """Do something that must not be done twice."""
        token, seconds, size = args[:3]
        self._note(token)
        sleep(seconds)
        return [200, [token, 'x' * size]]

    @zmq_method(repeatable=True)
    def again(self, args):
        """Do something that may be done twice."""
        return self.once(args)

    @zmq_method(timeout=LATE)
    def late(self, args):
        """Do something that takes longer than its time-out."""
        return self.once(args)

    def binary(self, data, args):
        """Return the digest of a binary frame."""
        self._note(args[0])
        return [200, [args[0], sha256(data).hexdigest()]]

    def nap(self, seconds):
        """Keep the service busy."""
        sleep(seconds)
        return [200, None]

    @zmq_method(timeout=LATE)
    def hang(self, _args):
        """Never end."""
        threading.Event().wait()

    def read(self, size):
        """Return much."""
        return [200, 'x' * size]


class AsyncWork(Work):
    """The same for a service that handles several messages at a time."""

    async def once(self, args):
        """Do something that must not be done twice."""
        token, seconds, size = args[:3]
        self._note(token)
        await asyncio.sleep(seconds)
        return [200, [token, 'x' * size]]

    @zmq_method(repeatable=True)
    async def again(self, args):
        """Do something that may be done twice."""
        return await self.once(args)

    @zmq_method(timeout=LATE)
    async def late(self, args):
        """Do something that takes longer than its time-out."""
        return await self.once(args)

    @zmq_method(timeout=LATE)
    async def hang(self, _args):
        """Never end, although it is cancelled."""
        while True:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    async def nap(self, seconds):
        """Keep one of the tasks busy."""
        await asyncio.sleep(seconds)
        return [200, None]


class WorkHandler(ZMQMessageHandler):
    """Handler of the services with one message at a time."""

    handler = Work


class AsyncWorkHandler(ZMQMessageHandler):
    """Handler of the concurrent service."""

    handler = AsyncWork


class SingleProcess(ZMQProcess):
    """Process that handles one message at a time."""

    overdue_grace = GRACE


class ConcurrentProcess(ZMQProcess):
    """Process that handles eight messages at a time."""

    concurrency = 8
    overdue_grace = GRACE


class SmallPool(ZMQPool):
    """Pool whose queue is soon full."""

    queue_limit = 20


FACTORIES = {
    'single': partial(SingleProcess, handler=WorkHandler),
    'steady': partial(SingleProcess, handler=WorkHandler),
    'concurrent': partial(ConcurrentProcess, handler=AsyncWorkHandler),
    'pool': partial(SmallPool, handler=WorkHandler, workers=2),
}
"""Services by name; no fault ends `steady`, so that its memory shows what the others hide"""


def run_device(address, target):
    """Forward requests until SIGTERM."""
    device = Device(QUEUE)
    device.bind_in(address)
    device.connect_out(target)
    signal.signal(signal.SIGTERM, lambda *_args: device.stop())
    device.start()
    return 0


def run(name, address, target=''):
    """Run a service, or a device in front of the service at *target*; return the exit code."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    setUp(hook_zca=True)
    if name == 'device':
        return run_device(address, target)
    factory = partial(FACTORIES[name], address)
    return Supervisor({name: factory}).run()


if __name__ == '__main__':
    sys.exit(run(*sys.argv[1:]))
