# SPDX-License-Identifier: ZPL-2.1
"""pyams_zmq 2.0.0, in its own environment."""

import multiprocessing

from contenders.base import KIND, TIMEOUT, Echo, Pair
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.process import ZMQProcess
from pyams_zmq.socket import zmq_response, zmq_socket


class EchoMessageHandler(ZMQMessageHandler):
    """Message handler of the server."""

    handler = Echo


class Process(ZMQProcess):
    """Sends its port to the parent; in 2.0.0 only the child knows it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reader, self._writer = multiprocessing.Pipe(duplex=False)

    def stream(self, *args, **kwargs):
        """Open a stream and send its port."""
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
        """Kill the process; in 2.0.0 `stop` works only in the child."""
        if self.process is not None:
            self.process.kill()

    def connect(self, address):
        """Return a call on a kept socket."""
        socket = zmq_socket(address)

        def call(args):
            socket.send_json([KIND, args])
            return zmq_response(socket, timeout=TIMEOUT)

        return call


class SocketPerMessage(KeptSocket):
    """A socket for each message, as its documentation shows it."""

    def connect(self, address):
        """Return a call that opens a socket for each message."""

        def call(args):
            socket = zmq_socket(address)
            socket.send_json([KIND, args])
            return zmq_response(socket, timeout=TIMEOUT)

        return call
