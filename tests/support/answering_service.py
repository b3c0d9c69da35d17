# SPDX-License-Identifier: ZPL-2.1
"""A service in a thread whose replies a test chooses, as those of other versions have them."""

import json
import threading

import zmq

UNKNOWN = [404, 'Unknown message type']
"""What a server of version 2.0.0 replies to the questions of the monitor"""


class AnsweringService(threading.Thread):
    """A REP socket with a reply for each type of message.

    :param address: URI that it binds
    :param replies: replies by type of message; other messages get `UNKNOWN`
    :ivar questions: types of the messages that came in, in their order
    """

    def __init__(self, address, replies):
        super().__init__()
        self.address = address
        self.replies = replies
        self.questions = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.bind(address)

    def run(self):
        """Reply until a message is `null`."""
        while (message := self._socket.recv_json()) is not None:
            self.questions.append(message[0])
            reply = self.replies.get(message[0], UNKNOWN)
            self._socket.send(json.dumps(reply).encode())
        self._socket.send(b'')

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        with self._context.socket(zmq.REQ) as socket:
            socket.connect(self.address)
            socket.send_json(None)
            socket.recv()
        self.join()
        self._socket.close()
        self._context.term()
