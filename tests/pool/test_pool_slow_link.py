# SPDX-License-Identifier: ZPL-2.1
"""A worker of another machine behind a slow link that makes progress."""

import os
import socket as network
import threading
from contextlib import ExitStack
from functools import partial
from math import inf

import pytest

from checks import wait_until
from peers import Forwarder
from pool_checks import (
    TIMEOUT,
    client_of,
    in_threads,
    wait_for_file,
    wait_for_workers,
    workers_of,
)
from pool_handlers import PoolMessageHandler
from pyams_zmq.auth import Access
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.process.connections import Connection, Listener
from pyams_zmq.testing import running
from slow_link import slow_link

MIB = 1024 * 1024


@pytest.mark.parametrize('name', ['size', 'big'])
def test_large_message(pool, tmp_path, name):
    """Heartbeats wait behind it for 4 seconds; it is sent once, and its worker stays."""
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    size = 12 * MIB
    argument, result = ('x' * size, size) if name == 'size' else (size, 'x' * size)
    hold = tmp_path / 'hold'
    with slow_link(process.bound_worker_address, 2 * MIB, 4.0) as (address, up, down):
        worker = PoolWorker(address, PoolMessageHandler, 'worker:secret')
        with running(worker), client_of(process) as client:
            pids = wait_for_workers(process)
            # The local worker, which has been free for longer, holds the first call.
            with in_threads(partial(client.call, 'wait_for'), str(hold)):
                wait_for_file(hold)
                with in_threads(partial(client.call, name), argument) as replies:
                    pass
                hold.unlink()
            assert replies == [result]
            assert workers_of(process) == pids
            calls = {each['pid']: each['calls'] for each in process.stats()['workers']}
            assert calls[worker.pid] == 1
            assert size < max(up.bytes, down.bytes) < 1.5 * size
            assert process.stats()['lost'] == process.stats()['repeated'] == 0


class SecondLater(Forwarder):
    """Forwards nothing through the second connection until `second` is set."""

    def __init__(self):
        super().__init__()
        self.second = threading.Event()

    def _pump(self, source, sink):
        if source in self._sockets[2:]:
            self.second.wait(TIMEOUT)
        super()._pump(source, sink)


def test_worker_whose_heartbeats_have_no_connection_yet(pool):
    """It gets no call: a large one might delay the connection until the worker counts as dead."""
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    host, _, port = process.bound_worker_address.removeprefix('tcp://').partition(':')
    with SecondLater() as forwarder:
        forwarder.target = host, int(port)
        worker = PoolWorker(forwarder.address, PoolMessageHandler, 'worker:secret')
        worker.start()
        try:
            wait_until(lambda: forwarder.forwarded == 2)
            threading.Event().wait(0.3)  # for a READY, which must not come
            assert worker.pid not in workers_of(process)
            forwarder.second.set()
            worker.wait_ready()
            assert worker.pid in workers_of(process)
        finally:
            forwarder.second.set()
            worker.stop()


def test_silence():
    """It is that of the connection, not of another file that has its descriptor now."""
    with ExitStack() as stack:
        server = stack.enter_context(network.create_server(('127.0.0.1', 0)))
        address = server.getsockname()
        peer = stack.enter_context(network.create_connection(address))
        accepted = stack.enter_context(server.accept()[0])
        pair = [stack.enter_context(each) for each in network.socketpair()]
        file = stack.enter_context(open(os.devnull))
        listener = Listener(f'tcp://127.0.0.1:{address[1]}', None, Access())
        listener.names.add('')  # the name of a socket pair
        fds = [each.fileno() for each in (accepted, peer, pair[0], file)]
        known = listener.connections = {fd: Connection(0.0) for fd in fds}
        peer.sendall(b'1')
        accepted.recv(1)
        silences = [listener.measure_silence(fd, known[fd]) for fd in fds]
        assert 0 <= silences[0] < TIMEOUT
        assert silences[1:] == [inf] * 3
        assert listener.measure_silence(fds[0], Connection(0.0)) == inf
