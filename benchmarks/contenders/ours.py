# SPDX-License-Identifier: ZPL-2.1
"""This package: its servers with a bare client, its clients with a serial server."""

from functools import partial

import zmq
from pyramid.config import Configurator
from pyramid.request import Request, apply_request_extensions

from contenders.bare import call, open_socket
from contenders.base import KIND, TIMEOUT, AsyncPair, Echo, Pair
from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.socket import zmq_response, zmq_socket

LOCAL = '127.0.0.1'


class EchoMessageHandler(ZMQMessageHandler):
    """Message handler of the servers."""

    handler = Echo


class AsyncEcho:
    """Handler with a coroutine."""

    async def echo(self, args):
        """Return the arguments."""
        return [200, args]


class AsyncEchoMessageHandler(ZMQMessageHandler):
    """Message handler of the concurrent server."""

    handler = AsyncEcho


class ConcurrentProcess(ZMQProcess):
    """Handles up to eight messages at a time."""

    concurrency = 8


class Served(Pair):
    """A serial ZMQProcess."""

    process = None

    def make(self):
        """Return the process."""
        return ZMQProcess(LOCAL, EchoMessageHandler)

    def serve(self, tell):
        """Start the process."""
        self.process = self.make()
        self.process.start()
        tell(self.process.wait_ready())
        self.process.join()

    def end(self):
        """Stop the process."""
        if self.process is not None:
            self.process.stop()


class BareClient(Served):
    """REQ socket of pyzmq, JSON of the standard library."""

    def connect(self, address):
        """Return a call on a kept socket."""
        return partial(call, open_socket(address, zmq.REQ))


class OnUvloop(BareClient):
    """A process that runs on uvloop."""

    def make(self):
        """Return the process."""
        import uvloop  # noqa: PLC0415 - not every system has it

        process = super().make()
        process.loop_factory = uvloop.new_event_loop
        return process


class Concurrent(BareClient):
    """A process with `concurrency`, and a coroutine as handler."""

    def make(self):
        """Return the process."""
        return ConcurrentProcess(LOCAL, AsyncEchoMessageHandler)


class Pool(BareClient):
    """Several processes behind an address."""

    def make(self):
        """Return the pool."""
        return ZMQPool(LOCAL, EchoMessageHandler, workers=4)


class KeptSocket(Served):
    """One socket for all messages."""

    def connect(self, address):
        """Return a call on a kept socket."""
        socket = zmq_socket(address)

        def call(args):
            socket.send_json([KIND, args])
            return zmq_response(socket, timeout=TIMEOUT)

        return call


class SocketPerMessage(Served):
    """A socket for each message."""

    def connect(self, address):
        """Return a call that opens a socket for each message."""

        def call(args):
            socket = zmq_socket(address)
            socket.send_json([KIND, args])
            return zmq_response(socket, timeout=TIMEOUT)

        return call


class Client(Served):
    """The client that keeps its connections."""

    def connect(self, address):
        """Return a call of a client."""
        client = ZMQClient(address, timeout=TIMEOUT)
        return lambda args: client.request([KIND, args])


class ClientOnUvloop(Client, OnUvloop):
    """The same with a process on uvloop."""


class RequestClient(Served):
    """The client of a Pyramid request, looked up for each message."""

    def connect(self, address):
        """Return a call on the client of a Pyramid request."""
        config = Configurator()
        config.include('pyams_zmq')
        config.add_zmq_process('echo', address=address, start='never', timeout=TIMEOUT)
        config.commit()
        request = Request.blank('/')
        request.registry = config.registry
        apply_request_extensions(request)
        return lambda args: request.zmq('echo').request([KIND, args])


class AsyncClient(Served, AsyncPair):
    """The client of asyncio."""

    async def connect_async(self, address):
        """Return a call of a client."""
        client = AsyncZMQClient(address, timeout=TIMEOUT)
        return lambda args: client.request([KIND, args])
