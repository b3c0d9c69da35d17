# SPDX-License-Identifier: ZPL-2.1
"""A slow network: a TCP relay whose connections share its bandwidth, and wait in one buffer."""

import queue
import socket
import threading
from contextlib import contextmanager, suppress

CHUNK = 16 * 1024


class _Direction:
    """One direction of the link."""

    def __init__(self, rate, delay, ended):
        self.rate = rate
        self.ended = ended
        self.bytes = 0
        self.buffer = queue.Queue(max(1, int(rate * delay / CHUNK)))
        self.thread = threading.Thread(target=self._send)
        self.thread.start()

    def _send(self):
        while (item := self.buffer.get()) is not None:
            target, data = item
            self.bytes += len(data)
            self.ended.wait(len(data) / self.rate)
            with suppress(OSError):
                target.sendall(data) if data else target.shutdown(socket.SHUT_WR)

    def receive(self, source, target):
        with suppress(OSError):
            while not self.ended.is_set():
                data = source.recv(CHUNK)
                self.buffer.put((target, data))
                if not data:
                    break


@contextmanager
def slow_link(uri, rate, delay):
    """Relay connections to an address; yield the address of the relay, and its two directions.

    :param rate: bytes per second in each direction
    :param delay: seconds that data waits in the buffer of a direction when it is full
    """

    def accept():
        while True:
            try:
                near = listener.accept()[0]
            except OSError:
                break
            far = socket.create_connection((host, int(port)))
            connections.extend([near, far])
            for direction, *ends in ((up, near, far), (down, far, near)):
                threads.append(threading.Thread(target=direction.receive, args=ends))
                threads[-1].start()

    host, _colon, port = uri.removeprefix('tcp://').rpartition(':')
    ended = threading.Event()
    up, down = _Direction(rate, delay, ended), _Direction(rate, delay, ended)
    connections = []
    listener = socket.create_server(('127.0.0.1', 0))
    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield f'tcp://127.0.0.1:{listener.getsockname()[1]}', up, down
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(30)
        for direction in (up, down):
            direction.buffer.put(None)
            direction.thread.join(30)
        for connection in connections:
            connection.close()
