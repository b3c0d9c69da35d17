# SPDX-License-Identifier: ZPL-2.1
"""pyzmq only, with a blocking loop and the JSON of the standard library."""

import json
from functools import partial
from time import perf_counter

import zmq

from contenders.base import ANY_PORT, KIND, TIMEOUT, Pair, answer, check


def open_socket(address, socket_type):
    """Open a socket for a client."""
    socket = zmq.Context.instance().socket(socket_type)
    socket.linger = 0
    socket.rcvtimeo = socket.sndtimeo = TIMEOUT * 1000
    socket.connect(address)
    return socket


def call(socket, args):
    """Send a message, receive its reply."""
    socket.send(json.dumps([KIND, args]).encode())
    return json.loads(socket.recv())


class ReqRep(Pair):
    """A REQ socket for each client."""

    def serve(self, tell):
        """Receive and send in a loop."""
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            socket.bind(ANY_PORT)
            tell(socket.last_endpoint.decode())
            while True:
                socket.send(answer(socket.recv()))

    def connect(self, address):
        """Return a call on a kept socket."""
        return partial(call, open_socket(address, zmq.REQ))


class DealerRouter(Pair):
    """A DEALER socket for each client; it sends the next message when a reply arrives."""

    def serve(self, tell):
        """Receive and send in a loop."""
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.bind(ANY_PORT)
            tell(socket.last_endpoint.decode())
            while True:
                *envelope, request = socket.recv_multipart()
                socket.send_multipart([*envelope, answer(request)])

    def open(self, address, args, flight):
        """Open a socket."""
        socket = open_socket(address, zmq.DEALER)

        def send():
            socket.send_multipart([b'', json.dumps([KIND, args]).encode()])

        def call_for(seconds):
            start = perf_counter()
            for _ in range(flight):
                send()
            count, waited_for = 0, flight
            while waited_for:
                check(json.loads(socket.recv_multipart()[-1]), args)
                count += 1
                if perf_counter() - start < seconds:
                    send()
                else:
                    waited_for -= 1
            return count, perf_counter() - start

        return call_for
