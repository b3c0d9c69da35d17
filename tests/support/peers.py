# SPDX-License-Identifier: ZPL-2.1
"""Servers of all kinds for tests of client sockets, and the calls that tests time."""

import socket as sockets
import threading
import time
from contextlib import contextmanager, suppress

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


class Forwarder:
    """A TCP port that is forwarded, as by docker-proxy, `ssh -L` or a load balancer.

    :param hang_up: called with each connection that is accepted before the service is there
    :param closes: false to leave such a connection open, without a word
    :param rate: bytes per second and direction; None is as fast as possible
    :ivar address: the address of the port
    :ivar target: host and port of the service, set when it is there
    :ivar hangups: number of connections that were ended because there was no service
    :ivar forwarded: number of connections to the service
    """

    def __init__(self, hang_up=lambda connection: None, closes=True, rate=None):
        self._closes = closes
        self.target = None
        self.hangups = self.forwarded = 0
        self._hang_up = hang_up
        self._rate = rate
        self._sockets = []
        self._listener = sockets.create_server(('127.0.0.1', 0))
        self.address = f'127.0.0.1:{self._listener.getsockname()[1]}'
        self._threads = [threading.Thread(target=self._run)]

    def __enter__(self):
        self._threads[0].start()
        return self

    def __exit__(self, *exc_info):
        self._listener.shutdown(sockets.SHUT_RDWR)
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()
        for each in [self._listener, *self._sockets]:
            each.close()

    def cut(self):
        """End all connections."""
        for each in self._sockets:
            with suppress(OSError):  # it has ended already
                each.shutdown(sockets.SHUT_RDWR)

    def _run(self):
        while True:
            try:
                here = self._listener.accept()[0]
            except OSError:
                return
            if self.target is None:
                self._sockets.append(here)
                with suppress(OSError):  # the client has ended it already
                    self._hang_up(here)
                    if self._closes:
                        # A process that was forked meanwhile has the descriptor, too.
                        here.shutdown(sockets.SHUT_RDWR)
                        here.close()
                self.hangups += 1
                continue
            there = sockets.create_connection(self.target)
            self._sockets += [here, there]
            self.forwarded += 1
            for pair in ((here, there), (there, here)):
                if self._rate is not None:  # small buffers, as those of a slow link
                    pair[0].setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 65536)
                self._threads.append(threading.Thread(target=self._pump, args=pair))
                self._threads[-1].start()

    def _pump(self, source, sink):
        with suppress(OSError):  # one of them was reset
            while data := source.recv(16384):
                sink.sendall(data)
                if self._rate is not None:
                    time.sleep(len(data) / self._rate)  # the link takes so long
        for each in (source, sink):
            with suppress(OSError):  # it has ended already
                each.shutdown(sockets.SHUT_RDWR)


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
