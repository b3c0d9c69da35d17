# SPDX-License-Identifier: ZPL-2.1
"""pyams_zmq 2.0.0, in an environment of its own."""

import multiprocessing

from contenders.base import KIND, TIMEOUT, Echo, Pair
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.process import ZMQProcess
from pyams_zmq.socket import zmq_response, zmq_socket


class EchoMessageHandler(ZMQMessageHandler):
    """Message handler of the server."""

    handler = Echo


class Process(ZMQProcess):
    """Tells its port, which formerly nobody but the child knew."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reader, self._writer = multiprocessing.Pipe(duplex=False)

    def stream(self, *args, **kwargs):
        """Make a stream."""
        stream, port = super().stream(*args, **kwargs)
        self._writer.send(port)
        return stream, port


class KeptSocket(Pair):
    """One socket for all messages."""

    process = None

    def serve(self, tell):
        """Serve from a process."""
        self.process = Process('127.0.0.1', EchoMessageHandler)
        self.process.start()
        if not self.process.reader.poll(TIMEOUT):
            raise TimeoutError('pyams_zmq 2.0.0 does not bind')
        tell(f'127.0.0.1:{self.process.reader.recv()}')
        self.process.join()

    def end(self):
        """End the process; its `stop` works in the child only."""
        if self.process is not None:
            self.process.kill()

    def connect(self, address):
        """Keep a socket."""
        socket = zmq_socket(address)

        def call(args):
            socket.send_json([KIND, args])
            return zmq_response(socket, timeout=TIMEOUT)

        return call


class SocketPerMessage(KeptSocket):
    """A socket for each message, as its documentation shows it."""

    def connect(self, address):
        """Open it when there is a message."""

        def call(args):
            socket = zmq_socket(address)
            socket.send_json([KIND, args])
            return zmq_response(socket, timeout=TIMEOUT)

        return call
