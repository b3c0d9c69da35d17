# SPDX-License-Identifier: ZPL-2.1
"""The port at which the workers of a pool reach their broker on the same machine."""

import os
import signal
import socket as network
import threading
from collections import deque

import psutil
import pytest
import zmq

from checks import wait_until
from pool_checks import TIMEOUT, client_of, wait_for_workers, workers_of
from pool_handlers import Pool
from pyams_zmq.auth import Access
from pyams_zmq.pool.local_port import LocalSecret
from pyams_zmq.process import guard as guard_module
from pyams_zmq.process.connections import Listener
from pyams_zmq.process.guard import ConnectionGuard
from pyams_zmq.process.server_socket import SocketLimits
from pyams_zmq.wire.monitor import close_monitor, open_monitor, parse_event


def listening_ports(pid):
    return {
        each.laddr.port
        for each in psutil.Process(pid).net_connections('tcp')
        if each.status == psutil.CONN_LISTEN
    }


def test_address(pool):
    """It is not ipc, whose listener aborts the process when no descriptor is free."""
    process = pool()
    front, local = process.stats()['addresses']
    ports = {int(uri.removeprefix('tcp://127.0.0.1:')) for uri in (front, local)}
    assert listening_ports(process.stats()['pid']) == ports
    assert [listening_ports(pid) for pid in workers_of(process)] == [set(), set()]


def test_new_broker(pool):
    """It has the port of the former one, which the workers try to reach meanwhile."""
    process = pool()
    before = process.stats()
    workers = workers_of(process)
    os.kill(before['pid'], signal.SIGKILL)
    assert wait_for_workers(process) == workers
    after = process.stats()
    assert after['pid'] != before['pid']
    assert after['addresses'] == before['addresses']


@pytest.mark.parametrize('user', [None, 'worker:guess', 'alice:a'])
def test_stranger(pool, user):
    """Another program of this machine is refused, also as a client of the pool."""
    process = pool(auth='alice:a')
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        if user is not None:
            name, _colon, password = user.partition(':')
            socket.plain_username, socket.plain_password = name.encode(), password.encode()
        monitor = open_monitor(
            socket,
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
        )
        socket.connect(process.bound_addresses[1])
        assert monitor.poll(TIMEOUT * 1000)
        event, _value = parse_event(monitor.recv_multipart())
        close_monitor(socket, monitor)
    assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED


def test_secret():
    """It is never shown, and another one in each pool."""
    secret = LocalSecret()
    _user, _colon, password = secret.auth.partition(':')
    assert len(bytes.fromhex(password)) == 32
    assert password not in repr(secret)
    assert secret.auth != LocalSecret().auth


def test_max_connections(pool, capfd):
    """It limits those of clients, not those of workers."""
    process = pool(factory=type('Narrow', (Pool,), {'max_connections': 1}), workers=3)
    with client_of(process) as client:
        assert {client.call('pid') for _ in range(30)} == workers_of(process)
    process.stop()
    assert 'max_connections' not in capfd.readouterr().err


def test_clients_take_all_descriptors(pool, monkeypatch):
    """Those of the workers are set aside: a new one can connect."""
    monkeypatch.setattr(guard_module, '_usable_descriptors', lambda: 100)
    process = pool()
    broker = process.stats()['pid']
    host, port = process.bound_address.removeprefix('tcp://').split(':')
    opened = deque()
    stop = threading.Event()

    def attack():
        while not stop.is_set():
            opened.append(network.create_connection((host, int(port))))
            if len(opened) > 200:
                opened.popleft().close()

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        wait_until(lambda: len(opened) == 200)
        killed = min(workers_of(process))
        os.kill(killed, signal.SIGKILL)
        wait_for_workers(process, {killed})
    finally:
        stop.set()
        thread.join()
        for connection in opened:
            connection.close()
    assert process.stats()['pid'] == broker


@pytest.mark.parametrize(('limit', 'left'), [(100, 76), (30, 15)])
def test_descriptors_that_are_set_aside(monkeypatch, limit, left):
    """Not more than half of them."""
    monkeypatch.setattr(guard_module, '_usable_descriptors', lambda: limit)
    guard = ConnectionGuard('pool', SocketLimits())
    clients, workers = (Listener(f'tcp://127.0.0.1:{port}', None, Access()) for port in (1, 2))
    workers.max_connections = 24
    guard.listeners[:] = [clients, workers]
    assert guard._usable_descriptors() == left
    before = guard._count_excess()
    workers.connections = dict.fromkeys(range(30))
    assert guard._count_excess() == before - 24
    guard.listeners.clear()
    guard.close()
