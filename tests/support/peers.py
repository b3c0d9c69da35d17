# SPDX-License-Identifier: ZPL-2.1
"""Servers of all kinds for tests of client sockets, and the calls that tests time."""

import socket as sockets
import threading
import time
from contextlib import contextmanager

import zmq

from pyams_zmq.auth import ZAP_DOMAIN, Authenticator
from pyams_zmq.socket import zmq_response, zmq_socket

ECHO = ['echo', {'path': '/this/is/my/path', 'format': 'JPEG'}]
REPLY = [200, ECHO[1]]


@contextmanager
def raw_server(serve):
    """Serve each connection to a TCP port with a function; yield the address."""

    def run():
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                break
            connections.append(connection)
            serve(connection)

    connections = []
    listener = sockets.create_server(('127.0.0.1', 0))
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f'127.0.0.1:{listener.getsockname()[1]}'
    finally:
        listener.shutdown(sockets.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for connection in connections:
            connection.close()


@contextmanager
def replying(*replies, socket_type=zmq.REP, policy=None, **options):
    """Answer each message with the next reply, bytes or a function; yield the address."""

    def run():
        for reply in replies:
            while not socket.poll(20):  # a client that fails may send nothing
                if stop.is_set():
                    return
            socket.recv_multipart()
            socket.send(reply() if callable(reply) else reply)
        stop.wait()

    with zmq.Context() as context, context.socket(socket_type) as socket:
        socket.linger = 1000
        for name, value in options.items():
            setattr(socket, name, value)
        authenticator = None
        if policy is not None:
            socket.zap_domain = ZAP_DOMAIN
            authenticator = Authenticator(context, policy)
            authenticator.start()
        port = socket.bind_to_random_port('tcp://127.0.0.1')
        stop = threading.Event()
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f'127.0.0.1:{port}'
        finally:
            stop.set()
            thread.join(5)
            if authenticator is not None:
                authenticator.stop()


def timed(function, *args, **kwargs):
    """Result of a call, and the seconds that it took."""
    start = time.monotonic()
    result = function(*args, **kwargs)
    return result, time.monotonic() - start


def ask_raw(address, timeout=10, **options):
    """Send one message on a socket that is dropped, as users do; return the reply."""
    socket = zmq_socket(address, **options)
    socket.send_json(ECHO)
    return zmq_response(socket, timeout=timeout)
