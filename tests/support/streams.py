# SPDX-License-Identifier: ZPL-2.1
"""Sockets and streams for tests of `ZMQStream`, which run in a loop of their own."""

import asyncio
import functools
from contextlib import contextmanager

import zmq

from pyams_zmq.process.reply_stream import ReplyStream
from pyams_zmq.process.stream import ZMQStream

BURST = 200


def in_loop(test):
    """Run an `async def` test in a loop of its own; failing callbacks may be logged."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


class Net:
    """Sockets of a test, which are closed at its end."""

    def __init__(self):
        self.context = zmq.Context()
        self.sockets = []

    def socket(self, sock_type, socket_class=zmq.Socket, **options):
        socket = self.context.socket(sock_type, socket_class=socket_class)
        socket.linger = 0
        for name, value in options.items():
            setattr(socket, name, value)
        self.sockets.append(socket)
        return socket

    def connect(self, sock_type, address, **options):
        socket = self.socket(sock_type, **options)
        socket.connect(address)
        return socket

    @contextmanager
    def stream(self, sock_type, callback=None, address='tcp://127.0.0.1:0', **options):
        """Yield a bound stream and its address."""
        is_reply = sock_type == zmq.REP
        socket = self.socket(zmq.ROUTER if is_reply else sock_type, **options)
        socket.bind(address)
        subject = ReplyStream(socket) if is_reply else ZMQStream(socket)
        if callback is not None:
            subject.on_recv(callback)
        try:
            yield subject, socket.last_endpoint.decode()
        finally:
            subject.close()


async def receive(socket, number):
    """Receive messages while the loop runs."""
    messages = []
    while len(messages) < number:
        if socket.poll(0):
            messages.append(socket.recv_multipart())
        else:
            await asyncio.sleep(0.001)  # a poll, with the deadline of `in_loop`
    return messages
