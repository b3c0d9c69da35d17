# SPDX-License-Identifier: ZPL-2.1
"""A service that does to a REP socket what one of pyams_zmq 2.0.0 does."""

import json
import threading

import zmq
from zmq.auth.thread import ThreadAuthenticator

METHOD = 'convert'
"""Its only method, which returns its argument"""


class OldService:
    """A thread with a REP socket, which a message of an unknown type blocks permanently.

    :param address: URI that it binds, by default a free port
    :param users: passwords by user, for PLAIN
    :ivar address: where it listens
    :ivar received: the types of all messages that came in
    """

    def __init__(self, address='tcp://127.0.0.1:*', *, users=None):
        self.received = []
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_plain(passwords=users or {})
        self._socket = self._context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.plain_server = users is not None
        self._socket.bind(address)
        self.address = self._socket.last_endpoint.rstrip(b'\0').decode()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        is_blocked = False
        while not self._stop.is_set():
            if self._socket.poll(10) and not is_blocked:
                name, args = json.loads(self._socket.recv())[:2]
                self.received.append(name)
                is_blocked = name != METHOD  # the handler raises, and nothing is sent
                if not is_blocked:
                    self._socket.send_json([200, args])

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._stop.set()
        self._thread.join()
        self._socket.close()
        self._authenticator.stop()
        self._context.term()
