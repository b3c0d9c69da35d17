# SPDX-License-Identifier: ZPL-2.1
"""A service that answers each type of message as a test says, also as other versions would."""

import json
import threading

import zmq

PING = {'name': 'x', 'kind': 'pool', 'version': '3.0.0', 'uptime': 3 * 86400.0, 'workers': 4}
"""Answer of a pool to `pyams_zmq.ping`, without its state"""


class AnsweringService:
    """A thread with a ROUTER socket, as services of this version have it.

    :param answers: for each type of message its reply, or several replies, of which the last stays;
        other types get a 404
    :ivar address: where it listens
    :ivar asked: the messages that it has received
    """

    def __init__(self, **answers):
        self._answers = {f'pyams_zmq.{name}': answers[name] for name in answers}
        self.asked = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 1000
        self.address = f'127.0.0.1:{self._socket.bind_to_random_port("tcp://127.0.0.1")}'
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            if self._socket.poll(10):
                *envelope, data = self._socket.recv_multipart()
                name, args, *_options = json.loads(data)
                self.asked.append([name, args])
                reply = json.dumps(self._answer(name)).encode()
                self._socket.send_multipart([*envelope, reply])

    def _answer(self, name):
        answer = self._answers.get(name, [404, f'Unknown message type {name!r}'])
        if isinstance(answer[0], list):
            return answer.pop(0) if len(answer) > 1 else answer[0]
        return answer

    def close(self):
        """Stop the thread."""
        self._stop.set()
        self._thread.join()
        self._socket.close()
        self._context.term()
