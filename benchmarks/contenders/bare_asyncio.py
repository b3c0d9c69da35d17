# SPDX-License-Identifier: ZPL-2.1
"""The sockets of zmq.asyncio, with the JSON of the standard library."""

import asyncio
import json
from time import perf_counter

import zmq
import zmq.asyncio

from contenders.base import ANY_PORT, KIND, TIMEOUT, AsyncPair, answer, check


def open_socket(address, socket_type):
    """Open a socket for a client."""
    socket = zmq.asyncio.Context.instance().socket(socket_type)
    socket.linger = 0
    socket.connect(address)
    return socket


class ReqRep(AsyncPair):
    """A REQ socket for each client."""

    async def serve_async(self, tell):
        """Receive and send in a loop."""
        with zmq.asyncio.Context() as context, context.socket(zmq.REP) as socket:
            socket.bind(ANY_PORT)
            tell(socket.last_endpoint.decode())
            while True:
                await socket.send(answer(await socket.recv()))

    async def connect_async(self, address):
        """Return a call on a kept socket."""
        socket = open_socket(address, zmq.REQ)

        async def call(args):
            await socket.send(json.dumps([KIND, args]).encode())
            return json.loads(await socket.recv())

        return call


class DealerRouter(AsyncPair):
    """A DEALER socket for each client; it sends the next message when a reply arrives."""

    async def serve_async(self, tell):
        """Receive and send in a loop."""
        with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.bind(ANY_PORT)
            tell(socket.last_endpoint.decode())
            while True:
                *envelope, request = await socket.recv_multipart()
                await socket.send_multipart([*envelope, answer(request)])

    def open(self, address, args, flight):
        """Open a socket in an event loop."""
        loop = asyncio.new_event_loop()
        socket = loop.run_until_complete(self.connect_async(address))

        async def send():
            await socket.send_multipart([b'', json.dumps([KIND, args]).encode()])

        async def call_for(seconds):
            start = perf_counter()
            for _ in range(flight):
                await send()
            count, waited_for = 0, flight
            while waited_for:
                frames = await socket.recv_multipart()
                check(json.loads(frames[-1]), args)
                count += 1
                if perf_counter() - start < seconds:
                    await send()
                else:
                    waited_for -= 1
            return count, perf_counter() - start

        return lambda seconds: loop.run_until_complete(
            asyncio.wait_for(call_for(seconds), TIMEOUT + seconds)
        )

    async def connect_async(self, address):
        """Return a socket; zmq.asyncio needs a running loop for it."""
        return open_socket(address, zmq.DEALER)
