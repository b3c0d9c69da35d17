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


"""Messages that take their time, and tell when they are in hand."""

import asyncio
import hashlib
import signal
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import handlers
from app.program import wait_until
from pyams_zmq.socket import zmq_socket


class Handler(handlers.Handler):
    """Methods which take the file to make when they start, and seconds, but for the last one."""

    def work(self, args):
        """Block, in a call that a signal interrupts."""
        path, seconds = args
        Path(path).touch()
        time.sleep(seconds)
        return [200, seconds]

    async def async_work(self, args):
        """Wait on the loop."""
        path, seconds = args
        await asyncio.to_thread(Path(path).touch)
        await asyncio.sleep(seconds)
        return [200, seconds]

    def deaf_work(self, args):
        """Block, without any ear for signals."""
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        return self.work(args)

    def native_work(self, args):
        """Block in a native call, which no signal interrupts; far longer than any test."""
        path, seconds = args
        Path(path).touch()
        hashlib.pbkdf2_hmac('sha256', b'password', b'salt', 2**31 - 1)
        return [200, seconds]

    def signal_elsewhere(self, seconds):
        """Get a SIGTERM in another thread, when this one waits for messages."""
        threading.Timer(
            seconds, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        ).start()
        return [200, seconds]


class MessageHandler(handlers.MessageHandler):
    """Serves Handler."""

    handler = Handler


class Process(handlers.Process):
    """Serves Handler."""

    def __init__(self, bind_addr='127.0.0.1', handler=MessageHandler, *args, **kwargs):
        super().__init__(bind_addr, handler, *args, **kwargs)


@contextmanager
def in_hand(address, name, seconds=60):
    """Send a message, give the socket that waits for the reply when the handler has started."""
    with tempfile.TemporaryDirectory() as folder, zmq_socket(address) as socket:
        path = Path(folder) / 'started'
        socket.send_json([name, [str(path), seconds]])
        wait_until(path.exists, 10)
        yield socket
