# SPDX-License-Identifier: ZPL-2.1
"""A service whose replies a function makes, in a thread of the test."""

import json
from contextlib import contextmanager
from threading import Thread

import zmq


@contextmanager
def answering(make_reply):
    """Run a service; return its address.

    :param make_reply: called with the type and the arguments of a message; returns the reply
    """
    with (
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as socket,
        context.socket(zmq.PAIR) as end,
        context.socket(zmq.PAIR) as stop,
    ):
        port = socket.bind_to_random_port('tcp://127.0.0.1')
        end.bind('inproc://end')
        stop.connect('inproc://end')
        thread = Thread(target=_serve, args=(socket, end, make_reply))
        thread.start()
        try:
            yield f'127.0.0.1:{port}'
        finally:
            stop.send(b'')
            thread.join()


def _serve(socket, end, make_reply):
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(end, zmq.POLLIN)
    while end not in dict(poller.poll()):
        *envelope, data = socket.recv_multipart()
        name, args = (*json.loads(data), None)[:2]
        socket.send_multipart([*envelope, json.dumps(make_reply(name, args)).encode()])


def answer_as_2_0(name, _args):
    """Reply as a server of pyams_zmq 2.0.0 to a message that its handler does not know."""
    return [404, f'Unknown message type {name!r}']
